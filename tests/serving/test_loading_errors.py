"""A checkpoint that does not fit is refused with the layer's name, never served."""

import pytest
import torch
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)

from tests.serving.vllm_layers import FORMATS, load, quant_config, random_layer
from vllm_requant.format import QuantizedLayer, ReQuantFormatError

HIDDEN = 128
PACKED = {"gate_up_proj": ["gate_proj", "up_proj"]}
SPARSE = FORMATS["uniform3-sparse"]


@pytest.fixture(autouse=True)
def single_rank(as_rank):
    as_rank(0, 1)


def column(layer: QuantizedLayer, rows: int = 64) -> ColumnParallelLinear:
    return ColumnParallelLinear(HIDDEN, rows, bias=False, quant_config=quant_config({"c": layer}), prefix="c")


def merged(config) -> MergedColumnParallelLinear:
    return MergedColumnParallelLinear(HIDDEN, [64, 64], bias=False, quant_config=config, prefix="m.gate_up_proj")


@pytest.mark.parametrize("missing", random_layer(64, HIDDEN, **SPARSE).tensors)
def test_missing_tensor(missing):
    layer = random_layer(64, HIDDEN, **SPARSE)
    rest = {name: tensor for name, tensor in layer.tensors.items() if name != missing}
    with pytest.raises(ReQuantFormatError, match=f"^c: tensors missing from the checkpoint: {missing}$"):
        load(column(layer), {None: QuantizedLayer(layer.spec, rest)})


def test_missing_sibling():
    layer = random_layer(64, HIDDEN, **SPARSE)
    module = merged(quant_config({"m.gate_proj": layer, "m.up_proj": layer}, PACKED))
    with pytest.raises(ReQuantFormatError, match=r"^m.up_proj: tensors missing from the checkpoint: qweight"):
        load(module, {0: layer})


@pytest.mark.parametrize("suffix", random_layer(64, HIDDEN, **SPARSE).tensors)
def test_tensor_of_wrong_shape(suffix):
    layer = random_layer(64, HIDDEN, **SPARSE)
    tensors = layer.tensors | {suffix: layer.tensors[suffix][:-1]}
    with pytest.raises(ReQuantFormatError, match=rf"^c.{suffix}: is .* the configuration demands"):
        load(column(layer), {None: QuantizedLayer(layer.spec, tensors)})


def test_invalid_values():
    layer = random_layer(64, HIDDEN, **SPARSE)
    tensors = layer.tensors | {"sparse_indices": torch.full_like(layer.tensors["sparse_indices"], HIDDEN)}
    with pytest.raises(ReQuantFormatError, match=r"^c.sparse_indices: a column lies outside"):
        load(column(layer), {None: QuantizedLayer(layer.spec, tensors)})


def test_tensor_that_comes_twice():
    layer = random_layer(64, HIDDEN, **SPARSE)
    module = column(layer)
    module.scales.weight_loader(module.scales, layer.tensors["scales"])
    with pytest.raises(ReQuantFormatError, match=r"^c.scales: arrived twice"):
        module.scales.weight_loader(module.scales, layer.tensors["scales"])


def test_tensor_of_the_sibling_s_kind():
    """gate is uniform, up is lut: a table for gate has a parameter to go to, but does not belong there."""
    gate, up = random_layer(64, HIDDEN, **FORMATS["uniform4"]), random_layer(64, HIDDEN, **FORMATS["lut3"])
    module = merged(quant_config({"m.gate_proj": gate, "m.up_proj": up}, PACKED))
    with pytest.raises(ReQuantFormatError, match=r"^m.gate_proj.lookup_table: does not belong"):
        load(module, {0: up, 1: gate})


def test_fused_tensor_where_siblings_are_expected():
    layer = random_layer(64, HIDDEN, **SPARSE)
    module = merged(quant_config({"m.gate_proj": layer, "m.up_proj": layer}, PACKED))
    with pytest.raises(ReQuantFormatError, match=r"shard None, unknown to m.gate_proj, m.up_proj"):
        load(module, {None: layer})


@pytest.mark.parametrize(("features", "allowed"), [(192, "1, 2, 3, 6$"), (160, "1, 5$")])
def test_unaligned_row_split(as_rank, features, allowed):
    as_rank(3, 4)
    layer = random_layer(64, features, **FORMATS["uniform4"])
    with pytest.raises(ValueError, match=f"^r: its {features} input features.* over 4 .* multiple of 32.*{allowed}"):
        RowParallelLinear(features, 64, bias=False, quant_config=quant_config({"r": layer}), prefix="r")


def test_other_sizes_than_the_model_s():
    layer = random_layer(64, HIDDEN, **SPARSE)
    with pytest.raises(ValueError, match=r"^c has 64 output features.* layer has \[96\]"):
        column(layer, rows=96)
    with pytest.raises(ValueError, match=r"^c has 128 input features.* layer has 256"):
        ColumnParallelLinear(256, 64, bias=False, quant_config=quant_config({"c": layer}), prefix="c")
    config = quant_config({"m.gate_proj": layer, "m.up_proj": random_layer(32, HIDDEN, **SPARSE)}, PACKED)
    with pytest.raises(ValueError, match=r"^m.up_proj has 32 output features"):
        merged(config)


def test_partly_quantized_fused_layer():
    config = quant_config(
        {"a.q_proj": random_layer(64, HIDDEN, **SPARSE)}, {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    )
    with pytest.raises(ValueError, match=r"does not quantize a.k_proj, a.v_proj; quantize all of them or none"):
        QKVParallelLinear(HIDDEN, 16, 4, bias=False, quant_config=config, prefix="a.qkv_proj")


def test_layer_that_is_not_named_stays_ordinary():
    config = quant_config({"c": random_layer(64, HIDDEN, **SPARSE)})
    module = ColumnParallelLinear(HIDDEN, 64, bias=False, quant_config=config, prefix="d")
    assert isinstance(module.quant_method, UnquantizedLinearMethod) and module.weight.shape == (64, HIDDEN)


def test_named_layer_that_no_module_asks_for():
    layer = random_layer(64, HIDDEN, **SPARSE)
    config = quant_config({"c": layer, "model.layers.0.self_attn.o_proj": layer})
    module = ColumnParallelLinear(HIDDEN, 64, bias=False, quant_config=config, prefix="c")
    with pytest.raises(ValueError, match=r"1 quantized layers.*no quantizable module.*layers.0.self_attn.o_proj"):
        load(module, {None: layer})
