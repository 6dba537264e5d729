"""Whatever happens to the bytes of a checkpoint, it is good or refused; and checking it takes little memory."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.format.bounded import allocating_at_most
from tests.format.checkpoints import write_checkpoint
from tests.fuzz.target import Target
from vllm_requant.format import ReQuantFormatError, sparse
from vllm_requant.format.reader import Checkpoint
from vllm_requant.format.sparse import Csr, all_finite
from vllm_requant.format.validation import findings, validate

ALLOWANCE = 32 * 2**20
NUMBERS = st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.sampled_from([2**31, 10**40]))
VALUES = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=5), st.just([]), st.just({}), st.just([[1]]))


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return Target(tmp_path_factory.mktemp("fuzz"))


def test_seeds_of_the_fuzzer_are_good(target: Target) -> None:
    assert [target.run(seed) for seed in target.seeds()] == [[] for _ in target.seeds()]


@settings(max_examples=300, deadline=10_000)
@given(data=st.data())
def test_changed_bytes_are_good_or_refused(target: Target, data: st.DataObject) -> None:
    changed = bytearray(data.draw(st.sampled_from(target.seeds())))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(1, len(changed)))
        removed = data.draw(st.sampled_from([0, 1, 2, 20]))
        changed[place : place + removed] = data.draw(st.binary(max_size=4))
    with allocating_at_most(2 * target.size + ALLOWANCE):
        target.run(bytes(changed))


def _places(content: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [place for key, value in items for place in [(*at, key), *_places(value, (*at, key))]]


@settings(max_examples=300, deadline=10_000)
@given(data=st.data())
def test_one_other_value_is_good_or_refused(target: Target, data: st.DataObject) -> None:
    """In config.json, in the entry, in the index and in a header."""
    choice = data.draw(st.sampled_from([0, 1, 2, 3]))
    content = json.loads(target.seeds()[choice][1:])
    *parents, last = data.draw(st.sampled_from(_places(content)))
    inner = content
    for key in parents:
        inner = inner[key]
    inner[last] = data.draw(VALUES)
    with allocating_at_most(2 * target.size + ALLOWANCE):
        target.run(bytes([choice]) + json.dumps(content).encode())


@pytest.mark.parametrize("max_shard_size", ["5GB", 40_000])
def test_truncated_at_every_4_kib(tmp_path: Path, max_shard_size: int | str) -> None:
    folder = write_checkpoint(tmp_path / "out", max_shard_size=max_shard_size)
    (folder / "SHA256SUMS").unlink()
    for path in sorted(folder.glob("*.safetensors")):
        content = path.read_bytes()
        assert len(content) > 3 * 4096
        for size in range(0, len(content), 4096):
            path.write_bytes(content[:size])
            with pytest.raises(ReQuantFormatError, match="truncated") as caught:
                validate(folder)
            assert caught.value.file == str(path)
        path.write_bytes(content)
    validate(folder)


def test_memory_is_a_small_part_of_a_large_file(tmp_path: Path) -> None:
    """64 MiB of embeddings and 40 MiB of sparse elements: neither is copied while it is checked."""
    big = {"vocab_size": 2**19, "intermediate_size": 160_000, "densities": {"gate_proj": 1.0, "lm_head": 0.0}}
    folder = write_checkpoint(tmp_path / "out", **big)
    checkpoint = Checkpoint(folder)
    size = (folder / "model.safetensors").stat().st_size
    assert size > 100 * 2**20 and checkpoint.config.nnz > 10**7
    del checkpoint
    with allocating_at_most(2 * size + ALLOWANCE):  # it is mapped, once more while its header is read
        validate(folder)
        assert list(findings(folder)) == []


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_columns_are_checked_piece_by_piece_as_they_would_be_at_once(data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.lists(st.integers(0, 9), max_size=5), min_size=1, max_size=5))
    if data.draw(st.booleans()):
        rows = [sorted(set(row)) for row in rows]
    good = all(row == sorted(set(row)) and all(column < 9 for column in row) for row in rows)
    indptr = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0).int()
    indices = torch.tensor([column for row in rows for column in row], dtype=torch.uint16)
    csr = Csr(indptr, indices, torch.zeros(len(indices), dtype=torch.float16))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse, "_PIECE", data.draw(st.integers(1, 6)))
        try:
            csr.check(len(rows), 9, name="m")
            assert good
        except ReQuantFormatError:
            assert not good


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 2**20 - 1, 2**20, 2**21])
def test_a_value_that_is_not_finite_is_found_anywhere(value: float, place: int) -> None:
    tensor = torch.zeros(3, 700_000, dtype=torch.bfloat16)
    assert all_finite(tensor)
    tensor.view(-1)[place] = value
    assert not all_finite(tensor)
    assert not all_finite(tensor.t())
