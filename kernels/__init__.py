"""y = x · (dense + sparse)ᵀ on low-bit weights: repack once for a device, then multiply or look rows up.

Tensors are validated by whoever loads them (:mod:`vllm_requant.format`); the kernels check no more than what
keeps them from reading outside a tensor. Importing this package loads no native code; the first call on the
CPU does.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from . import cpu
from .bitstream import unpack_codes
from .native import NativeCodeError
from .ops import FUSED_BATCH
from .reference import signs

__all__ = ["FUSED_BATCH", "NativeCodeError", "embedding", "kernel_path", "linear", "repack"]

_DENSE = {
    "uniform": ("qweight", "scales", "qzeros"),
    "lut": ("qweight", "lookup_table"),
    "trellis": ("qweight", "scales", "signs_in", "signs_out"),
}
_SPARSE = ("sparse_indptr", "sparse_indices", "sparse_values")


def _names(kind: str) -> tuple[str, ...]:
    if kind not in _DENSE:
        raise ValueError(f"unknown kind {kind!r}, the kernels know {', '.join(sorted(_DENSE))}")
    return _DENSE[kind] + _SPARSE


def repack(
    kind: str,
    tensors: Mapping[str, Tensor],
    *,
    bits: int,
    group_size: int = 0,
    state_bits: int = 0,
    in_features: int,
    device: torch.device | str,
) -> dict[str, Tensor]:
    """Turn the canonical tensors of a layer into run-time tensors for ``device``.

    Args:
        kind: ``"uniform"``, ``"lut"`` or ``"trellis"``.
        tensors: by suffix, types and shapes as in SPEC.md, section 4: those of the kind; then ``sparse_indptr``,
            ``sparse_indices``, ``sparse_values`` or none of these three.
        bits: width of a code.
        group_size: columns that share a scale; 0 for kinds without groups.
        state_bits: width of a trellis state; 0 for other kinds.
        in_features: columns of the weight.
        device: where :func:`linear` will run.

    Returns:
        Contiguous tensors that share no memory with the input, under the same names as the canonical ones.
        The set of names depends on ``kind`` alone: without a sparse part the sparse tensors are empty.

        On the CPU ``qweight`` is a flat uint8 tensor in the layout of cpu/kernels.h and ``qzeros`` holds a
        zero point a byte, ``[out_features, groups]``. On other devices both are the canonical ones, and so is a
        trellis on every device; its signs become float32 with the factor of the Hadamard transform. On every
        device uint16 ``sparse_indices`` become the int16 of the same bits: torch computes little on uint16.

    Raises:
        ValueError: unknown kind, or a tensor is missing.
        NativeCodeError: the native kernels are not built (CPU only).
    """
    names = _names(kind)
    missing = [name for name in _DENSE[kind] if name not in tensors]
    if missing:
        raise ValueError(f"a {kind} layer needs {', '.join(missing)}")
    device = torch.device(device)
    first = tensors["qweight"].device

    def copied(tensor: Tensor) -> Tensor:
        return tensor.to(device, copy=True, memory_format=torch.contiguous_format)

    packed: dict[str, Tensor] = {}
    for name in names:
        if name not in tensors or tensors["sparse_values" if name in _SPARSE else name].numel() == 0:
            dtype = {"sparse_indptr": torch.int32, "sparse_indices": torch.int16}.get(name, torch.float16)
            packed[name] = torch.empty(0, dtype=dtype, device=device)
        elif name == "sparse_indices" and tensors[name].dtype == torch.uint16:
            packed[name] = copied(tensors[name].view(torch.int16))
        elif kind == "trellis" and name.startswith("signs"):
            # features come in blocks of at least 16, so there are no pad bits
            features = 8 * tensors[name].numel()
            block = features // tensors["scales"].shape[0 if name == "signs_out" else 1]
            packed[name] = copied(signs(tensors[name], features) * block**-0.5)
        elif kind == "trellis":
            packed[name] = copied(tensors[name])
        elif device.type == "cpu" and name == "qweight":
            source = tensors[name].cpu() if first.type != "cpu" else tensors[name]
            packed[name] = cpu.repack_codes(source, bits=bits, in_features=in_features)
        elif device.type == "cpu" and name == "qzeros":
            packed[name] = copied(unpack_codes(tensors[name], bits, tensors["scales"].shape[1]))
        else:
            packed[name] = copied(tensors[name])
    return packed


def linear(
    kind: str, x: Tensor, weights: Mapping[str, Tensor], *, bits: int, group_size: int = 0, state_bits: int = 0
) -> Tensor:
    """``x · (dense + sparse)ᵀ``, accumulated in float32.

    On the CPU batches of up to :data:`FUSED_BATCH` rows are multiplied with exact float32 weights, and
    a row has the same result in every such batch. Larger batches go through torch's matrix product, with
    weights rounded to bfloat16 if ``x`` is bfloat16, else with float32 weights.

    Args:
        x: ``[..., in_features]``, float32, bfloat16 or float16, on the device of the weights.
        weights: what :func:`repack` returned.
        bits, group_size, state_bits: as given to :func:`repack`.

    Returns:
        ``[..., out_features]`` of ``x.dtype``.

    Raises:
        ValueError: unknown kind, or the weight has other dimensions.
        TypeError: ``x`` has another dtype.
        NativeCodeError: the native kernels are not built (CPU only).
    """
    tensors = [weights[name] for name in _names(kind)]
    if kind == "uniform":
        return torch.ops.requant.uniform_linear(x, *tensors, bits, group_size)  # type: ignore[no-any-return]
    if kind == "lut":
        return torch.ops.requant.lut_linear(x, *tensors, bits)  # type: ignore[no-any-return]
    return torch.ops.requant.trellis_linear(x, *tensors, bits, state_bits)  # type: ignore[no-any-return]


def embedding(
    kind: str,
    ids: Tensor,
    weights: Mapping[str, Tensor],
    *,
    bits: int,
    group_size: int = 0,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """Rows ``ids`` of ``dense + sparse``; not for the ``trellis`` kind, whose rows are mixed.

    Args:
        ids: integers ``[...]`` in ``[0, out_features)``.
        weights: what :func:`repack` returned.
        bits, group_size, in_features: as given to :func:`repack`.
        dtype: float32, bfloat16 or float16; the float32 weight is rounded once.

    Returns:
        ``[..., in_features]`` of type ``dtype``.

    Raises:
        IndexError: an id lies outside (on the CPU).
        ValueError, TypeError, NativeCodeError: as in :func:`linear`.
    """
    tensors = [weights[name] for name in _names(kind)]
    if kind == "uniform":
        return torch.ops.requant.uniform_embedding(  # type: ignore[no-any-return]
            ids, *tensors, bits, group_size, in_features, dtype
        )
    if kind != "lut":
        raise ValueError(f"no rows can be looked up in {kind} weights")
    return torch.ops.requant.lut_embedding(ids, *tensors, bits, in_features, dtype)  # type: ignore[no-any-return]


def kernel_path(kind: str, device: torch.device | str) -> str:
    """Which implementation serves ``kind`` on ``device``, for logs and metrics, e.g. ``"cpu-avx512"``.

    Raises:
        ValueError: unknown kind.
        NativeCodeError: the native kernels are not built (CPU only).
    """
    _names(kind)
    return f"cpu-{cpu.isa()}" if torch.device(device).type == "cpu" else "torch-reference"
