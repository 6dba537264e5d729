"""Time and peak memory of the stages of a conversion."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch

__all__ = ["Stages"]

_INTERVAL = 0.02


class Stages:
    """A clock for named stages; one that runs inside another counts for both.

    A thread looks at the memory of the process fifty times a second: not every system lets a process set the kernel's
    own high-water mark back.

    Attributes:
        seconds: by stage, summed over its runs.
        peak_bytes: largest memory of the process while the stage ran, by stage; of the accelerator too, as
            ``"<stage> (cuda)"``.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peak_bytes: dict[str, int] = {}
        self._running: list[str] = []
        self._process = psutil.Process()
        self._lock = threading.Lock()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure what a block takes."""
        self._look_at_accelerator()
        ended = threading.Event()
        with self._lock:
            self._running.append(name)
        watcher = threading.Thread(target=self._watch, args=(ended,), daemon=True) if len(self._running) == 1 else None
        if watcher is not None:
            watcher.start()
        self._look()
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started
            if watcher is not None:
                ended.set()
                watcher.join()
            self._look()
            self._look_at_accelerator()
            with self._lock:
                self._running.pop()

    def report(self) -> dict[str, dict[str, float]]:
        """Seconds and MiB by stage."""
        return {
            "seconds": {name: round(value, 1) for name, value in self.seconds.items()},
            "peak_mib": {name: round(value / 2**20, 1) for name, value in self.peak_bytes.items()},
        }

    def _watch(self, ended: threading.Event) -> None:
        while not ended.wait(_INTERVAL):
            self._look()

    def _look(self) -> None:
        self._book(self._process.memory_info().rss, "")

    def _look_at_accelerator(self) -> None:
        """Book the peak since the last call, and start a new one."""
        if torch.cuda.is_initialized():
            self._book(torch.cuda.max_memory_allocated(), " (cuda)")
            torch.cuda.reset_peak_memory_stats()

    def _book(self, held: int, suffix: str) -> None:
        with self._lock:
            for name in self._running:
                self.peak_bytes[name + suffix] = max(self.peak_bytes.get(name + suffix, 0), held)
