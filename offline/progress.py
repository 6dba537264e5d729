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

__all__ = ["track"]

log = logging.getLogger(__name__)
T = TypeVar("T")
_LOG_EVERY_SECONDS = 15.0


def track(items: Iterable[T], label: str, total: int) -> Iterator[T]:
    """Yield ``items`` and show how far the work on them is.

    Args:
        label: what is being done.
        total: number of items.
    """
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
