"""Progress for long work: a bar with the remaining time on a terminal, a log line every few seconds elsewhere."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from .observer import current_observer

__all__ = ["track"]

log = logging.getLogger(__name__)
T = TypeVar("T")
_LOG_EVERY_SECONDS = 15.0


def track(items: Iterable[T], label: str, total: int, *, tokens_per_item: int = 0) -> Iterator[T]:
    """Yield ``items`` and show how far the work on them is, to the observer of the run too.

    Args:
        label: what is being done.
        total: number of items.
        tokens_per_item: that the model computes on for each of them, for the observer.
    """
    items = _reported(items, total, tokens_per_item)
    if sys.stderr.isatty():
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            yield from progress.track(items, total=total, description=label)
        return
    started = last = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - last >= _LOG_EVERY_SECONDS and done < total:
            last = now
            left = (now - started) / done * (total - done)
            log.info("%s: %d/%d, about %.0f s left", label, done, total, left)


def _reported(items: Iterable[T], total: int, tokens: int) -> Iterator[T]:
    observer = current_observer()
    observer.advanced(0, total, 0)
    for done, item in enumerate(items, start=1):
        yield item
        observer.advanced(done, total, tokens)
