"""The row bit stream: how codes of 1 to 8 bits lie in bytes, on disk and as the input of every repacking.

Code ``j`` of a row occupies bits ``j·bits … (j+1)·bits − 1`` of that row's bit string; bit ``i`` of the
string is bit ``i mod 8`` (least significant first) of byte ``i // 8``. A row is padded with zero bits to a
whole byte. Eight codes therefore always fill ``bits`` bytes, whatever the width, and 3-bit codes take
exactly 3 bits.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["pack_codes", "row_bytes", "unpack_codes"]


def row_bytes(count: int, bits: int) -> int:
    """Bytes that ``count`` codes of ``bits`` bits occupy in one row."""
    return (count * bits + 7) // 8


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes into row bit streams.

    Args:
        codes: integer tensor ``[rows, count]`` with values in ``[0, 2**bits)``.
        bits: width of a code, 1 to 8.

    Returns:
        uint8 ``[rows, ceil(count · bits / 8)]``, pad bits zero.

    Raises:
        ValueError: a code does not fit.
    """
    _check_bits(bits)
    rows, count = codes.shape
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 1 << bits):
        raise ValueError(f"codes must lie in [0, {(1 << bits) - 1}] to be packed in {bits} bits")
    if bits == 8:
        return codes.to(torch.uint8).contiguous()
    blocks = (count + 7) // 8
    parts = pad(codes.to(torch.uint8).contiguous(), (0, blocks * 8 - count)).view(rows, blocks, 8)
    words = parts.view(torch.int64)
    for lane in (8, 16, 32):
        _join(words, bits, lane)
    joined = parts[:, :, :bits].reshape(rows, blocks * bits)
    return joined[:, : row_bytes(count, bits)].contiguous()


def unpack_codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of :func:`pack_codes`.

    Args:
        packed: uint8 ``[rows, ceil(count · bits / 8)]``.
        bits: width of a code, 1 to 8.
        count: codes in a row.

    Returns:
        uint8 ``[rows, count]``.
    """
    _check_bits(bits)
    rows, width = packed.shape
    if width != row_bytes(count, bits):
        raise ValueError(f"{count} codes of {bits} bits take {row_bytes(count, bits)} bytes a row, got {width}")
    if bits == 8:
        return packed
    blocks = (count + 7) // 8
    parts = pad(pad(packed, (0, blocks * bits - width)).reshape(rows, blocks, bits), (0, 8 - bits))
    words = parts.view(torch.int64)
    for lane in (32, 16, 8):
        _part(words, bits, lane)
    return parts.view(rows, blocks * 8)[:, :count].contiguous()


# Eight codes are a 64-bit word. Side by side at its lower end they become one a byte in three steps, each of which
# parts what every lane holds into halves; three steps back join them.


def _part(words: Tensor, bits: int, lane: int) -> None:
    """Move the upper half of what lies in each pair of lanes, ``lane`` bits wide, into the upper lane; in place."""
    held = bits * lane // 8
    low = _mask(held, lane)
    upper = words & (low << held)
    words &= low
    words |= upper.bitwise_left_shift_(lane - held)


def _join(words: Tensor, bits: int, lane: int) -> None:
    """The inverse of :func:`_part`."""
    held = bits * lane // 8
    low = _mask(held, lane)
    upper = words & (low << lane)
    words &= low
    words |= upper.bitwise_right_shift_(lane - held)


def _mask(held: int, lane: int) -> int:
    """The lowest ``held`` bits of the lower lane of each pair."""
    return sum(((1 << held) - 1) << at for at in range(0, 64, 2 * lane))


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must lie in [1, 8], got {bits}")
