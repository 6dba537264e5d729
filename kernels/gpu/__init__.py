"""The kernels of CUDA devices: CUDA C++ compiled at run time, Triton where that is not to be had.

Importing this package compiles nothing and imports neither Triton nor a CUDA library.
"""

import importlib.util
from functools import cache

import torch

from . import driver, experts, ops, weights

__all__ = ["experts", "ops", "path", "weights"]

_OLDEST = (8, 0)  # compute capability: asynchronous copies, products of bytes and of bfloat16


@cache
def _path(index: int) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return None  # looks rows up, and takes what CUDA C++ leaves out
    capable = torch.version.cuda is not None and torch.cuda.get_device_capability(index) >= _OLDEST
    return "cuda" if capable and driver.available() else "triton"


def path(device: torch.device) -> str | None:
    """``"cuda"`` (C++) or ``"triton"``, whichever serves a CUDA device; None where plain torch has to."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return _path(torch.cuda.current_device() if device.index is None else device.index)
