"""``requant verify``: good checkpoints, a line for every fault, and the original."""

import json
import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from typer.testing import CliRunner, Result

from tests import tiny
from tests.format.builders import random_layer
from tests.format.checkpoints import edit_tensors, write_checkpoint
from vllm_requant.cli import app
from vllm_requant.format.original import compare_layer
from vllm_requant.offline.models import load_causal_lm
from vllm_requant.offline.recipe import Recipe
from vllm_requant.offline.save import convert_and_save

RECIPE = {"bits": 4, "group_size": 32, "outliers": 0.002, "significant": 0.002, "rounds": 1, "num_samples": 4}
SHORT = {"seq_len": 24, "tune_epochs": 0}


def verify(*arguments: str | Path, status: int = 0) -> Result:
    # the command tells tqdm to be silent, which vLLM in later tests would stumble over
    with patch.dict(os.environ):
        done = CliRunner().invoke(app, ["verify", *map(str, arguments)])
    assert done.exit_code == status, done.output
    return done


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("source"))


def converted(folder: Path, source: Path, **recipe: Any) -> Path:
    convert_and_save(load_causal_lm(str(source)), folder / "out", Recipe(**RECIPE | SHORT | recipe))
    return folder / "out"


def test_a_good_checkpoint(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "out")
    assert verify(folder).stdout == f"{folder}: good; 8 layers, 8 other tensors; checksums agree\n"
    (folder / "SHA256SUMS").unlink()
    assert "nothing says which bytes were written" in verify(folder).stdout
    result = json.loads(verify(folder, "--json").stdout)
    assert result == {
        "folder": str(folder),
        "good": True,
        "checksums": False,
        "findings": [],
        "layers": 8,
        "other_tensors": 8,
    }


def test_a_line_for_every_fault(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "out")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"][0] = float("nan")
        tensors["model.layers.0.self_attn.q_proj.scales"][0, 0] = 0
        tensors["model.layers.0.mlp.gate_proj.sparse_values"][0] = float("inf")

    edit_tensors(folder, change)
    lines = verify(folder, status=1).stdout.splitlines()
    says = [
        "has SHA-256",
        "a scale is not",
        "sparse_values: a value is not",
        "norm.weight: a value is not",
        "findings: 4",
    ]
    assert len(lines) == len(says)
    for line, wanted in zip(lines, says, strict=True):
        assert str(folder) in line and wanted in line
    result = json.loads(verify(folder, "--json", status=1).stdout)
    assert result["good"] is False
    assert [finding["message"] for finding in result["findings"]] == lines[:-1]
    assert result["findings"][3]["tensor"] == "model.norm.weight"


def test_no_checkpoint(tmp_path: Path) -> None:
    assert "no such folder" in verify(tmp_path / "nowhere", status=1).stdout


@pytest.mark.parametrize("recipe", [{"base": "rtn"}, {"base": "squeezellm", "bits": 3}, {"base": "qtip", "bits": 2}])
def test_the_original_s_weights_are_restored(tmp_path: Path, source: Path, recipe: dict[str, Any]) -> None:
    folder = converted(tmp_path, source, **recipe)
    against = json.loads(verify(folder, "--against", source, "--json").stdout)["against"]
    assert against["layers_compared"] == 14
    assert against["sparse_elements"] > 100
    assert against["not_compared"] == []
    assert against["other_tensors_equal"] == 7
    assert 0 < against["relative_error"]["mean"] < 0.7
    assert len(against["per_layer"]) == 14


def test_another_model_is_not_the_original(tmp_path: Path, source: Path) -> None:
    folder = converted(tmp_path, source, base="rtn")
    out = verify(folder, "--against", tiny.save(tmp_path / "other", seed=1), status=1).stdout
    assert "sparse elements do not restore the original's weight" in out
    assert "no nearer to the original than zeros" in out
    assert "model.embed_tokens.weight: is not that of the original" in out
    out = verify(folder, "--against", tiny.save(tmp_path / "wide", intermediate_size=192), status=1).stdout
    assert "mlp.down_proj: is [64, 160], the original has one of [64, 192]" in out


def test_what_a_recipe_changed_is_named(tmp_path: Path, source: Path) -> None:
    (tmp_path / "folded").mkdir()
    out = verify(converted(tmp_path / "folded", source, base="awq"), "--against", source).stdout
    assert "0 layers compared" in out
    assert "not compared: 18 tensors and layers" in out and "base awq rescales" in out
    (tmp_path / "tuned").mkdir()
    folder = converted(tmp_path / "tuned", source, base="rtn", bits=2, tune_epochs=1)
    done = json.loads(verify(folder, "--against", source, "--json").stdout)["against"]
    assert done["layers_compared"] == 14, "tuning leaves what sparse elements restore"
    assert all("tunes norms" in what for what in done["not_compared"])


@pytest.mark.parametrize("kind", ["uniform", "lut", "trellis"])
def test_a_wrong_element_is_found(kind: str) -> None:
    layer, weight, mask = random_layer(kind, 3, 32, 64, density=0.1)
    result = compare_layer(layer, weight)
    assert result.broken == []
    error = (layer.weight() - weight)[~mask]
    assert result.mean_error == pytest.approx(float(error.square().mean().sqrt() / weight.square().mean().sqrt()))
    assert result.max_error == pytest.approx(float(error.abs().max() / weight.square().mean().sqrt()))
    layer.tensors["sparse_values"][7] += 0.01
    row, column = mask.nonzero()[7].tolist()
    assert compare_layer(layer, weight).broken == [(row, column)]
    assert compare_layer(layer, -layer.dense_weight()).mean_error > 1
