"""The processes that convert one model together, as torchrun starts them; one process is the usual case.

All of them run the same code and come to the same results; sequences and layers are divided, sums are added up, and
files are written once, to folders that all can read.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Ranks", "current_ranks", "started_ranks"]

_TIMEOUT = timedelta(days=7)  # one may quantize for hours while the others have nothing to do
_PR_SET_PDEATHSIG = 1  # of prctl(2)
Value = TypeVar("Value")


class Ranks:
    """This process among all.

    Attributes:
        rank: its number, from 0.
        size: how many there are.
        here: how many of them are on this machine.
    """

    def __init__(self, rank: int = 0, size: int = 1, here: int = 1) -> None:
        self.rank, self.size, self.here = rank, size, here

    @property
    def together(self) -> bool:
        return self.size > 1

    @property
    def suffix(self) -> str:
        """For names of files that every process has of its own, and that mean nothing to another number of them."""
        return f"-{self.rank}-of-{self.size}" if self.together else ""

    @property
    def first(self) -> bool:
        return self.rank == 0

    def mine(self, items: Any) -> Any:
        """Every size-th item of a sequence or tensor."""
        return items[self.rank :: self.size]

    def whole(self, own: list[Value], count: int) -> list[Value]:
        """Small values of all items, of which every process has those of :meth:`mine`."""
        parts = self.gather(own)
        return [parts[item % self.size][item // self.size] for item in range(count)]

    def add_up(self, tensors: Mapping[str, Tensor]) -> None:
        """Sum tensors over all processes, in place."""
        if self.together:
            for tensor in tensors.values():
                dist.all_reduce(tensor)

    def gather(self, value: Value) -> list[Value]:
        """A small value of every process, in the order of their numbers."""
        if not self.together:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def agree(self, value: Callable[[], Value]) -> Value:
        """What the first process finds; the others do not look."""
        if not self.together:
            return value()
        found: list[Any] = [value() if self.first else None]
        dist.broadcast_object_list(found, src=0)
        result: Value = found[0]
        return result

    def wait(self) -> None:
        """For all to come here."""
        if self.together:
            dist.barrier()


_current = Ranks()


def current_ranks() -> Ranks:
    """Those of the block that is running."""
    return _current


def _end_with_parent() -> None:
    """Have this process killed when torchrun is: nobody else would end it, and it would hold the work folder."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it was gone before the kernel was told
            os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def started_ranks() -> Iterator[Ranks]:
    """Join the processes that torchrun has started, for the time of a block; without it there is only this one."""
    global _current
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield _current
        return
    own = not dist.is_initialized()  # an engine such as Ray Train may have done it
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _end_with_parent()
    if own:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=_TIMEOUT)
    _current = Ranks(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    try:
        yield _current
        _current.wait()
    finally:
        _current = Ranks()
        if own:
            dist.destroy_process_group()
