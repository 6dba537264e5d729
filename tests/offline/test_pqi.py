"""The integral predicts ΔF, and scores are what the definition says."""

import numpy as np
import pytest
import torch

from tests import tiny
from vllm_requant.format.experts import MIXTURES, separate_experts
from vllm_requant.offline import pqi
from vllm_requant.offline.bases import LayerData, Rtn
from vllm_requant.offline.cache import TensorCache
from vllm_requant.offline.metrics import METRICS, Sensitivity
from vllm_requant.offline.models import COMPUTE_DTYPES, find_layers


@pytest.fixture(scope="module")
def setting():  # type: ignore[no-untyped-def]
    model = tiny.model()
    model.requires_grad_(False)
    layers = find_layers(model)
    quantized = {name: Rtn(3, 32).quantize(LayerData(layer.weight.data)).weight() for name, layer in layers.items()}
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
    objective = pqi.Objective(model, layers, tokens)
    return objective.loss(quantized) - objective.loss()


def test_signed_sum_predicts_the_change_of_loss(setting) -> None:  # type: ignore[no-untyped-def]
    model, layers, quantized, tokens = setting
    actual = _delta_loss(setting)
    error = {}
    for nodes in (1, 2, 4, 8):
        integral = pqi.Objective(model, layers, tokens).integrate(quantized, rule="gauss", nodes=nodes)
        error[nodes] = abs(sum(integral.predicted().values()) - actual) / abs(actual)
    assert error[8] < 5e-3, error
    assert error[8] < error[4] < error[1], error
    # first order, the gradient at w alone, is far off: this is why the integral exists
    first_order = pqi.Objective(model, layers, tokens).integrate(quantized, rule="uniform", nodes=2)
    assert abs(sum(first_order.predicted().values()) - actual) / abs(actual) > error[8]


def test_divergence_from_the_original_is_predicted_too(setting) -> None:  # type: ignore[no-untyped-def]
    model, layers, quantized, tokens = setting
    objective = pqi.Objective(model, layers, tokens, labels="model")
    assert objective.loss() == 0
    assert objective.loss(objective.start) == pytest.approx(0, abs=1e-7)
    actual = objective.loss(quantized)
    # by its definition, the long way
    original = torch.log_softmax(model(tokens).logits[:, :-1], -1)
    for name, layer in layers.items():
        layer.weight.data, quantized[name] = quantized[name], layer.weight.data
    moved = torch.log_softmax(model(tokens).logits[:, :-1], -1)
    for name, layer in layers.items():
        layer.weight.data, quantized[name] = quantized[name], layer.weight.data
    assert actual == pytest.approx(float((original.exp() * (original - moved)).sum(-1).mean()), rel=1e-4)
    share = objective.integrate(quantized, nodes=8).predicted()
    assert sum(share.values()) == pytest.approx(actual, rel=5e-3)
    # the gradient vanishes at w; moments there are the text's all the same
    assert float(max(square.max() for square in objective.gradients().square.values())) > 1e-6


def test_predictions_of_the_original_are_made_once(setting, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    model, layers, quantized, tokens = setting
    objective = pqi.Objective(model, layers, tokens, labels="model")
    first = objective.loss(quantized)
    asked = []
    hook = model.register_forward_hook(lambda *_: asked.append(1))
    try:
        assert objective.loss(quantized) == first
        assert len(asked) == len(tokens)
        # what does not fit is made again
        monkeypatch.setattr(pqi, "_KEPT_BYTES", 0)
        fresh = pqi.Objective(model, layers, tokens, labels="model")
        assert [fresh.loss(quantized), fresh.loss(quantized)] == [first, first]
        assert len(asked) == 5 * len(tokens)
    finally:
        hook.remove()


def _gradient(model, layer, weights, row):  # type: ignore[no-untyped-def]
    """One gradient of one sequence, the long way."""
    layers = find_layers(model)
    saved = {name: la.weight.data for name, la in layers.items()}
    for name, la in layers.items():
        la.weight.data = weights[name]
    layer.weight.requires_grad_(True)
    logits = model(row[None]).logits[0, :-1]
    loss = torch.nn.functional.cross_entropy(logits, row[1:])
    gradient = torch.autograd.grad(loss, layer.weight)[0]
    layer.weight.requires_grad_(False)
    for name, la in layers.items():
        la.weight.data = saved[name]
    return gradient


def test_scores_are_the_definitions(setting) -> None:  # type: ignore[no-untyped-def]
    model, layers, quantized, tokens = setting
    path = pqi.Objective(model, layers, tokens).integrate(quantized, rule="midpoint", nodes=2, squares=True)
    start = pqi.Objective(model, layers, tokens).gradients()
    name = list(layers)[3]
    weight = layers[name].weight.data.clone()
    delta = quantized[name] - weight
    at_start, along = [], []
    for row in tokens:
        at_start.append(_gradient(model, layers[name], {n: la.weight.data for n, la in layers.items()}, row))
        halves = [
            {n: la.weight.data + t * (quantized[n] - la.weight.data) for n, la in layers.items()} for t in (0.25, 0.75)
        ]
        along.append(sum(0.5 * _gradient(model, layers[name], moved, row) for moved in halves))
    expected = {
        "pqi": (delta * torch.stack(along).mean(0)).abs(),
        "path-fisher": delta**2 * torch.stack(along).square().mean(0),
        "fisher": delta**2 * torch.stack(at_start).square().mean(0),
        "pqi-fisher": delta**2 * torch.stack(at_start).square().mean(0),
        "first-order": (delta * torch.stack(at_start).mean(0)).abs(),
        "magnitude": weight.abs(),
    }
    known = Sensitivity.of(name, weight, delta, start, path, torch.Generator())
    for metric, values in expected.items():
        torch.testing.assert_close(METRICS[metric].score(known), values, rtol=1e-3, atol=1e-9)
    random = METRICS["random"].score(known)
    assert 0.45 < random.mean() < 0.55
    # layers: the paper's algorithm 1 looks at the mean score, ours at the layer's exact part of ΔF
    assert METRICS["pqi"].level(known) == pytest.approx(float(expected["pqi"].mean()), rel=1e-3)
    part = float((delta * torch.stack(along).mean(0)).sum())
    assert METRICS["pqi-fisher"].level(known) == pytest.approx(part / delta.numel(), rel=1e-3)
    assert METRICS["pqi-fisher"].splits["PQI"](known) == pytest.approx(part, rel=1e-3)


def test_a_metric_demands_what_it_needs(setting) -> None:  # type: ignore[no-untyped-def]
    model, layers, quantized, tokens = setting
    name = next(iter(layers))
    path = pqi.Objective(model, layers, tokens).integrate(quantized, nodes=1)
    known = Sensitivity.of(name, layers[name].weight.data, quantized[name], None, path, torch.Generator())
    for metric in ("path-fisher", "fisher", "first-order"):
        with pytest.raises(ValueError, match="not collected"):
            METRICS[metric].score(known)


def test_cached_moments_are_the_computed_ones(setting, tmp_path) -> None:  # type: ignore[no-untyped-def]
    model, layers, quantized, tokens = setting
    cache = TensorCache(tmp_path)
    first, again = (pqi.Objective(model, layers, tokens).integrate(quantized, nodes=2, cache=cache) for _ in range(2))
    assert len(list(tmp_path.rglob("*.safetensors"))) == len(layers)
    other = {**quantized, (name := next(iter(layers))): quantized[name] + 1e-3}
    pqi.Objective(model, layers, tokens).integrate(other, nodes=2, cache=cache)
    pqi.Objective(model, layers, tokens).integrate(quantized, nodes=3, cache=cache)
    pqi.Objective(model, layers, tokens[:2]).integrate(quantized, nodes=2, cache=cache)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 4 * len(layers)
    for name in layers:
        assert torch.equal(first.moments.gradient[name], again.moments.gradient[name])
    # a damaged entry is computed anew
    for path in tmp_path.rglob("*.safetensors"):
        path.write_bytes(b"broken")
    repaired = pqi.Objective(model, layers, tokens).integrate(quantized, nodes=2, cache=cache)
    assert torch.equal(repaired.moments.gradient[name], first.moments.gradient[name])


def test_model_is_left_as_it_was(setting) -> None:  # type: ignore[no-untyped-def]
    model, layers, quantized, tokens = setting
    before = {name: layer.weight.clone() for name, layer in layers.items()}
    pqi.Objective(model, layers, tokens).integrate(quantized, nodes=1)
    pqi.Objective(model, layers, tokens).gradients()
    for name, layer in layers.items():
        assert torch.equal(layer.weight, before[name])
        assert layer.weight.grad is None
        assert not layer.weight.requires_grad
        assert "forward" not in vars(layer)


@pytest.mark.parametrize("architecture", sorted(tiny.CONFIGS))
def test_every_architecture_predicts(architecture: str) -> None:
    """Biases, fused layers and shared inputs included: the loss is the model's own, and the path ends at w̃."""
    # where a token is sent to other experts the loss jumps, which no integral sees: all tokens to all experts
    model = tiny.model(architecture, **({"num_experts_per_tok": 4} if architecture in MIXTURES else {}))
    separate_experts(model)
    model.requires_grad_(False)
    layers = find_layers(model)
    tokens = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(1))
    objective = pqi.Objective(model, layers, tokens)
    expected = [model(row[None], labels=row[None]).loss for row in tokens]
    assert objective.loss() == pytest.approx(float(torch.stack(expected).mean()), rel=1e-5)
    end = {name: layer.weight * 0.9 for name, layer in layers.items()}
    actual = objective.loss(end) - objective.loss()
    assert sum(objective.integrate(end, nodes=6).predicted().values()) == pytest.approx(actual, rel=2e-2)


def test_checkpointing_and_offloading_change_nothing(setting) -> None:  # type: ignore[no-untyped-def]
    model, layers, quantized, tokens = setting
    plain = pqi.Objective(model, layers, tokens).integrate(quantized, nodes=2, squares=True)
    sparing = pqi.Objective(model, layers, tokens, checkpointing=True, accumulate_on="cpu")
    other = sparing.integrate(quantized, nodes=2, squares=True)
    for name in layers:
        torch.testing.assert_close(other.moments.gradient[name], plain.moments.gradient[name])
        torch.testing.assert_close(other.moments.square[name], plain.moments.square[name])
    assert not model.training and not model.is_gradient_checkpointing


def test_mixed_precision_predicts_its_own_loss(setting) -> None:  # type: ignore[no-untyped-def]
    model, layers, quantized, tokens = setting
    exact, mixed = (pqi.Objective(model, layers, tokens, compute=compute) for compute in COMPUTE_DTYPES)
    integral = mixed.integrate(quantized, nodes=8)
    actual = mixed.loss(quantized) - mixed.loss()
    assert actual != exact.loss(quantized) - exact.loss(), "it did compute in another precision"
    assert sum(integral.predicted().values()) == pytest.approx(actual, rel=0.05)
    name = list(layers)[2]
    assert integral.moments.gradient[name].dtype == torch.float32
