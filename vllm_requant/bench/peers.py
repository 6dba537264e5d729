"""The same model for vLLM without us: in 16 bits, and in vLLM's own 4 bits."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .. import hf

__all__ = ["write_bfloat16", "write_int4"]

_GROUPS = (128, 64, 32)
_PER_WORD = 8


def write_bfloat16(checkpoint: Path, folder: Path) -> None:
    """A checkpoint's weights, expanded, as an ordinary model folder.

    Raises:
        ReQuantFormatError: the checkpoint is malformed.
    """
    _model(checkpoint).save_pretrained(folder)
    hf.load_tokenizer(checkpoint).save_pretrained(folder)


def write_int4(checkpoint: Path, folder: Path) -> None:
    """The same weights rounded to 4 bits in groups, symmetric, in the layout of compressed-tensors; good for timing.

    Embedding and head stay in 16 bits.

    Raises:
        ReQuantFormatError: the checkpoint is malformed.
        ValueError: no group that vLLM's kernels take divides the input features of all layers.
    """
    model = _model(checkpoint)
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings()
    }
    fitting = [size for size in _GROUPS if all(module.in_features % size == 0 for module in linears.values())]
    if not fitting:
        raise ValueError(f"no group of {', '.join(map(str, _GROUPS))} divides the input features of all layers")
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    tensors = {name: tensor for name, tensor in model.state_dict().items() if not (tied and name == "lm_head.weight")}
    for name in linears:
        weight = tensors.pop(f"{name}.weight")
        tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in _packed(weight, fitting[0]).items()}
    model.config.save_pretrained(folder)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    hf.load_tokenizer(checkpoint).save_pretrained(folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": _scheme(fitting[0])}))


def _model(checkpoint: Path) -> Any:
    return hf.load_dequantized(checkpoint, torch.bfloat16)


def _packed(weight: Tensor, group_size: int) -> dict[str, Tensor]:
    rows, columns = weight.shape
    groups = weight.float().view(rows, -1, group_size)
    scales = (groups.abs().amax(-1, keepdim=True) / 7.5).clamp(min=1e-8).bfloat16()
    codes = (groups / scales.float()).round().clamp(-8, 7).add(8).to(torch.int32).view(rows, -1, _PER_WORD)
    words = (codes << (4 * torch.arange(_PER_WORD, dtype=torch.int32))).sum(-1, dtype=torch.int32)
    return {
        "weight_packed": words,
        "weight_scale": scales.squeeze(-1),
        "weight_shape": torch.tensor([rows, columns]),
    }


def _scheme(group_size: int) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": group_size}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }
