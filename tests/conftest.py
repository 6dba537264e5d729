"""How tests are divided over the processes of pytest-xdist, where it runs them (``make test``)."""

import os
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
# one after the other: each of these starts servers, and shares converted models with its neighbours
SERVERS = {"bench", "e2e", "serving"}

if "PYTEST_XDIST_WORKER" in os.environ:
    # before anything imports torch: threads of several processes that wait for each other on a few cores wait long
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_itemcollected(item: pytest.Item) -> None:
    """Keep the tests of a file together, since they share fixtures, and those that start servers."""
    if item.config.pluginmanager.hasplugin("xdist"):
        folder = item.path.relative_to(TESTS).parts[0]
        item.add_marker(pytest.mark.xdist_group("servers" if folder in SERVERS else str(item.path)))
