"""How tests are divided over the processes of pytest-xdist, where it runs them (``make test``)."""

import os
from pathlib import PurePosixPath
from typing import Any

import pytest

# one after the other: each of these starts servers, and shares converted models with its neighbours; engines of tiny
# models beside them, in a process of their own
GROUPS = {"bench": "servers", "e2e": "servers", "serving": "engines"}

if "PYTEST_XDIST_WORKER" in os.environ:
    # before anything imports torch: threads of several processes that wait for each other on a few cores wait long
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep the tests of a file together, since they share fixtures, and all those that start servers."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    config.option.loadscopereorder = False
    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """First what takes longest."""
    items.sort(key=lambda item: group_of(item.nodeid) not in GROUPS.values())


def group_of(nodeid: str) -> str:
    """What the test of that name has to stay together with."""
    file = nodeid.partition("::")[0]
    return next((GROUPS[part] for part in PurePosixPath(file).parts if part in GROUPS), file)
