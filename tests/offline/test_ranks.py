"""Conversions by two processes that torchrun starts, against one process; PyTorch's FSDP2 over gloo."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests import tiny
from vllm_requant.offline.work import default_folder

FLAGS = ["--num-samples", "8", "--seq-len", "24", "--nodes", "2", "--tune-epochs", "0", "--lm-head-bits", "8"]
RECIPES = {
    "squeezellm": ["--bits", "3", "--metric", "pqi"],
    "awq": ["--path-samples", "1", "--labels", "model"],  # one of the two has no sequence of the path
    "gptq": ["--hessian", "inputs", "--stream"],
    "qtip": ["--bits", "2", "--state-bits", "8", "--outliers", "0.01"],
}
MODULE = ["-m", "vllm_requant.cli", "convert"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "text.txt").write_text("some words of calibration, and others too. " * 100)
    return tiny.save(folder / "model", num_hidden_layers=3)


def command(model: Path, output: Path, base: str) -> list[str]:
    text = str(model.parent / "text.txt")
    flags = ["--base", base, "--calibration-dataset", text, *FLAGS, *RECIPES[base]]
    return [*MODULE, str(model), "-o", str(output), *flags]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def integrals(folder: Path) -> list[dict[str, Any]]:
    report: dict[str, Any] = json.loads((folder / "requant_report.json").read_text())
    return report["integrals"]


def run(start: list[str], model: Path, output: Path, base: str, *flags: str) -> None:
    subprocess.run([*start, *command(model, output, base), *flags], check=True, env=environment())


def assert_alike(one: Path, two: Path) -> None:
    """Sums are added up in another order, so that a weight may be ranked or rounded otherwise once in a while."""
    for expected, actual in zip(integrals(one), integrals(two), strict=True):
        assert actual["predicted"] == pytest.approx(expected["predicted"], rel=1e-4)
        assert actual["actual"] == pytest.approx(expected["actual"], rel=1e-4)
    first, second = (load_file(folder / "model.safetensors") for folder in (one, two))
    codes = [name for name in first if name.endswith("qweight")]
    same = sum(int((first[name] == second[name]).sum()) for name in codes)
    assert same > 0.999 * sum(first[name].numel() for name in codes)
    shapes = [
        {name: tensor.shape for name, tensor in tensors.items() if "sparse" not in name} for tensors in (first, second)
    ]
    assert shapes[0] == shapes[1]
    assert not default_folder(two).exists()


@pytest.mark.parametrize("base", RECIPES)
def test_two_processes_make_what_one_makes(base: str, model: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    run([sys.executable], model, one, base)
    run(TORCHRUN, model, two, base)
    assert_alike(one, two)
    if "--stream" not in RECIPES[base]:
        run(TORCHRUN, model, tmp_path / "replicated", base, "--replicate")
        assert_alike(one, tmp_path / "replicated")


def kill(start: list[str], model: Path, output: Path, base: str, *flags: str, once: str) -> None:
    """Begin a conversion and kill torchrun, with which its processes end, once something is in its results' folder."""
    process = subprocess.Popen([*start, *command(model, output, base), *flags], env=environment())
    results = default_folder(output) / "results"
    while process.poll() is None and not any(results.glob(once)):
        time.sleep(0.002)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 2
    process.kill()
    process.wait()
    _, left = psutil.wait_procs(workers, timeout=20)
    assert not left
    assert not output.exists(), "it was killed before the end"


@pytest.mark.parametrize("flags", [[], ["--replicate", "--snapshot-every", "0"]], ids=["sharded", "replicated"])
def test_two_processes_go_on_after_a_kill(flags: list[str], model: Path, tmp_path: Path) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    run(TORCHRUN, model, straight, "squeezellm", *flags)
    once = "*/*-1-of-2.snapshot" if flags else "quantized"
    kill(TORCHRUN, model, broken, "squeezellm", *flags, once=once)
    run(TORCHRUN, model, broken, "squeezellm", *flags, "--resume")
    first, second = (load_file(folder / "model.safetensors") for folder in (straight, broken))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_one_process_goes_on_with_what_two_have_begun(model: Path, tmp_path: Path) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    run([sys.executable], model, straight, "gptq")
    kill(TORCHRUN, model, broken, "gptq", once="scratch/between/*-1-of-2/input-1.safetensors")
    run([sys.executable], model, broken, "gptq", "--resume")
    assert_alike(straight, broken)
