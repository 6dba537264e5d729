"""Files that are there completely or not at all, even if the machine stops: written aside, synced, renamed."""

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["sync_file", "sync_folder", "write_bytes", "write_safetensors"]


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file.

    Raises:
        OSError: the file cannot be written, for example because the disk is full; nothing is left of it.
    """
    aside = _aside(path)
    try:
        save_file(dict(tensors), aside, metadata=None if metadata is None else dict(metadata))
        _put(aside, path)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from None
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
