"""Tensors of all layers of a model that need not all exist at once."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

__all__ = ["LazyMapping", "Positions", "each", "small_indices"]

Value = TypeVar("Value")


class LazyMapping(Mapping[str, Value], Generic[Value]):
    """What a function makes of each name, made anew whenever it is asked for.

    Args:
        names: in their order.
        make: the value of a name.
        digest: what tells the value of a name from others that it might have, without making it.
    """

    def __init__(
        self, names: Iterable[str], make: Callable[[str], Value], digest: Callable[[str], str] | None = None
    ) -> None:
        self._names, self._make, self.digest = dict.fromkeys(names), make, digest

    def __getitem__(self, name: str) -> Value:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def each(
    names: Iterable[str],
    make: Callable[[str], Value],
    *,
    lazy: bool,
    digest: Callable[[str], str] | None = None,
) -> Mapping[str, Value]:
    """What a function makes of each name: all of it now, or each whenever it is asked for."""
    return LazyMapping(names, make, digest) if lazy else {name: make(name) for name in names}


class Positions(Mapping[str, Tensor]):
    """A few positions in matrices of many layers, by name: read as bool masks, kept as indices.

    Args:
        masks: bool, of any shapes; looked at one at a time.
    """

    def __init__(self, masks: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> None:
        items = masks.items() if isinstance(masks, Mapping) else masks
        self._kept = {
            name: (small_indices(mask.flatten().nonzero()[:, 0], mask.shape), mask.shape) for name, mask in items
        }

    @classmethod
    def empty(cls, shapes: Mapping[str, torch.Size], device: torch.device) -> "Positions":
        """No positions in matrices of those shapes."""
        none = torch.zeros(0, dtype=torch.int64, device=device)
        return cls.of({name: (none, shape) for name, shape in shapes.items()})

    @classmethod
    def of(cls, indices: Mapping[str, tuple[Tensor, torch.Size]]) -> "Positions":
        """From distinct indices into the flattened matrices, int64, and the matrices' shapes."""
        result = cls(())
        result._kept = {
            name: (small_indices(index.sort().values, shape), shape) for name, (index, shape) in indices.items()
        }
        return result

    def __getitem__(self, name: str) -> Tensor:
        index, shape = self._kept[name]
        mask = torch.zeros(shape.numel(), dtype=torch.bool, device=index.device)
        mask[index] = True
        return mask.view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def __or__(self, other: "Positions") -> "Positions":
        """The positions of both; the other has the same layers."""
        return Positions((name, mask | other[name]) for name, mask in self.items())

    @property
    def counts(self) -> dict[str, int]:
        """How many, by layer."""
        return {name: index.numel() for name, (index, _) in self._kept.items()}

    def indices(self) -> dict[str, Tensor]:
        """Ascending indices into the flattened matrices, by layer: int32, or int64 if one is too large for that."""
        return {name: index for name, (index, _) in self._kept.items()}

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Positions) and all(
            torch.equal(index, other._kept[name][0]) for name, (index, _) in self._kept.items()
        )


def small_indices(index: Tensor, shape: torch.Size) -> Tensor:
    """Indices into a flattened tensor in as few bytes as they fit: those of all layers are in memory together."""
    return index.to(torch.int32 if shape.numel() < 2**31 else torch.int64)
