"""Time and peak memory of the stages of a conversion."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

__all__ = ["Stages"]

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Stages:
    """A clock for named stages; one that runs inside another counts for both.

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
        self._settle()
        self._running.append(name)
        started = time.monotonic()
        try:
            yield
        finally:
            self._settle()
            self._running.pop()
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started

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
            peaks[" (cuda)"] = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        for name in self._running:
            for suffix, peak in peaks.items():
                self.peak_bytes[name + suffix] = max(self.peak_bytes.get(name + suffix, 0), peak)
        with suppress(OSError):  # where it is not allowed, a peak is that since the process began
            _CLEAR.write_text("5")  # the kernel sets the high-water mark back to what is resident now


def _resident_peak() -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
