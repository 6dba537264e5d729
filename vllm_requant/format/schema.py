"""What ``quantization_config`` may say: the schema of SPEC.md, section 3, and the tensors that follow from it.

The arithmetic of a kind stands in :mod:`.kinds`. This module allocates nothing and reads no tensor: shapes
and sizes of a whole checkpoint are known from its ``config.json`` alone.
"""

import math
import re
import reprlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from ..kernels.bitstream import row_bytes
from ..kernels.reference import TILE
from .errors import ReQuantFormatError

__all__ = [
    "FORMAT_VERSION",
    "QUANT_METHOD",
    "SAFETENSORS_DTYPES",
    "SPARSE_TENSORS",
    "CheckpointConfig",
    "LayerSpec",
    "LutSpec",
    "TensorSpec",
    "TrellisSpec",
    "UniformSpec",
    "is_plain_name",
    "parse_config",
]

FORMAT_VERSION: Literal[1] = 1
QUANT_METHOD: Literal["requant"] = "requant"
SPARSE_TENSORS = ("sparse_indptr", "sparse_indices", "sparse_values")
SAFETENSORS_DTYPES = {
    torch.uint8: "U8",
    torch.float16: "F16",
    torch.int32: "I32",
    torch.uint16: "U16",
}
_MAX_INT32 = 2**31 - 1
_UINT16_COLUMNS = 2**16
_MAX_LAYERS = 2**17
_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
_LONGEST_NAME = 500


def is_plain_name(name: str) -> bool:
    """Whether a module or tensor may be called so: letters, digits, ``_`` and ``-``, in parts joined by dots."""
    return len(name) <= _LONGEST_NAME and _NAME.fullmatch(name) is not None


class TensorSpec(NamedTuple):
    """Type and shape that a stored tensor must have."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _whole(value: Any) -> Any:
    # a Literal compares: it would take 4.0 for 4
    if type(value) is not int:
        raise ValueError("Input should be a valid integer")
    return value


_Whole = BeforeValidator(_whole)


class _LayerBase(BaseModel):
    # strict: JSON's true is not the integer 1, and "4" is not 4
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    in_features: int = Field(ge=1, le=_MAX_INT32)
    out_features: int = Field(ge=1, le=_MAX_INT32)
    nnz: int = Field(default=0, ge=0, le=_MAX_INT32)

    @model_validator(mode="after")
    def _nnz_fits(self) -> "_LayerBase":
        if self.nnz > self.numel:
            raise ValueError(f"nnz {self.nnz} exceeds the {self.numel} weights of the layer")
        return self

    @property
    def numel(self) -> int:
        """Weights of the layer."""
        return self.in_features * self.out_features

    @property
    def kernel_settings(self) -> dict[str, int]:
        """What the kernels must know beside the tensors: keyword arguments of :mod:`vllm_requant.kernels`."""
        raise NotImplementedError

    @property
    def row_quantum(self) -> int:
        """Output features can be cut at multiples of this many."""
        return 1

    @property
    def column_quantum(self) -> int:
        """Input features can be cut at multiples of this many."""
        return 1

    @property
    def index_dtype(self) -> torch.dtype:
        """Type of the sparse column indices."""
        return torch.uint16 if self.in_features <= _UINT16_COLUMNS else torch.int32

    def dense_tensors(self) -> dict[str, TensorSpec]:
        """Stored tensors of the dense part, by suffix."""
        raise NotImplementedError

    def sparse_tensors(self) -> dict[str, TensorSpec]:
        """Stored tensors of the sparse part, by suffix; none when the layer has no sparse elements."""
        if self.nnz == 0:
            return {}
        return {
            "sparse_indptr": TensorSpec(torch.int32, (self.out_features + 1,)),
            "sparse_indices": TensorSpec(self.index_dtype, (self.nnz,)),
            "sparse_values": TensorSpec(torch.float16, (self.nnz,)),
        }

    def tensors(self) -> dict[str, TensorSpec]:
        """All stored tensors of the layer, by suffix."""
        return self.dense_tensors() | self.sparse_tensors()

    @property
    def dense_nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.dense_tensors().values())

    @property
    def sparse_nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.sparse_tensors().values())

    @property
    def nbytes(self) -> int:
        """Every stored byte of the layer, bias apart."""
        return self.dense_nbytes + self.sparse_nbytes

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.numel


class UniformSpec(_LayerBase):
    """Group-wise asymmetric integers: ``(code − zero_point) · scale``."""

    kind: Literal["uniform"] = "uniform"
    bits: Annotated[Literal[2, 3, 4, 8], _Whole]
    group_size: int = Field(ge=32, le=65536, multiple_of=32)

    @property
    def kernel_settings(self) -> dict[str, int]:
        return {"bits": self.bits, "group_size": self.group_size}

    @property
    def column_quantum(self) -> int:
        return 32

    @property
    def groups(self) -> int:
        """Groups in a row; the last may be shorter."""
        return -(-self.in_features // self.group_size)

    def dense_tensors(self) -> dict[str, TensorSpec]:
        rows = self.out_features
        return {
            "qweight": TensorSpec(torch.uint8, (rows, row_bytes(self.in_features, self.bits))),
            "scales": TensorSpec(torch.float16, (rows, self.groups)),
            "qzeros": TensorSpec(torch.uint8, (rows, row_bytes(self.groups, self.bits))),
        }


class LutSpec(_LayerBase):
    """A table of ``2**bits`` values per output row."""

    kind: Literal["lut"] = "lut"
    bits: Annotated[Literal[2, 3, 4], _Whole]

    @property
    def kernel_settings(self) -> dict[str, int]:
        return {"bits": self.bits}

    def dense_tensors(self) -> dict[str, TensorSpec]:
        rows = self.out_features
        return {
            "qweight": TensorSpec(torch.uint8, (rows, row_bytes(self.in_features, self.bits))),
            "lookup_table": TensorSpec(torch.float16, (rows, 1 << self.bits)),
        }


class TrellisSpec(_LayerBase):
    """Paths through a bitshift trellis, in coordinates rotated by block Hadamard transforms with random signs.

    Attributes:
        bits: K, stored bits a weight.
        state_bits: L, width of the window of bits that stands for a weight.
        code: which function makes a value of a window.
        block_in, block_out: sizes of the Hadamard blocks of input and output features.
    """

    kind: Literal["trellis"] = "trellis"
    bits: int = Field(ge=1, le=6)
    state_bits: int = Field(ge=8, le=16)
    code: Literal["mul1"] = "mul1"
    block_in: Annotated[Literal[16, 32, 64, 128], _Whole]
    block_out: Annotated[Literal[16, 32, 64, 128], _Whole]

    @model_validator(mode="after")
    def _check_sizes(self) -> "TrellisSpec":
        if self.state_bits < 2 * self.bits:
            raise ValueError(f"state_bits {self.state_bits} is less than twice the {self.bits} bits of a weight")
        for what, size, block in (
            ("in_features", self.in_features, self.block_in),
            ("out_features", self.out_features, self.block_out),
        ):
            if size % block:
                raise ValueError(f"{what} {size} is not a multiple of its Hadamard block {block}")
        return self

    @property
    def kernel_settings(self) -> dict[str, int]:
        return {"bits": self.bits, "state_bits": self.state_bits}

    @property
    def row_quantum(self) -> int:
        return self.block_out

    @property
    def column_quantum(self) -> int:
        return self.block_in

    @property
    def tile_columns(self) -> int:
        """Columns of a tile of ``TILE`` weights, which has ``block_out`` rows."""
        return TILE // self.block_out

    def dense_tensors(self) -> dict[str, TensorSpec]:
        rows = self.out_features // self.block_out
        tiles = self.in_features // self.tile_columns
        return {
            "qweight": TensorSpec(torch.uint8, (rows, tiles, TILE * self.bits // 8)),
            "scales": TensorSpec(torch.float16, (rows, self.in_features // self.block_in)),
            "signs_in": TensorSpec(torch.uint8, (row_bytes(self.in_features, 1),)),
            "signs_out": TensorSpec(torch.uint8, (row_bytes(self.out_features, 1),)),
        }


LayerSpec = UniformSpec | LutSpec | TrellisSpec


class CheckpointConfig(BaseModel):
    """The ``quantization_config`` entry of ``config.json``.

    ``producer`` says which program wrote the checkpoint, ``provenance`` from what and how; neither
    influences reading.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    quant_method: Literal["requant"] = QUANT_METHOD
    format_version: Literal[1] = FORMAT_VERSION
    producer: dict[str, Any] = Field(default_factory=dict)
    provenance: dict[str, Any] = Field(default_factory=dict)
    layers: dict[str, Annotated[LayerSpec, Field(discriminator="kind")]] = Field(min_length=1)

    @field_validator("layers", mode="before")
    @classmethod
    def _plain_layers(cls, layers: Any) -> Any:
        # before the entries are looked at: their number bounds the work and the memory
        if isinstance(layers, Mapping):
            if len(layers) > _MAX_LAYERS:
                raise ValueError(f"{len(layers)} layers, more than the {_MAX_LAYERS} that a checkpoint can have")
            for name in layers:
                if not isinstance(name, str) or not is_plain_name(name):
                    raise ValueError(f"{name!r:.300} is not a name of a module")
        return layers

    @property
    def numel(self) -> int:
        """Weights in all quantized layers."""
        return sum(spec.numel for spec in self.layers.values())

    @property
    def nbytes(self) -> int:
        """Stored bytes of all quantized layers."""
        return sum(spec.nbytes for spec in self.layers.values())

    @property
    def nnz(self) -> int:
        return sum(spec.nnz for spec in self.layers.values())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of all quantized layers over their weights (SPEC.md, section 7)."""
        return 8 * self.nbytes / self.numel


def parse_config(config: Mapping[str, Any], *, file: str | None = None) -> CheckpointConfig:
    """Parse and check a ``quantization_config`` entry.

    Raises:
        ReQuantFormatError: wrong method, unknown version, unknown key, wrong type or value out of range;
            the first offence is named.
    """
    method = config.get("quant_method")
    if method != QUANT_METHOD:
        raise ReQuantFormatError(
            f"not a ReQuant checkpoint (quant_method is {method!r:.80})", file=file, tensor="quantization_config"
        )
    version = config.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise ReQuantFormatError(
            f"format version {version!r:.80} is not one this program reads ({FORMAT_VERSION}); "
            "a newer vllm-requant may read it",
            file=file,
            tensor="quantization_config.format_version",
        )
    try:
        return CheckpointConfig.model_validate(dict(config))
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(["quantization_config", *map(str, first["loc"])])
        got = reprlib.repr(first["input"])  # of bounded length, whatever the input is
        raise ReQuantFormatError(f"{first['msg']} (got {got})", file=file, tensor=path) from None
