"""Numerical trouble that a conversion expects, what it did instead, and where: said at once, and kept for the record.

Where the trouble is met, nothing is known of who wants to hear of it; so, as with the observer of a run, what collects
incidents is set for a block, in a context variable. A cached result brings the incidents of its making along: what a
checkpoint says of itself does not depend on how often the conversion was interrupted.
"""

import json
import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Incident", "about", "collecting", "describe", "from_json", "note", "remember", "summary", "to_json"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, order=True)
class Incident:
    """One of them.

    Attributes:
        trouble: what was met.
        fallback: what was done instead.
        where: a layer, a sequence of the calibration set, a candidate.
        count: how often, in that place.
    """

    trouble: str
    fallback: str
    where: str
    count: int = 1


_where: ContextVar[str] = ContextVar("where", default="")
_found: ContextVar[set[Incident] | None] = ContextVar("incidents", default=None)


def note(
    trouble: str, fallback: str, *, where: str | None = None, count: int = 1, level: int = logging.WARNING
) -> None:
    """Say that trouble was met and what is done instead.

    Args:
        where: None for the place that :func:`about` has named.
        level: at which it is said.
    """
    incident = Incident(trouble, fallback, _where.get() if where is None else where, count)
    log.log(level, "%s: %s%s; %s", incident.where, f"{count} " if count > 1 else "", trouble, fallback)
    remember([incident])


def remember(incidents: Iterable[Incident]) -> None:
    """Count what was met before to what the running block collects."""
    found = _found.get()
    if found is not None:
        found.update(incidents)


@contextmanager
def about(where: str) -> Iterator[None]:
    """Name the place in which a block may meet trouble."""
    token = _where.set(where)
    try:
        yield
    finally:
        _where.reset(token)


@contextmanager
def collecting() -> Iterator[set[Incident]]:
    """Collect what a block meets; a block around it hears of nothing until it is told."""
    found: set[Incident] = set()
    token = _found.set(found)
    try:
        yield found
    finally:
        _found.reset(token)


def describe(incidents: Iterable[Incident]) -> list[dict[str, Any]]:
    """All of them, for a report."""
    return [asdict(incident) for incident in sorted(incidents)]


def summary(incidents: Iterable[Incident]) -> list[dict[str, Any]]:
    """One entry for each kind, with the first of its places and the number of places."""
    places: dict[tuple[str, str], list[str]] = defaultdict(list)
    for incident in sorted(incidents):
        where = places[incident.trouble, incident.fallback]
        if incident.where not in where:
            where.append(incident.where)
    return [
        {"trouble": trouble, "fallback": fallback, "first": where[0], "places": len(where)}
        for (trouble, fallback), where in places.items()
    ]


def to_json(incidents: Iterable[Incident]) -> str:
    """For the metadata of a file."""
    return json.dumps(describe(incidents))


def from_json(text: str) -> list[Incident]:
    """The inverse of :func:`to_json`."""
    return [Incident(**entry) for entry in json.loads(text)]
