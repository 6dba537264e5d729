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


@pytest.mark.parametrize("base", RECIPES)
def test_two_processes_make_what_one_makes(base: str, model: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    subprocess.run([sys.executable, *command(model, one, base)], check=True, env=environment())
    subprocess.run([*TORCHRUN, *command(model, two, base)], check=True, env=environment())
    for expected, actual in zip(integrals(one), integrals(two), strict=True):
        assert actual["predicted"] == pytest.approx(expected["predicted"], rel=1e-4)
        assert actual["actual"] == pytest.approx(expected["actual"], rel=1e-4)
    # sums are added up in another order, so that a weight may be ranked or rounded otherwise once in a while
    first, second = (load_file(folder / "model.safetensors") for folder in (one, two))
    codes = [name for name in first if name.endswith("qweight")]
    same = sum(int((first[name] == second[name]).sum()) for name in codes)
    assert same > 0.999 * sum(first[name].numel() for name in codes)
    shapes = [
        {name: tensor.shape for name, tensor in tensors.items() if "sparse" not in name} for tensors in (first, second)
    ]
    assert shapes[0] == shapes[1]
    assert not default_folder(two).exists()


def test_two_processes_go_on_after_a_kill(model: Path, tmp_path: Path) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    subprocess.run([*TORCHRUN, *command(model, straight, "squeezellm")], check=True, env=environment())
    process = subprocess.Popen([*TORCHRUN, *command(model, broken, "squeezellm")], env=environment())
    results = default_folder(broken) / "results"
    while process.poll() is None and not (results / "quantized").exists():
        time.sleep(0.01)
    family = psutil.Process(process.pid)
    for member in (family, *family.children(recursive=True)):
        member.kill()
    process.wait()
    assert not broken.exists(), "it was killed before the end"
    subprocess.run([*TORCHRUN, *command(model, broken, "squeezellm"), "--resume"], check=True, env=environment())
    first, second = (load_file(folder / "model.safetensors") for folder in (straight, broken))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
