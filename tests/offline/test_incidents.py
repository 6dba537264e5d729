"""Numerical trouble is an expected state: a conversion goes on, does what it says, and keeps a record of it."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tests import tiny
from vllm_requant.cli import app
from vllm_requant.format.durable import json_text, null_for_nan
from vllm_requant.format.reader import Checkpoint
from vllm_requant.offline import incidents
from vllm_requant.offline.bases import LayerData, SqueezeLLM
from vllm_requant.offline.bases.squeezellm import least_squares_table
from vllm_requant.offline.cache import TensorCache
from vllm_requant.offline.calibration import CalibrationError
from vllm_requant.offline.incidents import Incident
from vllm_requant.offline.mapped import load_mapped
from vllm_requant.offline.measurements import Measurements
from vllm_requant.offline.models import ModelError, load_causal_lm
from vllm_requant.offline.path import NOT_FINITE, LayerMoments, MovingLayer, results
from vllm_requant.offline.pipeline import Conversion, convert
from vllm_requant.offline.recipe import Recipe, RecipeError
from vllm_requant.offline.save import REPORT_NAME, convert_and_save

POISON = 200
"""a token that the poisoned model cannot compute with"""
SMALL: dict[str, Any] = {"bits": 3, "num_samples": 6, "seq_len": 16, "nodes": 2, "tune_epochs": 0}


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with an embedding that is finite until it is scaled, as Gemma scales them."""
    folder = tiny.save(tmp_path_factory.mktemp("poisoned"), "gemma3", tie_word_embeddings=False)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"][POISON] = 1e38
    save_file(tensors, file, {"format": "pt"})
    return folder


def sequences(*bad: int) -> torch.Tensor:
    tokens = torch.randint(0, POISON, (6, 16), generator=torch.Generator().manual_seed(1))
    tokens[list(bad), 3] = POISON
    return tokens


def converted(source: Path, tokens: torch.Tensor, cache: Path | None, *, mapped: bool = False, **choices: Any) -> Any:
    recipe = Recipe(**SMALL | {"path_samples": 2} | choices)
    if not mapped:
        return convert(load_causal_lm(str(source)), recipe, tokens, cache=TensorCache(cache))
    assert cache is not None
    return convert(load_mapped(str(source), cache / "rounded"), recipe, tokens, cache=TensorCache(cache))


def assert_same(one: Conversion, other: Conversion) -> None:
    for name, layer in one.layers.items():
        for key, tensor in layer.tensors.items():
            assert torch.equal(tensor, other.layers[name].tensors[key]), (name, key)


RECIPES: dict[str, dict[str, Any]] = {
    "squeezellm": {"metric": "pqi", "outliers": 0.01, "significant": 0.004},
    "awq": {"bits": 4, "hessian": "inputs"},
    "gptq": {"hessian": "inputs", "outliers": 0.0, "significant": 0.004, "labels": "model"},
}


@pytest.mark.parametrize(
    ("base", "mapped"), [("squeezellm", False), ("squeezellm", True), ("awq", False), ("gptq", True)]
)
def test_sequences_that_the_original_cannot_compute_are_left_out(
    tmp_path: Path, poisoned: Path, base: str, mapped: bool
) -> None:
    choices = RECIPES[base] | {"base": base, "mapped": mapped}
    tokens = sequences(0, 4)
    found = converted(poisoned, tokens, tmp_path / "cache", **choices)
    assert [(entry["where"], entry["fallback"]) for entry in found.report["incidents"]] == [
        ("calibration sequence 0", "the sequence is left out"),
        ("calibration sequence 4", "the sequence is left out"),
    ]
    assert found.incidents[0]["places"] == 2
    # what is kept from an interrupted run leads to the same record
    assert converted(poisoned, tokens, tmp_path / "cache", **choices).report["incidents"] == found.report["incidents"]
    good = tokens[[1, 2, 3, 5]]
    expected = converted(poisoned, good, tmp_path / "other", **choices | {"path_samples": 1})
    assert not expected.incidents
    assert_same(found, expected)


def test_no_sequence_is_left(poisoned: Path) -> None:
    with pytest.raises(CalibrationError, match=r"not finite on any calibration sequence.*--calibration-dataset"):
        converted(poisoned, sequences(*range(6)), None)


def test_record_of_a_model_that_overflows_on_its_own_text(tmp_path: Path, poisoned: Path) -> None:
    lm = load_causal_lm(str(poisoned))
    recipe = Recipe(**SMALL | {"num_samples": 24, "seq_len": 48})
    config, _ = convert_and_save(lm, tmp_path / "out", recipe)
    kinds = Checkpoint(tmp_path / "out").config.provenance["incidents"]
    assert kinds == config.provenance["incidents"]
    left_out = next(kind for kind in kinds if kind["fallback"] == "the sequence is left out")
    assert 0 < left_out["places"] < 24
    report = json.loads((tmp_path / "out" / REPORT_NAME).read_text())
    assert sum(entry["where"].startswith("calibration sequence") for entry in report["incidents"]) == left_out["places"]
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "out")])
    assert f"the sequence is left out: {left_out['first']}, {left_out['places']} in all" in shown.stdout


def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "in")
    file, name = folder / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(file)
    tensors[name][5, 7] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ModelError, match=f"{name} holds values that are not finite"):
        convert_and_save(load_causal_lm(str(folder)), tmp_path / "out", Recipe("rtn", 4, outliers=0.0, significant=0.0))
    assert not (tmp_path / "out").exists()


def test_sums_that_are_not_finite_count_as_nothing() -> None:
    layer = MovingLayer(torch.zeros(2, 3), torch.ones(2, 3))
    moments = LayerMoments(layer, 1, True, torch.device("cpu"), None)
    moments.at(0.0, 1.0)
    layer.collect(torch.tensor([[1e30, 1.0]]), torch.tensor([[1.0, 2.0, 1e30]]))
    moments.end_sequence()
    with incidents.collecting() as found:
        ((name, tensors),) = results({"a.layer": moments})
    assert found == {Incident(NOT_FINITE, "its gradients count as zero", name)}
    assert not tensors["gradient"].any()
    assert not tensors["square"].any()


def test_rows_without_fisher_information_count_alike() -> None:
    weight = torch.randn(4, 40, generator=torch.Generator().manual_seed(0))
    fisher = torch.rand(4, 40, generator=torch.Generator().manual_seed(1))
    fisher[1:3] = 0.0
    with incidents.collecting() as found:
        dense = SqueezeLLM(3).quantize(LayerData(weight, fisher=fisher))
    assert [(incident.trouble, incident.count) for incident in found] == [("rows without Fisher information", 2)]
    fisher[1:3] = 1.0
    expected = SqueezeLLM(3).quantize(LayerData(weight, fisher=fisher))
    assert torch.equal(dense.tensors["qweight"], expected.tensors["qweight"])


def test_tables_that_nothing_determines_stay() -> None:
    weight, table = torch.randn(3, 8), torch.tensor([[-1.0, 1.0]]).repeat(3, 1)
    codes = (weight > 0).long()
    with incidents.collecting() as found:
        # moments so large that the solution overflows
        same = least_squares_table(weight, torch.full((8, 8), 1e38), codes, table, torch.zeros(3, 8, dtype=torch.bool))
    assert torch.equal(same, table)
    assert [incident.count for incident in found] == [3]


def test_loss_that_is_not_finite_is_infinite_and_null_in_a_file(caplog: pytest.LogCaptureFixture) -> None:
    measurements = Measurements(Recipe(), SimpleNamespace(loss=lambda *_, **__: math.nan), {}, None, TensorCache(), 1.0)
    with incidents.collecting() as found:
        assert measurements.loss({}, "a candidate") == math.inf
    assert [incident.where for incident in found] == ["a candidate"]
    assert "a candidate: the loss at quantized weights is not finite" in caplog.text
    assert json.loads(json_text(null_for_nan({"loss": [math.inf, math.nan, 1.5]}))) == {"loss": [None, None, 1.5]}


def test_converted_model_that_overflows_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny.save(tmp_path / "in")
    monkeypatch.setattr(Measurements, "loss", lambda *_: math.inf)
    with pytest.raises(RecipeError, match=r"converted model's loss .* not finite.*--bits"):
        convert_and_save(load_causal_lm(str(source)), tmp_path / "out", Recipe(**SMALL))
    assert not (tmp_path / "out").exists()


def test_cached_results_bring_their_incidents(tmp_path: Path) -> None:
    cache, cpu = TensorCache(tmp_path), torch.device("cpu")

    def layers(missing: set[str], _: object) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        for name in sorted(missing):
            with incidents.about(name):
                incidents.note("trouble", "fallback")
            yield name, {"tensor": cache.get("inner", lambda: "inner", cpu, inner)["tensor"]}

    def inner() -> dict[str, torch.Tensor]:
        incidents.note("inner trouble", "fallback", where="inside")
        return {"tensor": torch.ones(1)}

    for _ in range(2):
        with incidents.collecting() as found:
            cache.by_layer("outer", lambda: "outer", ["a", "b"], cpu, layers)
        assert found == {
            Incident("inner trouble", "fallback", "inside"),
            Incident("trouble", "fallback", "a"),
            Incident("trouble", "fallback", "b"),
        }
    assert incidents.summary(found)[1] == {"trouble": "trouble", "fallback": "fallback", "first": "a", "places": 2}
