"""The converter's native code: C++ behind a C ABI, built with the package, called through ctypes."""

import ctypes
from functools import cache
from pathlib import Path

import torch  # noqa: F401  (first, so that both share one OpenMP runtime)

__all__ = ["library"]


@cache
def library() -> ctypes.CDLL:
    """The shared object beside this file.

    Raises:
        ImportError: it was not built.
    """
    built = sorted(Path(__file__).parent.glob("_native*.so"))
    if not built:
        raise ImportError(
            "the converter's native code is not built; run 'pip install .' (or -e .) with a C++ compiler installed"
        )
    loaded = ctypes.CDLL(str(built[0]))
    loaded.requant_kmeans_rows.argtypes = [
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int32,
        ctypes.c_void_p,
    ]
    loaded.requant_kmeans_rows.restype = None
    return loaded
