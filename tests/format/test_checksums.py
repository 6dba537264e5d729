"""SHA256SUMS lists the checkpoint's files as sha256sum does."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.format.checkpoints import write_checkpoint
from vllm_requant.format.checksums import check_sum, read_sums


@pytest.mark.parametrize("max_shard_size", ["5GB", 40_000])
def test_sums_of_every_file_are_those_of_sha256sum(tmp_path: Path, max_shard_size: int | str) -> None:
    folder = write_checkpoint(tmp_path / "out", max_shard_size=max_shard_size)
    sums = read_sums(folder)
    assert sums is not None
    assert {*sums, "SHA256SUMS"} == {path.name for path in folder.iterdir()}
    for name, expected in sums.items():
        check_sum(folder, name, expected)
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=folder, check=True)


def test_a_checkpoint_without_sums_says_so(tmp_path: Path) -> None:
    assert read_sums(tmp_path) is None
