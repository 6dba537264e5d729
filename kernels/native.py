"""Opening the package's own shared objects: plain C ABI, built by `pip install`, found beside a module."""

import ctypes
from pathlib import Path

import torch  # noqa: F401  (first: it loads libgomp, and ours then binds to that copy and hence to its threads)

__all__ = ["HOW_TO_BUILD", "NativeCodeError", "open_library"]

HOW_TO_BUILD = "build it with `pip install .` or `pip install -e .` (g++ must be installed)"


class NativeCodeError(ImportError):
    """A shared object of this package is missing or does not load."""


def open_library(folder: Path, stem: str) -> ctypes.CDLL:
    """Load ``stem*.so`` from ``folder``, the newest if there are several.

    Raises:
        NativeCodeError: it is missing or does not load; the message says how to build it.
    """
    found = sorted(folder.glob(f"{stem}*.so"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise NativeCodeError(f"native code of vllm-requant is not built (no {stem}*.so in {folder}): {HOW_TO_BUILD}")
    try:
        return ctypes.CDLL(str(found[-1]))
    except OSError as error:
        raise NativeCodeError(f"{found[-1]} does not load ({error}): {HOW_TO_BUILD}") from error
