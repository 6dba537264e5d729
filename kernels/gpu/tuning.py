"""Which variant of a kernel serves which layer and batch: measured tables, and where they are kept.

A table is by format (``uniform4``), shape (``4096x4096``: output by input features) and the largest batch of a class;
an entry names a variant by its index in native.py and, but for a trellis, the number of blocks that share the columns
of a row and the blocks a multiprocessor, or says that weights are expanded instead (null). ``python -m
vllm_requant.kernels.bench --device cuda --tune`` measures one for the device at hand and keeps it in the cache folder.

Where that was not done a table that comes with the package serves devices of the same capability and number of
multiprocessors, for the layers of Llama 3 1B, 3B, 8B and 70B; for what no table has the rules of native.py hold.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch

from .driver import cache_folder

__all__ = ["CLASSES", "Table", "batch_class", "clear", "lookup", "save"]

CLASSES = (1, 8, 16, 32, 64)
"""The largest batch of every class."""
Table = dict[str, dict[str, dict[str, list[int] | None]]]


def batch_class(batch: int) -> int:
    """The class of a batch of up to 64."""
    return next(size for size in CLASSES if batch <= size)


def _shipped(device: int) -> Path:
    properties = torch.cuda.get_device_properties(device)
    name = f"sm{properties.major}{properties.minor}-{properties.multi_processor_count}.json"
    return Path(__file__).parent / "tuned" / name


def _measured_here(name: str) -> Path:
    return cache_folder() / "tuned" / f"{name.lower().replace(' ', '-')}.json"


def _read(path: Path) -> Table:
    try:
        table: Any = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return table if isinstance(table, dict) else {}


@cache
def _tables(device: int) -> tuple[Table, Table]:
    return _read(_measured_here(torch.cuda.get_device_name(device))), _read(_shipped(device))


def lookup(device: int, form: str, rows: int, columns: int, batch: int) -> tuple[bool, list[int] | None]:
    """Whether this was measured, and the entry."""
    key = str(batch_class(batch))
    for table in _tables(device):
        by_batch = table.get(form, {}).get(f"{rows}x{columns}", {})
        if key in by_batch:
            return True, by_batch[key]
    return False, None


def save(table: Table) -> Path:
    """Keep a table for the current device, beside what an earlier one has on other formats and shapes."""
    path = _measured_here(torch.cuda.get_device_name())
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = _read(path)
    for form, shapes in table.items():
        kept[form] = kept.get(form, {}) | shapes
    path.write_text(json.dumps(kept, indent=1) + "\n")
    clear()
    return path


def clear() -> None:
    """Forget what was read."""
    _tables.cache_clear()
