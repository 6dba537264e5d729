"""Rescaling a model without changing what it computes: a channel's producer is divided, its consumers multiplied.

AWQ (arXiv 2306.00978) finds scales under which important channels suffer less from quantization. Everything that
follows (outliers, PQI, residuals) sees the rescaled model and nothing else.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vllm_requant.format.experts import MIXTURES

from .models import ModelError, decoder_blocks

__all__ = ["PAIRS", "Fold", "Pair", "apply_fold", "find_folds"]


@dataclass(frozen=True)
class Pair:
    """Who makes a channel and who reads it, as names inside a decoder block, in which ``*`` stands for every expert.

    Attributes:
        producer: a norm or a linear layer.
        consumers: linear layers that all read exactly the producer's channels; those of an expert, of the same one.
        routers: modules that read them too and are not quantized.
        rows: which output rows of a linear producer are meant: "all", "value" (the last third of a fused q/k/v) or
            "up" (the second half of a fused gate/up). "value" rows are shared by the query heads of their group.
    """

    producer: str
    consumers: tuple[str, ...]
    rows: str = "all"
    routers: tuple[str, ...] = ()

    def places(self, experts: int) -> Iterator[tuple[str, list[str]]]:
        """Names of producers and of their consumers in a block with so many experts."""
        for number in range(experts) if "*" in self.producer else [None]:
            # a producer outside the experts feeds all of them
            readers = range(experts) if number is None else [number]
            names = [name.replace("*", str(i)) for name in self.consumers for i in (readers if "*" in name else [0])]
            yield self.producer.replace("*", str(number)), names


_ATTENTION = Pair("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
_VALUE = Pair("self_attn.v_proj", ("self_attn.o_proj",), "value")
_UP = Pair("mlp.up_proj", ("mlp.down_proj",))
_LLAMA = (_ATTENTION, _VALUE, Pair("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")), _UP)
_GEMMA = (_ATTENTION, _VALUE, Pair("pre_feedforward_layernorm", ("mlp.gate_proj", "mlp.up_proj")), _UP)


def _mixture(model_type: str, *shared: str) -> tuple[Pair, ...]:
    """Of blocks with experts, of which ``shared`` ones see every token."""
    known = MIXTURES[model_type]
    gate, up, down = (f"mlp.experts.*.{name}" for name in (known.gate, known.up, known.down))
    norm = Pair("post_attention_layernorm", (gate, up, *shared), routers=known.routers)
    return (_ATTENTION, _VALUE, norm, Pair(up, (down,)))


PAIRS: dict[str, tuple[Pair, ...]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "phi3": (
        Pair("input_layernorm", ("self_attn.qkv_proj",)),
        Pair("self_attn.qkv_proj", ("self_attn.o_proj",), "value"),
        Pair("post_attention_layernorm", ("mlp.gate_up_proj",)),
        Pair("mlp.gate_up_proj", ("mlp.down_proj",), "up"),
    ),
    "mixtral": _mixture("mixtral"),
    "qwen2_moe": (
        *_mixture("qwen2_moe", "mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
        Pair("mlp.shared_expert.up_proj", ("mlp.shared_expert.down_proj",)),
    ),
    "qwen3_moe": _mixture("qwen3_moe"),
}
"""By ``model_type``; blocks of a mixture of experts that have none are Llama's."""

_NORM_OFFSET = {"gemma": 1.0, "gemma2": 1.0, "gemma3_text": 1.0}  # these norms multiply by 1 + weight


@dataclass(frozen=True)
class Fold:
    """One place of a model where channels can be rescaled.

    Attributes:
        producer: the module.
        consumers: linear layers by full name.
        channel: int64 ``[in_features of the consumers]``: the scale that each of their input channels shares; with
            grouped-query attention several query heads read one value head.
        rows: first output row of the producer that holds channel 0, for a linear producer.
        offset: what the producer adds to its weight, for a norm.
        routers: modules with a weight ``[…, in_features]`` that read the channels and are not quantized.
    """

    producer: Any
    consumers: dict[str, nn.Linear]
    channel: Tensor
    rows: int = 0
    offset: float = 0.0
    routers: tuple[Any, ...] = ()
    channels: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "channels", int(self.channel.max()) + 1)

    def per_channel(self, values: Tensor) -> Tensor:
        """Mean over the input channels that share a scale: ``[in_features]`` to ``[channels]``."""
        total = torch.zeros(self.channels, dtype=values.dtype, device=values.device)
        total.index_add_(0, self.channel.to(values.device), values)
        return total / (len(self.channel) // self.channels)

    def spread(self, scale: Tensor) -> Tensor:
        """``[channels]`` to ``[in_features]``."""
        return scale[self.channel.to(scale.device)]


def find_folds(model: Any) -> Iterator[Fold]:
    """All places of a model where channels can be rescaled.

    Raises:
        ModelError: nothing is known about the architecture.
    """
    config = model.config
    if config.model_type not in PAIRS:
        raise ModelError(
            f"--base awq: nothing is known about {config.model_type} models; it covers {', '.join(sorted(PAIRS))}. "
            "Use another base"
        )
    prefix, blocks = decoder_blocks(model)
    for number, block in enumerate(blocks):
        experts = len(getattr(block.mlp, "experts", ()))
        pairs = PAIRS[config.model_type] if experts or config.model_type not in MIXTURES else _LLAMA
        for pair in pairs:
            routers = tuple(block.get_submodule(name) for name in pair.routers)
            for producer_name, names in pair.places(experts):
                producer: Any = block.get_submodule(producer_name)
                consumers: dict[str, Any] = {f"{prefix}.{number}.{name}": block.get_submodule(name) for name in names}
                columns = next(iter(consumers.values())).in_features
                channel, first = torch.arange(columns), 0
                if pair.rows == "value":
                    channel, first = _value_channels(config, columns, producer.out_features)
                elif pair.rows == "up":
                    first = producer.out_features - columns
                offset = 0.0 if isinstance(producer, nn.Linear) else _NORM_OFFSET.get(config.model_type, 0.0)
                yield Fold(producer, consumers, channel, first, offset, routers)


def _value_channels(config: Any, columns: int, producer_rows: int) -> tuple[Tensor, int]:
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    size = columns // heads
    channel = torch.arange(columns).view(heads, size) % size
    channel += (torch.arange(heads) // (heads // kv_heads) * size)[:, None]
    return channel.flatten(), producer_rows - kv_heads * size


@torch.no_grad()
def apply_fold(fold: Fold, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Divide the producer and multiply the consumers, in place.

    Args:
        fold: where.
        scale: positive, float32 ``[channels]``.
        dtype: in which a norm's weight is stored.

    Returns:
        The scale that was applied: a norm's weight is rounded to ``dtype``, and the consumers follow it, so that the
        model computes what it did, up to the rounding of routers to ``dtype``.
    """
    producer = fold.producer
    scale = scale.to(producer.weight.device)
    if isinstance(producer, nn.Linear):
        rows = slice(fold.rows, fold.rows + fold.channels)
        producer.weight.data = producer.weight.data.to(torch.float32, copy=True)  # it may lie in a file
        producer.weight.data[rows] /= scale[:, None]
        if producer.bias is not None:
            producer.bias.data[rows] /= scale
    else:
        before = producer.weight.data + fold.offset
        stored = (before / scale - fold.offset).to(dtype).float()
        after = stored + fold.offset
        # a channel that the norm switches off, or that rounding would, keeps its scale
        usable = (before != 0) & (after != 0) & (before.sign() == after.sign())
        scale = torch.where(usable, before / torch.where(usable, after, 1.0), 1.0)
        producer.weight.data = torch.where(usable, stored, producer.weight.data)
        bias = getattr(producer, "bias", None)
        if bias is not None:
            bias.data /= scale
    spread = fold.spread(scale)
    for consumer in fold.consumers.values():
        consumer.weight.data = consumer.weight.data.float() * spread
    for router in fold.routers:
        router.weight.data = (router.weight.data.float() * spread).to(dtype).to(router.weight.dtype)
    return scale
