"""Every rank of every tensor-parallel size computes its part of ``x · Wᵀ``, through vLLM's own loaders."""

import pytest
import torch
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

from tests import tiny
from tests.serving.vllm_layers import FORMATS, assert_close, load, quant_config, random_layer
from vllm_requant.format import QuantizedLayer
from vllm_requant.offline.models import find_layers
from vllm_requant.offline.serving_memory import ServedModel

pytestmark = pytest.mark.parametrize("tp", [1, 2, 4])
formats = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
HIDDEN = 256
QKV = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}


def inputs(features: int = HIDDEN) -> torch.Tensor:
    return torch.randn(5, features, generator=torch.Generator().manual_seed(7))


def outputs_per_rank(as_rank, tp, build, shards, layers, packed=None) -> list[torch.Tensor]:
    """What each rank's freshly built and loaded layer makes of the same input."""
    result = []
    for rank in range(tp):
        as_rank(rank, tp)
        module = load(build(quant_config(layers, packed)), shards)
        result.append(module(inputs())[0])
    return result


@formats
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_qkv_with_grouped_and_replicated_kv_heads(as_rank, tp, fmt, kv_heads):
    heads, size = 4, 32
    layers = {
        f"a.{name}_proj": random_layer(count * size, HIDDEN, seed=seed, **fmt)
        for seed, (name, count) in enumerate({"q": heads, "k": kv_heads, "v": kv_heads}.items())
    }
    shards = dict(zip("qkv", layers.values(), strict=True))
    outputs = outputs_per_rank(
        as_rank,
        tp,
        lambda config: QKVParallelLinear(
            HIDDEN, size, heads, kv_heads, bias=False, quant_config=config, prefix="a.qkv_proj"
        ),
        shards,
        layers,
        QKV,
    )
    full = {name: inputs() @ layer.weight().T for name, layer in shards.items()}
    local = {"q": heads // tp, "k": max(1, kv_heads // tp), "v": max(1, kv_heads // tp)}
    for rank, output in enumerate(outputs):
        # heads that do not suffice for all ranks are repeated, neighbouring ranks sharing one
        first = {"q": rank * local["q"], "k": rank * kv_heads // tp, "v": rank * kv_heads // tp}
        expected = [full[n][:, first[n] * size : (first[n] + local[n]) * size] for n in "qkv"]
        assert_close(output, torch.cat(expected, dim=1))


@formats
def test_prefused_qkv(as_rank, tp, fmt):
    """Phi-3 stores one matrix with all of q, then k, then v; a rank needs three ranges of its rows."""
    heads, kv_heads, size = 4, 2, 32
    layer = random_layer((heads + 2 * kv_heads) * size, HIDDEN, **fmt)
    outputs = outputs_per_rank(
        as_rank,
        tp,
        lambda config: QKVParallelLinear(
            HIDDEN, size, heads, kv_heads, bias=False, quant_config=config, prefix="a.qkv_proj"
        ),
        {None: layer},
        {"a.qkv_proj": layer},
    )
    q, k, v = (inputs() @ layer.weight().T).split([heads * size, kv_heads * size, kv_heads * size], dim=1)
    n, m = heads // tp * size, max(1, kv_heads // tp) * size
    for rank, output in enumerate(outputs):
        at = rank * kv_heads // tp * size
        expected = [q[:, rank * n : (rank + 1) * n], k[:, at : at + m], v[:, at : at + m]]
        assert_close(output, torch.cat(expected, dim=1))


def merged(config, sizes, **kwargs):
    return MergedColumnParallelLinear(HIDDEN, sizes, bias=False, quant_config=config, prefix="m.gate_up_proj", **kwargs)


def gather(outputs: list[torch.Tensor], sizes: list[int]) -> torch.Tensor:
    """The outputs of a merged layer as if it had not been split."""
    parts = [output.split([size // len(outputs) for size in sizes], dim=1) for output in outputs]
    return torch.cat([torch.cat(column, dim=1) for column in zip(*parts, strict=True)], dim=1)


@formats
def test_merged_column(as_rank, tp, fmt):
    sizes = [64, 128]
    gate, up = (random_layer(size, HIDDEN, seed=size, **fmt) for size in sizes)
    layers = {"m.gate_proj": gate, "m.up_proj": up}
    outputs = outputs_per_rank(
        as_rank,
        tp,
        lambda config: merged(config, sizes),
        {0: gate, 1: up},
        layers,
        {"gate_up_proj": ["gate_proj", "up_proj"]},
    )
    expected = torch.cat([inputs() @ gate.weight().T, inputs() @ up.weight().T], dim=1)
    assert_close(gather(outputs, sizes), expected)


@pytest.mark.parametrize(
    "other",
    [
        FORMATS["lut3"],
        {"kind": "uniform", "bits": 2, "group_size": 32},
        {"kind": "uniform", "bits": 4, "group_size": 64},
    ],
    ids=["kind", "bits", "group"],
)
def test_merged_column_of_two_formats(as_rank, tp, other):
    """Siblings in different formats stay one vLLM layer."""
    sizes = [64, 64]
    gate, up = random_layer(64, HIDDEN, **FORMATS["uniform4"]), random_layer(64, HIDDEN, seed=1, **other)
    outputs = outputs_per_rank(
        as_rank,
        tp,
        lambda config: merged(config, sizes),
        {0: gate, 1: up},
        {"m.gate_proj": gate, "m.up_proj": up},
        {"gate_up_proj": ["gate_proj", "up_proj"]},
    )
    expected = torch.cat([inputs() @ gate.weight().T, inputs() @ up.weight().T], dim=1)
    assert_close(gather(outputs, sizes), expected)


def test_trellis_siblings_with_other_input_signs_are_segments_of_their_own(as_rank, tp):
    sizes = [64, 64]
    gate, up = (random_layer(64, HIDDEN, seed=seed, **FORMATS["trellis2-sparse"]) for seed in (0, 1))
    up.tensors["signs_in"].bitwise_not_()
    modules = []

    def build(config):
        modules.append(merged(config, sizes))
        return modules[-1]

    layers = {"m.gate_proj": gate, "m.up_proj": up}
    outputs = outputs_per_rank(as_rank, tp, build, {0: gate, 1: up}, layers, {"gate_up_proj": ["gate_proj", "up_proj"]})
    assert all(len(module.quant_method.segments) == 2 for module in modules)
    expected = torch.cat([inputs() @ gate.weight().T, inputs() @ up.weight().T], dim=1)
    assert_close(gather(outputs, sizes), expected)


def test_rows_inside_a_hadamard_block_are_refused_before_loading(as_rank, tp):
    """48 rows in blocks of 16 go to one rank or to three."""
    layer = random_layer(48, HIDDEN, **FORMATS["trellis2-sparse"])
    as_rank(0, tp)

    def build():
        return ColumnParallelLinear(HIDDEN, 48, bias=False, quant_config=quant_config({"c": layer}), prefix="c")

    if tp == 1:
        build()
        return
    with pytest.raises(ValueError, match=r"c: .*48 output features.*multiple of 16"):
        build()


def test_merged_column_stored_in_uneven_pieces(as_rank, tp):
    """Two stored modules that hold three partitions: one arrives under a tuple of shard ids."""
    sizes = [32, 64, 16]
    pair, single = (
        random_layer(96, HIDDEN, **FORMATS["lut4-sparse"]),
        random_layer(16, HIDDEN, **FORMATS["lut3"]),
    )
    outputs = outputs_per_rank(
        as_rank,
        tp,
        lambda config: merged(config, sizes),
        {(0, 1): pair, 2: single},
        {"m.pair": pair, "m.single": single},
        {"gate_up_proj": ["pair", "single"]},
    )
    expected = torch.cat([inputs() @ pair.weight().T, inputs() @ single.weight().T], dim=1)
    assert_close(gather(outputs, sizes), expected)


def with_bias(module: torch.nn.Module, bias: torch.Tensor) -> torch.nn.Module:
    module.bias.weight_loader(module.bias, bias)
    return module


@formats
def test_column_parallel_with_bias(as_rank, tp, fmt):
    layer, bias = random_layer(128, HIDDEN, **fmt), torch.randn(128)
    outputs = outputs_per_rank(
        as_rank,
        tp,
        lambda config: with_bias(ColumnParallelLinear(HIDDEN, 128, bias=True, quant_config=config, prefix="c"), bias),
        {None: layer},
        {"c": layer},
    )
    assert_close(torch.cat(outputs, dim=1), inputs() @ layer.weight().T + bias)


@formats
@pytest.mark.parametrize("features", [HIDDEN, 384])
def test_row_parallel_with_bias(as_rank, tp, fmt, features):
    """384 / 4 = 96 cuts groups of 128 in two; the bias counts once."""
    layer, bias, x = random_layer(48, features, **fmt), torch.randn(48), inputs(features)
    outputs = []
    for rank in range(tp):
        as_rank(rank, tp)
        module = RowParallelLinear(
            features,
            48,
            bias=True,
            quant_config=quant_config({"r": layer}),
            prefix="r",
            input_is_parallel=False,
        )
        outputs.append(load(with_bias(module, bias), {None: layer})(x)[0])
    assert_close(sum(outputs), x @ layer.weight().T + bias)


@formats
def test_replicated_and_disabled_tensor_parallelism(as_rank, tp, fmt):
    layer = random_layer(64, HIDDEN, **fmt)
    for build in (
        lambda config: ReplicatedLinear(HIDDEN, 64, bias=False, quant_config=config, prefix="r"),
        lambda config: ColumnParallelLinear(HIDDEN, 64, bias=False, quant_config=config, prefix="r", disable_tp=True),
        lambda config: RowParallelLinear(HIDDEN, 64, bias=False, quant_config=config, prefix="r", disable_tp=True),
    ):
        for output in outputs_per_rank(as_rank, tp, build, {None: layer}, {"r": layer}):
            assert_close(output, inputs() @ layer.weight().T)


def test_a_rank_keeps_only_its_part(as_rank, tp):
    """After loading no parameter of a layer is as large as the unsplit matrix, and the stash is gone."""
    layer: QuantizedLayer = random_layer(64, HIDDEN, **FORMATS["uniform3-sparse"])
    as_rank(tp - 1, tp)
    build = ColumnParallelLinear(HIDDEN, 64, bias=False, quant_config=quant_config({"c": layer}), prefix="c")
    names = {name for name, _ in build.named_parameters()}
    assert names == set(layer.tensors) and all(p.numel() == 0 for p in build.parameters())
    module = load(build, {None: layer})
    assert not any(name in layer.tensors for name, _ in module.named_parameters())
    assert [segment.in_features for segment in module.quant_method.segments] == [HIDDEN]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_output_has_the_dtype_of_the_input(as_rank, tp, dtype):
    layer, bias = random_layer(64, HIDDEN, **FORMATS["uniform4"]), torch.zeros(64)
    as_rank(0, tp)
    module = with_bias(
        ColumnParallelLinear(HIDDEN, 64, bias=True, quant_config=quant_config({"c": layer}), prefix="c"), bias
    )
    # more than two dimensions, as some models call it
    output = load(module, {None: layer})(inputs().to(dtype)[None])[0]
    assert output.dtype == dtype and output.shape == (1, 5, 64 // tp)


@formats
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_a_rank_holds_what_a_dry_run_foretells(as_rank, tp, fmt, kv_heads):
    """Of two layers whose siblings vLLM computes as one, and of one that is split by columns."""
    heads, size, inner = 4, 32, 384
    source = tiny.model(
        hidden_size=HIDDEN,
        intermediate_size=inner,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=size,
    )
    layers = {
        name: random_layer(linear.out_features, linear.in_features, seed=seed, **fmt)
        for seed, (name, linear) in enumerate(find_layers(source).items())
    }
    served = ServedModel(source, {name: layer.spec for name, layer in layers.items()})
    packed = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
    block = "model.layers.0"
    assert served.objection(tp) is None
    held = []
    for rank in range(tp):
        as_rank(rank, tp)
        config = quant_config(layers, packed)
        attention, mlp = f"{block}.self_attn", f"{block}.mlp"
        o_proj = f"{attention}.o_proj"
        sizes = (HIDDEN, size, heads, kv_heads)
        modules = [
            (QKVParallelLinear(*sizes, bias=False, quant_config=config, prefix=f"{attention}.qkv_proj"), "qkv"),
            (
                RowParallelLinear(heads * size, HIDDEN, bias=False, quant_config=config, prefix=f"{attention}.o_proj"),
                "o",
            ),
            (
                MergedColumnParallelLinear(
                    HIDDEN, [inner, inner], bias=False, quant_config=config, prefix=f"{mlp}.gate_up_proj"
                ),
                "gate_up",
            ),
            (RowParallelLinear(inner, HIDDEN, bias=False, quant_config=config, prefix=f"{mlp}.down_proj"), "down"),
        ]
        shards = {
            "qkv": {shard: layers[f"{attention}.{shard}_proj"] for shard in "qkv"},
            "o": {None: layers[o_proj]},
            "gate_up": {shard: layers[f"{mlp}.{name}_proj"] for shard, name in enumerate(("gate", "up"))},
            "down": {None: layers[f"{mlp}.down_proj"]},
        }
        for module, name in modules:
            load(module, shards[name])
        held.append(sum(config.loading._weight_bytes.values()))
    # how many sparse elements a row has is chance
    assert served.quantized_bytes(tp, "cpu") == pytest.approx(max(held), rel=0.03 if fmt["density"] else 0)
