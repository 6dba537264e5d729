"""The op ``requant::gpu_expert_linear``: products of tokens with the experts that they are sent to.

A launch reads the weights of these experts and no others, and the host does not learn which they are: it can be
captured into a CUDA graph.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.library import Library

from . import native, ops
from .weights import NAMES, Weights

__all__ = ["MOST", "linear", "serves", "takes"]

MOST = 512
"""Pairs of a token and an expert that are worth it: each reads the expert's weights, from the cache at best."""

_SCHEMA = f"gpu_expert_linear(Tensor x, Tensor experts, {ops.FIELDS}, int share) -> Tensor"


def serves(kind: str, in_features: int, device: torch.device) -> bool:
    """Whether the op multiplies such weights."""
    return kind in ("uniform", "lut") and ops.native_serves(device, in_features)


def takes(x: Tensor, experts: Tensor) -> bool:
    """Whether the op is for such activations, and for so many pairs."""
    return x.dtype in ops.HALVES and experts.numel() <= MOST


def linear(
    kind: str,
    x: Tensor,
    experts: Tensor,
    weights: Mapping[str, Tensor],
    *,
    share: int,
    out_features: int,
    bits: int,
    group_size: int = 0,
) -> Tensor:
    """``x[p // share] · (dense + sparse)ᵀ`` with the weights of expert ``experts[p]``, for every ``p``.

    Args:
        kind, bits, group_size: of all experts.
        x: float16 or bfloat16 ``[pairs / share, in_features]``.
        experts: integers ``[pairs]``; below zero for one that is not here.
        weights: what :func:`vllm_requant.kernels.gpu.weights.stack` returned.
        share: neighbouring pairs that have one activation.

    Returns:
        ``[pairs, out_features]`` of ``x.dtype``, zeros where there is no expert.
    """
    settings = (kind, bits, group_size, 0, x.shape[-1], out_features, share)
    return torch.ops.requant.gpu_expert_linear(  # type: ignore[no-any-return]
        x, experts, *(weights[name] for name in NAMES), *settings
    )


def _linear(x: Tensor, experts: Tensor, *fields: object) -> Tensor:
    *weights, share = fields
    assert isinstance(share, int)
    return native.expert_products(Weights(*weights), ops.aligned(x), experts.to(torch.int32).contiguous(), share)  # type: ignore[arg-type]


def _linear_fake(x: Tensor, experts: Tensor, *fields: object) -> Tensor:
    out_features = fields[-2]
    assert isinstance(out_features, int | torch.SymInt)
    return x.new_empty(experts.shape[0], out_features)


if not hasattr(torch.ops.requant, "gpu_expert_linear"):
    _library = Library("requant", "FRAGMENT")
    _library.define(_SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl("gpu_expert_linear", _linear, "CUDA")
    torch.library.register_fake("requant::gpu_expert_linear", _linear_fake, lib=_library)
    # alive as long as the ops, see ../ops.py
    setattr(torch.ops.requant, "gpu_expert_registrations", _library)  # noqa: B010 (a namespace made at run time)
