"""Time and peak memory of the stages of a conversion."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from .observer import current_observer

__all__ = ["Stages"]

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_ON_CUDA = " (cuda)"


class Stages:
    """A clock for named stages, which the observer of the run hears of too; one inside another counts for both.

    Attributes:
        seconds: by stage, summed over its runs.
        peak_bytes: largest memory of the process while the stage ran, by stage; of the accelerator too, as
            ``"<stage> (cuda)"``.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peak_bytes: dict[str, int] = {}
        self._running: list[str] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure what a block takes."""
        observer = current_observer()
        self._settle()
        self._running.append(name)
        observer.stage_began(name)
        started = time.monotonic()
        try:
            yield
        finally:
            self._settle()
            self._running.pop()
            seconds = time.monotonic() - started
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
            peaks = {"host": self.peak_bytes[name]}
            if (on_cuda := name + _ON_CUDA) in self.peak_bytes:
                peaks["cuda"] = self.peak_bytes[on_cuda]
            observer.stage_ended(name, seconds, peaks)

    def report(self) -> dict[str, dict[str, float]]:
        """Seconds and MiB by stage."""
        return {
            "seconds": {name: round(value, 1) for name, value in self.seconds.items()},
            "peak_mib": {name: round(value / 2**20, 1) for name, value in self.peak_bytes.items()},
        }

    def _settle(self) -> None:
        """Book the peak since the last call on all that runs, and start a new one."""
        peaks = {"": _resident_peak()}
        if torch.cuda.is_initialized():
            peaks[_ON_CUDA] = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        for name in self._running:
            for suffix, peak in peaks.items():
                self.peak_bytes[name + suffix] = max(self.peak_bytes.get(name + suffix, 0), peak)
        with suppress(OSError):  # where it is not allowed, a peak is that since the process began
            _CLEAR.write_text("5")  # the kernel sets the high-water mark back to what is resident now


def _resident_peak() -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
