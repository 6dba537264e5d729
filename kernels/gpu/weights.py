"""A layer's run-time tensors on a GPU, made once from the canonical ones."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..bitstream import unpack_codes
from . import layout

__all__ = ["NAMES", "Weights", "expert_of", "repack", "stack"]

NAMES = ("codes", "params", "zeros", "signs_in", "signs_out", "sparse_indptr", "sparse_entries", "locks")
"""Of the run-time tensors; those that a kind does not have are empty."""


class Weights(NamedTuple):
    """The run-time tensors and what they mean.

    Attributes:
        codes: int32 words as in layout.py; of a trellis whose strings have fewer than 128 rows the canonical bytes as
            int16 ``[row blocks, tiles, 8 · bits]``.
        params: float16; ``uniform``: scales ``[row tiles, groups, 8, 2]``; ``lut``: tables ``[out_features, 2**bits]``;
            ``trellis``: scales ``[row blocks, column blocks]``.
        zeros: ``uniform``: zero points, uint8 ``[row tiles, groups, 8, 2]``.
        signs_in, signs_out: ``trellis``: float32, times the factor of the transform.
        sparse_indptr, sparse_entries: int32 ``[out_features + 1]`` and :func:`layout.residual_entries`; both empty
            without a residual.
        locks: int32 zeros, with which the blocks of one launch find the last among them; they end as they began.
            Launches that share them must not overlap: those of one layer follow each other.
        kind, bits, group_size, state_bits, in_features, out_features: as everywhere.
    """

    codes: Tensor
    params: Tensor
    zeros: Tensor
    signs_in: Tensor
    signs_out: Tensor
    sparse_indptr: Tensor
    sparse_entries: Tensor
    locks: Tensor
    kind: str
    bits: int
    group_size: int
    state_bits: int
    in_features: int
    out_features: int

    @property
    def lut(self) -> bool:
        return self.kind == "lut"

    @property
    def wide(self) -> bool:
        """Whether a column of the residual takes more than 16 bits."""
        return self.sparse_entries.dtype == torch.int64

    def fits(self) -> bool:
        """Whether the tensors are those of so many features, as far as their shapes say."""
        if self.kind == "trellis":
            return (self.in_features, self.out_features) == (self.signs_in.numel(), self.signs_out.numel())
        rows, columns = layout.tiles_of(self.out_features, self.in_features)
        groups = 1 if self.lut else -(-self.in_features // self.group_size)
        right = self.codes.shape == (rows, columns, 32 * self.bits) and self.params.shape[1] == (
            1 << self.bits if self.lut else groups
        )
        return right and (not self.lut or self.params.shape[0] == self.out_features)

    def expert(self, number: int) -> "Weights":
        """Those of one expert, see :func:`expert_of`."""
        tensors = {name: getattr(self, name) for name in NAMES}
        return self._replace(**expert_of(tensors, number))  # type: ignore[arg-type]

    @property
    def block_out(self) -> int:
        """Rows of a string of the ``trellis`` kind."""
        return self.out_features // self.params.shape[0]

    @property
    def block_in(self) -> int:
        return self.in_features // self.params.shape[1]


def tiled(bits: int, block_out: int) -> bool:
    """Whether :func:`layout.tile_strings` is for this trellis."""
    return block_out == 128 and bits in (2, 3, 4)


def repack(
    kind: str,
    tensors: Mapping[str, Tensor],
    signs: tuple[Tensor, Tensor] | None,
    *,
    bits: int,
    in_features: int,
    device: torch.device,
) -> dict[str, Tensor]:
    """Run-time tensors by name.

    Args:
        kind, tensors, bits, in_features, device: as for :func:`vllm_requant.kernels.repack`.
        signs: of the ``trellis`` kind, float32 with the factor of the transform.
    """
    here = {name: tensor.to(device) for name, tensor in tensors.items()}

    def empty(dtype: torch.dtype) -> Tensor:
        return torch.empty(0, dtype=dtype, device=device)

    out = {"zeros": empty(torch.uint8), "signs_in": empty(torch.float32), "signs_out": empty(torch.float32)}
    if kind == "trellis":
        assert signs is not None
        out |= {"signs_in": signs[0].to(device), "signs_out": signs[1].to(device)}
        rows = out["signs_out"].numel()
        if tiled(bits, rows // here["scales"].shape[0]):
            out["codes"] = layout.tile_strings(here["qweight"], bits=bits)
        else:
            out["codes"] = here["qweight"].contiguous().view(torch.int16).clone()
        out["params"] = here["scales"].clone(memory_format=torch.contiguous_format)
    else:
        table = here["scales" if kind == "uniform" else "lookup_table"]
        rows = table.shape[0]
        out["codes"] = layout.tile_codes(kind, here["qweight"], bits=bits, in_features=in_features)
        if kind == "uniform":
            out["params"] = layout.group_pairs(table)
            out["zeros"] = layout.group_pairs(unpack_codes(here["qzeros"], bits, table.shape[1]))
        else:
            out["params"] = table.clone(memory_format=torch.contiguous_format)
    out["sparse_indptr"], out["sparse_entries"] = empty(torch.int32), empty(torch.int32)
    if "sparse_values" in here and here["sparse_values"].numel():
        out["sparse_indptr"] = here["sparse_indptr"].clone(memory_format=torch.contiguous_format)
        out["sparse_entries"] = layout.residual_entries(here["sparse_indices"], here["sparse_values"], in_features)
    out["locks"] = torch.zeros(-(-rows // layout.ROWS), dtype=torch.int32, device=device)
    return {name: out[name] for name in NAMES}


def expert_of(stacked: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    """One expert's run-time tensors, views of what :func:`stack` made; row pointers go on counting entries of all."""
    of_experts = ("codes", "params", "zeros", "sparse_indptr")
    return {
        name: tensor[number] if name in of_experts and tensor.numel() else tensor for name, tensor in stacked.items()
    }


def stack(experts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Run-time tensors of a layer of experts from those of its experts, which have one format and shape.

    Args:
        experts: what :func:`repack` returned for each, of the ``uniform`` or ``lut`` kind.

    Returns:
        ``codes``, ``params`` and ``zeros`` with the experts as first dimension; ``sparse_entries`` of all one behind
        the other, and ``sparse_indptr`` ``[experts, out_features + 1]`` that count them through; the rest of one.

    Raises:
        ValueError: there are more entries than int32 counts.
    """
    out = dict(experts[0]) | {
        name: torch.stack([one[name] for one in experts]) for name in ("codes", "params", "zeros")
    }
    counts = [one["sparse_entries"].numel() for one in experts]
    if not any(counts):
        return out
    if sum(counts) > torch.iinfo(torch.int32).max:
        raise ValueError(f"{sum(counts)} entries of residuals in one layer of experts; at most 2³¹ − 1 can be counted")
    whole = next(one for one, count in zip(experts, counts, strict=True) if count)
    nothing = torch.zeros_like(whole["sparse_indptr"])
    before, rows = 0, []
    for one, count in zip(experts, counts, strict=True):
        rows.append((one["sparse_indptr"] if count else nothing) + before)
        before += count
    return out | {
        "sparse_indptr": torch.stack(rows),
        "sparse_entries": torch.cat([one["sparse_entries"].to(whole["sparse_entries"].dtype) for one in experts]),
    }
