"""Random quantized layers, vLLM configs that name them, and loading as vLLM's loaders do it."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from tests.format import builders
from vllm_requant.format import CheckpointConfig, QuantizedLayer

RankSetter = Callable[[int, int], None]

FORMATS = {
    "uniform4": {"kind": "uniform", "bits": 4, "group_size": 32, "density": 0.0},
    "uniform3-sparse": {"kind": "uniform", "bits": 3, "group_size": 128, "density": 0.02},
    "lut3": {"kind": "lut", "bits": 3, "density": 0.0},
    "lut4-sparse": {"kind": "lut", "bits": 4, "density": 0.02},
    "trellis2-sparse": {"kind": "trellis", "bits": 2, "density": 0.02},
}

BY_ROW = {name: fmt for name, fmt in FORMATS.items() if fmt["kind"] != "trellis"}
"""The formats whose rows stand alone: what embeddings need."""


def random_layer(
    rows: int, columns: int, *, kind: str, bits: int, group_size: int = 0, density: float = 0.0, seed: int = 0
) -> QuantizedLayer:
    """A layer with codes, scales, zero points or tables, and sparse elements drawn at random."""
    layer, _, _ = builders.random_layer(
        kind, bits, rows, columns, density=density, group_size=group_size or 64, seed=seed
    )
    return layer


def quant_config(layers: Mapping[str, QuantizedLayer], packed: Mapping[str, list[str]] | None = None):
    """The vLLM config of a checkpoint with these layers, for a model that fuses as ``packed`` says."""
    from vllm_requant.serving.config import RequantConfig

    checkpoint = CheckpointConfig(layers={name: layer.spec for name, layer in layers.items()})
    config = RequantConfig.from_config(checkpoint.model_dump(mode="json"))
    config.packed_modules_mapping = dict(packed or {})
    return config


def load(
    module: torch.nn.Module, shards: Mapping[str | int | tuple[int, ...] | None, QuantizedLayer]
) -> torch.nn.Module:
    """Load as a model does: fused layers through their ``load_weights``, others through ``weight_loader``.

    The tensors come in an order that mixes the shards.
    """
    stream = sorted((suffix, index) for index, s in enumerate(shards) for suffix in shards[s].tensors)
    ids = list(shards)
    for suffix, index in stream:
        tensor = shards[ids[index]].tensors[suffix].clone()
        if hasattr(module, "load_weights"):
            if ids[index] is not None:
                tensor.shard_id = ids[index]
            list(module.load_weights([(suffix, tensor)]))
        else:
            param = getattr(module, suffix)
            param.weight_loader(param, tensor)
    module.quant_method.process_weights_after_loading(module)
    return module


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Equal up to the order of float32 sums: relative to the largest output, as sums of many terms are."""
    assert actual.shape == expected.shape
    bound = 1e-5 * expected.abs().max().item()
    assert (actual - expected).abs().max().item() <= bound
