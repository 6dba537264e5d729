"""Time and memory are booked on the stage that took them."""

import mmap
import os

import pytest

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
