"""y = x · (dense + sparse)ᵀ on low-bit weights: repack once for a device, then multiply or look rows up.

Tensors are validated by whoever loads them (:mod:`vllm_requant.format`); the kernels check no more than what
keeps them from reading outside a tensor. Importing this package loads no native code and compiles none; the first
call on a device does.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from . import cpu, gpu
from .bitstream import unpack_codes
from .native import NativeCodeError
from .ops import planes_for
from .reference import signs

__all__ = ["NativeCodeError", "embedding", "kernel_path", "linear", "repack"]

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
        Contiguous tensors that share no memory with the input. On the CPU one, ``packed``: uint8, a header and what
        the kernels read (cpu/kernels.h). On a CUDA device with kernels of its own those of gpu/weights.py. On other
        devices the canonical tensors under their own names, which depend on ``kind`` alone: without a sparse part the
        sparse ones are empty. Signs become float32 with the factor of the Hadamard transform, and uint16
        ``sparse_indices`` the int16 of the same bits: torch computes little on uint16.

    Raises:
        ValueError: unknown kind, or a tensor is missing.
        NativeCodeError: the native kernels are not built (CPU only).
    """
    names = _names(kind)
    missing = [name for name in _DENSE[kind] if name not in tensors]
    if missing:
        raise ValueError(f"a {kind} layer needs {', '.join(missing)}")
    device = torch.device(device)
    if device.type == "cpu":
        return {"packed": _pack(kind, tensors, bits, group_size, state_bits, in_features)}
    if gpu.path(device):
        ends = (_scaled_signs("signs_in", tensors), _scaled_signs("signs_out", tensors)) if kind == "trellis" else None
        return gpu.weights.repack(kind, tensors, ends, bits=bits, in_features=in_features, device=device)

    def copied(tensor: Tensor) -> Tensor:
        return tensor.to(device, copy=True, memory_format=torch.contiguous_format)

    packed: dict[str, Tensor] = {}
    for name in names:
        if name not in tensors or tensors["sparse_values" if name in _SPARSE else name].numel() == 0:
            dtype = {"sparse_indptr": torch.int32, "sparse_indices": torch.int16}.get(name, torch.float16)
            packed[name] = torch.empty(0, dtype=dtype, device=device)
        elif name == "sparse_indices" and tensors[name].dtype == torch.uint16:
            packed[name] = copied(tensors[name].view(torch.int16))
        elif name.startswith("signs"):
            packed[name] = copied(_scaled_signs(name, tensors))
        else:
            packed[name] = copied(tensors[name])
    return packed


def _pack(
    kind: str, tensors: Mapping[str, Tensor], bits: int, group_size: int, state_bits: int, in_features: int
) -> Tensor:
    here = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    sparse = None
    if here.get("sparse_values", torch.empty(0)).numel():
        sparse = (here["sparse_indptr"], here["sparse_indices"], here["sparse_values"])
    if kind == "trellis":
        ends = (_scaled_signs("signs_in", here), _scaled_signs("signs_out", here))
        return cpu.pack_trellis(here["qweight"], here["scales"], *ends, sparse, bits=bits, state_bits=state_bits)
    scales = here["scales" if kind == "uniform" else "lookup_table"]
    zeros = unpack_codes(here["qzeros"], bits, scales.shape[1]).contiguous() if kind == "uniform" else None
    settings = {"bits": bits, "group_size": group_size, "in_features": in_features}
    return cpu.pack(kind, here["qweight"], scales, zeros, sparse, **settings)


def _scaled_signs(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """Signs of a trellis with the factor of the Hadamard transform; features come in blocks of at least 16."""
    features = 8 * tensors[name].numel()
    block = features // tensors["scales"].shape[0 if name == "signs_out" else 1]
    scaled: Tensor = signs(tensors[name], features) * block**-0.5
    return scaled


def linear(
    kind: str,
    x: Tensor,
    weights: Mapping[str, Tensor],
    *,
    out_features: int,
    bits: int,
    group_size: int = 0,
    state_bits: int = 0,
    activation_bits: int = 16,
) -> Tensor:
    """``x · (dense + sparse)ᵀ``.

    The CPU multiplies integers: weights as they are stored (the entries of a table with 14 bits against the largest of
    their row, 21 if ``x`` is float32), activations with 16 bits against the largest of 64 neighbours, 24 if ``x`` is
    float32; sums are exact within these 64, then float32. A row has the same result in every batch up to
    ``cpu.FUSED_BATCHES``; larger ones go through torch's matrix product of dequantized weights, in bfloat16 if ``x`` is
    bfloat16 and the processor multiplies that.

    A CUDA device multiplies up to 64 activations as they are (of a trellis with 16 bits) by exact weights, with float32
    sums; more of them, or float32 ones, through torch's product of weights rounded to their type. Other devices
    multiply float32 weights.

    Args:
        x: ``[..., in_features]``, float32, bfloat16 or float16, on the device of the weights.
        weights: what :func:`repack` returned.
        out_features: rows of the weight.
        bits, group_size, state_bits: as given to :func:`repack`.
        activation_bits: 16, or 8 for the CPU to multiply shorter integers; no other device, and neither float32 inputs
            nor trellis weights, take notice.

    Returns:
        ``[..., out_features]`` of ``x.dtype``.

    Raises:
        ValueError: unknown kind, or another number of bits.
        TypeError: ``x`` has another dtype.
        RuntimeError: the weight has other dimensions.
    """
    names = _names(kind)
    if "packed" in weights:
        planes = planes_for(x.dtype, activation_bits)
        return torch.ops.requant.packed_linear(x, weights["packed"], out_features, planes)  # type: ignore[no-any-return]
    if "codes" in weights:
        planes_for(x.dtype)
        settings = (kind, bits, group_size, state_bits, x.shape[-1], out_features)
        return torch.ops.requant.gpu_linear(  # type: ignore[no-any-return]
            x, *(weights[name] for name in gpu.weights.NAMES), *settings
        )
    tensors = [weights[name] for name in names]
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
    names = _names(kind)
    if kind == "trellis":
        raise ValueError(f"no rows can be looked up in {kind} weights")
    if "packed" in weights:
        planes_for(dtype)
        return torch.ops.requant.packed_embedding(  # type: ignore[no-any-return]
            ids, weights["packed"], in_features, dtype
        )
    if "codes" in weights:
        planes_for(dtype)
        # nothing in it needs the number of rows
        settings = (kind, bits, group_size, 0, in_features, 0, dtype)
        return torch.ops.requant.gpu_embedding(  # type: ignore[no-any-return]
            ids, *(weights[name] for name in gpu.weights.NAMES), *settings
        )
    tensors = [weights[name] for name in names]
    if kind == "uniform":
        return torch.ops.requant.uniform_embedding(  # type: ignore[no-any-return]
            ids, *tensors, bits, group_size, in_features, dtype
        )
    return torch.ops.requant.lut_embedding(ids, *tensors, bits, in_features, dtype)  # type: ignore[no-any-return]


def kernel_path(kind: str, device: torch.device | str) -> str:
    """Which implementation serves ``kind`` on ``device``, for logs and metrics.

    ``"cpu-avx512"``, say; ``"cuda"`` is CUDA C++ (with Triton for what that leaves out), ``"triton"`` Triton alone,
    ``"torch-reference"`` plain torch.

    Raises:
        ValueError: unknown kind.
        NativeCodeError: the native kernels are not built (CPU only).
    """
    _names(kind)
    device = torch.device(device)
    return f"cpu-{cpu.isa()}" if device.type == "cpu" else gpu.path(device) or "torch-reference"
