"""``requant`` as a quantization method of transformers; importing this module registers it.

Models compute with the kernels that the server uses, so that logits agree. They are for inference: their run-time
weights neither train nor move between devices, and are not what a checkpoint stores, so that they cannot be saved.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..format import QUANT_METHOD, CheckpointConfig, LayerSpec, ReQuantFormatError, parse_config
from ..format.experts import model_name, separate_experts, stored_name
from ..format.validation import validate
from .modules import QuantizedEmbedding, QuantizedLinear, QuantizedModule, TiedHead

__all__ = ["RequantTransformersConfig", "RequantTransformersQuantizer"]


class RequantTransformersConfig(QuantizationConfigMixin):
    """The ``quantization_config`` entry; keyword arguments are its keys.

    Raises:
        ReQuantFormatError: it breaks the schema.
    """

    def __init__(self, **config: Any) -> None:
        self.checkpoint: CheckpointConfig = parse_config(config)
        self.quant_method = QUANT_METHOD

    def to_dict(self) -> dict[str, Any]:
        return self.checkpoint.model_dump(mode="json")


class RequantTransformersQuantizer(HfQuantizer):
    """Puts quantized modules in place of those that the configuration names."""

    requires_calibration = True  # of our own converter
    quantization_config: RequantTransformersConfig

    def _process_model_before_weight_loading(
        self, model: Any, dtype: torch.dtype | None = None, checkpoint_files: Sequence[str] = (), **_: Any
    ) -> None:
        if checkpoint_files:
            if not all(file.endswith(".safetensors") for file in checkpoint_files):
                raise ReQuantFormatError("a checkpoint consists of safetensors files", file=checkpoint_files[0])
            validate(Path(checkpoint_files[0]).parent)
        separate_experts(model)
        stored = self.quantization_config.checkpoint.layers
        # transformers renames what it reads from the files as it does for any checkpoint of the architecture
        layers = {model_name(model.config, name): spec for name, spec in stored.items()}
        self._dtype = dtype or torch.get_default_dtype()
        tied = {
            target.removesuffix(".weight"): source.removesuffix(".weight")
            for target, source in getattr(model, "all_tied_weights_keys", {}).items()
        }
        for name, spec in layers.items():
            try:
                module = model.get_submodule(name)
            except AttributeError:
                raise ReQuantFormatError("the model has no such module", tensor=name) from None
            if name in tied:
                raise ReQuantFormatError("quantized on its own, but config.json ties it to the embedding", tensor=name)
            model.set_submodule(name, _quantized(name, spec, module, self._dtype))
        for target, source in tied.items():
            if source in layers:
                embedding = model.get_submodule(source)
                if not isinstance(embedding, QuantizedEmbedding):
                    raise ReQuantFormatError(f"{target} is tied to it, and it is no embedding", tensor=source)
                model.set_submodule(target, TiedHead(embedding))
                del model.all_tied_weights_keys[f"{target}.weight"]
                # from which a later tie_weights() begins anew
                tied_keys = model._tied_weights_keys or {}
                model._tied_weights_keys = {key: of for key, of in tied_keys.items() if key != f"{target}.weight"}

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        for module in model.modules():
            if isinstance(module, QuantizedModule):
                module.repack()
        for name, parameter in model.named_parameters():
            # transformers takes what it renames in a quantized checkpoint for a quantized tensor, and leaves its type
            if stored_name(model.config, name) != name:
                parameter.data = parameter.data.to(self._dtype)
        return model

    @property
    def is_trainable(self) -> bool:
        return False

    def is_serializable(self) -> bool:
        return False


def _quantized(name: str, spec: LayerSpec, module: nn.Module, dtype: torch.dtype) -> QuantizedModule:
    """What takes the place of a module, on the meta device.

    Raises:
        ReQuantFormatError: the layer is not the module's, or the module is of a kind that cannot be quantized.
    """
    stored = [spec.out_features, spec.in_features]
    weight = getattr(module, "weight", None)
    if weight is None or list(weight.shape) != stored:
        have = "has no weight" if weight is None else f"is {list(weight.shape)}"
        raise ReQuantFormatError(f"{stored} in the checkpoint, the model's {have}", tensor=name)
    with torch.device("meta"):
        if isinstance(module, nn.Linear):
            return QuantizedLinear(name, spec, module.bias)
        scale = getattr(module, "scalar_embed_scale", getattr(module, "embed_scale", None))
        if isinstance(module, nn.Embedding) and (type(module) is nn.Embedding or scale is not None):
            return QuantizedEmbedding(name, spec, dtype, None if scale is None else float(scale))
    raise ReQuantFormatError(f"a {type(module).__name__} of transformers cannot be quantized", tensor=name)


if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(QUANT_METHOD)(RequantTransformersConfig)
    register_quantizer(QUANT_METHOD)(RequantTransformersQuantizer)
