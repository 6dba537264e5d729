"""The row bit stream is what SPEC.md, section 4, says, and packing is its inverse."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_requant.kernels.bitstream import pack_codes, row_bytes, unpack_codes


@st.composite
def code_rows(draw: st.DrawFn) -> tuple[int, list[list[int]]]:
    bits = draw(st.integers(1, 8))
    count = draw(st.integers(1, 40))
    row = st.lists(st.integers(0, (1 << bits) - 1), min_size=count, max_size=count)
    return bits, draw(st.lists(row, min_size=1, max_size=3))


@given(code_rows())
def test_bytes_follow_the_specification_and_unpack_again(case: tuple[int, list[list[int]]]) -> None:
    bits, rows = case
    codes = torch.tensor(rows, dtype=torch.uint8)
    packed = pack_codes(codes, bits)
    for row, stream in zip(rows, packed.tolist(), strict=True):
        # the bit string as one number: code j stands at bit j * bits
        number = sum(code << (j * bits) for j, code in enumerate(row))
        assert bytes(stream) == number.to_bytes(row_bytes(len(row), bits), "little")
    assert torch.equal(unpack_codes(packed, bits, codes.shape[1]), codes)


@pytest.mark.parametrize("code", [8, -1])
def test_code_that_does_not_fit_is_refused(code: int) -> None:
    with pytest.raises(ValueError, match=r"\[0, 7\]"):
        pack_codes(torch.tensor([[0, code]]), 3)


def test_stream_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="4 bytes a row"):
        unpack_codes(torch.zeros(1, 3, dtype=torch.uint8), 3, 10)
