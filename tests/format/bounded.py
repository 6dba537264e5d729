"""A limit on what the tests' own process may allocate."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["allocating_at_most", "tree_size"]


@contextmanager
def allocating_at_most(size: int) -> Iterator[None]:
    """Within the block the process gets no more address space than it has and ``size`` bytes; then allocation fails."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def tree_size(folder: Path) -> int:
    """Bytes of the regular files of a folder."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file()) if folder.exists() else 0
