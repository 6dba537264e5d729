"""How layers are split over tensor-parallel ranks (SPEC.md, section 6), known from their specs alone."""

from collections.abc import Iterable
from functools import lru_cache

import torch

from .rows import synthetic_layer
from .schema import LayerSpec

__all__ = ["column_parts", "require_row_borders", "require_split"]

_MAX_SUGGESTED_TP = 16


@lru_cache(maxsize=4096)
def column_parts(spec: LayerSpec, ranks: int) -> tuple[LayerSpec, ...]:
    """Specs of what each rank has of a layer whose input features are split evenly, without sparse elements.

    Raises:
        ValueError: the kind cannot be cut at these borders.
    """
    size, rest = divmod(spec.in_features, ranks)
    if rest:
        raise ValueError(f"{spec.in_features} input features are no multiple of {ranks}")
    with torch.device("cpu"):  # vLLM builds layers under the target device as default device
        # of as few rows as can be
        row = synthetic_layer(spec.model_copy(update={"out_features": spec.row_quantum, "nnz": 0}))
        parts = [row.slice(columns=(rank * size, (rank + 1) * size)).spec for rank in range(ranks)]
    return tuple(part.model_copy(update={"out_features": spec.out_features}) for part in parts)


def require_split(name: str, spec: LayerSpec, ranks: int) -> None:
    """Refuse input features that cannot be split over so many ranks, naming the numbers that would do.

    Raises:
        ValueError: the kind cannot be cut at this split's borders.
    """
    if not _splits(spec, ranks):
        fitting = [str(tp) for tp in range(1, _MAX_SUGGESTED_TP + 1) if _splits(spec, tp)]
        raise ValueError(
            f"{name}: its {spec.in_features} input features cannot be split over {ranks} tensor-parallel "
            f"ranks; a rank's {spec.in_features / ranks:g} must be a multiple of {spec.column_quantum} for {spec.kind} "
            "weights. "
            f"This layer allows --tensor-parallel-size {', '.join(fitting)}"
        )


def _splits(spec: LayerSpec, ranks: int) -> bool:
    try:
        column_parts(spec, ranks)
    except ValueError:
        return False
    return True


def require_row_borders(name: str, spec: LayerSpec, rows: Iterable[tuple[int, int]]) -> None:
    """Refuse output features that a rank cannot be given, naming the numbers of ranks that would do.

    Args:
        rows: of the rank, half-open ranges.

    Raises:
        ValueError: the kind cannot be cut at these borders.
    """
    quantum = spec.row_quantum
    if any(border % quantum for borders in rows for border in borders):
        fitting = [str(tp) for tp in range(1, _MAX_SUGGESTED_TP + 1) if spec.out_features % (tp * quantum) == 0]
        raise ValueError(
            f"{name}: a rank's part of its {spec.out_features} output features must be a multiple of {quantum} "
            f"for {spec.kind} weights. This layer allows --tensor-parallel-size {', '.join(fitting)} at most"
        )
