"""``python -m tests.format.faults``."""

from . import table

print(table(), end="")
