"""The integral predicts ΔF, and scores are what the definition says."""

import numpy as np
import pytest
import torch

from tests import tiny
from vllm_requant.offline import pqi
from vllm_requant.offline.bases import Rtn
from vllm_requant.offline.models import find_layers


@pytest.fixture(scope="module")
def setting():  # type: ignore[no-untyped-def]
    model = tiny.model()
    model.requires_grad_(False)
    layers = find_layers(model)
    quantized = {name: Rtn(3, 32).quantize(layer.weight.data).weight() for name, layer in layers.items()}
    tokens = torch.randint(0, 256, (3, 24), generator=torch.Generator().manual_seed(1))
    return model, layers, quantized, tokens


@pytest.mark.parametrize("rule", pqi.QUADRATURES)
@pytest.mark.parametrize("nodes", [2, 3, 4, 8, 32])
def test_quadrature_weights_sum_to_one(rule: str, nodes: int) -> None:
    points, weights = pqi.quadrature(rule, nodes)
    assert sum(weights) == pytest.approx(1)
    assert points == sorted(points)
    assert points[0] >= 0
    assert points[-1] <= 1


@pytest.mark.parametrize("nodes", [1, 2, 3, 4])
def test_gauss_is_exact_for_polynomials(nodes: int) -> None:
    points, weights = pqi.quadrature("gauss", nodes)
    for degree in range(2 * nodes):
        value = float(np.dot(weights, np.power(points, degree)))
        assert value == pytest.approx(1 / (degree + 1))
    assert float(np.dot(weights, np.power(points, 2 * nodes))) != pytest.approx(1 / (2 * nodes + 1))


def test_uniform_is_the_plain_mean_with_both_ends() -> None:
    assert pqi.quadrature("uniform", 5) == ([0, 0.25, 0.5, 0.75, 1], [0.2] * 5)


def test_unknown_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="gauss, midpoint, uniform"):
        pqi.quadrature("simpson", 4)
    with pytest.raises(ValueError, match="at least 2"):
        pqi.quadrature("uniform", 1)


def _delta_loss(setting) -> float:  # type: ignore[no-untyped-def]
    model, layers, quantized, tokens = setting
    before = pqi.calibration_loss(model, tokens)
    with pqi.weights_replaced(layers, quantized):
        return pqi.calibration_loss(model, tokens) - before


def test_signed_sum_predicts_the_change_of_loss(setting) -> None:  # type: ignore[no-untyped-def]
    model, layers, quantized, tokens = setting
    actual = _delta_loss(setting)
    error = {}
    for nodes in (1, 2, 4, 8):
        integral = pqi.integrate(model, layers, quantized, tokens, rule="gauss", nodes=nodes)
        error[nodes] = abs(sum(integral.predicted().values()) - actual) / abs(actual)
    assert error[8] < 5e-3, error
    assert error[8] < error[4] < error[1], error
    # first order, the gradient at w alone, is far off: this is why the integral exists
    first_order = pqi.integrate(model, layers, quantized, tokens, rule="uniform", nodes=2)
    assert abs(sum(first_order.predicted().values()) - actual) / abs(actual) > error[8]


def test_score_is_the_definition(setting) -> None:  # type: ignore[no-untyped-def]
    """|Δ · Σ_k a_k mean_s ∇F_s(w + t_k Δ)|, computed the long way with one gradient per node and sequence."""
    model, layers, quantized, tokens = setting
    integral = pqi.integrate(model, layers, quantized, tokens, rule="midpoint", nodes=2)
    name = list(layers)[3]
    weight = layers[name].weight
    expected = torch.zeros_like(weight)
    for t in (0.25, 0.75):
        moved = {n: layer.weight.data + t * (quantized[n] - layer.weight.data) for n, layer in layers.items()}
        with pqi.weights_replaced(layers, moved):
            for row in tokens:
                weight.requires_grad_(True)
                logits = model(row[None]).logits[0, :-1]
                loss = torch.nn.functional.cross_entropy(logits, row[1:])
                expected += 0.5 / len(tokens) * torch.autograd.grad(loss, weight)[0]
                weight.requires_grad_(False)
    delta = quantized[name] - weight.data
    torch.testing.assert_close(integral.score(name), (delta * expected).abs(), rtol=1e-3, atol=1e-9)


def test_model_is_left_as_it_was(setting) -> None:  # type: ignore[no-untyped-def]
    model, layers, quantized, tokens = setting
    before = {name: layer.weight.clone() for name, layer in layers.items()}
    pqi.integrate(model, layers, quantized, tokens, nodes=1)
    pqi.fisher_information(model, layers, tokens)
    for name, layer in layers.items():
        assert torch.equal(layer.weight, before[name])
        assert layer.weight.grad is None
        assert not layer.weight.requires_grad


def test_fisher_is_the_sum_of_squared_sequence_gradients(setting) -> None:  # type: ignore[no-untyped-def]
    model, layers, _, tokens = setting
    fisher = pqi.fisher_information(model, layers, tokens)
    name = next(iter(layers))
    one_by_one = [pqi.fisher_information(model, layers, row[None])[name] for row in tokens]
    torch.testing.assert_close(fisher[name], sum(one_by_one))
    together = (pqi.integrate(model, layers, {n: la.weight + 1 for n, la in layers.items()}, tokens, nodes=1)).gradient
    assert not torch.allclose(fisher[name], together[name] ** 2)
