"""The converter's native code: C++ behind a C ABI, built with the package, called through ctypes."""

import ctypes
from functools import cache
from pathlib import Path

from vllm_requant.kernels.native import open_library

__all__ = ["library"]


@cache
def library() -> ctypes.CDLL:
    """The shared object beside this file with its argument types set.

    Raises:
        NativeCodeError: it was not built.
    """
    native = open_library(Path(__file__).parent, "_native")
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    native.requant_kmeans_rows.argtypes = [pointer, pointer, size, size, ctypes.c_int32, pointer]
    native.requant_kmeans_rows.restype = None
    number = ctypes.c_int32
    native.requant_viterbi.argtypes = [pointer, size, size, number, number, pointer, number, pointer]
    return native
