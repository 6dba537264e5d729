"""Files that are there completely or not at all, even if the machine stops: written aside, synced, renamed."""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .schema import SAFETENSORS_DTYPES

__all__ = [
    "CACHE_LINE",
    "filling_safetensors",
    "json_text",
    "null_for_nan",
    "sync_file",
    "sync_folder",
    "write_bytes",
    "write_safetensors",
]

# types of a checkpoint: those of its layers, and those that other tensors may have
_NAMES = SAFETENSORS_DTYPES | {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64", torch.bool: "BOOL"}
_NAMES |= {torch.float64: "F64"}  # of results that are kept
CACHE_LINE = 64
"""Bytes."""


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, whose tensors are best read by mapping it.

    Tensors of whole cache lines begin at borders of cache lines, as those that torch allocates do: the last bit of a
    matrix product depends on that.

    Raises:
        OSError: the file cannot be written, for example because the disk is full; nothing is left of it.
    """
    announced = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with filling_safetensors(path, announced, metadata or {}, alignment=CACHE_LINE) as write:
        for name, tensor in tensors.items():
            write(name, tensor)


@contextmanager
def filling_safetensors(
    path: Path,
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    metadata: Mapping[str, str],
    *,
    alignment: int = 1,
) -> Iterator[Callable[[str, Tensor], None]]:
    """Write a safetensors file one tensor at a time, in any order.

    Args:
        path: of the file, which is there when the block ends.
        tensors: type and shape of each by name; the block has to write all of them.
        alignment: tensors of a multiple of so many bytes, a power of two, begin at one.

    Yields:
        ``(name, tensor)``, writes it.

    Raises:
        OSError: the file cannot be written, for example because the disk is full; nothing is left of it.
    """
    sizes = {name: dtype.itemsize * math.prod(shape) for name, (dtype, shape) in tensors.items()}
    # large elements first: every tensor then begins at a multiple of its element's size
    order = sorted(tensors, key=lambda name: (sizes[name] % alignment != 0, -tensors[name][0].itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        dtype, shape = tensors[name]
        begin, end = end, end + sizes[name]
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % max(8, alignment))
    first = 8 + len(text)
    left = set(order)
    aside = _aside(path)
    try:
        with aside.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, first + end)  # a full disk is noticed here
            file.write(len(text).to_bytes(8, "little") + text)

            def write(name: str, tensor: Tensor) -> None:
                if (tensor.dtype, tuple(tensor.shape)) != tensors[name]:
                    raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, not what was announced")
                file.seek(first + header[name]["data_offsets"][0])
                file.write(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
                left.remove(name)

            yield write
        if left:
            raise ValueError(f"{min(left)} was never written")
        _put(aside, path)
    except OSError as error:
        raise OSError(error.errno, f"{path} cannot be written: {error.strerror}") from None
    finally:
        aside.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a small file; errors as for :func:`write_safetensors`."""
    aside = _aside(path)
    try:
        aside.write_bytes(content)
        _put(aside, path)
    except OSError as error:
        raise OSError(error.errno, f"{path} cannot be written: {error.strerror}") from None
    finally:
        aside.unlink(missing_ok=True)


def json_text(content: Any) -> str:
    """JSON that every reader takes, for people too.

    Raises:
        ValueError: a number is not finite, for which JSON has no word.
    """
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def null_for_nan(content: Any) -> Any:
    """Results with None in the place of numbers that are not finite, which say that something could not be measured."""
    if isinstance(content, Mapping):
        return {key: null_for_nan(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [null_for_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def sync_file(path: Path) -> None:
    """Have the content of a file on the disk before anything says that it is there."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


sync_folder = sync_file  # a folder's names are synced like a file's content


def _aside(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{os.getpid()}.partial")  # another process may be writing the same


def _put(aside: Path, path: Path) -> None:
    sync_file(aside)
    aside.replace(path)
    sync_folder(path.parent)
