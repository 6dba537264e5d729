"""A model that stays in its files, walked block by block, against the same model in memory."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny
from vllm_requant.offline.cache import TensorCache, matrices_changed, model_fingerprint
from vllm_requant.offline.mapped import load_mapped
from vllm_requant.offline.models import CausalLM, ModelError, find_layers, load_causal_lm
from vllm_requant.offline.pqi import Objective
from vllm_requant.offline.recipe import Recipe, RecipeError
from vllm_requant.offline.save import TIMINGS_NAME, convert_and_save
from vllm_requant.offline.streaming import StreamedObjective, Walk

SMALL = {"num_samples": 6, "seq_len": 24, "nodes": 2, "tune_epochs": 0, "outliers": 0.01, "significant": 0.004}
RECIPES: dict[str, dict[str, Any]] = {
    "rtn": {"base": "rtn", "outliers": 0, "significant": 0},
    "gptq": {"base": "gptq", "hessian": "inputs", "bits": 3, "num_samples": 40, "lm_head_bits": 8},
    "awq": {"base": "awq", "metric": "pqi"},
    "squeezellm": {"base": "squeezellm", "bits": 3, "labels": "model"},
    "squeezellm's own": {"base": "squeezellm", "outlier_rule": "base"},
    "qtip": {"base": "qtip", "bits": 2, "state_bits": 8},
    "target": {"base": "gptq", "target_bpw": 3.4, "outliers": None, "significant": None},
}


@pytest.mark.parametrize("architecture", tiny.CONFIGS)
def test_the_mapped_model_computes_the_same(architecture: str, tmp_path: Path) -> None:
    source = str(tiny.save(tmp_path / "model", architecture))
    loaded, mapped = load_causal_lm(source), load_mapped(source, tmp_path / "scratch")
    tokens = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(mapped.model(tokens).logits, loaded.model(tokens).logits, rtol=0, atol=1e-6)
    assert loaded.model.generation_config.to_dict() == mapped.model.generation_config.to_dict()


def objectives(lm: CausalLM, mapped: CausalLM, folder: Path, **settings: Any) -> tuple[Objective, StreamedObjective]:
    tokens = torch.randint(0, 256, (3, 20), generator=torch.Generator().manual_seed(1))
    whole = Objective(lm.model, find_layers(lm.model), tokens, **settings)
    layers = find_layers(mapped.model)
    return whole, StreamedObjective(mapped.model, layers, tokens, walk=Walk(folder / "scratch"), **settings)


@pytest.mark.parametrize("labels", ["text", "model"])
@pytest.mark.parametrize("architecture", tiny.CONFIGS)
def test_losses_and_integrals_are_the_same(architecture: str, labels: str, tmp_path: Path) -> None:
    source = str(tiny.save(tmp_path / "model", architecture))
    whole, streamed = objectives(
        load_causal_lm(source), load_mapped(source, tmp_path / "rounded"), tmp_path, labels=labels
    )
    end = {name: weight.float() * 1.05 for name, weight in whole.start.items()}
    cache = TensorCache(tmp_path / "cache")
    assert streamed.loss() == pytest.approx(whole.loss(), rel=1e-6)
    assert streamed.loss(end) == pytest.approx(whole.loss(end), rel=1e-6)
    expected = whole.integrate(end, nodes=3, squares=True)
    actual = streamed.integrate(end, nodes=3, squares=True, cache=cache)
    for part in ("gradient", "square"):
        for name, tensor in getattr(expected.moments, part).items():
            torch.testing.assert_close(getattr(actual.moments, part)[name], tensor, rtol=1e-4, atol=1e-9)
    assert sum(actual.predicted().values()) == pytest.approx(sum(expected.predicted().values()), rel=1e-5)
    assert not list((tmp_path / "scratch").iterdir()), "nothing is left between blocks"


@pytest.mark.parametrize("name", RECIPES)
def test_conversions_are_the_same(name: str, tmp_path: Path) -> None:
    source = str(tiny.save(tmp_path / "model", num_hidden_layers=3))
    recipe = Recipe(**SMALL | RECIPES[name])
    for kind, lm in (
        ("whole", load_causal_lm(source)),
        ("streamed", load_mapped(source, tmp_path / "rounded")),
    ):
        convert_and_save(lm, tmp_path / kind, recipe, cache=TensorCache(tmp_path / f"{kind} cache"))
    whole, streamed = (load_file(tmp_path / kind / "model.safetensors") for kind in ("whole", "streamed"))
    assert whole.keys() == streamed.keys()
    different = {key for key in whole if not torch.equal(whole[key], streamed[key])}
    assert not different
    files = {path.name for path in (tmp_path / "whole").iterdir()} - {TIMINGS_NAME}
    assert files <= {path.name for path in (tmp_path / "streamed").iterdir()}


def test_weights_of_another_type_are_rounded_once(tmp_path: Path) -> None:
    tiny.model().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    mapped = load_mapped(str(tmp_path / "model"), tmp_path / "rounded")
    assert mapped.dtype == torch.bfloat16
    for name, layer in find_layers(load_causal_lm(str(tmp_path / "model")).model).items():
        assert torch.equal(layer.weight, mapped.model.get_submodule(name).weight)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "rounded").iterdir()}
    load_mapped(str(tmp_path / "model"), tmp_path / "rounded")
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "rounded").iterdir()}


def test_what_cannot_be_streamed_is_refused(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "model")
    lm = load_mapped(str(source), tmp_path / "rounded")
    with pytest.raises(RecipeError, match="tuning needs the whole model"):
        convert_and_save(lm, tmp_path / "out", Recipe(num_samples=2, tune_epochs=1), cache=TensorCache(tmp_path / "c"))
    (source / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:-10])
    with pytest.raises(ModelError, match="is not a whole safetensors file"):
        load_mapped(str(source), tmp_path / "rounded")


def test_memory_does_not_grow_with_the_number_of_blocks(tmp_path: Path) -> None:
    shape = {"hidden_size": 256, "intermediate_size": 1024, "num_key_value_heads": 4}
    # the first one brings in what is loaded and compiled once
    folders = [str(tiny.save(tmp_path / str(n), num_hidden_layers=n, **shape)) for n in (1, 2, 6)]
    weights = 4 * (4 * 256 * 256 + 3 * 256 * 1024)  # of four blocks
    grown = {}
    for how in ("stream", "whole"):
        program = [sys.executable, "-m", "tests.offline.conversion_memory", how, str(tmp_path / how), *folders]
        # what is freed goes back, and threads that wait for each other do not take turns with other processes
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**16), "OMP_NUM_THREADS": "1"}
        ran = subprocess.run(program, check=True, capture_output=True, text=True, env=environment)
        _, few, many = json.loads(ran.stdout.splitlines()[-1])
        grown[how] = many - few
    # in memory the sums of gradients and of squares, in float32, and the quantized weights
    assert grown["whole"] > 8 * weights
    assert grown["stream"] < 2 * weights


def test_sums_over_a_few_layers_at_a_time_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = str(tiny.save(tmp_path / "model"))
    _, streamed = objectives(load_causal_lm(source), load_mapped(source, tmp_path / "rounded"), tmp_path)
    end = {name: weight.float() * 1.05 for name, weight in streamed.start.items()}
    expected = streamed.integrate(end, nodes=2, squares=True, cache=TensorCache(tmp_path / "at once"))
    monkeypatch.setattr("vllm_requant.offline.streaming._SUMS_BYTES", 1)
    actual = streamed.integrate(end, nodes=2, squares=True, cache=TensorCache(tmp_path / "one by one"))
    for name, tensor in expected.moments.square.items():
        assert torch.equal(actual.moments.square[name], tensor)
        assert torch.equal(actual.moments.gradient[name], expected.moments.gradient[name])


def test_a_fingerprint_follows_the_weights() -> None:
    model = tiny.model()
    weight, norm = model.model.layers[0].mlp.up_proj.weight, model.model.norm.weight
    seen = {model_fingerprint(model)}
    assert model_fingerprint(model) in seen
    with torch.no_grad():
        weight.mul_(1.5)
        seen.add(model_fingerprint(model))
        norm.data.mul_(1.5)
        seen.add(model_fingerprint(model))
    weight.data = weight.data * 1.5
    seen.add(model_fingerprint(model))
    weight.data.mul_(1.5)
    matrices_changed(model)
    seen.add(model_fingerprint(model))
    assert len(seen) == 5
