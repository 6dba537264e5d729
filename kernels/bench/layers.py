"""What the benchmarks of all devices measure: formats, random layers of them, and the weights that these stand for."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..bitstream import pack_codes

__all__ = ["DENSITIES", "DENSITY", "FORMATS", "LLAMA_3", "Format", "canonical", "residual", "weight_of"]


class Format(NamedTuple):
    """Settings of the kernels, by the names that they go by there; 0 where a kind has none."""

    kind: str
    bits: int
    group_size: int = 0
    state_bits: int = 0

    @property
    def settings(self) -> dict[str, int]:
        return {"bits": self.bits, "group_size": self.group_size, "state_bits": self.state_bits}


FORMATS = (
    *(Format("uniform", bits, group_size) for bits, group_size in ((2, 64), (3, 64), (4, 128), (8, 128))),
    *(Format("lut", bits) for bits in (2, 3, 4)),
    *(Format("trellis", bits, state_bits=12) for bits in (2, 3, 4)),
)
LLAMA_3 = {
    "8b": ((4096, 4096), (6144, 4096), (28_672, 4096), (4096, 14_336)),
    "1b": ((2048, 2048), (3072, 2048), (16_384, 2048), (2048, 8192)),
    "3b": ((3072, 3072), (5120, 3072), (16_384, 3072), (3072, 8192)),
    "70b": ((8192, 8192), (10_240, 8192), (57_344, 8192), (8192, 28_672)),
}
"""``(out_features, in_features)`` by model: output, query with key and value, gate with up, and down projections."""
DENSITY = 0.0005
DENSITIES = (0.0, DENSITY, 0.005)
_DEQUANTIZE: dict[str, Callable[..., Tensor]] = {
    "uniform": reference.dequantize_uniform,
    "lut": reference.dequantize_lut,
    "trellis": reference.dequantize_trellis,
}


def canonical(form: Format, rows: int, columns: int, device: str = "cpu") -> dict[str, Tensor]:
    """Random canonical tensors of a layer without a residual."""
    generator = torch.Generator(device).manual_seed(0)
    where: dict[str, Any] = {"device": device, "generator": generator}

    def codes(count: int) -> Tensor:
        return pack_codes(torch.randint(1 << form.bits, (rows, count), dtype=torch.uint8, **where), form.bits)

    def random_bytes(*shape: int) -> Tensor:
        return torch.randint(256, shape, dtype=torch.uint8, **where)

    if form.kind == "lut":
        table = torch.randn(rows, 1 << form.bits, **where).half()
        return {"qweight": codes(columns), "lookup_table": table}
    if form.kind == "uniform":
        groups = -(-columns // form.group_size)
        scales = torch.rand(rows, groups, **where).mul(0.01).add(0.001).half()
        return {"qweight": codes(columns), "scales": scales, "qzeros": codes(groups)}
    block_out, block_in = (min(128, size & -size) for size in (rows, columns))
    tiles = columns * block_out // reference.TILE
    return {
        "qweight": random_bytes(rows // block_out, tiles, reference.TILE * form.bits // 8),
        "scales": torch.rand(rows // block_out, columns // block_in, **where).mul(0.01).add(0.001).half(),
        "signs_in": random_bytes(columns // 8),
        "signs_out": random_bytes(rows // 8),
    }


def residual(rows: int, columns: int, density: float, device: str = "cpu") -> dict[str, Tensor]:
    """A random sparse part; nothing for density 0."""
    if not density:
        return {}
    where: dict[str, Any] = {"device": device, "generator": torch.Generator(device).manual_seed(1)}
    mask = torch.rand(rows, columns, **where) < density
    indptr = torch.zeros(rows + 1, dtype=torch.int32, device=device)
    indptr[1:] = mask.sum(1).cumsum(0)
    return {
        "sparse_indptr": indptr,
        "sparse_indices": mask.nonzero()[:, 1].to(torch.uint16),
        "sparse_values": torch.randn(int(indptr[-1]), **where).half(),
    }


def weight_of(form: Format, tensors: dict[str, Tensor], columns: int) -> Tensor:
    """float32 ``[rows, columns]`` by reference.py."""
    dense = {name: tensor for name, tensor in tensors.items() if not name.startswith("sparse")}
    settings = {name: value for name, value in form.settings.items() if value}
    weight = _DEQUANTIZE[form.kind](**dense, **settings, in_features=columns)
    if "sparse_values" in tensors:
        sparse = (tensors[f"sparse_{name}"] for name in ("indptr", "indices", "values"))
        weight = reference.add_sparse_(weight, *sparse)
    return weight
