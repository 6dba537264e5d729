"""Quantized experts through vLLM's own loader: every rank of tensor and expert parallelism computes its part."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEParallelConfig, RoutingMethodType
from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager

from tests.serving.vllm_layers import FORMATS, assert_close, quant_config, random_layer
from vllm_requant.format import QuantizedLayer, ReQuantFormatError
from vllm_requant.kernels.bench.layers import Format, weight_of
from vllm_requant.kernels.gpu import weights as gpu_weights
from vllm_requant.serving import experts as serving
from vllm_requant.serving import segments

EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 4, 2, 64, 128
PREFIX = "model.layers.0.mlp.experts"
NAMES = {"gate_proj": (INTERMEDIATE, HIDDEN), "up_proj": (INTERMEDIATE, HIDDEN), "down_proj": (HIDDEN, INTERMEDIATE)}
formats = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)


def stored(fmt: dict[str, Any], **changed: dict[str, Any]) -> dict[str, QuantizedLayer]:
    """All matrices of all experts of one format; ``changed`` gives others to matrices of a name."""
    return {
        f"{PREFIX}.{number}.{name}": random_layer(*NAMES[name], seed=3 * number + i, **changed.get(name, fmt))
        for number in range(EXPERTS)
        for i, name in enumerate(NAMES)
    }


def parallel(ranks: int = 1, rank: int = 0, *, experts: bool = False) -> FusedMoEParallelConfig:
    tensor, expert = ((1, 0), (ranks, rank)) if experts else ((ranks, rank), (1, 0))
    return FusedMoEParallelConfig(
        tp_size=tensor[0],
        tp_rank=tensor[1],
        ep_size=expert[0],
        ep_rank=expert[1],
        use_ep=experts,
        **dict.fromkeys(("pcp_size", "dp_size", "sp_size"), 1),
        **dict.fromkeys(("pcp_rank", "dp_rank"), 0),
        all2all_backend="allgather_reducescatter",
        enable_eplb=False,
    )


def build(config: Any, place: FusedMoEParallelConfig, **options: Any) -> RoutedExperts:
    manager = ExpertMapManager(64, TOP_K, EXPERTS, 0, None, place, "linear", enable_eplb=False)
    moe = FusedMoEConfig(
        num_experts=EXPERTS,
        experts_per_token=TOP_K,
        hidden_dim=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_local_experts=manager.local_num_experts,
        num_logical_experts=EXPERTS,
        activation=options.pop("activation", MoEActivation.SILU),
        device="cpu",
        routing_method=RoutingMethodType.Renormalize,
        moe_parallel_config=place,
        in_dtype=torch.float32,
        **options,
    )
    with set_current_vllm_config(VllmConfig()):
        return RoutedExperts(PREFIX, torch.float32, moe, config, expert_map_manager=manager)


def load(module: RoutedExperts, layers: dict[str, QuantizedLayer]) -> RoutedExperts:
    """The tensors come in an order that mixes experts and matrices."""
    stream = sorted((suffix, name) for name, layer in layers.items() for suffix in layer.tensors)
    for suffix, name in stream:
        tensor = layers[name].tensors[suffix].clone()
        list(module.load_weights([(f"{name.removeprefix(f'{PREFIX}.')}.{suffix}", tensor)]))
    module.quant_method.process_weights_after_loading(module)
    return module


def routed(tokens: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, and for each token two experts and their weights; expert 3 gets none."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(tokens, HIDDEN, generator=generator)
    ids = torch.rand(tokens, EXPERTS - 1, generator=generator).argsort(1)[:, :TOP_K]
    return x, torch.rand(tokens, TOP_K, generator=generator), ids


def expected(
    layers: dict[str, QuantizedLayer],
    x: Tensor,
    routing: Tensor,
    ids: Tensor,
    act: Callable[[Tensor], Tensor] = nn.functional.silu,
) -> Tensor:
    result = torch.zeros_like(x)
    for token, (row, weights, numbers) in enumerate(zip(x, routing, ids.tolist(), strict=True)):
        for weight, number in zip(weights, numbers, strict=True):
            gate, up, down = (layers[f"{PREFIX}.{number}.{name}"].weight() for name in NAMES)
            result[token] += weight * (down @ (act(gate @ row) * (up @ row)))
    return result


def outputs(module: RoutedExperts, x: Tensor, routing: Tensor, ids: Tensor) -> Tensor:
    return module.quant_method.apply(module, x, routing, ids, None, None)


@formats
@pytest.mark.parametrize(("ranks", "by_experts"), [(1, False), (2, False), (2, True), (4, True)])
def test_ranks_add_up(fmt: dict[str, Any], ranks: int, by_experts: bool) -> None:
    layers = stored(fmt)
    parts = [
        outputs(load(build(quant_config(layers), parallel(ranks, rank, experts=by_experts)), layers), *routed())
        for rank in range(ranks)
    ]
    assert_close(torch.stack(parts).sum(0), expected(layers, *routed()))
    assert all(part.abs().max() > 0 for part in parts[:2]), "every rank but that of the idle expert has its part"


def test_a_residual_of_one_expert_alone() -> None:
    """vLLM offers its tensors to every rank."""
    layers = stored(FORMATS["uniform4"])
    layers |= {f"{PREFIX}.1.down_proj": random_layer(HIDDEN, INTERMEDIATE, **FORMATS["uniform4"] | {"density": 0.02})}
    parts = [
        outputs(load(build(quant_config(layers), parallel(4, rank, experts=True)), layers), *routed())
        for rank in range(4)
    ]
    assert_close(torch.stack(parts).sum(0), expected(layers, *routed()))


def test_matrices_of_different_formats() -> None:
    """A search for a size gives every matrix bits of its own."""
    layers = stored(FORMATS["lut4-sparse"], up_proj=FORMATS["lut3"], down_proj=FORMATS["uniform3-sparse"])
    module = load(build(quant_config(layers), parallel()), layers)
    assert_close(outputs(module, *routed()), expected(layers, *routed()))


@pytest.mark.parametrize(
    ("activation", "function"),
    [
        (MoEActivation.GELU, nn.functional.gelu),
        (MoEActivation.GELU_TANH, lambda x: nn.functional.gelu(x, approximate="tanh")),
    ],
)
def test_other_activations(activation: MoEActivation, function: Callable[[Tensor], Tensor]) -> None:
    layers = stored(FORMATS["uniform4"])
    module = load(build(quant_config(layers), parallel(), activation=activation), layers)
    assert_close(outputs(module, *routed()), expected(layers, *routed(), function))


def test_a_token_alone_has_the_result_that_it_has_among_others() -> None:
    layers = stored(FORMATS["lut4-sparse"])
    module = load(build(quant_config(layers), parallel()), layers)
    together = outputs(module, *routed())
    for token in range(len(together)):
        alone = outputs(module, *(tensor[token : token + 1] for tensor in routed()))
        assert torch.equal(alone[0], together[token])


@formats
def test_every_expert_on_other_devices(fmt: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the host must not wait for the routing, all experts compute; the sum is the same."""
    layers = stored(fmt)
    with monkeypatch.context() as patch:
        # torch's reference computes on "meta"'s stand-in, the tensors themselves staying on the CPU
        patch.setattr(serving, "on_cpu", lambda device: False)
        module = load(build(quant_config(layers), parallel()), layers)
    assert module.quant_method.segments
    assert_close(outputs(module, *routed()), expected(layers, *routed()))


@pytest.mark.parametrize("name", ["uniform4", "lut4-sparse"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_chosen_experts_on_a_gpu(name: str, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of all experts lie in one, as GPUs have them; the kernels, which are tested there, are stood in for."""
    dense: list[tuple[dict[str, Tensor], Tensor]] = []

    def repack(kind: str, tensors: Any, *, bits: int, group_size: int = 0, in_features: int, **_: Any) -> Any:
        made = gpu_weights.repack(kind, tensors, None, bits=bits, in_features=in_features, device=torch.device("cpu"))
        dense.append((made, weight_of(Format(kind, bits, group_size), tensors, in_features)))
        return made

    def weight(weights: Any) -> Tensor:
        names = ("codes", "params")
        return next(w for made, w in dense if all(torch.equal(made[name], weights[name]) for name in names))

    calls: list[str] = []

    def chosen(kind: str, x: Tensor, experts: Tensor, weights: Any, *, share: int, out_features: int, **_: Any) -> Any:
        calls.append("chosen")
        y = torch.zeros(len(experts), out_features, dtype=x.dtype)
        for p, number in enumerate(experts.tolist()):
            if number >= 0:
                y[p] = (weight(gpu_weights.expert_of(weights, number)) @ x[p // share].float()).to(x.dtype)
        return y

    def every(kind: str, x: Tensor, weights: Any, **_: Any) -> Tensor:
        calls.append("every")
        return (x.float() @ weight(weights).t()).to(x.dtype)

    monkeypatch.setattr(serving, "on_cpu", lambda device: False)
    monkeypatch.setattr(serving.gpu, "serves", lambda kind, columns, device: True)
    monkeypatch.setattr(serving.gpu, "linear", chosen)
    monkeypatch.setattr(segments.kernels, "repack", repack)
    monkeypatch.setattr(segments.kernels, "linear", every)
    layers = stored(FORMATS[name])
    for dtype, experts, expected_calls in ((torch.bfloat16, ranks > 1, "chosen"), (torch.float32, False, "every")):
        parts = []
        for rank in range(ranks):
            dense.clear(), calls.clear()
            module = load(build(quant_config(layers), parallel(ranks, rank, experts=experts)), layers)
            assert module.quant_method.stacked and not module.quant_method.segments
            x, routing, ids = routed()
            parts.append(outputs(module, x.to(dtype), routing, ids).float())
            assert set(calls) == {expected_calls}
        found, right = torch.stack(parts).sum(0), expected(layers, *routed())
        assert (found - right).norm() <= (0.02 if dtype == torch.bfloat16 else 1e-5) * right.norm()


def test_bytes_of_a_step_are_those_of_a_tokens_experts() -> None:
    layers = stored(FORMATS["uniform4"])
    config = quant_config(layers)
    load(build(config, parallel()), layers)
    held = sum(config.loading._weight_bytes.values())
    assert config.loading._step_bytes == pytest.approx(held * TOP_K / EXPERTS, rel=0.01)


def test_unquantized_experts_stay_vllms() -> None:
    config = quant_config({"model.layers.0.self_attn.o_proj": random_layer(64, HIDDEN, **FORMATS["lut3"])})
    assert type(build(config, parallel()).quant_method).__name__ == "UnquantizedFusedMoEMethod"


def test_some_experts_quantized_and_some_not() -> None:
    layers = stored(FORMATS["lut3"])
    del layers[f"{PREFIX}.2.up_proj"]
    with pytest.raises(ValueError, match=r"not model\.layers\.0\.mlp\.experts\.2\.up_proj; quantize all or none"):
        build(quant_config(layers), parallel())


def test_another_size_than_the_models() -> None:
    layers = stored(FORMATS["lut3"]) | {f"{PREFIX}.1.down_proj": random_layer(HIDDEN, 96, **FORMATS["lut3"])}
    with pytest.raises(ValueError, match=r"1\.down_proj is \[64, 96\] in the checkpoint.*have \[64, 128\]"):
        build(quant_config(layers), parallel())


def test_a_split_that_does_not_fit() -> None:
    layers = stored(FORMATS["uniform4"])
    with pytest.raises(ValueError, match=r"0\.down_proj: its 128 input features cannot be split over 8.*1, 2, 4$"):
        build(quant_config(layers), parallel(8, 1))


def test_a_tensor_that_never_comes() -> None:
    layers = stored(FORMATS["lut4-sparse"])
    incomplete = dict(layers)
    del incomplete[f"{PREFIX}.2.gate_proj"]
    with pytest.raises(ReQuantFormatError, match=r"experts\.2\.gate_proj.*missing"):
        load(build(quant_config(layers), parallel()), incomplete)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"activation": MoEActivation.SWIGLUOAI}, "the activation swigluoai"),
        ({"has_bias": True}, "experts with biases"),
        ({"is_lora_enabled": True}, "LoRA adapters on experts"),
    ],
)
def test_what_is_not_implemented_is_refused(options: dict[str, Any], reason: str) -> None:
    config = quant_config(stored(FORMATS["lut3"]))
    with pytest.raises(ValueError, match=f"{reason} cannot be combined with quantized experts"):
        build(config, parallel(), **options)
