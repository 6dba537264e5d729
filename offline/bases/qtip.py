"""QTIP: incoherent weights, block error feedback and a bitshift trellis (arXiv 2406.11235).

Differences from the paper, measured to help or to cost nothing. Hadamard transforms are blockwise, so that layers can
be split over tensor-parallel ranks. A circular string covers the rows of one output block and as few columns as make
128 weights, not 16 × 16: error feedback then works between columns or pairs of columns, and a closed string of 128 is
as accurate as a longer one. A float16 scale stands for every pair of blocks, not for the matrix.
"""

from functools import cache
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from vllm_requant.format import TrellisSpec
from vllm_requant.kernels.bitstream import pack_codes
from vllm_requant.kernels.reference import TILE, hadamard_blocks, trellis_code

from .base import Base, DenseLayer, LayerData, Need
from .feedback import reversed_feedback, upright
from .uniform import SMALLEST_SCALE
from .viterbi import code_on, trellis_path

__all__ = ["CodeFit", "Qtip", "code_fit", "hadamard_block"]

_BLOCKS = (128, 64, 32, 16)
_SIGNS_SEED = 0x7E111
_LAZY = 128  # columns after which the feedback reaches all that follow


def hadamard_block(features: int) -> int:
    """The largest block that divides the features.

    Raises:
        ValueError: none does.
    """
    for block in _BLOCKS:
        if features % block == 0:
            return block
    raise ValueError(f"{features} features are not a multiple of {_BLOCKS[-1]}, which the trellis needs")


class Qtip(Base):
    """The ``trellis`` kind.

    Args:
        bits: K, bits a weight.
        state_bits: L; the time to find a path doubles with each bit.
    """

    name: ClassVar[str] = "qtip"
    bits: ClassVar[tuple[int, ...]] = (1, 2, 3, 4, 5, 6)  # 1, 5 and 6 are of use where widths differ
    options: ClassVar[tuple[str, ...]] = ("state_bits",)
    # rotated weights have no outliers; beyond the first few, bits are better spent on wider layers (measured)
    usual_shares: ClassVar[tuple[float, float]] = (0.0, 0.0005)
    needs: ClassVar[frozenset[Need]] = frozenset({Need.INPUTS})
    # a second search draws all errors anew, and the positions were chosen for those of the first (measured: worse)
    can_refit: ClassVar[bool] = False

    def __init__(self, bits: int, state_bits: int = 12) -> None:
        super().__init__(bits)
        self.state_bits = state_bits

    def spec(self, in_features: int, out_features: int) -> TrellisSpec:
        return TrellisSpec(
            bits=self.width,
            state_bits=self.state_bits,
            block_in=hadamard_block(in_features),  # type: ignore[arg-type]
            block_out=hadamard_block(out_features),  # type: ignore[arg-type]
            in_features=in_features,
            out_features=out_features,
        )

    def quantize(self, layer: LayerData, removed: Tensor | None = None) -> DenseLayer:
        spec = self.spec(*layer.weight.shape[::-1])
        signs_in, signs_out = (_signs(n).to(layer.weight.device) for n in (spec.in_features, spec.out_features))
        hessian = layer.require_inputs().hessian
        feedback = reversed_feedback(
            lambda rows: _rotate_both(hessian, rows, signs_in, spec.block_in), spec.in_features, spec.tile_columns
        )
        weight = layer.weight if removed is None else layer.weight.masked_fill(removed, 0.0)
        rotated = _rotate(_rotate(weight, signs_in, spec.block_in).t(), signs_out, spec.block_out).t().contiguous()
        scales = self._scales(rotated, spec)
        states = self._states(rotated, feedback, scales, spec)
        return DenseLayer(
            spec,
            {
                "qweight": _pack(states, spec),
                "scales": scales,
                "signs_in": _pack_signs(signs_in),
                "signs_out": _pack_signs(signs_out),
            },
        )

    def expected_error(self, layer: LayerData) -> float:
        """Incoherent weights are Gaussian: the distortion of the code says it all."""
        return layer.error(torch.zeros_like(layer.weight)) * code_fit(self.width, self.state_bits).distortion

    def _scales(self, rotated: Tensor, spec: TrellisSpec) -> Tensor:
        blocks = rotated.reshape(
            spec.out_features // spec.block_out, spec.block_out, spec.in_features // spec.block_in, spec.block_in
        )
        rms = blocks.square().mean(dim=(1, 3)).sqrt()
        return (rms * code_fit(self.width, self.state_bits).scale).to(torch.float16)

    def _states(self, rotated: Tensor, feedback: Tensor, scales: Tensor, spec: TrellisSpec) -> Tensor:
        """Block error feedback: int32 ``[row blocks, tiles, TILE]``."""
        width, rows = spec.tile_columns, spec.block_out
        code = code_on(rotated.device, self.state_bits)
        # a scale of 0 stands for a block of zeros
        by_block = scales.float().clamp(min=SMALLEST_SCALE)
        by_row = by_block.repeat_interleave(rows, 0)
        target = rotated.clone()
        shape = spec.out_features // rows, spec.in_features // width, TILE
        states = torch.empty(shape, dtype=torch.int32, device=rotated.device)
        for begin in range(0, spec.in_features, _LAZY):
            end = min(begin + _LAZY, spec.in_features)
            moves = upright(feedback, slice(begin, end))
            errors = torch.empty(spec.out_features, end - begin, device=rotated.device)
            for first in range(begin, end, width):
                at = slice(first, first + width)
                scale = by_row[:, first // spec.block_in, None]  # a tile lies in one block
                # within a string rows run fastest
                strings = (target[:, at] / scale).view(-1, rows, width).transpose(1, 2).reshape(-1, TILE)
                path = trellis_path(strings, code, self.width)
                states[:, first // width] = path
                value = code[path.long()].view(-1, width, rows).transpose(1, 2).reshape(-1, width)
                error = rotated[:, at] - value * scale
                errors[:, first - begin : first - begin + width] = error
                target[:, at.stop : end] += error @ moves[first - begin : at.stop - begin, at.stop : end]
            target[:, end:] += errors @ moves[:, end:]
        return states


@cache
def _signs(features: int) -> Tensor:
    """±1, the same for every layer of that width: siblings that are fused when served must share their input signs."""
    generator = torch.Generator().manual_seed(_SIGNS_SEED + features)
    return torch.randint(2, (features,), generator=generator) * 2.0 - 1.0


def _rotate(matrix: Tensor, signs: Tensor, block: int) -> Tensor:
    """The columns of a matrix, with signs, through the Hadamard transform."""
    return hadamard_blocks((matrix * signs.to(matrix.device)).contiguous(), block)


def _rotate_both(hessian: Tensor, rows: slice, signs: Tensor, block: int) -> Tensor:
    """Some rows of a symmetric matrix whose rows and columns both go through the transform."""
    begin = rows.start - rows.start % block
    end = min(-(-rows.stop // block) * block, len(hessian))
    # by symmetry the columns of a few blocks are their rows
    columns = _rotate(hessian[begin:end].t(), signs[begin:end], block)
    return _rotate(columns.t(), signs, block)[rows.start - begin : rows.stop - begin]


class CodeFit(NamedTuple):
    """How the code is used for values of unit variance, and the mean squared error then."""

    scale: float
    distortion: float


@cache
def code_fit(bits: int, state_bits: int) -> CodeFit:
    """The best scale of the code, from a measurement on Gaussian values."""
    values = torch.randn(64, TILE, generator=torch.Generator().manual_seed(0))
    code = trellis_code(state_bits)
    spread = float(code.std())
    fits = []
    for step in range(16):  # the more bits, the more the tails matter
        scale = (0.84 + 0.04 * step) / spread
        found = code[trellis_path(values, code * scale, bits).long()] * scale
        fits.append(CodeFit(scale, float((found - values).square().mean())))
    return min(fits, key=lambda fit: fit.distortion)


def _pack(states: Tensor, spec: TrellisSpec) -> Tensor:
    """The lowest ``bits`` bits of every state are the string."""
    flat = (states & ((1 << spec.bits) - 1)).view(-1, TILE).to(torch.uint8)
    return pack_codes(flat, spec.bits).view(*states.shape[:2], -1)


def _pack_signs(signs: Tensor) -> Tensor:
    return pack_codes((signs < 0).to(torch.uint8)[None], 1)[0]
