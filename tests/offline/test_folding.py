"""Folding scales changes weights, never what the model computes; statistics are those of the inputs."""

from functools import partial

import pytest
import torch

from tests import tiny
from vllm_requant.format.experts import MIXTURES, separate_experts
from vllm_requant.offline.bases import Awq
from vllm_requant.offline.folding import PAIRS, apply_fold, find_folds
from vllm_requant.offline.models import COMPUTE_DTYPES, ModelError, computing_in, find_layers
from vllm_requant.offline.pqi import Objective
from vllm_requant.offline.statistics import guided_statistics, input_statistics

ARCHITECTURES = sorted(tiny.CONFIGS)


def _model(architecture: str):  # type: ignore[no-untyped-def]
    model = tiny.model(architecture)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        # norms and biases that are not all one or zero
        if parameter.ndim == 1:
            noise = torch.randn(parameter.shape, generator=generator) * 0.3
            parameter.data = (parameter.data + noise).to(torch.bfloat16).float()
        assert torch.equal(parameter, parameter.to(torch.bfloat16).float()), name
    separate_experts(model)
    model.requires_grad_(False)
    return model


def _tokens() -> torch.Tensor:
    return torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_folding_leaves_the_function_alone(architecture: str) -> None:
    model = _model(architecture)
    before = model(_tokens()).logits
    weights = {name: layer.weight.data.clone() for name, layer in find_layers(model).items()}
    generator = torch.Generator().manual_seed(1)
    # rounded routers may send a token elsewhere
    dtype = torch.float32 if architecture in MIXTURES else torch.bfloat16
    touched = set()
    for fold in find_folds(model):
        scale = torch.rand(fold.channels, generator=generator) * 4 + 0.25
        applied = apply_fold(fold, scale, dtype)
        # a norm's weight is rounded, so its scale moves by a rounding of bfloat16 or two
        torch.testing.assert_close(applied, scale, rtol=0.05, atol=0)
        touched |= set(fold.consumers)
    assert touched == set(weights), "every layer consumes some channel"
    torch.testing.assert_close(model(_tokens()).logits, before, rtol=2e-4, atol=2e-4)
    for name, layer in find_layers(model).items():
        assert not torch.allclose(layer.weight, weights[name], rtol=0.05)
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("gate.weight"):
            assert torch.equal(parameter, parameter.to(dtype).float()), f"{name} must be storable"


def test_a_norm_that_switches_a_channel_off_survives() -> None:
    model = _model("llama")
    model.model.layers[0].input_layernorm.weight.data[5] = 0.0
    before = model(_tokens()).logits
    for fold in find_folds(model):
        apply_fold(fold, torch.full((fold.channels,), 3.0), torch.bfloat16)
    torch.testing.assert_close(model(_tokens()).logits, before, rtol=2e-4, atol=2e-4)


def test_grouped_query_heads_share_the_scale_of_their_value_head() -> None:
    model = _model("llama")
    heads, kv_heads, size = 4, 2, 16
    fold = next(f for f in find_folds(model) if "o_proj" in next(iter(f.consumers)))
    assert fold.channels == kv_heads * size
    spread = fold.spread(torch.arange(fold.channels).float()).view(heads, size)
    assert torch.equal(spread[0], spread[1])
    assert torch.equal(spread[2], spread[3])
    assert spread[2, 0] == size
    values = torch.rand(heads * size)
    expected = values.view(kv_heads, 2, size).mean(1).flatten()
    torch.testing.assert_close(fold.per_channel(values), expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_awq_scales_lower_the_output_error_they_are_chosen_by(architecture: str) -> None:
    model = _model(architecture)
    layers = find_layers(model)
    inputs = input_statistics(model, layers, _tokens())
    base = Awq(3, 32)
    better = 0
    for fold in find_folds(model):
        weights = [layer.weight.data for layer in fold.consumers.values()]
        statistics = [inputs[name] for name in fold.consumers]
        scale = base.fold_scale(fold, inputs)
        assert (scale > 0).all()
        chosen = base._loss(weights, fold.spread(scale), statistics)
        plain = base._loss(weights, torch.ones(weights[0].shape[1]), statistics)
        assert chosen <= plain
        better += chosen < plain
    assert better


@pytest.mark.parametrize("architecture", ["qwen2", "phi3"])
def test_guided_statistics_weight_tokens_by_squared_gradients(architecture: str) -> None:
    model = _model(architecture)
    layers = find_layers(model)
    tokens = _tokens()
    objective = Objective(model, layers, tokens)
    gradients, result = guided_statistics(objective)
    expected = {name: torch.zeros_like(result[name].hessian) for name in layers}
    for row in tokens:
        seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

        def keep(layer, x, out, *, name, seen=seen):  # type: ignore[no-untyped-def]
            out.retain_grad()
            seen[name] = x[0], out

        hooks = [layer.register_forward_hook(partial(keep, name=name)) for name, layer in layers.items()]
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        logits = model(row[None]).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum").backward()
        for hook in hooks:
            hook.remove()
        for name, (x, out) in seen.items():
            scale = len(row) / (len(row) - 1)  # of the mean over predicted tokens
            importance = (out.grad[0] * scale).square().mean(1)
            expected[name] += torch.einsum("t,ti,tj->ij", importance, x[0], x[0]).detach() / tokens.numel()
        model.zero_grad()
        model.requires_grad_(False)
    for name, hessian in expected.items():
        torch.testing.assert_close(result[name].hessian, hessian, rtol=1e-3, atol=1e-5 * float(hessian.max()))
    plain = objective.gradients()
    for name in layers:
        torch.testing.assert_close(gradients.square[name], plain.square[name])
        torch.testing.assert_close(gradients.gradient[name], plain.gradient[name])


def test_unknown_architecture_is_refused_by_name() -> None:
    model = tiny.model("llama")
    model.config.model_type = "frobnicator"
    with pytest.raises(ModelError, match=r"frobnicator models; it covers .*llama.*phi3"):
        list(find_folds(model))
    assert "llama" in PAIRS


@pytest.mark.parametrize("compute", COMPUTE_DTYPES)
@pytest.mark.parametrize("architecture", ["llama", "phi3", "gemma3"])
def test_statistics_are_those_of_the_inputs(architecture: str, compute: str) -> None:
    model = tiny.model(architecture)
    layers = find_layers(model)
    captured: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
    hooks = [
        layer.register_forward_pre_hook(lambda _, x, n=name: captured[n].append(x[0].flatten(0, -2).float()))
        for name, layer in layers.items()
    ]
    with computing_in(compute, torch.device("cpu")):
        for row in _tokens():
            model(row[None])
    for hook in hooks:
        hook.remove()
    result = input_statistics(model, layers, _tokens(), compute=compute)
    for name, parts in captured.items():
        x = torch.cat(parts)
        torch.testing.assert_close(result[name].hessian, x.t() @ x / len(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(result[name].mean_abs, x.abs().mean(0))
    # siblings share, and nothing else does
    distinct = len({id(value) for value in result.values()})
    assert distinct == 4 * len(model.model.layers)
    scaled = result[name].scaled(torch.full((len(result[name].mean_abs),), 2.0))
    torch.testing.assert_close(scaled.hessian, 4 * result[name].hessian)
    assert not any(layer._forward_pre_hooks for layer in layers.values())
