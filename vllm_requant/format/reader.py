"""Reading a checkpoint: configuration, file index, headers, and one checked layer at a time.

Order of trust: ``config.json`` is parsed first, then the safetensors headers are held against it and against the
sizes of their files, and only then is tensor data read. Nothing is allocated from a declared size before a file
confirmed it. :mod:`.validation` checks the rest of a checkpoint: all of its values, and that the model it names has
what it holds.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import ReQuantFormatError
from .layer import QuantizedLayer
from .model_config import check_counts, check_experts, check_no_code, check_tying
from .schema import SAFETENSORS_DTYPES, CheckpointConfig, parse_config
from .shards import INDEX_NAME, SINGLE_FILE_NAME, StoredTensor, stored_tensors
from .sparse import all_finite
from .untrusted import file_of, read_json

__all__ = [
    "CONFIG_NAME",
    "INDEX_NAME",
    "SINGLE_FILE_NAME",
    "Checkpoint",
    "read_model_config",
]

CONFIG_NAME = "config.json"
# what a tensor outside the quantized layers may be: weights, and buffers
_ORDINARY_DTYPES = frozenset({"BF16", "F16", "F32", "BOOL", "I32", "I64"})


def read_model_config(folder: Path) -> tuple[dict[str, Any], CheckpointConfig]:
    """The whole ``config.json`` of a checkpoint and its parsed ``quantization_config``.

    Raises:
        ReQuantFormatError: the folder or file is missing, is not JSON, breaks the schema, or names code to be run.
    """
    if not folder.is_dir():
        raise ReQuantFormatError("no such folder", file=folder)
    path = file_of(folder, CONFIG_NAME)
    if path is None:
        raise ReQuantFormatError(
            f"holds no {CONFIG_NAME}: not a checkpoint, or one whose writing was interrupted", file=folder
        )
    model_config = read_json(path)
    entry = model_config.get("quantization_config")
    if not isinstance(entry, dict):
        raise ReQuantFormatError(
            "has no quantization_config: the model is not quantized; convert it with 'requant convert'",
            file=path,
        )
    config = parse_config(entry, file=str(path))
    check_no_code({key: value for key, value in model_config.items() if value is not entry}, file=path)
    check_tying(model_config, config, file=path)
    check_experts(model_config, config, file=path)
    return model_config, config


def _check_tensors(stored: dict[str, StoredTensor], config: CheckpointConfig, folder: Path) -> set[str]:
    """Hold the tensors of all files against the configuration; no tensor data is read.

    Returns:
        Names of those that belong to quantized layers, biases apart.

    Raises:
        ReQuantFormatError: one is missing, superfluous, or has another type or shape than the configuration demands.
    """
    quantized = set()
    for module, spec in config.layers.items():
        for suffix, (dtype, shape) in spec.tensors().items():
            name = f"{module}.{suffix}"
            if name not in stored:
                raise ReQuantFormatError("is missing", file=folder, tensor=name)
            _require(stored[name], name, (SAFETENSORS_DTYPES[dtype],), shape)
            quantized.add(name)
    for name, tensor in stored.items():
        module, _, suffix = name.rpartition(".")
        if name in quantized:
            continue
        if module in config.layers:
            if suffix != "bias":
                raise ReQuantFormatError("does not belong to this layer", file=tensor.file, tensor=name)
            _require(tensor, name, ("BF16", "F16", "F32"), (config.layers[module].out_features,))
        elif tensor.dtype not in _ORDINARY_DTYPES:
            raise ReQuantFormatError(
                f"is {tensor.dtype}; tensors of no quantized layer are {', '.join(sorted(_ORDINARY_DTYPES))}",
                file=tensor.file,
                tensor=name,
            )
    return quantized


def _require(tensor: StoredTensor, name: str, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> None:
    if tensor.dtype not in dtypes or tensor.shape != shape:
        raise ReQuantFormatError(
            f"is {tensor.dtype} {list(tensor.shape)}, the configuration demands {' or '.join(dtypes)} {list(shape)}",
            file=tensor.file,
            tensor=name,
        )


class Checkpoint:
    """A checkpoint on disk, opened and with everything checked that needs no tensor data.

    Attributes:
        folder: where it lies.
        model_config: the parsed ``config.json``.
        config: its ``quantization_config``.
        tensors: what the files hold, by name.

    Raises:
        ReQuantFormatError: a rule of SPEC.md, sections 2 to 4, is broken.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.model_config, self.config = read_model_config(self.folder)
        self.tensors = stored_tensors(self.folder)
        check_counts(self.model_config, len(self.tensors), file=self.folder / CONFIG_NAME)
        self._quantized = _check_tensors(self.tensors, self.config, self.folder)
        # mapped once, each: a header is parsed anew whenever its file is opened
        self._open = {path: _open(path) for path in {tensor.file for tensor in self.tensors.values()}}

    def layer(self, module: str) -> QuantizedLayer:
        """Read one layer and check its values.

        Raises:
            ReQuantFormatError: a rule of SPEC.md, section 4, is broken.
        """
        spec = self.config.layers[module]
        tensors = {suffix: self._read(f"{module}.{suffix}") for suffix in spec.tensors()}
        layer = QuantizedLayer(spec, tensors)
        layer.check(name=module, file=str(self.tensors[f"{module}.qweight"].file))
        return layer

    def layers(self) -> Iterator[tuple[str, QuantizedLayer]]:
        """All layers in the order of the configuration, read one at a time."""
        for module in self.config.layers:
            yield module, self.layer(module)

    @property
    def other_names(self) -> list[str]:
        """Names of the tensors that belong to no quantized layer (embeddings, norms, biases)."""
        return [name for name in self.tensors if name not in self._quantized]

    def other_tensor(self, name: str) -> Tensor:
        """Read one of them and check its values.

        Raises:
            ReQuantFormatError: one is not finite.
        """
        tensor = self._read(name)
        if not all_finite(tensor):
            raise ReQuantFormatError("a value is not finite", file=self.tensors[name].file, tensor=name)
        return tensor

    def other_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor that belongs to no quantized layer, read one at a time."""
        for name in self.other_names:
            yield name, self.other_tensor(name)

    def other_nbytes(self) -> int:
        """Bytes of :meth:`other_tensors`, without reading them."""
        return sum(self.tensors[name].nbytes for name in self.other_names)

    def _read(self, name: str) -> Tensor:
        tensor: Tensor = self._open[self.tensors[name].file].get_tensor(name)
        return tensor


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ReQuantFormatError(f"is not a safetensors file ({error})", file=path) from None
