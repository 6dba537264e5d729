"""The best closed path through a bitshift trellis: in C++ on the CPU, in CUDA C++ on a GPU, by tensor operations where
neither serves.

All follow the same plan: Viterbi on the sequence rotated by half finds good bits for the seam of the circle, and a
second pass takes them as given (arXiv 2406.11235, tail-biting).
"""

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from vllm_requant.kernels.gpu import driver
from vllm_requant.kernels.reference import trellis_code

from .. import native
from ..native import library

__all__ = ["SOURCE", "closed_paths", "code_on", "trellis_path"]

_ROTATIONS = 1  # tries to close a string; more gain less than 1 %
_STATES_AT_ONCE = 1 << 25  # costs held at a time
_UNREACHABLE = 1e30
_SHARED = 224 << 10  # bytes of a multiprocessor's shared memory that a block may take
_TYPES = Path(driver.__file__).parent / "cuda" / "types.cuh"
SOURCE = Path(native.__file__).parent / "viterbi.cu"
"""The GPU's kernel."""


@cache
def code_on(device: torch.device, state_bits: int) -> Tensor:
    """:func:`trellis_code` on a device; the same tensor every time, by which the GPU's kernel knows it."""
    return trellis_code(state_bits).to(device)


def trellis_path(values: Tensor, code: Tensor, bits: int, *, rotations: int = _ROTATIONS) -> Tensor:
    """States of the best closed paths.

    Args:
        values: float32 ``[sequences, length]``.
        code: float32 ``[2**state_bits]``, the value of every state.
        bits: K.
        rotations: tries to close the circle; 0 leaves the paths open.

    Returns:
        int32 ``[sequences, length]`` on the device of the values; state ``i`` is the window of a circular bit string
        that starts at bit ``i·bits``.

    Raises:
        ValueError: there is no trellis of that size.
    """
    state_bits = code.numel().bit_length() - 1
    if not 1 <= bits <= 6 or not max(bits + 4, 2 * bits) <= state_bits <= 16:
        raise ValueError(f"no trellis has {state_bits} state bits and {bits} bits a value")
    if values.device.type != "cpu":
        return closed_paths(values, code, bits, rotations=rotations)
    x = values.float().contiguous()
    table = code.to("cpu", torch.float32).contiguous()
    states = torch.empty(x.shape, dtype=torch.int32)
    status = library().requant_viterbi(
        x.data_ptr(), *x.shape, state_bits, bits, table.data_ptr(), rotations, states.data_ptr()
    )
    if status:
        raise RuntimeError(f"the Viterbi of {list(x.shape)} failed with status {status}")
    return states


def closed_paths(values: Tensor, code: Tensor, bits: int, *, rotations: int = _ROTATIONS) -> Tensor:
    """:func:`trellis_path` by tensor operations, for any device."""
    code = code.to(values.device, torch.float32)
    at_once = max(1, _STATES_AT_ONCE // code.numel())
    parts = [_closed(part.float(), code, bits, rotations) for part in values.split(at_once)]
    return torch.cat(parts).to(torch.int32)


def _closed(x: Tensor, code: Tensor, bits: int, rotations: int) -> Tensor:
    length, groups = x.shape[1], code.numel() >> bits
    if not rotations:
        return _viterbi(x, code, bits, None)
    best, least = None, torch.full(x.shape[:1], torch.inf, device=x.device)
    for number in range(rotations):
        offset = length * number // rotations // 2
        # the seam, at `offset`, is in the middle of the first pass and at both ends of the second
        trial = _viterbi(x.roll(-(offset + length // 2), 1), code, bits, None)
        seam = trial[:, length - length // 2] & (groups - 1)
        states = _viterbi(x.roll(-offset, 1), code, bits, seam).roll(offset, 1)
        error = (code[states] - x).square().sum(1)
        better = error < least
        best = states if best is None else torch.where(better[:, None], states, best)
        least = torch.minimum(error, least)
    assert best is not None
    return best


def _viterbi(x: Tensor, code: Tensor, bits: int, seam: Tensor | None) -> Tensor:
    """Best paths ``[sequences, length]``, int64; with a seam, those whose ends meet in it."""
    if _on_gpu(x, code, bits):
        return _viterbi_on_gpu(x.contiguous(), code.numel().bit_length() - 1, bits, seam)
    sequences, length = x.shape
    groups, fan = code.numel() >> bits, 1 << bits
    state = torch.arange(code.numel(), device=x.device)
    cost = (x[:, :1] - code).square()
    if seam is not None:
        cost.masked_fill_((state & (groups - 1)) != seam[:, None], _UNREACHABLE)
    # the predecessors of state s are s's low bits, moved up, with any low bits of their own
    came = torch.empty(length, sequences, groups, dtype=torch.uint8, device=x.device)
    for i in range(1, length):
        least, arg = cost.view(sequences, groups, fan).min(2)
        came[i] = arg
        cost = least.repeat(1, fan) + (x[:, i : i + 1] - code).square()
    if seam is not None:
        cost.masked_fill_((state >> bits) != seam[:, None], torch.inf)
    path = torch.empty(sequences, length, dtype=torch.int64, device=x.device)
    last = cost.argmin(1)
    for i in range(length - 1, -1, -1):
        path[:, i] = last
        low = last & (groups - 1)
        if i:
            last = low << bits | came[i].gather(1, low[:, None])[:, 0].long()
    return path


# ---- on a GPU ----------------------------------------------------------------------------------------------


class _Arguments(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "seam", "came", "states")),
        ("length", ctypes.c_int),
    )


def _on_gpu(x: Tensor, code: Tensor, bits: int) -> bool:
    """Whether the kernel serves: it computes the code itself, and keeps costs in shared memory."""
    if x.device.type != "cuda" or not driver.available() or _shared(code.numel(), bits) > _SHARED:
        return False
    return code is code_on(code.device, code.numel().bit_length() - 1)


def _shared(states: int, bits: int) -> int:
    return 2 * 4 * max(states >> bits, _threads(states, bits))


def _threads(states: int, bits: int) -> int:
    return max(32, min(1024, states >> bits))


@cache
def _module(state_bits: int, bits: int, device: int) -> driver.Module:
    macros = {"STATE_BITS": state_bits, "BITS": bits, "THREADS": _threads(1 << state_bits, bits)}
    with torch.cuda.device(device):
        return driver.Module(_TYPES.read_text() + SOURCE.read_text(), macros)


def _viterbi_on_gpu(x: Tensor, state_bits: int, bits: int, seam: Tensor | None) -> Tensor:
    sequences, length = x.shape
    groups, threads = 1 << (state_bits - bits), _threads(1 << state_bits, bits)
    came = torch.empty(sequences, length, groups, dtype=torch.uint8, device=x.device)
    states = torch.empty(sequences, length, dtype=torch.int32, device=x.device)
    ends = None if seam is None else seam.to(torch.int32).contiguous()
    arguments = _Arguments(
        x.data_ptr(), None if ends is None else ends.data_ptr(), came.data_ptr(), states.data_ptr(), length
    )
    stream = torch.cuda.current_stream(x.device).cuda_stream
    kernel = _module(state_bits, bits, x.get_device()).kernel("viterbi")
    kernel((sequences, 1, 1), threads, _shared(1 << state_bits, bits), arguments, stream)
    return states.long()
