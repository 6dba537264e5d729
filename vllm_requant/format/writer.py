"""Writing a checkpoint so that an interrupted run never leaves something that looks complete.

Everything is written into a folder beside the target, ``config.json`` last, and renamed into place.
"""

import fcntl
import glob
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

from .checksums import SUMS_NAME, file_sums
from .durable import filling_safetensors, json_text, sync_file, sync_folder
from .layer import QuantizedLayer
from .model_config import without_code
from .reader import CONFIG_NAME, INDEX_NAME
from .schema import CheckpointConfig

__all__ = ["check_folder", "check_output", "check_shard_size", "existing_folder", "staged_folder", "write_tensors"]

_PARTIAL, _RETIRED = ".partial-", ".old-"


def check_output(folder: Path, *, overwrite: bool) -> None:
    """Refuse a target that must not be touched; meant to be called before any expensive work.

    Raises:
        FileExistsError: the folder exists and is not empty, and ``overwrite`` is not set.
        NotADirectoryError: the target, or the nearest existing folder above it, is a file.
        PermissionError: the folder above cannot be written to.
    """
    if folder.is_file():
        raise NotADirectoryError(f"{folder} is a file; name a folder with -o")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise FileExistsError(f"{folder} exists and is not empty; pass --overwrite or name another folder with -o")
    check_folder(folder.absolute().parent, "-o")


def check_folder(folder: Path, flag: str) -> None:
    """Refuse a folder in which nothing could be written, whether it exists or has to be made.

    Args:
        flag: names another one.

    Raises:
        NotADirectoryError: it, or the nearest that exists above it, is a file.
        PermissionError: that cannot be written to.
    """
    nearest = existing_folder(folder)
    if not nearest.is_dir():
        raise NotADirectoryError(f"{nearest} is a file, so nothing can be written to {folder}; name another {flag}")
    if not os.access(nearest, os.W_OK):
        raise PermissionError(f"{nearest} is not writable, so nothing can be written to {folder}; name another {flag}")


def existing_folder(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    nearest = folder.absolute()
    while not nearest.exists():
        nearest = nearest.parent
    return nearest


def check_shard_size(size: str) -> None:
    """Refuse what is no size of a file.

    Raises:
        ValueError: huggingface_hub cannot read it.
    """
    split_state_dict_into_shards_factory({}, get_storage_size=lambda _: 0, filename_pattern="", max_shard_size=size)


@contextmanager
def staged_folder(folder: Path, *, overwrite: bool) -> Iterator[Path]:
    """A folder to write into that becomes ``folder`` when the block ends, and vanishes when it raises.

    An existing target is replaced only after the new one is complete and on the disk. What a process that was killed
    here has left behind is cleared away, or put back where it was.
    """
    _clear_leftovers(folder)
    check_output(folder, overwrite=overwrite)
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = folder.parent / f".{folder.name}{_PARTIAL}{os.getpid()}"
    retired = folder.parent / f".{folder.name}{_RETIRED}{os.getpid()}"
    staging.mkdir()
    try:
        with _held(staging):
            yield staging
            for path in staging.iterdir():
                sync_file(path)
            sync_folder(staging)
            if folder.exists():
                folder.rename(retired)
            staging.rename(folder)
            sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        if retired.exists() and not folder.exists():
            retired.rename(folder)
        raise
    shutil.rmtree(retired, ignore_errors=True)


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Raises:
    BlockingIOError: another process, possibly of another machine, holds the folder.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _clear_leftovers(folder: Path) -> None:
    for retired in folder.parent.glob(f".{glob.escape(folder.name)}{_RETIRED}*"):
        if folder.exists():
            shutil.rmtree(retired)
        else:
            retired.rename(folder)
    for staging in folder.parent.glob(f".{glob.escape(folder.name)}{_PARTIAL}*"):
        with suppress(BlockingIOError), _held(staging):
            shutil.rmtree(staging)


def write_tensors(
    folder: Path,
    model_config: Mapping[str, Any],
    config: CheckpointConfig,
    layers: Mapping[str, QuantizedLayer],
    others: Mapping[str, Tensor],
    *,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write all tensors, the index, the checksums of every file of the folder, and at last ``config.json``.

    Args:
        folder: an existing, private folder (see :func:`staged_folder`) that holds everything else already.
        model_config: the model's configuration, without ``quantization_config``. Code that it names is left out: a
            checkpoint needs none.
        config: what stands there instead.
        layers: quantized layers by module, exactly those of ``config``.
        others: all remaining tensors by name.
        max_shard_size: bytes, or a size as huggingface_hub reads it.
    """
    if layers.keys() != config.layers.keys():
        raise ValueError("the layers to write are not those of the configuration")
    kinds = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in others.items()}
    for module, spec in config.layers.items():
        kinds |= {f"{module}.{suffix}": (kind.dtype, kind.shape) for suffix, kind in spec.tensors().items()}
    plan = split_state_dict_into_shards_factory(
        kinds,
        get_storage_size=lambda kind: kind[0].itemsize * math.prod(kind[1]),
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    with ExitStack() as files:
        write: dict[str, Callable[[str, Tensor], None]] = {}
        for file_name, names in plan.filename_to_tensors.items():
            there = {name: kinds[name] for name in names}
            one = files.enter_context(filling_safetensors(folder / file_name, there, {"format": "pt"}))
            write |= dict.fromkeys(names, one)
        for name, tensor in others.items():
            write[name](name, tensor)
        for module, layer in layers.items():  # one at a time: together they may be larger than memory
            if layer.spec != config.layers[module]:
                raise ValueError(f"{module} is not as the configuration has it")
            layer.check(name=module)
            for suffix, tensor in layer.tensors.items():
                write[f"{module}.{suffix}"](f"{module}.{suffix}", tensor)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / INDEX_NAME).write_bytes(json_text(index).encode())
    entry = config.model_dump(mode="json")
    content = json_text({**without_code(model_config), "quantization_config": entry}).encode()
    (folder / SUMS_NAME).write_bytes(file_sums(folder, {CONFIG_NAME: content}))
    (folder / CONFIG_NAME).write_bytes(content)
