"""How much of a total its largest parts make up: the share of weights that holds a share of all PQI."""

import torch
from torch import Tensor

__all__ = ["SHARES", "Coverage"]

SHARES = (0.0001, 0.0005, 0.0015, 0.005, 0.0071, 0.01, 0.02, 0.0525, 0.1, 0.2, 0.5, 1.0)
"""of weights: those of the paper's table 5, and others between"""
_DROPPED_BITS = 17  # of a float32's 23 mantissa bits: 64 classes an octave
_CLASSES = 1 << (31 - _DROPPED_BITS)


class Coverage:
    """Counts and sums of many values by size, in memory that does not grow with them."""

    def __init__(self) -> None:
        self._counts = torch.zeros(_CLASSES, dtype=torch.float64)
        self._sums = torch.zeros(_CLASSES, dtype=torch.float64)

    def add(self, values: Tensor) -> None:
        """Count values: float32 of any shape, finite and not negative."""
        flat = values.flatten().contiguous()
        classes = flat.view(torch.int32) >> _DROPPED_BITS  # the bits of floats are in the order of the floats
        self._counts += torch.bincount(classes, minlength=_CLASSES).cpu()
        self._sums += torch.bincount(classes, flat.double(), minlength=_CLASSES).cpu()

    def curve(self) -> list[tuple[float, float]]:
        """For each of ``SHARES``, the share of the total that so many of the largest values make up.

        Values of one class, which differ by less than 1.6 %, count as equal.
        """
        counts, sums = (part.flip(0).cumsum(0) for part in (self._counts, self._sums))
        total, whole = counts[-1], sums[-1].clamp(min=torch.finfo(torch.float64).tiny)
        curve = []
        for share in SHARES:
            wanted = share * total
            at = int(torch.searchsorted(counts, wanted).clamp(max=_CLASSES - 1))
            below, above = (counts[at - 1], counts[at]) if at else (torch.zeros_like(total), counts[0])
            least = sums[at - 1] if at else torch.zeros_like(whole)
            part = least + (sums[at] - least) * (wanted - below) / (above - below).clamp(min=1.0)
            curve.append((share, float(part / whole)))
        return curve
