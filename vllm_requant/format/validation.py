"""The whole of a checkpoint against SPEC.md: what ``requant verify``, the vLLM plugin and transformers do alike.

Three steps, each of which needs the one before: configuration, index and headers (:class:`.reader.Checkpoint`), the
model that they are said to be (:mod:`.architecture`), and the values, layer by layer. :func:`findings` adds the
checksums, for which every byte has to be read.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from .architecture import check_architecture
from .checksums import SUMS_NAME, check_sum, read_sums, require_listed
from .errors import ReQuantFormatError
from .reader import CONFIG_NAME, INDEX_NAME, Checkpoint
from .untrusted import file_of

__all__ = ["findings", "validate"]

Step = Callable[[], object]
Track = Callable[[Iterable[Any], str, int], Iterable[Any]]
"""Yields items, and shows how far the work on them is: ``(items, what it is, number of items)``."""


def validate(folder: str | Path) -> Checkpoint:
    """Open a checkpoint that keeps every rule; checksums are not looked at.

    Raises:
        ReQuantFormatError: the first rule that it breaks.
    """
    checkpoint = Checkpoint(folder)
    check_architecture(checkpoint)
    for step in _value_checks(checkpoint):
        step()
    return checkpoint


def findings(folder: Path, track: Track = lambda items, label, total: items) -> Iterator[ReQuantFormatError]:
    """Everything that is wrong with a checkpoint, checksums included.

    What a broken configuration or header says is not believed, so that nothing is found behind one. A tensor yields its
    first fault only. Memory holds one layer at a time.
    """
    try:
        sums = read_sums(folder)
    except ReQuantFormatError as error:
        yield error
        sums = None
    steps: list[Step] = [partial(check_sum, folder, name, wanted) for name, wanted in sorted((sums or {}).items())]
    yield from _failures(track(steps, "checksums", len(steps)))
    try:
        checkpoint = Checkpoint(folder)
    except ReQuantFormatError as error:
        yield error
        return
    steps = [partial(check_architecture, checkpoint), *_value_checks(checkpoint)]
    if sums is not None:
        needed = {CONFIG_NAME, *(tensor.file.name for tensor in checkpoint.tensors.values())}
        needed |= {INDEX_NAME} if file_of(folder, INDEX_NAME) else set()
        steps.insert(0, partial(require_listed, needed, sums, folder / SUMS_NAME))
    yield from _failures(track(steps, "values", len(steps)))


def _value_checks(checkpoint: Checkpoint) -> list[Step]:
    """Reads of one layer or other tensor each, which check what they read."""
    layers = [partial(checkpoint.layer, name) for name in checkpoint.config.layers]
    return [*layers, *(partial(checkpoint.other_tensor, name) for name in checkpoint.other_names)]


def _failures(steps: Iterable[Step]) -> Iterator[ReQuantFormatError]:
    for step in steps:
        try:
            step()
        except ReQuantFormatError as error:
            yield error
