"""The row bit stream: how codes of 1 to 8 bits lie in bytes, on disk and as the input of every repacking.

Code ``j`` of a row occupies bits ``j·bits … (j+1)·bits − 1`` of that row's bit string; bit ``i`` of the
string is bit ``i mod 8`` (least significant first) of byte ``i // 8``. A row is padded with zero bits to a
whole byte. Eight codes therefore always fill ``bits`` bytes, whatever the width, and 3-bit codes take
exactly 3 bits.
"""

import torch
from torch import Tensor

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
    # int16 holds a code shifted by up to 7 bits; the upper byte carries into the next one
    padded = torch.zeros(rows, blocks * 8, dtype=torch.int16, device=codes.device)
    padded[:, :count] = codes.to(torch.int16)
    padded = padded.view(rows, blocks, 8)
    out = torch.zeros(rows, blocks, bits, dtype=torch.int16, device=codes.device)
    for j in range(8):
        byte, shift = divmod(j * bits, 8)
        shifted = padded[:, :, j] << shift
        out[:, :, byte] |= shifted & 0xFF
        if shift + bits > 8:
            out[:, :, byte + 1] |= shifted >> 8
    return out.to(torch.uint8).view(rows, blocks * bits)[:, : row_bytes(count, bits)].contiguous()


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
    padded = torch.zeros(rows, blocks * bits, dtype=torch.int16, device=packed.device)
    padded[:, :width] = packed.to(torch.int16)
    padded = padded.view(rows, blocks, bits)
    out = torch.empty(rows, blocks, 8, dtype=torch.uint8, device=packed.device)
    mask = (1 << bits) - 1
    for j in range(8):
        byte, shift = divmod(j * bits, 8)
        code = padded[:, :, byte] >> shift
        if shift + bits > 8:
            code = code | (padded[:, :, byte + 1] << (8 - shift))
        out[:, :, j] = (code & mask).to(torch.uint8)
    return out.view(rows, blocks * 8)[:, :count].contiguous()


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must lie in [1, 8], got {bits}")
