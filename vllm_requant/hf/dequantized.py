"""A ReQuant checkpoint as a transformers model with dequantized weights, for evaluation and for checking a server."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..format import ReQuantFormatError
from ..format.experts import separate_experts, stored_name
from ..format.reader import Checkpoint

__all__ = ["load_dequantized", "load_tokenizer"]


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer that lies in a checkpoint folder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def load_dequantized(folder: str | Path, dtype: torch.dtype = torch.float32) -> Any:
    """Build the transformers model of a checkpoint with every quantized weight expanded.

    Args:
        folder: the checkpoint.
        dtype: type of all parameters; float32 reproduces the weights exactly as SPEC.md, section 5, defines them.

    Returns:
        The model in evaluation mode.

    Raises:
        ReQuantFormatError: the checkpoint is malformed, or does not fit the architecture it names.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    checkpoint = Checkpoint(folder)
    raw = {key: value for key, value in checkpoint.model_config.items() if key != "quantization_config"}
    config = AutoConfig.for_model(**raw)
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    # tying is part of the initialization that was skipped
    model.tie_weights()
    separate_experts(model)
    parameters = {stored_name(config, name): p for name, p in model.named_parameters(remove_duplicate=False)}
    buffers = {stored_name(config, name): buffer for name, buffer in model.named_buffers()}
    filled: set[int] = set()

    def fill(name: str, value: torch.Tensor) -> None:
        target = parameters.get(name, buffers.get(name))
        if target is None or target.shape != value.shape:
            have = "no such parameter" if target is None else f"the model has {list(target.shape)}"
            raise ReQuantFormatError(f"{list(value.shape)} does not fit the model: {have}", file=folder, tensor=name)
        with torch.no_grad():
            target.copy_(value)
        filled.add(id(target))

    for name, tensor in checkpoint.other_tensors():
        fill(name, tensor)
    for module, layer in checkpoint.layers():
        fill(f"{module}.weight", layer.weight())
    # tied weights are one parameter under two names, so identity counts, not the name
    missing = [name for name, parameter in parameters.items() if id(parameter) not in filled]
    if missing:
        raise ReQuantFormatError("the checkpoint does not hold this parameter", file=folder, tensor=missing[0])
    assert isinstance(model, nn.Module)
    return model.eval()
