"""Which tensors the safetensors files of a folder hold: names, types, shapes and places, from the headers alone.

The headers are parsed here and not by the safetensors library, which accepts a name that stands twice; it parses them
again when the files are opened.
"""

import math
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from .errors import ReQuantFormatError
from .schema import is_plain_name
from .untrusted import file_of, open_regular, parse_json, read_json

__all__ = ["INDEX_NAME", "SINGLE_FILE_NAME", "StoredTensor", "stored_tensors"]

INDEX_NAME = "model.safetensors.index.json"
SINGLE_FILE_NAME = "model.safetensors"
_SUFFIX = ".safetensors"
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,200}\.safetensors")
_MAX_HEADER_BYTES = 100_000_000  # as the safetensors library has it
_MAX_DIMENSIONS = 8
_MAX_SIZE = 2**63 - 1
_LFS_POINTER = b"version https://git-lfs"
_ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}


class StoredTensor(NamedTuple):
    """What a header says of a tensor, its size confirmed by that of the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a folder, by name.

    Raises:
        ReQuantFormatError: the rules of SPEC.md, section 2, are broken; a file is truncated or not safetensors.
    """
    index_path = file_of(folder, INDEX_NAME)
    listed: dict[str, str] | None = None
    if index_path is None:
        names = [SINGLE_FILE_NAME]
        if file_of(folder, SINGLE_FILE_NAME) is None:
            raise ReQuantFormatError(f"holds neither {SINGLE_FILE_NAME} nor {INDEX_NAME}", file=folder)
    else:
        index = read_json(index_path)
        listed = _weight_map(index, index_path)
        names = sorted(set(listed.values()))
    # vLLM reads every file that ends so, or that an index lists
    for entry in os.scandir(folder):
        if entry.name.endswith(_SUFFIX) and not entry.name.startswith(".") and entry.name not in names:
            raise ReQuantFormatError("is not part of the checkpoint; remove it", file=entry.path)
    found: dict[str, StoredTensor] = {}
    for name in names:
        path = file_of(folder, name)
        if path is None:
            raise ReQuantFormatError(f"the shard {name} is missing", file=index_path)
        for tensor, stored in _read_header(path).items():
            if tensor in found:
                raise ReQuantFormatError("stands in two shards", file=path, tensor=tensor)
            if listed is not None and listed.get(tensor) != name:
                raise ReQuantFormatError("is not listed in the index for its file", file=path, tensor=tensor)
            found[tensor] = stored
    if listed is not None:
        _check_index(index, listed, found, index_path)
    return found


def _weight_map(index: dict[str, Any], path: Path | None) -> dict[str, str]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict):
        raise ReQuantFormatError("has no weight_map", file=path)
    for tensor, name in weight_map.items():
        # a plain name: nothing outside the folder is ever opened
        if not isinstance(name, str) or not _FILE_NAME.fullmatch(name):
            raise ReQuantFormatError(f"{name!r:.300} is not a plain safetensors file name", file=path, tensor=tensor)
    return weight_map


def _check_index(
    index: dict[str, Any], listed: dict[str, str], found: dict[str, StoredTensor], path: Path | None
) -> None:
    for name, file in listed.items():
        if name not in found:
            raise ReQuantFormatError(f"is listed in the index but not in its file {file}", file=path, tensor=name)
    metadata = index.get("metadata", {})
    total = sum(tensor.nbytes for tensor in found.values())
    stated = metadata.get("total_size", total) if isinstance(metadata, dict) else None
    if type(stated) is not int or stated != total:
        raise ReQuantFormatError(f"metadata.total_size is {stated!r:.80}, the tensors have {total} bytes", file=path)


def _read_header(path: Path) -> dict[str, StoredTensor]:
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(len(_LFS_POINTER))
        if start == _LFS_POINTER:
            raise ReQuantFormatError("is a pointer of Git LFS, not the file itself; run 'git lfs pull'", file=path)
        length = int.from_bytes(start[:8], "little")
        # before anything is read or allocated by that number
        if size < 8 or length > size - 8:
            raise ReQuantFormatError(
                f"is truncated or not a safetensors file: a header of {length} bytes in a file of {size}",
                file=path,
            )
        if length > _MAX_HEADER_BYTES:
            raise ReQuantFormatError(f"its header has {length} bytes, at most {_MAX_HEADER_BYTES} are read", file=path)
        file.seek(8)
        text = file.read(length)
    if not text.startswith(b"{"):
        raise ReQuantFormatError("is truncated or not a safetensors file: its header is not JSON", file=path)
    header = parse_json(text, file=path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ReQuantFormatError("its metadata is not text by name", file=path)
    placed = [(name, *_parse_entry(name, entry, path)) for name, entry in header.items()]
    end = 0
    for name, begin, stop, _ in sorted(placed, key=lambda item: item[1:3]):
        if begin != end:
            raise ReQuantFormatError(
                f"its data begins at {begin}, that of the tensor before ends at {end}", file=path, tensor=name
            )
        end = stop
    if end != size - 8 - length:
        raise ReQuantFormatError(
            f"is truncated or has bytes that belong to no tensor: tensors end at {end}, "
            f"the file holds {size - 8 - length} bytes of data",
            file=path,
        )
    return {name: stored for name, _, _, stored in placed}


def _parse_entry(name: str, entry: Any, path: Path) -> tuple[int, int, StoredTensor]:
    """Begin and end of a tensor's bytes behind the header, and what is known of it."""

    def sizes(values: Any, most: int) -> bool:
        return isinstance(values, list) and len(values) <= most and all(_is_size(value) for value in values)

    def refuse(reason: str) -> ReQuantFormatError:
        return ReQuantFormatError(reason, file=path, tensor=name)

    if not is_plain_name(name):
        raise refuse("is not a name of a tensor")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise refuse("its entry in the header is not dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise refuse(f"is of an unknown type {dtype!r:.80}")
    if not sizes(shape, _MAX_DIMENSIONS) or not sizes(offsets, 2) or len(offsets) != 2:
        raise refuse("its shape or data_offsets are not numbers of elements and bytes")
    nbytes = math.prod(shape) * _ITEM_BYTES[dtype]
    if offsets[1] - offsets[0] != nbytes:
        raise refuse(f"{dtype} {shape} is {nbytes:.6g} bytes, but data_offsets are {offsets}")
    return offsets[0], offsets[1], StoredTensor(path, dtype, tuple(shape), nbytes)


def _is_size(value: Any) -> bool:
    # bool is an int in Python, not in JSON
    return type(value) is int and 0 <= value <= _MAX_SIZE
