"""Random layers in canonical form and the instruction sets to run them on."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from vllm_requant import kernels
from vllm_requant.kernels import cpu, reference
from vllm_requant.kernels.bitstream import pack_codes


@dataclass
class Layer:
    """Canonical tensors of a random layer and what they mean."""

    kind: str
    bits: int
    group_size: int
    out_features: int
    in_features: int
    tensors: dict[str, Tensor]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def dense(self) -> Tensor:
        """The dense part, float32, by reference.py."""
        t, size = self.tensors, {"bits": self.bits, "in_features": self.in_features}
        if self.kind == "uniform":
            return reference.dequantize_uniform(
                t["qweight"], t["scales"], t["qzeros"], group_size=self.group_size, **size
            )
        return reference.dequantize_lut(t["qweight"], t["lookup_table"], **size)

    def steps(self) -> Tensor:
        """For the uniform kind: what ``2**bits`` steps of every weight's scale are."""
        group = torch.arange(self.in_features) // self.group_size
        return self.tensors["scales"].float()[:, group] * (1 << self.bits)

    def weight(self) -> Tensor:
        """float32, by reference.py."""
        t, dense = self.tensors, self.dense()
        if "sparse_indptr" not in t:
            return dense
        return reference.add_sparse_(dense, t["sparse_indptr"], t["sparse_indices"], t["sparse_values"])

    def repack(self, device: str = "cpu") -> dict[str, Tensor]:
        return kernels.repack(
            self.kind,
            self.tensors,
            bits=self.bits,
            group_size=self.group_size,
            in_features=self.in_features,
            device=device,
        )

    def linear(self, x: Tensor, weights: dict[str, Tensor] | None = None, *, activation_bits: int = 16) -> Tensor:
        weights = self.repack() if weights is None else weights
        settings = {"out_features": self.out_features, "bits": self.bits, "group_size": self.group_size}
        return kernels.linear(self.kind, x, weights, **settings, activation_bits=activation_bits)

    def embedding(self, ids: Tensor, dtype: torch.dtype, weights: dict[str, Tensor] | None = None) -> Tensor:
        weights = self.repack() if weights is None else weights
        return kernels.embedding(
            self.kind,
            ids,
            weights,
            bits=self.bits,
            group_size=self.group_size,
            in_features=self.in_features,
            dtype=dtype,
        )


def build(
    kind: str,
    bits: int,
    group_size: int,
    out_features: int,
    in_features: int,
    *,
    density: float = 0.0,
    seed: int = 0,
) -> Layer:
    """A random layer; with a sparse part its row 0 is full and its last row, if there are several, empty."""
    generator = torch.Generator().manual_seed(seed)

    def codes(count: int) -> Tensor:
        return pack_codes(torch.randint(1 << bits, (out_features, count), generator=generator), bits)

    tensors = {"qweight": codes(in_features)}
    if kind == "uniform":
        groups = -(-in_features // group_size)
        tensors["scales"] = (torch.rand(out_features, groups, generator=generator) * 0.1 + 0.01).half()
        tensors["qzeros"] = codes(groups)
    else:
        tensors["lookup_table"] = torch.randn(out_features, 1 << bits, generator=generator).half()
    if density:
        mask = torch.rand(out_features, in_features, generator=generator) < density
        mask[0] = True
        if out_features > 1:
            mask[-1] = False
        indptr = torch.zeros(out_features + 1, dtype=torch.int32)
        indptr[1:] = mask.sum(1).cumsum(0)
        tensors["sparse_indptr"] = indptr
        tensors["sparse_indices"] = mask.nonzero()[:, 1].to(torch.uint16 if in_features <= 65536 else torch.int32)
        tensors["sparse_values"] = torch.randn(int(indptr[-1]), generator=generator).half()
    return Layer(kind, bits, group_size, out_features, in_features, tensors)


@pytest.fixture(scope="session")
def make_layer() -> Callable[..., Layer]:
    return build


@pytest.fixture(params=cpu.ISA_NAMES)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set of this machine in turn, through the C function that caps it."""
    native = cpu.library()
    before = native.requant_isa()
    index = cpu.ISA_NAMES.index(request.param)
    if native.requant_set_isa(index) != index:
        native.requant_set_isa(before)
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    native.requant_set_isa(before)
