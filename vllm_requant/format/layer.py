"""One quantized layer: its spec and its canonical tensors, with the operations that hold for every kind."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import reference
from .errors import ReQuantFormatError
from .kinds import KINDS
from .schema import SPARSE_TENSORS, LayerSpec
from .sparse import Csr

__all__ = ["QuantizedLayer"]


@dataclass(frozen=True)
class QuantizedLayer:
    """A layer as it is stored.

    Attributes:
        spec: kind, bits, shapes, nnz.
        tensors: canonical tensors by suffix, ``spec.tensors()`` says which.
    """

    spec: LayerSpec
    tensors: Mapping[str, Tensor]

    @classmethod
    def build(
        cls,
        spec: LayerSpec,
        dense: Mapping[str, Tensor],
        *,
        weight: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> "QuantizedLayer":
        """Join a dense part with the residual of ``weight`` at the positions of ``mask``.

        Args:
            spec: of the dense part; its ``nnz`` is replaced by the number of set positions.
            dense: tensors of the dense part by suffix.
            weight: ``[out_features, in_features]``, the full-precision weight; needed with a mask.
            mask: bool ``[out_features, in_features]``.
        """
        if mask is None or not mask.any():
            return cls(spec.model_copy(update={"nnz": 0}), dict(dense))
        if weight is None:
            raise ValueError("a sparse part needs the full-precision weight")
        residual = weight.float() - KINDS[spec.kind].dequantize(spec, dense)
        csr = Csr.from_mask(mask, residual, spec.index_dtype)
        return cls(
            spec.model_copy(update={"nnz": csr.nnz}),
            dict(dense) | dict(zip(SPARSE_TENSORS, csr, strict=True)),
        )

    @property
    def sparse(self) -> Csr | None:
        """The sparse part, or None."""
        return Csr(*(self.tensors[name] for name in SPARSE_TENSORS)) if self.spec.nnz else None

    def dense_weight(self) -> Tensor:
        """float32 ``[out_features, in_features]`` of the dense part alone, exact."""
        return KINDS[self.spec.kind].dequantize(self.spec, self.tensors)

    def weight(self) -> Tensor:
        """float32 ``[out_features, in_features]``, dense + sparse (SPEC.md, section 5)."""
        weight = self.dense_weight()
        return weight if self.sparse is None else reference.add_sparse_(weight, *self.sparse)

    def slice(self, rows: tuple[int, int] | None = None, columns: tuple[int, int] | None = None) -> "QuantizedLayer":
        """The block ``rows × columns`` (half-open ranges, None for all) as a layer of its own.

        Raises:
            ValueError: the kind cannot be cut there, or a range lies outside the layer.
        """
        spec = self.spec
        rows, columns = rows or (0, spec.out_features), columns or (0, spec.in_features)
        for (start, stop), size, what in (
            (rows, spec.out_features, "output"),
            (columns, spec.in_features, "input"),
        ):
            if not 0 <= start < stop <= size:
                raise ValueError(f"{what} features {start}:{stop} lie outside the layer's {size}")
        dense = {name: self.tensors[name] for name in spec.dense_tensors()}
        cut: LayerSpec = spec.model_copy(update={"nnz": 0})
        if rows != (0, spec.out_features):
            dense = KINDS[spec.kind].slice_rows(cut, dense, *rows)
            cut = cut.model_copy(update={"out_features": rows[1] - rows[0]})
        if columns != (0, spec.in_features):
            cut, dense = KINDS[spec.kind].slice_columns(cut, dense, *columns)
        if self.sparse is None:
            return QuantizedLayer(cut, dense)
        csr = self.sparse.slice(rows, columns, cut.index_dtype)
        if csr.nnz == 0:
            return QuantizedLayer(cut, dense)
        return QuantizedLayer(
            cut.model_copy(update={"nnz": csr.nnz}), dense | dict(zip(SPARSE_TENSORS, csr, strict=True))
        )

    def check(self, *, name: str, file: str | None = None) -> None:
        """Enforce every rule of SPEC.md, section 4, on shapes, types and values.

        Raises:
            ReQuantFormatError: the first broken rule, with file and tensor.
        """
        expected = self.spec.tensors()
        for suffix in sorted(expected.keys() ^ self.tensors.keys()):
            reason = "is missing" if suffix in expected else "does not belong to this layer"
            raise ReQuantFormatError(reason, file=file, tensor=f"{name}.{suffix}")
        for suffix, (dtype, shape) in expected.items():
            tensor = self.tensors[suffix]
            if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                raise ReQuantFormatError(
                    f"is {tensor.dtype} {list(tensor.shape)}, the configuration demands {dtype} {list(shape)}",
                    file=file,
                    tensor=f"{name}.{suffix}",
                )
        broken = KINDS[self.spec.kind].check(self.spec, self.tensors)
        if broken:
            raise ReQuantFormatError(broken[1], file=file, tensor=f"{name}.{broken[0]}")
        if self.sparse is not None:
            self.sparse.check(self.spec.out_features, self.spec.in_features, name=name, file=file)

    def to(self, device: torch.device | str) -> "QuantizedLayer":
        return QuantizedLayer(self.spec, {name: tensor.to(device) for name, tensor in self.tensors.items()})
