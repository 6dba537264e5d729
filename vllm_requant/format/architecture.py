"""Whether a checkpoint holds what the model needs that its ``config.json`` describes, and nothing else.

A server builds a model from ``config.json`` and then looks for its tensors, so that what is not in the files would be
allocated first, and left as it is. Here the model is built without weights and held against the headers.
"""

from typing import Any

import torch
from torch import nn

from .errors import ReQuantFormatError
from .experts import model_name, separate_experts
from .reader import CONFIG_NAME, Checkpoint

__all__ = ["check_architecture", "model_without_weights"]


def model_without_weights(checkpoint: Checkpoint) -> Any:
    """The transformers model that ``config.json`` describes on the "meta" device, experts as modules of their own.

    Raises:
        ReQuantFormatError: transformers knows no such model, or cannot build it with these values.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    raw = {key: value for key, value in checkpoint.model_config.items() if key != "quantization_config"}
    try:
        config = AutoConfig.for_model(**raw)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
        separate_experts(model)
    except Exception as error:  # values that nobody checked make transformers raise anything
        reason = f"transformers builds no causal language model from it ({type(error).__name__}: {error})"
        raise ReQuantFormatError(reason, file=checkpoint.folder / CONFIG_NAME) from error
    return model


def check_architecture(checkpoint: Checkpoint) -> None:
    """Compare names and shapes; no tensor data is read.

    Raises:
        ReQuantFormatError: a quantized layer is no layer of the model or of another size; a tensor is missing, of
            another shape, or unknown to the model.
    """
    model = model_without_weights(checkpoint)
    config = model.config
    wanted = model.state_dict()
    tied = getattr(model, "all_tied_weights_keys", {})
    held: set[str] = set()

    def refuse(reason: str, name: str) -> ReQuantFormatError:
        stored = checkpoint.tensors.get(name)
        return ReQuantFormatError(reason, file=stored.file if stored else checkpoint.folder / CONFIG_NAME, tensor=name)

    for name, spec in checkpoint.config.layers.items():
        module = _submodule(model, model_name(config, name))
        if module is None:
            raise refuse("the model has no such module", name)
        if not isinstance(module, nn.Linear | nn.Embedding):
            raise refuse(f"is a {type(module).__name__} of the model and cannot be quantized", name)
        if spec.kind == "trellis" and isinstance(module, nn.Embedding):
            raise refuse("an embedding cannot be of the trellis kind, whose rows are mixed", name)
        stored, have = [spec.out_features, spec.in_features], list(module.weight.shape)
        if stored != have:
            raise refuse(f"{stored} in the checkpoint, the model's is {have}", name)
        held.add(f"{model_name(config, name)}.weight")
    for name in checkpoint.other_names:
        inside = model_name(config, name)
        if inside not in wanted:
            raise refuse("the model has no such tensor", name)
        stored, have = list(checkpoint.tensors[name].shape), list(wanted[inside].shape)
        if stored != have:
            raise refuse(f"{stored} in the checkpoint, the model's is {have}", name)
        held.add(inside)
    for name in wanted:
        if name not in held and tied.get(name) not in held:
            raise refuse("the checkpoint does not hold this tensor of the model", name)


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None
