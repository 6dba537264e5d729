"""The whole of a checkpoint against SPEC.md: what ``requant verify``, the vLLM plugin and transformers do alike.

Three steps, each of which needs the one before: configuration, index and headers (:class:`.reader.Checkpoint`), the
model that they are said to be (:mod:`.architecture`), and the values, layer by layer.
"""

from collections.abc import Iterator
from pathlib import Path

from .architecture import check_architecture
from .errors import ReQuantFormatError
from .reader import Checkpoint

__all__ = ["check_values", "validate"]


def validate(folder: str | Path) -> Checkpoint:
    """Open a checkpoint that keeps every rule; checksums are not looked at.

    Raises:
        ReQuantFormatError: the first rule that it breaks.
    """
    checkpoint = Checkpoint(folder)
    check_architecture(checkpoint)
    for _, problem in check_values(checkpoint):
        if problem is not None:
            raise problem
    return checkpoint


def check_values(checkpoint: Checkpoint) -> Iterator[tuple[str, ReQuantFormatError | None]]:
    """Every layer and every other tensor with what is wrong with its values, read one at a time."""
    reads = [(name, checkpoint.layer) for name in checkpoint.config.layers]
    others = [(name, checkpoint.other_tensor) for name in checkpoint.other_names]
    for name, read in [*reads, *others]:
        try:
            read(name)
        except ReQuantFormatError as error:
            yield name, error
        else:
            yield name, None
