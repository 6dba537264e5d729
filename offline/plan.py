"""What a conversion would write, known from the model's shapes alone; and what it cannot do with this model."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from vllm_requant.format import LayerSpec
from vllm_requant.format.experts import routed_share

from .bases import Base, Rtn
from .budget import layer_sizes
from .folding import find_folds
from .models import ModelError, find_layers, head_module, other_weights
from .objections import Objections, by_reason
from .recipe import Recipe, RecipeError

__all__ = ["check_stream", "plan", "tokens_to_refit", "with_target"]

_TOKENS_PER_FEATURE = 4


def check_stream(source: str, recipe: Recipe, device: torch.device) -> None:
    """Refuse what cannot be done with a model that stays in its files, before anything expensive.

    Raises:
        RecipeError: choices, or the source, need the whole model in memory.
    """
    reasons = []
    if source.lower().endswith(".gguf"):
        reasons.append(f"--stream: {source} has to be expanded in memory first; give a folder of safetensors files")
    if recipe.tune_epochs:
        reasons.append("--stream: tuning needs the whole model in memory; leave --tune-epochs out or at 0")
    if device.type != "cpu":
        reasons.append("--stream: works on the CPU only; add --device cpu, or --low-memory for a GPU")
    if reasons:
        raise RecipeError(*reasons)


def plan(model: nn.Module, recipe: Recipe) -> dict[str, LayerSpec]:
    """Specs of all layers that a conversion would write, sparse elements spread evenly; the model may be on "meta".

    With a target the precisions are not known before anything is measured; a typical one stands for them.

    Raises:
        ModelError: the architecture is not supported, or the base cannot quantize some layers.
        RecipeError: the target is smaller than anything that the base can do with this model.
        ObjectionError: several of these.
    """
    objections = Objections()
    layers: dict[str, nn.Linear] = {}
    with objections.collecting():
        layers = find_layers(model)
    if layers:
        with objections.collecting():
            recipe = with_target(model, recipe)
    base = recipe.make_base()
    if base.folds:
        with objections.collecting():
            list(find_folds(model))  # refuses an architecture that it knows nothing about
    specs: dict[str, LayerSpec] = {}
    with objections.collecting():
        specs = _layer_specs(base, layers)
        if recipe.target_bpw is not None:
            _check_target(recipe, recipe.target_bpw, layers)
    objections.raise_any()
    share = recipe.outliers + (recipe.significant or 0.0)
    specs = {name: spec.model_copy(update={"nnz": round(share * spec.numel)}) for name, spec in specs.items()}
    if recipe.lm_head_bits < 16:
        name, weight = head_module(model)
        specs[name] = Rtn(recipe.lm_head_bits, recipe.group_size).spec(weight.shape[1], weight.shape[0])
    return specs


def with_target(model: nn.Module, recipe: Recipe) -> Recipe:
    """The recipe with a size of the checkpoint turned into bits a weight of its quantized layers.

    Raises:
        RecipeError: what is not quantized leaves too little.
    """
    if recipe.target_size is None:
        return recipe
    layers = find_layers(model)
    quantized = set(layers)
    head_bytes = 0
    if recipe.lm_head_bits < 16:
        name, weight = head_module(model)
        quantized.add(name)
        head_bytes = Rtn(recipe.lm_head_bits, recipe.group_size).spec(weight.shape[1], weight.shape[0]).nbytes
    rest = head_bytes + sum(2 * tensor.numel() for tensor in other_weights(model, quantized).values())
    left = 8 * (recipe.target_size - rest) / sum(layer.weight.numel() for layer in layers.values())
    try:
        return replace(recipe, target_bpw=left, target_size=None)
    except RecipeError as error:
        raise RecipeError(
            f"--target-size {recipe.target_size}: {rest} bytes are not quantized, which leaves {left:.3f} bits per "
            f"weight of the quantized layers: {error}"
        ) from None


def tokens_to_refit(model: Any, layers: Mapping[str, nn.Linear]) -> int:
    """Calibration tokens that it takes for second moments of all inputs that are more than the tokens' own."""
    widest = max(layer.in_features for layer in layers.values())
    return round(_TOKENS_PER_FEATURE * widest / routed_share(model.config))


def _layer_specs(base: Base, layers: Mapping[str, nn.Linear]) -> dict[str, LayerSpec]:
    """Raises:
    ModelError: what the base cannot quantize, a reason for all layers that have it in common.
    """
    specs: dict[str, LayerSpec] = {}
    refused: list[tuple[str, str]] = []
    for name, layer in layers.items():
        try:
            specs[name] = base.spec(layer.in_features, layer.out_features)
        except ValueError as error:
            refused.append((name, f"{error}; use another --base"))
    if refused:
        raise ModelError(*by_reason(refused))
    return specs


def _check_target(recipe: Recipe, target_bpw: float, layers: Mapping[str, nn.Linear]) -> None:
    sizes = layer_sizes({name: layer.weight.shape for name, layer in layers.items()}, recipe)
    numel = sum(layer.weight.numel() for layer in layers.values())
    least = sum(min(size.values()) for size in sizes.values()) / numel
    if least > target_bpw:
        raise RecipeError(
            f"the target of {target_bpw:.3f} bits per weight is too small: {recipe.base} takes at least "
            f"{least:.3f} with this model; raise --target-bpw or --target-size, or use another base"
        )
