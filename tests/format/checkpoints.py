"""Small checkpoints that keep every rule, and their files taken apart, so that tests can break one rule of one."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.format.builders import random_layer
from vllm_requant.format import CheckpointConfig
from vllm_requant.format.experts import separate_experts, stored_name
from vllm_requant.format.writer import write_tensors

__all__ = ["edit_config", "edit_header", "edit_index", "edit_tensors", "split_file", "write_checkpoint", "write_file"]

_FORMATS: dict[str, tuple[str, int, float]] = {
    # kind, bits, density of the sparse part
    "q_proj": ("uniform", 3, 0.05),
    "k_proj": ("trellis", 2, 0.05),
    "v_proj": ("uniform", 4, 0.0),
    "o_proj": ("lut", 2, 0.0),
    "gate_proj": ("lut", 4, 0.05),
    "up_proj": ("uniform", 8, 0.05),
    "down_proj": ("lut", 3, 0.05),
    "lm_head": ("uniform", 8, 0.0),
}
_EXPERTS = {name: ("lut", 4, 0.0) for name in ("w1", "w2", "w3")}
# 164 codes of 3 bits do not fill their last byte
_SETTINGS = {
    "llama": {"num_hidden_layers": 1, "intermediate_size": 164, "attention_bias": True},
    "mixtral": {"num_hidden_layers": 1},
}


def write_checkpoint(
    folder: Path,
    architecture: str = "llama",
    *,
    max_shard_size: int | str = "5GB",
    densities: Mapping[str, float] = MappingProxyType({}),
    **settings: Any,
) -> Path:
    """A checkpoint of a tiny model: a Llama with layers of every kind, or a Mixtral whose experts are quantized.

    Args:
        densities: of the sparse parts of layers of these names, where other ones are wanted.
        settings: of the model's configuration.
    """
    torch.manual_seed(0)
    config = tiny.CONFIGS[architecture](**_SETTINGS[architecture] | settings)
    model = AutoModelForCausalLM.from_config(config)
    separate_experts(model)
    formats = _FORMATS if architecture == "llama" else _EXPERTS
    layers, others = {}, {}
    for name, tensor in model.state_dict().items():
        module, _, suffix = name.rpartition(".")
        wanted = formats.get(module.rpartition(".")[2])
        if wanted and suffix == "weight":
            kind, bits, density = wanted
            density = densities.get(module.rpartition(".")[2], density)
            layer = random_layer(kind, bits, *tensor.shape, density=density, group_size=32, seed=len(layers))[0]
            layers[stored_name(config, module)] = layer
        else:
            others[stored_name(config, name)] = tensor.bfloat16()
    entry = CheckpointConfig(layers={name: layer.spec for name, layer in layers.items()})
    folder.mkdir()
    model_config = {**json.loads(config.to_json_string()), "architectures": [type(model).__name__]}
    tiny.tokenizer().save_pretrained(folder)
    write_tensors(folder, model_config, entry, layers, others, max_shard_size=max_shard_size)
    return folder


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object], name: str = "config.json") -> None:
    """Change a JSON file."""
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


def edit_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the index of the shards."""
    edit_config(folder, change, "model.safetensors.index.json")


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a checkpoint of one file."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def edit_header(folder: Path, change: Callable[[dict[str, Any]], object], name: str = "model.safetensors") -> None:
    """Change a header and leave the data behind it as it is."""
    header, data = split_file(folder / name)
    content = json.loads(header)
    change(content)
    write_file(folder / name, json.dumps(content).encode(), data)


def split_file(path: Path) -> tuple[bytes, bytes]:
    """Header and data of a safetensors file."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return content[8:end], content[end:]


def write_file(path: Path, header: bytes, data: bytes) -> None:
    """Inverse of :func:`split_file`."""
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
