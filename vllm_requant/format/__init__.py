"""The ReQuant checkpoint: see SPEC.md in this folder."""

from .errors import ReQuantFormatError
from .layer import QuantizedLayer
from .schema import (
    FORMAT_VERSION,
    QUANT_METHOD,
    CheckpointConfig,
    LayerSpec,
    LutSpec,
    TrellisSpec,
    UniformSpec,
    parse_config,
)

__all__ = [
    "FORMAT_VERSION",
    "QUANT_METHOD",
    "CheckpointConfig",
    "LayerSpec",
    "LutSpec",
    "QuantizedLayer",
    "ReQuantFormatError",
    "TrellisSpec",
    "UniformSpec",
    "parse_config",
]
