"""Time and memory are booked on the stage that took them."""

import torch

from vllm_requant.offline.stages import Stages


def test_memory_is_booked_on_the_stage_that_held_it() -> None:
    stages = Stages()
    with stages.stage("large"):
        held = torch.ones(30_000_000)  # 114 MiB
        del held
        with stages.stage("inside"):
            pass
    with stages.stage("small"):
        pass
    peak = stages.report()["peak_mib"]
    assert peak["large"] > peak["small"] + 80
    assert peak["large"] > peak["inside"] + 80
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
