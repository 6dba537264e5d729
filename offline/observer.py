"""Who watches a conversion: what it says about itself while it runs, and to whom.

Stages, loops and measurements lie deep in a conversion, and nothing on the way down to them has any use for an
observer; so it is not handed from function to function but set for a block, in a context variable. A thread that is
started inside the block watches on its own account. Where no observer is set, an idle one listens, which costs a call.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_requant.format import CheckpointConfig

__all__ = ["RunObserver", "current_observer", "observing"]


class RunObserver:
    """Ignores everything. What an observer raises ends the conversion, so one that may fail has to catch that."""

    def stage_began(self, stage: str) -> None:
        """A stage begins; it may lie inside another, and come again later."""

    def stage_ended(self, stage: str, seconds: float, peak_bytes: Mapping[str, int]) -> None:
        """The stage that began last and has not ended yet ends, possibly by an exception.

        Args:
            stage: its name.
            seconds: it took this time.
            peak_bytes: largest memory during any of its runs so far: of the process ("host"), of the accelerator.
        """

    def advanced(self, done: int, total: int, tokens: int) -> None:
        """A loop begins (0 done), or is through with one more of its items, which held so many tokens."""

    def integrated(self, integral: Mapping[str, Any]) -> None:
        """A path integral and the actual ΔF, as an entry of the report's ``integrals``."""

    def converted(self, config: "CheckpointConfig", report: Mapping[str, Any]) -> None:
        """The checkpoint is complete."""


_IDLE = RunObserver()
_current: ContextVar[RunObserver] = ContextVar("observer", default=_IDLE)


def current_observer() -> RunObserver:
    """The observer of the block that is running."""
    return _current.get()


@contextmanager
def observing(observer: RunObserver) -> Iterator[None]:
    """Let ``observer`` watch what a block converts."""
    token = _current.set(observer)
    try:
        yield
    finally:
        _current.reset(token)
