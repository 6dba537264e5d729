"""Reading a checkpoint: configuration, file index, headers, and one checked layer at a time.

Order of trust: ``config.json`` is parsed first, then the safetensors headers are held against it, and only
then is tensor data read. Nothing is allocated from a declared size before the header confirmed it.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import ReQuantFormatError
from .layer import QuantizedLayer
from .schema import SAFETENSORS_DTYPES, CheckpointConfig, parse_config

__all__ = [
    "CONFIG_NAME",
    "INDEX_NAME",
    "SINGLE_FILE_NAME",
    "Checkpoint",
    "check_headers",
    "read_model_config",
]

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_FILE_NAME = "model.safetensors"


def read_model_config(folder: Path) -> tuple[dict[str, Any], CheckpointConfig]:
    """The whole ``config.json`` of a checkpoint and its parsed ``quantization_config``.

    Raises:
        ReQuantFormatError: the folder or file is missing, is not JSON, or breaks the schema.
    """
    path = folder / CONFIG_NAME
    if not folder.is_dir():
        raise ReQuantFormatError("no such folder", file=folder)
    if not path.is_file():
        raise ReQuantFormatError(
            f"holds no {CONFIG_NAME}: not a checkpoint, or one whose writing was interrupted", file=folder
        )
    model_config = _read_json(path)
    entry = model_config.get("quantization_config")
    if not isinstance(entry, dict):
        raise ReQuantFormatError(
            "has no quantization_config: the model is not quantized; convert it with 'requant convert'",
            file=path,
        )
    return model_config, parse_config(entry, file=str(path))


def check_headers(folder: Path, config: CheckpointConfig) -> dict[str, Path]:
    """Hold the headers of all safetensors files against the configuration; no tensor data is read.

    Returns:
        The file of every tensor.

    Raises:
        ReQuantFormatError: a file is missing, truncated or not safetensors; a tensor is missing, superfluous,
            doubled, or has another type or shape than the configuration demands.
    """
    files = _tensor_files(folder)
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for path in sorted(set(files.values())):
        with _open(path) as shard:
            for name in shard.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
                if files.get(name) != path:
                    reason = "stands in two shards" if name in files else "is not listed in the index"
                    raise ReQuantFormatError(reason, file=path, tensor=name)
                view = shard.get_slice(name)
                found[name] = (view.get_dtype(), tuple(view.get_shape()))
    for name, path in files.items():
        if name not in found:
            raise ReQuantFormatError("is listed in the index but not in its file", file=path, tensor=name)
    for module, spec in config.layers.items():
        for suffix, (dtype, shape) in spec.tensors().items():
            name = f"{module}.{suffix}"
            if name not in found:
                raise ReQuantFormatError("is missing", file=folder, tensor=name)
            if found[name] != (SAFETENSORS_DTYPES[dtype], shape):
                raise ReQuantFormatError(
                    f"is {found[name][0]} {list(found[name][1])}, the configuration demands "
                    f"{SAFETENSORS_DTYPES[dtype]} {list(shape)}",
                    file=files[name],
                    tensor=name,
                )
        allowed = {f"{module}.{suffix}" for suffix in (*spec.tensors(), "bias")}
        for name in found:
            if name.rpartition(".")[0] == module and name not in allowed:
                raise ReQuantFormatError("does not belong to this layer", file=files[name], tensor=name)
    return files


class Checkpoint:
    """A checkpoint on disk, opened and with its headers checked.

    Attributes:
        folder: where it lies.
        model_config: the parsed ``config.json``.
        config: its ``quantization_config``.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.model_config, self.config = read_model_config(self.folder)
        self._files = check_headers(self.folder, self.config)
        self._quantized = {
            f"{module}.{suffix}" for module, spec in self.config.layers.items() for suffix in spec.tensors()
        }

    def layer(self, module: str) -> QuantizedLayer:
        """Read one layer and check its values.

        Raises:
            ReQuantFormatError: a rule of SPEC.md, section 4, is broken.
        """
        spec = self.config.layers[module]
        tensors = {suffix: self._read(f"{module}.{suffix}") for suffix in spec.tensors()}
        layer = QuantizedLayer(spec, tensors)
        layer.check(name=module, file=str(self._files[f"{module}.qweight"]))
        return layer

    def layers(self) -> Iterator[tuple[str, QuantizedLayer]]:
        """All layers in the order of the configuration, read one at a time."""
        for module in self.config.layers:
            yield module, self.layer(module)

    def other_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor that belongs to no quantized layer (embeddings, norms, biases)."""
        for name in self._files:
            if name not in self._quantized:
                yield name, self._read(name)

    def other_nbytes(self) -> int:
        """Bytes of :meth:`other_tensors`, without reading them."""
        total = sum(path.stat().st_size for path in set(self._files.values()))
        return total - self.config.nbytes - self._header_nbytes()

    def _header_nbytes(self) -> int:
        return sum(8 + int.from_bytes(path.open("rb").read(8), "little") for path in set(self._files.values()))

    def _read(self, name: str) -> Tensor:
        with _open(self._files[name]) as shard:
            tensor: Tensor = shard.get_tensor(name)
            return tensor


def _tensor_files(folder: Path) -> dict[str, Path]:
    index_path, single = folder / INDEX_NAME, folder / SINGLE_FILE_NAME
    if not index_path.is_file():
        if not single.is_file():
            raise ReQuantFormatError(f"holds neither {SINGLE_FILE_NAME} nor {INDEX_NAME}", file=folder)
        with _open(single) as shard:
            return dict.fromkeys(shard.keys(), single)
    weight_map = _read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ReQuantFormatError("has no weight_map", file=index_path)
    files: dict[str, Path] = {}
    for tensor, name in weight_map.items():
        # a plain name: nothing outside the folder is ever opened
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ReQuantFormatError(f"{name!r} is not a plain safetensors file name", file=index_path, tensor=tensor)
        path = folder / name
        if not path.is_file():
            raise ReQuantFormatError(f"the shard {name} is missing", file=index_path, tensor=tensor)
        files[tensor] = path
    return files


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ReQuantFormatError(f"is truncated or not a safetensors file ({error})", file=path) from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ReQuantFormatError(f"is not valid JSON ({error})", file=path) from None
    if not isinstance(content, dict):
        raise ReQuantFormatError("is not a JSON object", file=path)
    return content
