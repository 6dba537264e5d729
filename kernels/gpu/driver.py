"""CUDA C++ compiled at run time: NVRTC, which every CUDA build of torch brings along, and the driver's launches.

A compiled module stays on disk, in ``$REQUANT_CACHE`` or ``~/.cache/vllm-requant``, under the hash of what went into
it.
"""

import ctypes
import hashlib
import os
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

__all__ = ["Kernel", "Module", "NvrtcError", "available", "cache_folder"]

_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8
_INVALID_CONTEXT = 201
_DEFAULT_SHARED = 16 << 10  # with what a kernel declares itself less than the 48 KB that need no permission


class NvrtcError(RuntimeError):
    """The compiler or the driver refused."""


def cache_folder() -> Path:
    """Where compiled modules and tuning results are kept."""
    return Path(os.environ.get("REQUANT_CACHE") or Path.home() / ".cache" / "vllm-requant")


@cache
def _nvrtc() -> ctypes.CDLL:
    """The compiler's library: one that is loaded, one that the loader finds, or one of NVIDIA's wheels.

    Raises:
        OSError: there is none.
    """
    major = (torch.version.cuda or "").partition(".")[0]
    names = [f"libnvrtc.so.{major}", f"libnvrtc.so.{major}.0", "libnvrtc.so"]
    if sys.platform == "win32":
        names = [f"nvrtc64_{major}0_0.dll"]
    folders = [Path(p) / "nvidia" for p in sys.path if (Path(p) / "nvidia").is_dir()]
    for folder in folders:
        names += [str(path) for path in sorted(folder.glob("*/lib/libnvrtc.so.*")) if f".so.{major}" in path.name]
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise OSError("libnvrtc is not installed")


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


@cache
def available() -> bool:
    """Whether kernels can be compiled and launched here."""
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return False
    try:
        _nvrtc(), _driver()
    except OSError:
        return False
    return True


def _check(what: str, status: int) -> None:
    if status:
        raise NvrtcError(f"{what} failed with status {status}")


def compile_to_cubin(source: str, options: Sequence[str]) -> bytes:
    """Machine code of CUDA C++.

    Raises:
        NvrtcError: with the compiler's log.
    """
    nvrtc = _nvrtc()
    program = ctypes.c_void_p()
    text = source.encode()
    _check("nvrtcCreateProgram", nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, b"requant.cu", 0, None, None))
    try:
        flags = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        status = nvrtc.nvrtcCompileProgram(program, len(options), flags)
        if status:
            raise NvrtcError(
                f"NVRTC refused the kernels: {_read(nvrtc, program, 'ProgramLog').decode(errors='replace')}"
            )
        return _read(nvrtc, program, "CUBIN")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _read(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(f"nvrtcGet{what}Size", getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(f"nvrtcGet{what}", getattr(nvrtc, f"nvrtcGet{what}")(program, buffer))
    return buffer.raw


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("_pad", ctypes.c_int), ("value", ctypes.c_int), ("_rest", ctypes.c_byte * 60))


class _Launch(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint) for name in ("x", "y", "z", "threads", "_one", "_one_too", "shared")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


# a launch may begin while the one before it ends; the kernels wait where it matters
_OVERLAP = _Attribute(id=6, value=1)


class Kernel:
    """A kernel that takes one structure by value."""

    def __init__(self, handle: ctypes.c_void_p, name: str) -> None:
        self._handle, self._name, self._shared = handle, name, _DEFAULT_SHARED

    def __call__(
        self,
        grid: tuple[int, int, int],
        threads: int,
        shared: int,
        arguments: ctypes.Structure,
        stream: int,
        overlap: bool = False,
    ) -> None:
        """Launch on a CUDA stream.

        Args:
            shared: dynamic shared memory in bytes.
            overlap: the launch may begin before the one before it has ended; from compute capability 9.0 on.
        """
        driver = _driver()
        if shared > self._shared:
            status = driver.cuFuncSetAttribute(self._handle, _MAX_DYNAMIC_SHARED_SIZE_BYTES, shared)
            _check(f"{shared} bytes of shared memory for {self._name}", status)
            self._shared = shared
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        launch = _Launch(*grid, threads, 1, 1, shared, stream, ctypes.pointer(_OVERLAP), int(overlap))
        status = driver.cuLaunchKernelEx(ctypes.byref(launch), self._handle, pointers, None)
        if status == _INVALID_CONTEXT:  # a thread that has not used the device yet
            torch.cuda.set_device(torch.cuda.current_device())
            status = driver.cuLaunchKernelEx(ctypes.byref(launch), self._handle, pointers, None)
        _check(f"launch of {self._name} on {grid}", status)


class Module:
    """Kernels compiled for the current device.

    Args:
        source: CUDA C++ without includes.
        defines: its macros.
    """

    def __init__(self, source: str, defines: dict[str, int]) -> None:
        major, minor = torch.cuda.get_device_capability()
        options = [f"--gpu-architecture=sm_{major}{minor}", "--std=c++17"]
        options += [f"-D{name}={value}" for name, value in sorted(defines.items())]
        content = "\0".join([source, *options, _nvrtc_version()])
        path = cache_folder() / "cubin" / f"{hashlib.sha256(content.encode()).hexdigest()[:32]}.cubin"
        try:
            cubin = path.read_bytes()
        except OSError:
            cubin = compile_to_cubin(source, options)
            _store(path, cubin)
        torch.cuda.set_device(torch.cuda.current_device())  # makes its context this thread's
        self._module = ctypes.c_void_p()
        _check("cuModuleLoadData", _driver().cuModuleLoadData(ctypes.byref(self._module), cubin))
        self._kernels: dict[str, Kernel] = {}

    def kernel(self, name: str) -> Kernel:
        """A kernel by its name."""
        if name not in self._kernels:
            handle = ctypes.c_void_p()
            status = _driver().cuModuleGetFunction(ctypes.byref(handle), self._module, name.encode())
            _check(f"cuModuleGetFunction of {name}", status)
            self._kernels[name] = Kernel(handle, name)
        return self._kernels[name]


def _nvrtc_version() -> str:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check("nvrtcVersion", _nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return f"{major.value}.{minor.value}"


def _store(path: Path, content: bytes) -> None:
    """Write at once, so that another process reads all or nothing; a folder that cannot be written is no error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(content)
        os.replace(file.name, path)
    except OSError:
        pass
