"""A conversion that is killed anywhere goes on, and the checkpoint is the same byte by byte."""

import json
import random
import shutil
from collections import Counter
from collections.abc import Mapping
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from vllm_requant.offline.cache import TensorCache
from vllm_requant.offline.mapped import load_mapped
from vllm_requant.offline.models import load_causal_lm
from vllm_requant.offline.observer import RunObserver, observing
from vllm_requant.offline.recipe import Recipe
from vllm_requant.offline.save import TIMINGS_NAME, convert_and_save
from vllm_requant.offline.work import WorkFolder

# a fresh process that need not import torch and transformers again
PROCESSES = get_context("forkserver")
PROCESSES.set_forkserver_preload([__name__])

COMMON = {"num_samples": 4, "seq_len": 24, "nodes": 2, "tune_epochs": 1, "lm_head_bits": 8, "path_samples": 2}
RECIPES: dict[str, dict[str, Any]] = {
    "squeezellm": COMMON | {"bits": 3, "outliers": 0.01, "significant": 0.004, "metric": "pqi"},
    "awq": COMMON | {"bits": 4, "num_samples": 40, "outliers": 0.01, "significant": 0.004},
    "qtip": COMMON | {"bits": 2, "hessian": "inputs", "labels": "model", "state_bits": 8},
    "gptq": COMMON | {"target_bpw": 3.3, "rounds": 1},
    "streamed": COMMON | {"base": "awq", "metric": "pqi", "tune_epochs": 0},
}
KILLS_PER_STAGE = 1  # of each of the four recipes: about fifty in all


class Teller(RunObserver):
    """Tells another process which stage begins."""

    def __init__(self, to: Connection) -> None:
        self.to = to

    def stage_began(self, stage: str) -> None:
        self.to.send(stage)


def convert(folder: Path, name: str, resume: bool, to: Connection) -> None:
    recipe = Recipe(**{"base": name} | RECIPES[name])
    source = str(folder.parent / "model")
    cache = TensorCache(snapshot_every=0)
    with observing(Teller(to)), WorkFolder.open(folder / "work", recipe.describe(), resume=resume, cache=cache) as work:
        lm = load_mapped(source, folder / "rounded") if name == "streamed" else load_causal_lm(source)
        convert_and_save(lm, folder / "out", recipe, work=work)


def run(folder: Path, base: str, *, resume: bool, kill_in: str | None = None, after: float = 0.0) -> list[str]:
    """Convert in a process of its own, killed so many seconds after a stage has begun; the stages that did begin."""
    here, there = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=convert, args=(folder, base, resume, there))
    process.start()
    there.close()
    stages = []
    while True:
        try:
            stages.append(here.recv())
        except EOFError:
            break
        if stages[-1] == kill_in:
            process.join(after)
            process.kill()
    process.join()
    if kill_in is None:
        assert process.exitcode == 0
    return stages


def content(folder: Path) -> Mapping[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != TIMINGS_NAME}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("resume") / "model").parent


@pytest.mark.parametrize("base", RECIPES)
def test_killed_in_every_stage(base: str, model: Path) -> None:
    straight, broken = model / f"{base} straight", model / f"{base} broken"
    straight.mkdir()
    broken.mkdir()
    stages = Counter(run(straight, base, resume=False))  # in the order in which they begin
    seconds: dict[str, Any] = json.loads((straight / "out" / TIMINGS_NAME).read_text())["seconds"]
    assert {"calibration_text", "original_loss", "quantize", "final_loss", "save"} <= set(stages)
    assert ("tuning" in stages) == (base != "streamed")
    chance = random.Random(0)
    for stage, times in stages.items():
        for _ in range(KILLS_PER_STAGE):
            after = chance.uniform(0, seconds.get(stage, 0.05) / times)
            while True:
                resume = (broken / "work" / "arguments.json").exists()
                begun = run(broken, base, resume=resume, kill_in=stage, after=after)
                assert stage in begun
                if not (broken / "out").exists():
                    break
                # it was faster than the kill: what is there is complete, and the next one is killed earlier
                assert content(broken / "out") == content(straight / "out")
                shutil.rmtree(broken / "out")
                shutil.rmtree(broken / "work", ignore_errors=True)
                after /= 2
    run(broken, base, resume=True)
    assert content(broken / "out") == content(straight / "out")
    assert not list(broken.glob(".*")), "nothing is left of those that were killed"
    assert not (broken / "work").exists()
