"""Tuning moves what is stored in full precision, in the direction of the gradient, and nothing else."""

import pytest
import torch

from tests import tiny
from vllm_requant.format import QuantizedLayer
from vllm_requant.offline.bases import BASES, LayerData
from vllm_requant.offline.models import find_layers
from vllm_requant.offline.pqi import Objective
from vllm_requant.offline.statistics import InputStatistics
from vllm_requant.offline.tuning import tunable, tune

BASE_OF_KIND = {"uniform": "rtn", "lut": "squeezellm", "trellis": "qtip"}


def _quantized(kind: str, weight: torch.Tensor, bits: int = 2):  # type: ignore[no-untyped-def]
    base = BASES[BASE_OF_KIND[kind]]
    options = {"group_size": 32} if "group_size" in base.options else {}
    columns = weight.shape[1]
    inputs = InputStatistics(torch.eye(columns), torch.ones(columns))
    return base(bits, **options).quantize(LayerData(weight, torch.ones_like(weight), inputs))


@pytest.mark.parametrize("kind", BASE_OF_KIND)
def test_parameter_makes_the_weight_and_its_gradient(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    dense = _quantized(kind, torch.randn(32, 96, generator=generator))
    part = tunable(dense)
    torch.testing.assert_close(part.weight(), dense.weight(), rtol=0, atol=1e-6)
    assert all(torch.equal(part.result().tensors[name], tensor) for name, tensor in dense.tensors.items())
    # the weight is linear in the parameter, so one finite difference gives the exact slope
    gradient = torch.randn(32, 96, generator=generator)
    direction = torch.rand(part.parameter.shape, generator=generator) * 0.1
    before = float((part.weight() * gradient).sum())
    slope = float((part.gradient(gradient) * direction).sum())
    part.parameter += direction
    assert float((part.weight() * gradient).sum()) - before == pytest.approx(slope, rel=1e-3, abs=1e-4)
    result = part.result()
    QuantizedLayer(result.spec, result.tensors).check(name=kind)
    torch.testing.assert_close(result.weight(), part.weight(), rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("kind", BASE_OF_KIND)
@pytest.mark.parametrize("norms", [True, False])
def test_tuning_lowers_the_divergence(kind: str, norms: bool) -> None:
    model = tiny.model()
    model.requires_grad_(False)
    layers = find_layers(model)
    tokens = torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(0))
    objective = Objective(model, layers, tokens)
    weights = {name: layer.weight.data.clone() for name, layer in layers.items()}
    dense = {name: _quantized(kind, weight) for name, weight in weights.items()}
    masks = {name: torch.zeros_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    for mask in masks.values():
        mask[:, ::11] = True
    others = {name: p.clone() for name, p in model.named_parameters()}
    result, divergence = tune(objective, dense, masks, epochs=8, rate=0.03, norms=norms)
    assert len(divergence) == 32
    first, last = sum(divergence[:4]), sum(divergence[-4:])
    # a trellis has a scale for every pair of blocks and little else to tune
    assert last < (0.97 if kind == "trellis" else 0.8) * first
    # the measured loss of what is returned, float16 and all, is that of the end
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, others[name])}
    assert all("norm" in name for name in changed)
    assert bool(changed) is norms
    for name, layer in result.items():
        assert torch.equal(layers[name].weight, weights[name])
        assert torch.equal(layer.tensors["qweight"], dense[name].tensors["qweight"])
        QuantizedLayer(layer.spec, layer.tensors).check(name=name)
    with torch.no_grad():
        teacher_model = tiny.model()
        teacher = torch.log_softmax(teacher_model(tokens).logits, -1)
        for name, layer in layers.items():
            layer.weight.data = torch.where(masks[name], weights[name], result[name].weight())
        student = torch.log_softmax(model(tokens).logits, -1)
    left = float((teacher.exp() * (teacher - student))[:, :-1].sum(-1).mean())
    assert left == pytest.approx(last / 4, rel=0.1)


def test_what_is_nearly_right_is_moved_less() -> None:
    model = tiny.model()
    model.requires_grad_(False)
    layers = find_layers(model)
    tokens = torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(0))
    weights = {name: layer.weight.data for name, layer in layers.items()}
    fine = next(iter(weights))
    dense = {name: _quantized("uniform", weight, bits=8 if name == fine else 2) for name, weight in weights.items()}
    masks = {name: torch.zeros_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    tuned, _ = tune(Objective(model, layers, tokens), dense, masks, epochs=2, norms=False)

    def moved(name: str) -> float:
        before, after = dense[name].tensors["scales"].float(), tuned[name].tensors["scales"].float()
        return float((after - before).norm() / before.norm())

    assert all(moved(name) > 10 * moved(fine) for name in weights if name != fine)
