"""Error feedback: quantize column by column and let the columns that follow make up for each error.

The loop of GPTQ (arXiv 2210.17323), for any scalar quantizer: what is minimized is ``tr(E H Eᵀ)``, E the weight's
error and H the second moment of the inputs.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from vllm_requant.format.sparse import all_finite

from .. import incidents

__all__ = ["block_feedback", "compensate", "inverse_factor", "reversed_factor"]

_BLOCK = 128
_PANEL = 256  # rows or columns of a large matrix that are worked on at a time
_DAMPING, _MORE_DAMPING = 0.01, (0.1, 1.0)
_NOT_POSITIVE = "the input moments are not positive definite"

Nearest = Callable[[int, Tensor], tuple[Tensor, Tensor]]
"""``(column, values [rows]) → (codes [rows], dequantized [rows])``"""


def reversed_factor(hessian: Tensor, damping: float = _DAMPING, order: Tensor | None = None) -> Tensor:
    """Lower triangular L with ``L Lᵀ = J (H + λI) J``, J the matrix that reverses an order.

    ``V = J L J`` is an upper triangular factor of ``H + λI``: a Cholesky factor of the matrix with its columns in
    reverse is an upper one in the right order.

    λ starts at ``damping`` times the mean diagonal. A matrix that is not positive definite even so, as few tokens
    or a dead input make it, is an expected state: λ grows tenfold, up to the mean diagonal; then all elements beside
    the diagonal count as zero.

    Args:
        hessian: ``[columns, columns]``, symmetric, non-negative diagonal.
        damping: first λ over the mean of the diagonal.
        order: int64 ``[columns]``, in which rows and columns are taken; None for their own.

    Returns:
        float64 ``[columns, columns]``, in the memory of one such matrix, which is all that is taken.

    Raises:
        ValueError: the matrix holds a value that is not finite.
    """
    if not all(all_finite(hessian[rows]) for rows in _panels(len(hessian))):  # no copy, whatever its strides
        raise ValueError("the second moment of the inputs is not finite")
    columns = len(hessian)
    order = torch.arange(columns, device=hessian.device) if order is None else order
    reverse = order.flip(0)
    diagonal = hessian.diagonal().double()[reverse]
    mean = diagonal.mean().clamp(min=torch.finfo(torch.float32).tiny)
    # column-major, as LAPACK wants it, which then works in place: the matrix may be larger than all else
    lower = torch.empty(columns, columns, dtype=torch.float64, device=hessian.device).t()
    failed = torch.empty((), dtype=torch.int32, device=hessian.device)
    for tried in (damping, *(more for more in _MORE_DAMPING if more > damping)):
        for rows in _panels(columns):
            lower[rows] = hessian[reverse[rows]][:, reverse].double()
        lower.diagonal().copy_(diagonal + tried * mean)
        torch.linalg.cholesky_ex(lower, out=(lower, failed))
        if not failed:
            if tried != damping:
                incidents.note(_NOT_POSITIVE, f"damping {tried:g} in the place of {damping:g}")
            return lower
    incidents.note(_NOT_POSITIVE, "no error feedback")
    lower.zero_().diagonal().copy_((diagonal + damping * mean).clamp(min=damping * mean).sqrt())
    return lower


def inverse_factor(hessian: Tensor, damping: float = _DAMPING, order: Tensor | None = None) -> Tensor:
    """Upper triangular U with ``UᵀU = (H + λI)⁻¹``, float32; arguments and errors as :func:`reversed_factor`."""
    lower = reversed_factor(hessian, damping, order)
    columns = len(lower)
    inverse = torch.empty(columns, columns, device=lower.device)
    for panel in _panels(columns):
        unit = torch.zeros(panel.stop - panel.start, columns, dtype=lower.dtype, device=lower.device).t()
        at = torch.arange(panel.start, panel.stop, device=lower.device)
        unit[columns - 1 - at, at - panel.start] = 1.0
        inverse[:, panel] = torch.linalg.solve_triangular(lower, unit, upper=False).flip(0)
    return inverse


def block_feedback(hessian: Tensor, width: int, damping: float = _DAMPING) -> Tensor:
    """How errors in earlier columns move the target of later ones that are quantized in blocks.

    ``H = V D Vᵀ`` with D block diagonal and V block upper triangular, identities on its diagonal. Then ``E H Eᵀ`` is
    the sum of squares of ``E_k + E_{<k} V_{<k,k}``, and the best target for block k is ``W_k + E_{<k} V_{<k,k}``
    with E the weight less its quantized value.

    Args:
        hessian, damping: as in :func:`reversed_factor`.
        width: columns of a block; divides their number.

    Returns:
        V, float32 ``[columns, columns]``.
    """
    lower = reversed_factor(hessian, damping)
    del hessian  # nobody else may want it
    columns = len(lower)
    blocks = columns // width
    index = torch.arange(blocks, device=lower.device)
    own = lower.t().view(blocks, width, blocks, width)[index, :, index].mT.flip(0, 1, 2)
    unit = torch.linalg.inv(own)
    result = torch.empty(columns, columns, device=lower.device)
    for rows in _panels(columns):
        upper = lower[columns - rows.stop : columns - rows.start].flip(0, 1)
        by_block = upper.reshape(-1, blocks, width)
        result[rows] = torch.einsum("nbw,bwv->nbv", by_block, unit).reshape(upper.shape).float()
    return result


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
        damping: as in :func:`inverse_factor`.

    Returns:
        Codes ``[rows, columns]`` of the dtype that ``nearest`` gives.
    """
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    factor = inverse_factor(hessian, damping, order)
    # column-major: the loop reads and writes columns
    original = weight.t()[order].contiguous()
    fixed = None if exact is None else exact.t()[order].contiguous()
    # at an exact position only the displacement counts: it is kept about 0, where a large weight costs no precision
    moved = original.clone() if fixed is None else original.masked_fill(fixed, 0.0)
    columns = len(moved)
    where = order.tolist()
    codes: list[Tensor] = []
    for begin in range(0, columns, _BLOCK):
        end = min(begin + _BLOCK, columns)
        errors = torch.empty_like(moved[begin:end])
        for j in range(begin, end):
            if fixed is None:
                code, value = nearest(where[j], moved[j])
            else:
                code, value = nearest(where[j], torch.where(fixed[j], original[j], moved[j]))
                value = value.masked_fill(fixed[j], 0.0)
            codes.append(code)
            error = (moved[j] - value) / factor[j, j]
            errors[j - begin] = error
            moved[j + 1 : end].addr_(factor[j, j + 1 : end], error, alpha=-1)
        moved[end:].addmm_(factor[begin:end, end:].t(), errors, alpha=-1)
    stacked = torch.stack(codes)
    result = torch.empty_like(stacked)
    result[order] = stacked
    return result.t().contiguous()
