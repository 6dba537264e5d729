"""The arithmetic of each dense kind: check, dequantize, cut columns. A kind is an entry of :data:`KINDS`.

Functions take the tensors by suffix, exactly as SPEC.md, section 4, lists them, and assume the shapes that
the schema gives; values are what :attr:`Kind.check` looks at.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import reference
from ..kernels.bitstream import pack_codes, unpack_codes
from .schema import LayerSpec, LutSpec, TrellisSpec, UniformSpec
from .sparse import all_finite

__all__ = ["KINDS", "Kind"]

Tensors = Mapping[str, Tensor]


class Kind(NamedTuple):
    """What can be done with the dense part of a layer.

    Attributes:
        check: ``(spec, tensors) → (suffix, reason) | None``, the first broken rule.
        dequantize: ``(spec, tensors) → float32 [out_features, in_features]``.
        slice_rows: ``(spec, tensors, start, stop) → tensors`` for that range of output features, copied.
            Raises ``ValueError`` where the kind cannot be cut there.
        slice_columns: ``(spec, tensors, start, stop) → (spec, tensors)`` for that range of input features; the
            new spec has ``nnz`` 0. Raises ``ValueError`` where the kind cannot be cut there.
        zeros: ``spec → tensors`` of a dense part whose weights are all exactly zero.
        shared: suffixes of the tensors that have no output rows: layers that are stacked must agree on them. The
            others are stacked along their first dimension.
    """

    check: Callable[[Any, Tensors], tuple[str, str] | None]
    dequantize: Callable[[Any, Tensors], Tensor]
    slice_rows: Callable[[Any, Tensors, int, int], dict[str, Tensor]]
    slice_columns: Callable[[Any, Tensors, int, int], tuple[Any, dict[str, Tensor]]]
    zeros: Callable[[Any], dict[str, Tensor]]
    shared: tuple[str, ...] = ()


def _pad_bits_set(packed: Tensor, count: int, bits: int) -> bool:
    used = count * bits % 8
    return used != 0 and bool((packed[:, -1] >> used).any())


def _slice_codes(packed: Tensor, bits: int, count: int, start: int, stop: int) -> Tensor:
    return pack_codes(unpack_codes(packed, bits, count)[:, start:stop], bits)


def _check_uniform(spec: UniformSpec, tensors: Tensors) -> tuple[str, str] | None:
    if not all_finite(tensors["scales"]) or bool((tensors["scales"] <= 0).any()):
        return "scales", "a scale is not finite and positive"
    for suffix, count in (("qweight", spec.in_features), ("qzeros", spec.groups)):
        if _pad_bits_set(tensors[suffix], count, spec.bits):
            return suffix, "pad bits are not zero"
    return None


def _dequantize_uniform(spec: UniformSpec, tensors: Tensors) -> Tensor:
    return reference.dequantize_uniform(
        tensors["qweight"],
        tensors["scales"],
        tensors["qzeros"],
        bits=spec.bits,
        group_size=spec.group_size,
        in_features=spec.in_features,
    )


def _slice_uniform(spec: UniformSpec, tensors: Tensors, start: int, stop: int) -> tuple[UniformSpec, dict[str, Tensor]]:
    # a group that the border cuts becomes two with the same scale and zero point
    group = math.gcd(spec.group_size, start)
    if stop != spec.in_features:
        group = math.gcd(group, stop)
    if group % 32:
        raise ValueError(
            f"input features {start}:{stop} cut a group of {spec.group_size} into pieces of {group}; "
            "borders must be multiples of 32"
        )
    width = stop - start
    first = torch.arange(start, stop, group) // spec.group_size
    zeros = unpack_codes(tensors["qzeros"], spec.bits, spec.groups)[:, first]
    sliced = UniformSpec(bits=spec.bits, group_size=group, in_features=width, out_features=spec.out_features)
    return sliced, {
        "qweight": _slice_codes(tensors["qweight"], spec.bits, spec.in_features, start, stop),
        "scales": tensors["scales"][:, first].contiguous(),
        "qzeros": pack_codes(zeros, spec.bits),
    }


def _blank(spec: LayerSpec) -> dict[str, Tensor]:
    return {suffix: torch.zeros(shape, dtype=dtype) for suffix, (dtype, shape) in spec.dense_tensors().items()}


def _zeros_uniform(spec: UniformSpec) -> dict[str, Tensor]:
    # code 0 minus zero point 0 is zero under any scale, but a scale must be positive
    tensors = _blank(spec)
    tensors["scales"].fill_(1)
    return tensors


def _check_lut(spec: LutSpec, tensors: Tensors) -> tuple[str, str] | None:
    if not all_finite(tensors["lookup_table"]):
        return "lookup_table", "an entry is not finite"
    if _pad_bits_set(tensors["qweight"], spec.in_features, spec.bits):
        return "qweight", "pad bits are not zero"
    return None


def _dequantize_lut(spec: LutSpec, tensors: Tensors) -> Tensor:
    return reference.dequantize_lut(
        tensors["qweight"], tensors["lookup_table"], bits=spec.bits, in_features=spec.in_features
    )


def _slice_lut(spec: LutSpec, tensors: Tensors, start: int, stop: int) -> tuple[LutSpec, dict[str, Tensor]]:
    sliced = LutSpec(bits=spec.bits, in_features=stop - start, out_features=spec.out_features)
    return sliced, {
        "qweight": _slice_codes(tensors["qweight"], spec.bits, spec.in_features, start, stop),
        "lookup_table": tensors["lookup_table"].clone(),
    }


def _slice_plain_rows(spec: LayerSpec, tensors: Tensors, start: int, stop: int) -> dict[str, Tensor]:
    """For kinds whose tensors all have one row per output feature."""
    return {name: tensors[name][start:stop].clone() for name in spec.dense_tensors()}


def _check_trellis(spec: TrellisSpec, tensors: Tensors) -> tuple[str, str] | None:
    if not all_finite(tensors["scales"]) or bool((tensors["scales"] < 0).any()):
        return "scales", "a scale is not finite and non-negative"
    return None


def _dequantize_trellis(spec: TrellisSpec, tensors: Tensors) -> Tensor:
    return reference.dequantize_trellis(
        *(tensors[name] for name in spec.dense_tensors()),
        bits=spec.bits,
        state_bits=spec.state_bits,
        in_features=spec.in_features,
    )


def _require_blocks(what: str, start: int, stop: int, block: int) -> None:
    if start % block or stop % block:
        raise ValueError(f"{what} features {start}:{stop} cut a Hadamard block; borders must be multiples of {block}")


def _slice_trellis_rows(spec: TrellisSpec, tensors: Tensors, start: int, stop: int) -> dict[str, Tensor]:
    _require_blocks("output", start, stop, spec.block_out)
    blocks = slice(start // spec.block_out, stop // spec.block_out)
    return {
        "qweight": tensors["qweight"][blocks].clone(),
        "scales": tensors["scales"][blocks].clone(),
        "signs_in": tensors["signs_in"].clone(),
        "signs_out": tensors["signs_out"][start // 8 : stop // 8].clone(),
    }


def _slice_trellis_columns(
    spec: TrellisSpec, tensors: Tensors, start: int, stop: int
) -> tuple[TrellisSpec, dict[str, Tensor]]:
    _require_blocks("input", start, stop, spec.block_in)
    sliced = TrellisSpec.model_validate(spec.model_dump() | {"in_features": stop - start, "nnz": 0})
    return sliced, {
        "qweight": tensors["qweight"][:, start // spec.tile_columns : stop // spec.tile_columns].clone(),
        "scales": tensors["scales"][:, start // spec.block_in : stop // spec.block_in].clone(),
        "signs_in": tensors["signs_in"][start // 8 : stop // 8].clone(),
        "signs_out": tensors["signs_out"].clone(),
    }


KINDS: dict[str, Kind] = {
    "uniform": Kind(_check_uniform, _dequantize_uniform, _slice_plain_rows, _slice_uniform, _zeros_uniform),
    "lut": Kind(_check_lut, _dequantize_lut, _slice_plain_rows, _slice_lut, _blank),
    "trellis": Kind(
        _check_trellis,
        _dequantize_trellis,
        _slice_trellis_rows,
        _slice_trellis_columns,
        _blank,  # under scales of zero
        shared=("signs_in",),
    ),
}
