"""How tests are divided over the processes of pytest-xdist, where it runs them (``make test``)."""

import os
from pathlib import PurePosixPath
from typing import Any

import pytest

# one after the other: each of these starts servers, and shares converted models with its neighbours
SERVERS = {"bench", "e2e", "serving"}

if "PYTEST_XDIST_WORKER" in os.environ:
    # before anything imports torch: threads of several processes that wait for each other on a few cores wait long
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep the tests of a file together, since they share fixtures, and all those that start servers."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "servers" if SERVERS & set(PurePosixPath(file).parts) else file

    config.option.loadscopereorder = False  # servers come first as it is, and take longest
    return ByFile(config, log)
