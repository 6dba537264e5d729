"""A ReQuant checkpoint as a transformers model with dequantized weights, for evaluation and for checking a server."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..format.experts import model_name, separate_experts
from ..format.validation import validate

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

    checkpoint = validate(folder)
    raw = {key: value for key, value in checkpoint.model_config.items() if key != "quantization_config"}
    config = AutoConfig.for_model(**raw)
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    # tying is part of the initialization that was skipped
    model.tie_weights()
    separate_experts(model)
    targets = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    with torch.no_grad():
        for name, tensor in checkpoint.other_tensors():
            targets[model_name(config, name)].copy_(tensor)
        for module, layer in checkpoint.layers():
            targets[f"{model_name(config, module)}.weight"].copy_(layer.weight())
    assert isinstance(model, nn.Module)
    return model.eval()
