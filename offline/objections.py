"""What speaks against a conversion: collected before anything expensive, so that all of it can be said at once."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from vllm_requant.format import ReQuantFormatError

__all__ = ["ObjectionError", "Objections", "by_reason"]

_NAMES_SHOWN = 3


class ObjectionError(ValueError):
    """What a user asked for cannot be done.

    Every argument is a reason, complete in itself: it names the file, tensor or flag, and the way out.

    Attributes:
        exit_status: of a command that ends with it: 1, or 2 for wrong usage.
    """

    exit_status = 1

    def __str__(self) -> str:
        return "\n".join(map(str, self.args))


class Objections:
    """All that was found so far.

    Attributes:
        errors: in the order in which they came.
    """

    def __init__(self) -> None:
        self.errors: list[Exception] = []

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Keep what a block objects to, and go on behind it."""
        try:
            yield
        except (ObjectionError, ReQuantFormatError, OSError) as error:
            self.errors.append(error)

    @property
    def reasons(self) -> list[str]:
        """A line each, none twice."""
        lines = (
            reason
            for error in self.errors
            for reason in (error.args if isinstance(error, ObjectionError) else [str(error)])
        )
        return list(dict.fromkeys(lines))

    def raise_any(self) -> None:
        """End here if there are objections.

        Raises:
            Exception: the only error there is, or an :class:`ObjectionError` with the reasons of all.
        """
        if len(self.errors) == 1:
            raise self.errors[0]
        if self.errors:
            error = ObjectionError(*self.reasons)
            error.exit_status = max(getattr(each, "exit_status", 1) for each in self.errors)
            raise error


def by_reason(found: Iterable[tuple[str, str]]) -> list[str]:
    """A line for every distinct reason, with the first names that it holds for.

    Args:
        found: names and reasons.
    """
    names: defaultdict[str, list[str]] = defaultdict(list)
    for name, reason in found:
        names[reason].append(name)
    return [f"{_listed(alike)}: {reason}" for reason, alike in names.items()]


def _listed(names: list[str]) -> str:
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
