"""What a fault is, and the edits that faults are made of."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests.format.checkpoints import edit_config, edit_header, edit_index, edit_tensors

__all__ = [
    "BASES",
    "CONFIG",
    "INDEX",
    "LAYER",
    "SUMS",
    "TAIL",
    "TRELLIS",
    "UNIFORM",
    "WEIGHTS",
    "Edit",
    "Fault",
    "config",
    "entry",
    "header",
    "index",
    "instead",
    "layer",
    "outside",
    "rename",
    "replace_text",
    "shard",
    "tensors",
    "value",
    "write_bytes",
]

CONFIG, INDEX, WEIGHTS, SUMS = "config.json", "model.safetensors.index.json", "model.safetensors", "SHA256SUMS"
LAYER = "model.layers.0.mlp.gate_proj"  # a table of 4 bits with a sparse part
UNIFORM = "model.layers.0.self_attn.q_proj"  # 3 bits, groups of 32, two in a row, sparse, with a bias
TRELLIS = "model.layers.0.self_attn.k_proj"
TAIL = "model.layers.0.mlp.down_proj"  # its rows end inside a byte
BASES: dict[str, dict[str, Any]] = {
    "one file": {},
    "shards": {"max_shard_size": 40_000},
    "experts": {"architecture": "mixtral"},
}
"""Arguments of ``write_checkpoint`` for the good checkpoints."""


class Fault(NamedTuple):
    """How a good checkpoint is broken.

    Attributes:
        name: of the fault, which is also the test's parameter.
        what: is wrong.
        says: regular expression for what the refusal says.
        make: breaks the rule in a folder that holds the checkpoint.
        base: the good checkpoint, a key of ``BASES``.
        by: who refuses: everybody, or only ``verify``, which alone reads checksums.
    """

    name: str
    what: str
    says: str
    make: Callable[[Path], object]
    base: str = "one file"
    by: str = "all"


Edit = Callable[[dict[str, Any]], object]


def replace_text(name: str, *replace: tuple[str, str]) -> Callable[[Path], None]:
    """Replace in the text of a file what stands in it once."""

    def make(folder: Path) -> None:
        text = (folder / name).read_text()
        for old, new in replace:
            assert old in text, old
            text = text.replace(old, new, 1)
        (folder / name).write_text(text)

    return make


def write_bytes(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def config(change: Edit) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder, change)


def entry(change: Edit) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder, lambda config: change(config["quantization_config"]))


def layer(name: str = LAYER, **values: Any) -> Callable[[Path], None]:
    return entry(lambda entry: entry["layers"][name].update(values))


def index(change: Edit) -> Callable[[Path], None]:
    return lambda folder: edit_index(folder, change)


def header(change: Edit) -> Callable[[Path], None]:
    return lambda folder: edit_header(folder, change)


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(folder, change)


def value(tensor: str, at: Any, value: float) -> Callable[[Path], None]:
    return tensors(lambda tensors: tensors[tensor].__setitem__(at, value))


def instead(name: str, special: Callable[[Path], object]) -> Callable[[Path], None]:
    """Something else in place of a file."""

    def make(folder: Path) -> None:
        (folder / name).rename(folder.with_name("elsewhere"))
        special(folder / name)

    return make


def outside(path: Path) -> None:
    path.symlink_to(path.parent.with_name("elsewhere"))


def rename(table: dict[str, Any], old: str, new: str) -> None:
    table[new] = table.pop(old)


def shard(folder: Path) -> Path:
    return min(folder.glob("model-*.safetensors"))
