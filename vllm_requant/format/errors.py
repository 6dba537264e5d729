"""The one error that a malformed checkpoint raises."""

from pathlib import Path

__all__ = ["ReQuantFormatError"]


class ReQuantFormatError(ValueError):
    """A checkpoint breaks a rule of SPEC.md.

    Args:
        reason: what is wrong and, where there is one, the way out.
        file: the file in which it was found.
        tensor: the tensor, or the dotted path of the config entry.
    """

    def __init__(self, reason: str, *, file: str | Path | None = None, tensor: str | None = None) -> None:
        self.reason, self.file, self.tensor = reason, None if file is None else str(file), tensor
        where = ": ".join(part for part in (self.file, tensor) if part)
        super().__init__(f"{where}: {reason}" if where else reason)
