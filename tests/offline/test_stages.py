"""Time and memory are booked on the stage that took them."""

import json
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny
from vllm_requant.offline.stages import Stages


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the kernel's mark may not be set back")
def test_memory_is_booked_on_the_stage_that_held_it() -> None:
    stages = Stages()
    with stages.stage("large"):
        # straight from the system: an allocator that has lived for long may have as much at hand
        with mmap.mmap(-1, 120 * 2**20) as held:
            for page in range(0, len(held), mmap.PAGESIZE):
                held[page] = 1
        with stages.stage("inside"):
            pass
    with stages.stage("small"):
        pass
    peak = stages.report()["peak_mib"]
    assert peak["large"] > peak["small"] + 100
    assert peak["large"] > peak["inside"] + 100
    assert stages.report()["seconds"].keys() == {"large", "inside", "small"}


def test_a_stage_that_fails_is_booked_all_the_same() -> None:
    stages = Stages()
    try:
        with stages.stage("broken"):
            raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    with stages.stage("broken"):
        pass
    assert list(stages.report()["seconds"]) == ["broken"]


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the kernel's mark may not be set back")
def test_an_integral_holds_both_models_and_the_accumulators(tmp_path: Path) -> None:
    """w and w̃ in 16 bits; nothing else of a model's size is ever made, the interpolated weights in particular.

    What is freed goes back to the system at once here; by default glibc keeps about a tenth of the model.
    """
    small = tiny.save(tmp_path / "small")
    large = tiny.save(
        tmp_path / "large", hidden_size=640, intermediate_size=2560, num_hidden_layers=12, num_key_value_heads=4
    )
    program = [sys.executable, "-m", "tests.offline.integral_memory", str(small), str(large)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    ran = subprocess.run(program, check=True, capture_output=True, text=True, env=environment)
    result = json.loads(ran.stdout)
    one_layer = 16 * 2**20  # its weight in between, its gradient, its activations
    assert result["grown"] < 2.2 * result["model"] + result["accumulators"] + one_layer
