"""What all commands share: logging to stderr, one JSON object on stdout, one line for an error."""

import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from ..bench.servers import ServerError
from ..format import ReQuantFormatError
from ..format.durable import json_text, null_for_nan
from ..offline.objections import ObjectionError

__all__ = [
    "byte_size",
    "command_errors",
    "incident_lines",
    "prepare_results",
    "print_json",
    "set_up_logging",
    "share",
    "work_folder",
]

_UNITS = {"": 1} | {
    f"{prefix}{suffix}B": base ** (power + 1)
    for suffix, base in (("", 1000), ("i", 1024))
    for power, prefix in enumerate("KMGT")
}
_BROKEN_TORCHVISION = "torchvision::nms"


def set_up_logging(*, quiet: bool = False) -> None:
    """Our log lines to stderr; other packages' progress bars off."""
    logging.basicConfig(
        level=logging.WARNING if quiet else logging.INFO,
        format="%(asctime)s %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
    )
    for noisy in ("httpx", "httpx2", "filelock", "urllib3", "transformers", "lm_eval", "datasets"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def print_json(content: dict[str, Any]) -> None:
    """The one JSON object of a command."""
    typer.echo(json_text(null_for_nan(content)), nl=False)


def incident_lines(entries: Any) -> list[str]:
    """What a checkpoint's provenance says of numerical trouble, of which no reader of checkpoints checks anything."""
    return [
        f"{entry.get('trouble')}; {entry.get('fallback')}: {entry.get('first')}, {entry.get('places')} in all"
        for entry in (entries if isinstance(entries, list) else [])
        if isinstance(entry, dict)
    ]


@contextmanager
def work_folder(kept: Path | None) -> Iterator[Path]:
    """Where files of a block go: the folder that the user wants to keep, or else one that goes at the end."""
    with tempfile.TemporaryDirectory(prefix="requant-") as temporary:
        folder = kept or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        yield folder


def prepare_results(folder: Path | None) -> None:
    """Before hours of work: numbers and a picture can be written there, if the user asked for them.

    Raises:
        OSError: there is no folder to be made, or nothing to draw with.
    """
    if folder is not None:
        from ..bench.plots import require_matplotlib

        require_matplotlib()
        folder.mkdir(parents=True, exist_ok=True)


def share(text: str) -> float:
    """Parse ``0.45%`` or ``0.0045``."""
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a share; write 0.45% or 0.0045") from None


def byte_size(text: str) -> int:
    """Parse ``90MB``, ``1.5GiB`` or a plain number of bytes."""
    match = re.fullmatch(r"([0-9.]+) ?([A-Za-z]*)", text.strip())
    try:
        return int(float(match[1]) * _UNITS[match[2]]) if match else int(text)
    except (ValueError, KeyError):
        raise typer.BadParameter(f"{text!r} is not a size; write 90MB, 1.5GiB or a number of bytes") from None


@contextmanager
def command_errors() -> Iterator[None]:
    """Turn what a user can cause into a line on stderr for every reason, and the right exit status.

    Anything else is a defect of ours and keeps its traceback.
    """
    _hide_bars()
    try:
        yield
    except ObjectionError as error:
        _fail(error.exit_status, *error.args)
    except (ReQuantFormatError, ServerError, OSError) as error:
        _fail(1, error)
    except RuntimeError as error:
        if _BROKEN_TORCHVISION not in str(error):
            raise
        _fail(
            1,
            "the installed torchvision does not fit this torch and breaks transformers; "
            "run: pip uninstall -y torchvision torchaudio torchcodec",
        )


def _fail(status: int, *reasons: object) -> None:
    for reason in reasons:
        typer.echo(f"requant: error: {reason}", err=True)
    raise typer.Exit(status)


def _hide_bars() -> None:
    # read by these packages when they are imported; ours are drawn by offline.progress
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
