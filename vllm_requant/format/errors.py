"""The one error that a malformed checkpoint raises."""

from pathlib import Path

__all__ = ["ReQuantFormatError"]

_LONGEST = 1000


class ReQuantFormatError(ValueError):
    """A checkpoint breaks a rule of SPEC.md.

    The message may hold text of the checkpoint; it is one line of bounded length, without control characters.

    Args:
        reason: what is wrong and, where there is one, the way out.
        file: the file in which it was found.
        tensor: the tensor, or the dotted path of the config entry.
    """

    def __init__(self, reason: str, *, file: str | Path | None = None, tensor: str | None = None) -> None:
        self.reason, self.file, self.tensor = reason, None if file is None else str(file), tensor
        where = ": ".join(part for part in (self.file, tensor and _shown(tensor, _LONGEST // 4)) if part)
        super().__init__(_shown(f"{where}: {reason}" if where else reason, _LONGEST))


def _shown(text: str, longest: int) -> str:
    """What a terminal and a log can take of a text."""
    # cut first: what a checkpoint calls a tensor can be as long as its file
    cut = text if len(text) <= longest else text[: longest - 1] + "…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in cut)
