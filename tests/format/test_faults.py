"""A checkpoint for every rule of SPEC.md that breaks it is refused: with its reason, at once, in little memory."""

import re
import shutil
import time
from pathlib import Path

import pytest

from tests.format.bounded import allocating_at_most, tree_size
from tests.format.checkpoints import write_checkpoint
from tests.format.faults import BASES, FAULTS, Fault, table
from vllm_requant.format import ReQuantFormatError
from vllm_requant.format.validation import findings, validate

ALLOWANCE = 128 * 2**20  # beside twice the files: parsed JSON of up to 10 MB, arenas of threads


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("good")
    return {name: write_checkpoint(folder / name, **arguments) for name, arguments in BASES.items()}


@pytest.mark.parametrize("base", BASES)
def test_what_the_faults_are_made_of_is_good(good: dict[str, Path], base: str) -> None:
    validate(good[base])
    assert list(findings(good[base])) == []


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_refused(good: dict[str, Path], tmp_path: Path, fault: Fault) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(good[fault.base], folder)
    fault.make(folder)
    if fault.by == "all" and folder.exists():
        # stale sums would be a finding, too
        (folder / "SHA256SUMS").unlink()
    began = time.monotonic()
    with allocating_at_most(2 * tree_size(folder) + ALLOWANCE):
        found = list(findings(folder))
        if fault.by == "all":
            with pytest.raises(ReQuantFormatError, match=fault.says) as caught:
                validate(folder)
            assert str(caught.value) == str(found[0])
        else:
            validate(folder)
    assert time.monotonic() - began < 10
    (finding,) = found
    message = str(finding)
    assert "\n" not in message and message.isprintable() and len(message) <= 1000
    assert str(folder) in message
    assert re.search(fault.says, message), message


def test_the_table_is_that_of_the_faults() -> None:
    assert Path(__file__).with_name("FAULTS.md").read_text() == table()
    names = [fault.name for fault in FAULTS]
    assert len(set(names)) == len(names)
