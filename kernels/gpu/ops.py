"""The torch ops ``requant::gpu_linear`` and ``requant::gpu_embedding``, opaque to torch.compile.

Which code runs for which batch is decided inside. Nothing is synchronised with the host, and memory comes from torch's
allocator alone, so that launches can be captured into a CUDA graph once a first call has compiled the kernels.
"""

import torch
from torch import Tensor
from torch.library import Library

from . import native
from .weights import Weights

__all__ = ["FIELDS", "HALVES", "aligned", "by_panels", "embedding", "expand", "linear", "native_serves"]

PANEL_BYTES = 32 << 20
"""Of weights that are expanded at a time: they should still be in the second-level cache when they are multiplied."""

_PORTABLE = 32  # activations up to which the portable product is used

FIELDS = (
    "Tensor codes, Tensor params, Tensor zeros, Tensor signs_in, Tensor signs_out, Tensor sparse_indptr, "
    "Tensor sparse_entries, Tensor locks, str kind, int bits, int group_size, int state_bits, int in_features, "
    "int out_features"
)
"""Of :class:`Weights`, in the schemas of ops."""
HALVES = (torch.float16, torch.bfloat16)
"""Types of activations that CUDA C++ takes."""


def linear(x: Tensor, w: Weights) -> Tensor:
    """``x · (dense + sparse)ᵀ``: ``[..., in_features]`` to ``[..., out_features]`` in ``x.dtype``.

    Raises:
        RuntimeError: the weight has other dimensions.
    """
    if not w.fits():
        raise RuntimeError(
            f"the {w.kind} weight does not fit {w.in_features} input and {w.out_features} output features"
        )
    flat = x.reshape(-1, w.in_features)
    y = flat.new_empty(0, w.out_features) if flat.shape[0] == 0 else _fused(flat, w)
    if y is None:
        y = by_panels(flat, w)
    return y.view(*x.shape[:-1], w.out_features)


def native_serves(device: torch.device, in_features: int) -> bool:
    """Whether CUDA C++ serves such weights on a device."""
    from . import path

    return path(device) == "cuda" and in_features % 4 == 0


def _native(w: Weights) -> bool:
    return native_serves(w.codes.device, w.in_features)


def aligned(x: Tensor) -> Tensor:
    """Activations ``[batch, in_features]`` as the kernels read them, four at a time: copied if they do not lie so."""
    if x.stride(1) != 1 or x.stride(0) % 4 or x.data_ptr() % 8:
        return x.clone(memory_format=torch.contiguous_format)
    return x


def _fused(x: Tensor, w: Weights) -> Tensor | None:
    """By a kernel that decodes weights as it multiplies; None where there is none, or expanded weights are faster."""
    batch = x.shape[0]
    if batch > native.MOST or x.dtype not in HALVES:
        return None
    if not _native(w):
        from . import portable

        if w.kind == "trellis" or batch > _PORTABLE:
            return None
        return portable.linear(w, x if x.stride(1) == 1 else x.contiguous())
    x = aligned(x)
    if w.kind == "trellis":
        serves = native.trellis_variant(w, batch) if native.takes_trellis(w) else None
        return None if serves is None else native.trellis(w, x, serves)
    variant = native.matvec_variant(w, batch)
    return None if variant is None else native.matvec(w, x, variant)


def by_panels(x: Tensor, w: Weights) -> Tensor:
    """With expanded weights and torch's matrix product."""
    y = torch.empty(x.shape[0], w.out_features, dtype=x.dtype, device=x.device)
    rows = max(128, PANEL_BYTES // (w.in_features * x.element_size()) // 128 * 128)
    for first in range(0, w.out_features, rows):
        count = min(rows, w.out_features - first)
        torch.mm(x, expand(w, x.dtype, first, count).t(), out=y[:, first : first + count])
    return y


def expand(w: Weights, dtype: torch.dtype, first_row: int, count: int) -> Tensor:
    """Rows of ``dense + sparse``, ``[count, in_features]``; ``first_row`` is a multiple of 128."""
    if dtype in HALVES and _native(w):
        if w.kind != "trellis":
            return native.expand(w, dtype, first_row, count)
        if native.takes_trellis(w):
            return native.expand_trellis(w, dtype, first_row, count)
    from . import portable

    return portable.expand(w, dtype, first_row, count)


def embedding(ids: Tensor, w: Weights, dtype: torch.dtype) -> Tensor:
    """Rows ``ids`` of ``dense + sparse``: ``[..., in_features]``; the float32 sum is rounded once."""
    from . import portable

    return portable.embedding(w, ids.reshape(-1), dtype).view(*ids.shape, w.in_features)


# ---- registration ------------------------------------------------------------------------------------------


def _gpu_linear(x: Tensor, *fields: object) -> Tensor:
    return linear(x, Weights(*fields))  # type: ignore[arg-type]


def _gpu_linear_fake(x: Tensor, *fields: object) -> Tensor:
    out_features = fields[-1]
    assert isinstance(out_features, int | torch.SymInt)
    return x.new_empty(*x.shape[:-1], out_features)


def _gpu_embedding(ids: Tensor, *fields: object) -> Tensor:
    *weights, dtype = fields
    assert isinstance(dtype, torch.dtype)
    return embedding(ids, Weights(*weights), dtype)  # type: ignore[arg-type]


def _gpu_embedding_fake(ids: Tensor, *fields: object) -> Tensor:
    *_, in_features, _, dtype = fields
    assert isinstance(in_features, int | torch.SymInt) and isinstance(dtype, torch.dtype)
    return ids.new_empty(*ids.shape, in_features, dtype=dtype)


if not hasattr(torch.ops.requant, "gpu_linear"):
    _library = Library("requant", "FRAGMENT")
    _library.define(f"gpu_linear(Tensor x, {FIELDS}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
    _library.define(
        f"gpu_embedding(Tensor ids, {FIELDS}, ScalarType dtype) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
    )
    _library.impl("gpu_linear", _gpu_linear, "CUDA")
    _library.impl("gpu_embedding", _gpu_embedding, "CUDA")
    torch.library.register_fake("requant::gpu_linear", _gpu_linear_fake, lib=_library)
    torch.library.register_fake("requant::gpu_embedding", _gpu_embedding_fake, lib=_library)
    # as in ../ops.py: the registrations live as long as the object, which a second import must find alive
    setattr(torch.ops.requant, "gpu_registrations", _library)  # noqa: B010 (a namespace made at run time)
