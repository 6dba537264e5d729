"""A conversion whose model lies on another device than what the host makes."""

from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.pretend_device import pretend_device
from vllm_requant.offline.bases import LayerData, Qtip
from vllm_requant.offline.evaluate import Windows, compare, predictions
from vllm_requant.offline.models import load_causal_lm
from vllm_requant.offline.pipeline import Conversion, convert
from vllm_requant.offline.recipe import Recipe
from vllm_requant.offline.statistics import InputStatistics
from vllm_requant.offline.tuning import tunable

TOKENS = torch.randint(0, 256, (6, 48), generator=torch.Generator().manual_seed(0))
FIXED = {"outliers": 0.01, "significant": 0.004}
RECIPES = {
    "squeezellm": {"base": "squeezellm", "bits": 3, **FIXED},
    "its own rule": {"base": "squeezellm", "bits": 3, **FIXED, "outlier_rule": "base"},
    "rtn, range rule": {"base": "rtn", "bits": 4, **FIXED, "outlier_rule": "range", "metric": "first-order"},
    "gptq, tuned": {"base": "gptq", "bits": 3, **FIXED, "metric": "path-fisher", "tune_epochs": 1},
    "awq": {"base": "awq", "bits": 4, **FIXED, "metric": "fisher", "hessian": "inputs"},
    "squeezellm, target": {"target_bpw": 3.5, "metric": "pqi-fisher", "tune_epochs": 1, "labels": "model"},
    "random, target": {"base": "rtn", "target_bpw": 3.5, "metric": "random"},
    "random": {"base": "rtn", "bits": 3, **FIXED, "metric": "random"},
    "head": {"base": "rtn", "bits": 4, **FIXED, "metric": "magnitude", "lm_head_bits": 8},
}


def _convert(source: Path, choices: dict[str, object], *, elsewhere: bool, low_memory: bool = False) -> Conversion:
    # both from the same attention: the one that PyTorch picks has no like on the pretended device
    lm = load_causal_lm(str(source))
    lm.model.set_attn_implementation("eager")
    recipe = Recipe(num_samples=len(TOKENS), seq_len=TOKENS.shape[1], nodes=2, path_samples=2, **choices)
    if not elsewhere:
        return convert(lm, recipe, TOKENS)
    with pretend_device() as device:
        lm.model.to(device)
        assert {parameter.device for parameter in lm.model.parameters()} == {device}
        return convert(lm, recipe, TOKENS, low_memory=low_memory)


def _assert_same(there: Conversion, here: Conversion, *, folded: bool) -> None:
    """Products round differently, so that a code or a position may differ, and another fold may win by a hair."""
    assert there.layers.keys() == here.layers.keys()
    for name, layer in there.layers.items():
        assert {type(tensor) for tensor in layer.tensors.values()} == {torch.Tensor}, "what is stored lies on the host"
        expected = here.layers[name]
        assert layer.spec.model_copy(update={"nnz": expected.spec.nnz}) == expected.spec
        difference = torch.linalg.vector_norm(layer.weight() - expected.weight())
        assert folded or difference < 0.02 * torch.linalg.vector_norm(expected.weight())
    nnz, expected_nnz = (sum(layer.spec.nnz for layer in result.layers.values()) for result in (there, here))
    assert nnz == pytest.approx(expected_nnz, rel=0.01)
    assert there.report["calibration_loss"] == pytest.approx(
        here.report["calibration_loss"], rel=0.05 if folded else 1e-3
    )


@pytest.mark.parametrize("recipe", RECIPES)
def test_conversion_on_another_device(tmp_path: Path, recipe: str) -> None:
    source = tiny.save(tmp_path / "in", "qwen2", tie_word_embeddings=False)
    here = _convert(source, RECIPES[recipe], elsewhere=False)
    there = _convert(source, RECIPES[recipe], elsewhere=True)
    _assert_same(there, here, folded=recipe == "awq")


@pytest.mark.parametrize("base", ["squeezellm", "gptq", "awq"])
@pytest.mark.parametrize("metric", ["pqi-fisher", "path-fisher"])
def test_statistics_in_the_memory_of_the_host(tmp_path: Path, base: str, metric: str) -> None:
    source = tiny.save(tmp_path / "in", tie_word_embeddings=False)
    choices = {"base": base, "bits": 3, **FIXED, "metric": metric}
    sparing = _convert(source, choices, elsewhere=True, low_memory=True)
    _assert_same(sparing, _convert(source, choices, elsewhere=False), folded=base == "awq")


def test_trellis_on_another_device() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(shape, generator=generator) for shape in ((32, 64), (256, 64)))
    inputs = InputStatistics(x.t() @ x / len(x), x.abs().mean(0))
    here = Qtip(2, state_bits=8).quantize(LayerData(weight, inputs=inputs))
    with pretend_device() as device:
        made = Qtip(2, state_bits=8).quantize(LayerData(weight.to(device), inputs=inputs.to(device)))
        part = tunable(made)
        assert {tensor.device for tensor in (*made.tensors.values(), part.weight(), part.gradient(part.weight()))} == {
            device
        }
        there = made.weight().cpu()
    # ties between paths, and products, may go another way
    error = inputs.output_error(here.weight() - weight)
    assert inputs.output_error(there - weight) == pytest.approx(error, rel=0.05)


def test_evaluation_on_another_device() -> None:
    model = tiny.model(tie_word_embeddings=False)
    model.set_attn_implementation("eager")
    windows = Windows(TOKENS, [TOKENS.shape[1] - 1] * len(TOKENS))
    expected = compare(windows, predictions(model, windows), predictions(model, windows))
    with pretend_device() as device:
        model.to(device)
        scores = compare(windows, predictions(model, windows), list(predictions(model, windows)))
    assert scores == pytest.approx(expected, rel=1e-4)
