"""The sparse residual as CSR by output row: building, slicing, checking."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.reference import row_index
from .errors import ReQuantFormatError

__all__ = ["Csr", "all_finite"]

_PIECE = 2**20
"""Elements that are checked at a time."""


class Csr(NamedTuple):
    """``indptr`` int32 ``[rows + 1]``, ``indices`` uint16 or int32 ``[nnz]``, ``values`` float16 ``[nnz]``."""

    indptr: Tensor
    indices: Tensor
    values: Tensor

    @classmethod
    def from_mask(cls, mask: Tensor, residual: Tensor, index_dtype: torch.dtype) -> "Csr":
        """Take ``residual`` where ``mask`` is set.

        Args:
            mask: bool ``[rows, columns]``.
            residual: ``[rows, columns]``, rounded to float16 once.

        Raises:
            ValueError: a residual is not finite in float16.
        """
        values = residual[mask].to(torch.float16)
        if not torch.isfinite(values).all():
            raise ValueError("a sparse value is not finite in float16")
        return cls(_indptr(mask.sum(1)), mask.nonzero()[:, 1].to(index_dtype), values)

    @property
    def nnz(self) -> int:
        return self.values.numel()

    def slice(self, rows: tuple[int, int], columns: tuple[int, int], index_dtype: torch.dtype) -> "Csr":
        """The elements inside ``rows × columns`` (half-open), counted from the block's corner."""
        low, high = int(self.indptr[rows[0]]), int(self.indptr[rows[1]])
        row = row_index(self.indptr)[low:high] - rows[0]
        index = self.indices[low:high].to(torch.int64)
        keep = (index >= columns[0]) & (index < columns[1])
        counts = torch.bincount(row[keep], minlength=rows[1] - rows[0])
        return Csr(_indptr(counts), (index[keep] - columns[0]).to(index_dtype), self.values[low:high][keep].clone())

    def check(self, rows: int, columns: int, *, name: str, file: str | None = None) -> None:
        """Enforce the rules of SPEC.md, section 4, in O(nnz · log rows) and little memory, before anything is indexed.

        Raises:
            ReQuantFormatError: a rule is broken.
        """

        def refuse(tensor: str, reason: str) -> None:
            raise ReQuantFormatError(reason, file=file, tensor=f"{name}.{tensor}")

        pointers = self.indptr
        if int(pointers[0]) != 0:
            refuse("sparse_indptr", f"starts at {int(pointers[0])}, must start at 0")
        if (pointers[1:] < pointers[:-1]).any():
            refuse("sparse_indptr", "row pointers decrease")
        if int(pointers[-1]) != self.nnz:
            refuse("sparse_indptr", f"ends at {int(pointers[-1])}, but there are {self.nnz} elements")
        for begin in range(0, self.nnz, _PIECE):
            # with the last element of the piece before
            first = max(begin - 1, 0)
            index = self.indices[first : begin + _PIECE].to(torch.int32)
            if int(index.min()) < 0 or int(index.max()) >= columns:
                refuse("sparse_indices", f"a column lies outside the {columns} input features")
            # columns may fall or repeat only where a row begins
            falls = (index[1:] <= index[:-1]).nonzero()[:, 0].to(torch.int32) + (first + 1)
            row = torch.searchsorted(pointers, falls)
            if (pointers[row] != falls).any():
                refuse("sparse_indices", "the columns of a row are not strictly increasing")
        if not all_finite(self.values):
            refuse("sparse_values", "a value is not finite")


def all_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite, with memory for a piece of it at a time."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    # NaN is both the least and the greatest of whatever holds one; twenty times as fast as asking every value
    extremes = [torch.stack(piece.aminmax()) for piece in tensor.flatten().split(_PIECE)]
    return bool(torch.isfinite(torch.stack(extremes)).all())


def _indptr(counts: Tensor) -> Tensor:
    """int32 row pointers from the number of elements in each row."""
    pointers = torch.zeros(counts.numel() + 1, dtype=torch.int64, device=counts.device)
    torch.cumsum(counts, 0, out=pointers[1:])
    return pointers.to(torch.int32)
