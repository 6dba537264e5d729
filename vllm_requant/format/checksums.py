"""``SHA256SUMS``: one line a file of a checkpoint, in the format of ``sha256sum -c``.

They find what was damaged on the way. Who can change a file can change its line, so they say nothing about who made
the checkpoint.
"""

import hashlib
import re
from collections.abc import Mapping, Set
from pathlib import Path

from .errors import ReQuantFormatError
from .untrusted import file_of, open_regular, read_bounded

__all__ = ["SUMS_NAME", "amended_sums", "check_sum", "file_sum", "file_sums", "read_sums", "require_listed"]

SUMS_NAME = "SHA256SUMS"
_MAX_BYTES = 2**20
# no path: what is listed lies in the folder
_LINE = re.compile(r"([0-9a-f]{64}) [ *]([^/\\\0]+)")


def file_sums(folder: Path, coming: Mapping[str, bytes]) -> bytes:
    """The content of ``SHA256SUMS`` for all files of a folder and those that will be written to it.

    Args:
        folder: the finished folder, but for ``coming``.
        coming: contents by file name.
    """
    sums = {path.name: file_sum(path) for path in folder.iterdir() if path.is_file()}
    sums |= {name: hashlib.sha256(content).hexdigest() for name, content in coming.items()}
    return _lines(sums)


def amended_sums(sums: Mapping[str, str], changed: Mapping[str, bytes]) -> bytes:
    """The content of ``SHA256SUMS`` after some files have changed; what it says of the others stays as it is.

    Args:
        sums: of :func:`read_sums`.
        changed: new contents by file name.
    """
    return _lines({**sums, **{name: hashlib.sha256(content).hexdigest() for name, content in changed.items()}})


def read_sums(folder: Path) -> dict[str, str] | None:
    """SHA-256 by file name as ``SHA256SUMS`` has them, None where there is no such file.

    Raises:
        ReQuantFormatError: a line is not one of ``sha256sum`` for a file of the folder, or a file stands there twice.
    """
    path = file_of(folder, SUMS_NAME)
    if path is None:
        return None
    sums: dict[str, str] = {}
    try:
        lines = read_bounded(path, _MAX_BYTES).decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ReQuantFormatError(f"is not text ({error})", file=path) from None
    for number, line in enumerate(lines, start=1):
        match = _LINE.fullmatch(line)
        if match is None:
            raise ReQuantFormatError(f"line {number} is not a SHA-256 and a plain file name", file=path)
        if match[2] in sums:
            raise ReQuantFormatError(f"line {number} lists {match[2]} again", file=path)
        sums[match[2]] = match[1]
    return sums


def require_listed(needed: Set[str], sums: Mapping[str, str], file: Path) -> None:
    """A list that leaves out a part of the checkpoint would say nothing about it.

    Raises:
        ReQuantFormatError: a file is not listed.
    """
    missing = sorted(needed - sums.keys())
    if missing:
        raise ReQuantFormatError(f"does not list {missing[0]}", file=file)


def check_sum(folder: Path, name: str, expected: str) -> None:
    """Read a whole file and compare.

    Raises:
        ReQuantFormatError: the file is missing or is not the one that was listed.
    """
    path = file_of(folder, name)
    if path is None:
        raise ReQuantFormatError(f"is missing, but {SUMS_NAME} lists it", file=folder / name)
    found = file_sum(path)
    if found != expected:
        raise ReQuantFormatError(f"has SHA-256 {found}, {SUMS_NAME} says {expected}", file=path)


def _lines(sums: Mapping[str, str]) -> bytes:
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())).encode("utf-8")


def file_sum(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
