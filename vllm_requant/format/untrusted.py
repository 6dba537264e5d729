"""Files of a folder that nobody vouches for: which are opened at all, and how much of them is believed."""

import json
import os
import re
import stat
from collections.abc import Iterable
from io import BufferedReader
from pathlib import Path
from typing import Any, NoReturn

from .errors import ReQuantFormatError

__all__ = ["MAX_JSON_BYTES", "MAX_JSON_VALUES", "file_of", "open_regular", "parse_json", "read_bounded", "read_json"]

MAX_JSON_BYTES = 64 * 2**20
MAX_JSON_VALUES = 2**21
"""Python needs up to 100 bytes for a value of which the text has two, so that their number is bounded, too."""
_MAX_DEPTH = 64


def file_of(folder: Path, name: str) -> Path | None:
    """The file of that plain name in a checkpoint, None if there is none.

    A link may stay inside the folder, or lead from a snapshot of the Hub's cache to its blobs, and nowhere else.

    Raises:
        ReQuantFormatError: it is no regular file, or a link to a file elsewhere.
    """
    path = folder / name
    if not os.path.lexists(path):
        return None
    if not path.is_file():
        raise ReQuantFormatError("is not a regular file", file=path)
    home, target = folder.resolve(), path.resolve()
    in_cache = home.parent.name == "snapshots" and target.parent == home.parent.parent / "blobs"
    if not target.is_relative_to(home) and not in_cache:
        raise ReQuantFormatError("is a link to a file outside the checkpoint", file=path)
    return path


def open_regular(path: Path) -> BufferedReader:
    """Open a file for reading, without waiting for whoever might write to a pipe.

    Raises:
        ReQuantFormatError: it is no regular file.
    """
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ReQuantFormatError("is not a regular file", file=path)
    return file


def read_bounded(path: Path, limit: int) -> bytes:
    """The whole of a file that is not larger than ``limit`` bytes.

    Raises:
        ReQuantFormatError: it is larger, or no regular file.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise ReQuantFormatError(f"has {size} bytes, more than the {limit} that are read", file=path)
        return file.read(size)  # not limit: so much would be allocated first


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ReQuantFormatError: see :func:`parse_json`; or the file is too large.
    """
    return parse_json(read_bounded(path, MAX_JSON_BYTES), file=path)


def parse_json(data: bytes, *, file: Path) -> dict[str, Any]:
    """A JSON object as RFC 8259 has it, which Python's parser takes more freely.

    Raises:
        ReQuantFormatError: it is none: not UTF-8, a name that stands twice, NaN or an infinity, half a surrogate pair;
            or it is too large or too deep.
    """
    if sum(map(data.count, (b",", b"[", b"{"))) > MAX_JSON_VALUES:
        raise ReQuantFormatError(f"holds more than {MAX_JSON_VALUES} values", file=file)

    def refuse(number: str) -> NoReturn:
        raise ValueError(f"{number} is no number of JSON")

    def finite(number: str) -> float:
        value = float(number)
        return value if abs(value) != float("inf") else refuse(number[:40])

    try:
        text = data.decode("utf-8")
        content = json.loads(text, object_pairs_hook=_object, parse_constant=refuse, parse_float=finite)
        if re.search(r"\\u[dD][89a-fA-F]", text):
            json.dumps(content, ensure_ascii=False).encode("utf-8")  # fails on half a surrogate pair
    except RecursionError:
        raise ReQuantFormatError(f"is nested deeper than {_MAX_DEPTH} levels", file=file) from None
    except ValueError as error:  # of the parser, of the hooks, of int() for a number of many digits
        raise ReQuantFormatError(f"is not valid JSON ({error})", file=file) from None
    if not isinstance(content, dict):
        raise ReQuantFormatError("is not a JSON object", file=file)
    level: list[Any] = [content]
    for _ in range(_MAX_DEPTH):
        level = [child for parent in level for child in _children(parent) if isinstance(child, (dict, list))]
    if level:
        raise ReQuantFormatError(f"is nested deeper than {_MAX_DEPTH} levels", file=file)
    return content


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        double = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the name {double[:200]!r} stands twice in an object")
    return made


def _children(container: Any) -> Iterable[Any]:
    return container.values() if isinstance(container, dict) else container
