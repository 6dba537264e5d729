"""CUDA C++ kernels compiled against cuda_on_threads.h, in place of a module that is compiled for a GPU."""

import ctypes
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

__all__ = ["compiled"]

HERE = Path(__file__).parent
SHARED = "extern __shared__ __align__(16) char shared[];"


def compiled(source: str, macros: Mapping[str, int], kernels: Sequence[str], file: Path) -> SimpleNamespace:
    """Something with the ``kernel`` of :class:`vllm_requant.kernels.gpu.driver.Module`.

    Args:
        source: CUDA C++ without what cuda_on_threads.h has.
        kernels: names of those that can be launched.
        file: where to write it; the library goes beside it.
    """
    assert SHARED in source
    source = source.replace(SHARED, "char* const shared = shared_memory;")
    source = source.replace("__shared__ __align__(16)", "alignas(16) static")
    entries = "".join(
        f'extern "C" void run_{kernel}(const Arguments* in, int x, int y, int z, int threads, int shared) '
        f"{{ run([=] {{ {kernel}(*in); }}, x, y, z, threads, shared); }}\n"
        for kernel in kernels
    )
    lines = "".join(f"#define {name} {value}\n" for name, value in macros.items())
    file.write_text(f'{lines}#include "{HERE}/cuda_on_threads.h"\n{source}\n{entries}')
    library = file.with_suffix(".so")
    # no contraction: products are rounded as torch rounds them
    flags = ["-std=c++20", "-O1", "-w", "-ffp-contract=off", "-shared", "-fPIC", "-pthread"]
    done = subprocess.run(["g++", *flags, str(file), "-o", str(library)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    loaded = ctypes.CDLL(str(library))

    def kernel(which: str) -> Callable:
        def launch(
            grid: tuple[int, int, int], threads: int, shared: int, arguments: ctypes.Structure, *_: object
        ) -> None:
            getattr(loaded, f"run_{which}")(ctypes.byref(arguments), *grid, threads, shared)

        return launch

    return SimpleNamespace(kernel=kernel)
