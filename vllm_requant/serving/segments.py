"""Run-time weights of a vLLM layer: stacked parts in the kernels' layout, and the calls that use them.

A fused layer is one *segment*, one kernel call, while its parts share a format; a part in another format
(another bit width, say) begins a new segment.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from vllm.logger import init_logger

from .. import kernels
from ..format import QuantizedLayer
from ..format.rows import can_stack, concat_rows

if TYPE_CHECKING:
    from .config import RequantConfig

__all__ = [
    "Segment",
    "install_segments",
    "joined",
    "make_segments",
    "parts_linear",
    "register_segments",
    "report_ready",
    "segment_weights",
    "segments_linear",
    "stand_in_weight",
    "with_weights",
]

# a name below vllm's, so that vLLM's handlers and VLLM_LOGGING_LEVEL apply to it
logger = init_logger(f"vllm.{__name__}")


class Segment(NamedTuple):
    """Consecutive output features of one format.

    Attributes:
        kind: as the kernels take it.
        settings: keyword arguments of the kernels, such as ``bits``.
        in_features, out_features: of this rank.
        activation_bits: as the kernels take them.
        names: (the kernels' name, the parameter's name in the vLLM layer) of every run-time tensor.
    """

    kind: str
    settings: dict[str, int]
    in_features: int
    out_features: int
    activation_bits: int
    names: tuple[tuple[str, str], ...]


def install_segments(
    layer: torch.nn.Module,
    parts: Sequence[QuantizedLayer],
    device: torch.device,
    config: "RequantConfig",
    *,
    read_share: float,
) -> tuple[Segment, ...]:
    """Stack, repack and register ``parts`` as parameters ``segment<i>_<name>`` of ``layer``, which is then ready.

    Args:
        parts: this rank's canonical layers on the CPU, in the order of the output features.
        device: where the layer computes.
        config: says with how many bits activations are multiplied; its load report is told that the layer is ready.
        read_share: of the weights, how much a decoding step of one request reads.
    """
    made = make_segments(parts, device, config, read_share=read_share)
    segments = register_segments(layer, made)
    if config.adapters:
        stand_in_weight(layer, device)
    report_ready(config, device)
    return segments


def stand_in_weight(layer: torch.nn.Module, device: torch.device) -> None:
    """Give a layer an empty ``weight``: vLLM's LoRA layers read from it where, and as what, the layer computes.

    No parameter, so that nothing loads, ties or counts it.
    """
    dtype: Any = layer.params_dtype
    layer.weight = torch.empty(0, dtype=dtype, device=device)


def make_segments(
    parts: Sequence[QuantizedLayer], device: torch.device, config: "RequantConfig", *, read_share: float
) -> list[tuple[Segment, dict[str, Tensor]]]:
    """Segments and their run-time weights, which are not registered yet; arguments as above."""
    runs: list[list[QuantizedLayer]] = []
    for part in parts:
        if runs and can_stack(runs[-1][-1], part):
            runs[-1].append(part)
        else:
            runs.append([part])
    segments = []
    for run in runs:
        with torch.device("cpu"):
            stacked = concat_rows(run)
        spec = stacked.spec
        with config.loading.repacking():
            weights = kernels.repack(
                spec.kind,
                stacked.tensors,
                **spec.kernel_settings,
                in_features=spec.in_features,
                device=device,
            )
        features = (spec.in_features, spec.out_features)
        segment = Segment(spec.kind, spec.kernel_settings, *features, config.activation_bits, ())
        segments.append((segment, weights))
        config.loading.holds(
            spec.kind,
            sum(tensor.nbytes for tensor in weights.values()),
            device=torch.device(device).type,
            kernel=_kernel(spec.kind, torch.device(device).type),
            read_share=read_share,
        )
    return segments


def register_segments(
    layer: torch.nn.Module, made: Sequence[tuple[Segment, dict[str, Tensor]]], prefix: str = ""
) -> tuple[Segment, ...]:
    """Make run-time weights parameters ``<prefix>segment<i>_<name>`` of a vLLM layer; the segments then know them."""
    segments = []
    for index, (segment, weights) in enumerate(made):
        names = tuple((name, f"{prefix}segment{index}_{name}") for name in weights)
        for name, attribute in names:
            layer.register_parameter(attribute, torch.nn.Parameter(weights[name], requires_grad=False))
        segments.append(segment._replace(names=names))
    return tuple(segments)


def report_ready(config: "RequantConfig", device: torch.device) -> None:
    """A vLLM layer has all its run-time weights."""
    if torch.device(device).type == "cpu":
        _request_amx()
    config.loading.done()


def segment_weights(layer: torch.nn.Module, segment: Segment) -> dict[str, Tensor]:
    """The segment's run-time tensors by the kernels' names."""
    return {name: getattr(layer, attribute) for name, attribute in segment.names}


def with_weights(layer: torch.nn.Module, segments: Sequence[Segment]) -> list[tuple[Segment, dict[str, Tensor]]]:
    """Segments and their run-time tensors."""
    return [(segment, segment_weights(layer, segment)) for segment in segments]


def joined(outputs: Sequence[Tensor]) -> Tensor:
    """Output features of segments side by side."""
    return outputs[0] if len(outputs) == 1 else torch.cat(tuple(outputs), dim=-1)


def parts_linear(parts: Sequence[tuple[Segment, Mapping[str, Tensor]]], x: Tensor) -> Tensor:
    """``x · Wᵀ`` of segments with their run-time tensors; arguments and result as below."""
    return joined(
        [
            kernels.linear(
                segment.kind,
                x,
                weights,
                out_features=segment.out_features,
                activation_bits=segment.activation_bits,
                **segment.settings,
            )
            for segment, weights in parts
        ]
    )


def segments_linear(layer: torch.nn.Module, segments: Sequence[Segment], x: Tensor, bias: Tensor | None) -> Tensor:
    """``x · Wᵀ + bias``.

    Args:
        x: ``[..., in_features]``, float32, bfloat16 or float16.
        bias: ``[out_features]`` or None.

    Returns:
        ``[..., out_features]`` in ``x.dtype``.
    """
    y = parts_linear(with_weights(layer, segments), x)
    return y if bias is None else y + bias.to(y.dtype)


@cache
def _kernel(kind: str, device_type: str) -> str:
    """Which kernel serves a kind; said once per process."""
    path = kernels.kernel_path(kind, torch.device(device_type))
    logger.info("ReQuant %s layers run through %s", kind, path)
    return path


@cache
def _request_amx() -> None:
    """Ask the kernel for AMX tiles, once per process, where the CPU has them.

    vLLM's bfloat16 attention uses tiles but leaves the request to oneDNN's matrix products. A model whose every
    linear layer is quantized makes none, and the first prompt would end in an illegal instruction.
    """
    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()
