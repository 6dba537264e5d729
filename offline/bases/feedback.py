"""Error feedback: quantize column by column and let the columns that follow make up for each error.

The loop of GPTQ (arXiv 2210.17323), for any scalar quantizer: what is minimized is ``tr(E H Eᵀ)``, E the weight's
error and H the second moment of the inputs.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from vllm_requant.format.sparse import all_finite

from .. import incidents

__all__ = ["Rows", "compensate", "reversed_factor", "reversed_feedback", "reversed_inverse", "upright"]

_BLOCK = 128
_PANEL = 256  # rows or columns of a large matrix that are worked on at a time
_DAMPING, _MORE_DAMPING = 0.01, (0.1, 1.0)
_NOT_POSITIVE = "the input moments are not positive definite"

Rows = Callable[[slice], Tensor]
"""Rows of a matrix, float32 ``[rows, columns]``; what is made of one need not exist as a whole"""
Nearest = Callable[[int, Tensor], tuple[Tensor, Tensor]]
"""``(column, values [rows]) → (codes [rows], dequantized [rows])``"""


def reversed_factor(rows: Rows, columns: int, damping: float = _DAMPING) -> Tensor:
    """Lower triangular L with ``L Lᵀ = J (H + λI) J``, J the matrix that reverses an order.

    ``V = J L J`` is an upper triangular factor of ``H + λI``: a Cholesky factor of the matrix with its columns in
    reverse is an upper one in the right order.

    λ starts at ``damping`` times the mean diagonal. A matrix that is not positive definite even so, as few tokens
    or a dead input make it, is an expected state: λ grows tenfold, up to the mean diagonal; then all elements beside
    the diagonal count as zero.

    Args:
        rows: of H, symmetric, with a non-negative diagonal; asked for as often as λ grows.
        columns: of H.
        damping: first λ over the mean of the diagonal.

    Returns:
        float64 ``[columns, columns]``, in the memory of one such matrix, which is all that is taken.

    Raises:
        ValueError: the matrix holds a value that is not finite.
    """
    device = rows(slice(0, 1)).device
    # column-major, as LAPACK wants it, which then works in place: the matrix may be larger than all else
    lower = torch.empty(columns, columns, dtype=torch.float64, device=device).t()
    failed = torch.empty((), dtype=torch.int32, device=device)
    for tried in (damping, *(more for more in _MORE_DAMPING if more > damping)):
        for panel in _panels(columns):
            part = rows(panel)
            if not all_finite(part):
                raise ValueError("the second moment of the inputs is not finite")
            lower[_mirrored(panel, columns)] = part.flip(0, 1).double()
        diagonal = lower.diagonal().clone()
        mean = diagonal.mean().clamp(min=torch.finfo(torch.float32).tiny)
        lower.diagonal().copy_(diagonal + tried * mean)
        torch.linalg.cholesky_ex(lower, out=(lower, failed))
        if not failed:
            if tried != damping:
                incidents.note(_NOT_POSITIVE, f"damping {tried:g} in the place of {damping:g}")
            return lower
    incidents.note(_NOT_POSITIVE, "no error feedback")
    lower.zero_().diagonal().copy_((diagonal + damping * mean).clamp(min=damping * mean).sqrt())
    return lower


def reversed_inverse(rows: Rows, columns: int, damping: float = _DAMPING) -> Tensor:
    """``J U J`` with U upper triangular and ``UᵀU = (H + λI)⁻¹``; everything else as :func:`reversed_factor`."""
    lower = reversed_factor(rows, columns, damping)
    for panel in _panels(columns):
        unit = torch.zeros(panel.stop - panel.start, columns, dtype=lower.dtype, device=lower.device).t()
        unit[panel].fill_diagonal_(1.0)
        # columns of the inverse take the place of the factor's, of which later ones need no more than that they are
        # finite: their own units are zero there
        lower[:, panel] = torch.linalg.solve_triangular(lower, unit, upper=False)
    return lower


def reversed_feedback(rows: Rows, columns: int, width: int, damping: float = _DAMPING) -> Tensor:
    """How errors in earlier columns move the target of later ones that are quantized in blocks.

    ``H = V D Vᵀ`` with D block diagonal and V block upper triangular, identities on its diagonal. Then ``E H Eᵀ`` is
    the sum of squares of ``E_k + E_{<k} V_{<k,k}``, and the best target for block k is ``W_k + E_{<k} V_{<k,k}``
    with E the weight less its quantized value.

    Args:
        rows, columns, damping: as in :func:`reversed_factor`.
        width: columns of a block; divides their number.

    Returns:
        ``J V J``, float64 ``[columns, columns]``, in the memory of one such matrix.
    """
    lower = reversed_factor(rows, columns, damping)
    blocks = columns // width
    index = torch.arange(blocks, device=lower.device)
    own = lower.t().view(blocks, width, blocks, width)[index, :, index].mT.flip(0, 1, 2)
    unit = torch.linalg.inv(own)
    for panel in _panels(columns):
        upper = lower[_mirrored(panel, columns)].flip(0, 1)
        by_block = torch.einsum("nbw,bwv->nbv", upper.reshape(-1, blocks, width), unit)
        lower[_mirrored(panel, columns)] = by_block.reshape(upper.shape).flip(0, 1)
    return lower


def upright(reversed_matrix: Tensor, rows: slice) -> Tensor:
    """Rows of ``J M J``, float32."""
    return reversed_matrix[_mirrored(rows, len(reversed_matrix))].flip(0, 1).float().contiguous()


def _mirrored(rows: slice, columns: int) -> slice:
    return slice(columns - rows.stop, columns - rows.start)


def _panels(columns: int) -> Iterator[slice]:
    for first in range(0, columns, _PANEL):
        yield slice(first, min(first + _PANEL, columns))


def compensate(
    weight: Tensor,
    hessian: Tensor,
    nearest: Nearest,
    *,
    exact: Tensor | None = None,
    damping: float = _DAMPING,
) -> Tensor:
    """Codes of a matrix, chosen column by column with error feedback.

    Columns go in the order of decreasing ``H_jj``: where inputs are large, errors are made while all the others can
    still compensate for them.

    Args:
        weight: float32 ``[rows, columns]``.
        hessian: float32 ``[columns, columns]``.
        nearest: the quantizer of one column.
        exact: bool ``[rows, columns]``: positions that will be ``weight`` itself, as the residual makes them. Their
            error is what feedback has moved them by.
        damping: as in :func:`reversed_factor`.

    Returns:
        Codes ``[rows, columns]`` of the dtype that ``nearest`` gives.
    """
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    columns = len(order)
    inverse = reversed_inverse(lambda rows: hessian[order[rows]][:, order], columns, damping)
    # column-major: the loop reads and writes columns
    original = weight.t()[order].contiguous()
    fixed = None if exact is None else exact.t()[order].contiguous()
    # at an exact position only the displacement counts: it is kept about 0, where a large weight costs no precision
    moved = original.clone() if fixed is None else original.masked_fill(fixed, 0.0)
    where = order.tolist()
    codes: list[Tensor] = []
    for begin in range(0, columns, _BLOCK):
        end = min(begin + _BLOCK, columns)
        factor = upright(inverse, slice(begin, end))
        errors = torch.empty_like(moved[begin:end])
        for j in range(begin, end):
            if fixed is None:
                code, value = nearest(where[j], moved[j])
            else:
                code, value = nearest(where[j], torch.where(fixed[j], original[j], moved[j]))
                value = value.masked_fill(fixed[j], 0.0)
            codes.append(code)
            own = factor[j - begin]
            error = (moved[j] - value) / own[j]
            errors[j - begin] = error
            moved[j + 1 : end].addr_(own[j + 1 : end], error, alpha=-1)
        moved[end:].addmm_(factor[:, end:].t(), errors, alpha=-1)
    stacked = torch.stack(codes)
    result = torch.empty_like(stacked)
    result[order] = stacked
    return result.t().contiguous()
