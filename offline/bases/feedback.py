"""Error feedback: quantize column by column and let the columns that follow make up for each error.

The loop of GPTQ (arXiv 2210.17323), for any scalar quantizer: what is minimized is ``tr(E H Eᵀ)``, E the weight's
error and H the second moment of the inputs.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .. import incidents

__all__ = ["block_feedback", "compensate", "inverse_factor", "upper_factor"]

_BLOCK = 128
_DAMPING, _MORE_DAMPING = 0.01, (0.1, 1.0)
_NOT_POSITIVE = "the input moments are not positive definite"

Nearest = Callable[[int, Tensor], tuple[Tensor, Tensor]]
"""``(column, values [rows]) → (codes [rows], dequantized [rows])``"""


def upper_factor(hessian: Tensor, damping: float = _DAMPING) -> Tensor:
    """Upper triangular V with ``V Vᵀ = H + λI``.

    λ starts at ``damping`` times the mean diagonal. A matrix that is not positive definite even so, as few tokens
    or a dead input make it, is an expected state: λ grows tenfold, up to the mean diagonal; then all elements beside
    the diagonal count as zero.

    Args:
        hessian: ``[columns, columns]``, symmetric, non-negative diagonal.
        damping: first λ over the mean of the diagonal.

    Returns:
        float64 ``[columns, columns]``.

    Raises:
        ValueError: the matrix holds a value that is not finite.
    """
    if not torch.isfinite(hessian).all():
        raise ValueError("the second moment of the inputs is not finite")
    # a Cholesky factor of the matrix with its columns in reverse is an upper one in the right order
    reverse = hessian.double().flip(0, 1)
    diagonal = reverse.diagonal().clone()
    mean = diagonal.mean().clamp(min=torch.finfo(torch.float32).tiny)
    for tried in (damping, *(more for more in _MORE_DAMPING if more > damping)):
        reverse.diagonal().copy_(diagonal + tried * mean)  # in place: the matrix may be larger than all else
        lower, failed = torch.linalg.cholesky_ex(reverse)
        if not failed:
            if tried != damping:
                incidents.note(_NOT_POSITIVE, f"damping {tried:g} in the place of {damping:g}")
            del reverse
            return lower.flip(0, 1)
    incidents.note(_NOT_POSITIVE, "no error feedback")
    return (diagonal + damping * mean).clamp(min=damping * mean).sqrt().flip(0).diag()


def inverse_factor(hessian: Tensor, damping: float = _DAMPING) -> Tensor:
    """Upper triangular U with ``UᵀU = (H + λI)⁻¹``, float32; arguments and errors as :func:`upper_factor`."""
    factor = upper_factor(hessian, damping)
    inverse = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    return torch.linalg.solve_triangular(factor, inverse, upper=True, out=inverse).float()


def block_feedback(hessian: Tensor, width: int, damping: float = _DAMPING) -> Tensor:
    """How errors in earlier columns move the target of later ones that are quantized in blocks.

    ``H = V D Vᵀ`` with D block diagonal and V block upper triangular, identities on its diagonal. Then ``E H Eᵀ`` is
    the sum of squares of ``E_k + E_{<k} V_{<k,k}``, and the best target for block k is ``W_k + E_{<k} V_{<k,k}``
    with E the weight less its quantized value.

    Args:
        hessian, damping: as in :func:`upper_factor`.
        width: columns of a block; divides their number.

    Returns:
        V, float32 ``[columns, columns]``.
    """
    factor = upper_factor(hessian, damping)
    blocks = len(factor) // width
    by_block = factor.view(len(factor), blocks, width)
    own = factor.view(blocks, width, blocks, width)[torch.arange(blocks), :, torch.arange(blocks)]
    return torch.einsum("nbw,bwv->nbv", by_block, torch.linalg.inv(own)).reshape(factor.shape).float()


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
    factor = inverse_factor(hessian[order][:, order], damping)
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
