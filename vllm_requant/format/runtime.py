"""How large a layer is in the layout in which kernels read it: known before there are weights."""

from functools import lru_cache

import torch
from torch import Tensor

from ..kernels import cpu
from ..kernels.gpu import weights as gpu_weights
from .schema import LayerSpec, TrellisSpec, UniformSpec

__all__ = ["DEVICE_TYPES", "runtime_nbytes"]

DEVICE_TYPES = ("cpu", "cuda")


@lru_cache(maxsize=4096)
def runtime_nbytes(spec: LayerSpec, device_type: str) -> int:
    """Bytes that :func:`vllm_requant.kernels.repack` makes of a layer.

    The dense part is exact. On a CPU the sparse part depends on how many elements each row has, for which chance is
    taken here; real residuals are less even, and a little larger.

    Args:
        spec: of the layer, or of what a rank has of it.
        device_type: one of :data:`DEVICE_TYPES`, "cuda" being a device with kernels of its own.

    Raises:
        NativeCodeError: the native kernels are not built ("cpu" only).
    """
    if device_type == "cpu":
        return cpu.packed_nbytes(
            spec.kind,
            (spec.out_features, spec.in_features),
            bits=spec.bits,
            group_size=spec.group_size if isinstance(spec, UniformSpec) else 0,
            state_bits=spec.state_bits if isinstance(spec, TrellisSpec) else 0,
            blocks=(spec.block_out, spec.block_in) if isinstance(spec, TrellisSpec) else (0, 0),
            indptr=_random_indptr(spec) if spec.nnz else None,
            wide=spec.index_dtype == torch.int32,
        )
    # the repacking itself, of tensors without values
    meta = torch.device("meta")
    tensors = {
        suffix: torch.empty(shape, dtype=dtype, device=meta) for suffix, (dtype, shape) in spec.tensors().items()
    }
    signs = None
    if isinstance(spec, TrellisSpec):
        signs = torch.empty(spec.in_features, device=meta), torch.empty(spec.out_features, device=meta)
    packed = gpu_weights.repack(spec.kind, tensors, signs, bits=spec.bits, in_features=spec.in_features, device=meta)
    return sum(tensor.nbytes for tensor in packed.values())


def _random_indptr(spec: LayerSpec) -> Tensor:
    """Row pointers of elements at random places; int32 ``[out_features + 1]``."""
    generator = torch.Generator().manual_seed(spec.nnz)
    rows = torch.randint(spec.out_features, (spec.nnz,), generator=generator)
    indptr = torch.zeros(spec.out_features + 1, dtype=torch.int32)
    indptr[1:] = torch.bincount(rows, minlength=spec.out_features).cumsum(0)
    return indptr
