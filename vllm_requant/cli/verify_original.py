"""The part of ``requant verify`` that compares a checkpoint with the model that it was made of."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..format import ReQuantFormatError
from ..format.experts import model_name
from ..format.original import Comparison, compare_layer
from ..format.reader import Checkpoint
from ..offline.models import DTYPES, decoder_blocks, load_causal_lm, other_tensors
from ..offline.progress import track

__all__ = ["compare_with_original"]

_FOLDED = "base awq rescales the channels of decoder blocks, by factors that a checkpoint does not hold"
_TUNED = "the recipe tunes norms"


def compare_with_original(checkpoint: Checkpoint, source: str) -> tuple[dict[str, Any], list[ReQuantFormatError]]:
    """Hold every layer and every other tensor against the original model.

    What the recipe changed on purpose cannot be compared and is named as such. The recipe is what the checkpoint says
    of itself: one that lies hides such changes, but no others.

    Args:
        checkpoint: one without findings.
        source: the model, as ``requant convert`` takes it.

    Returns:
        What was compared, with the errors of each layer, and what is not as SPEC.md, section 5, has it.

    Raises:
        ModelError: the original cannot be loaded.
    """
    recipe = checkpoint.config.provenance.get("recipe")
    recipe = recipe if isinstance(recipe, dict) else {}
    stored_in = checkpoint.model_config.get("dtype")
    lm = load_causal_lm(source, dtype=stored_in if stored_in in DTYPES else "auto")
    folded = f"{decoder_blocks(lm.model)[0]}." if recipe.get("base") == "awq" else None
    inside = {name: model_name(lm.model.config, name) for name in checkpoint.config.layers}
    weights = {name: tensor for name, tensor in lm.model.state_dict().items() if name.endswith(".weight")}
    found: list[ReQuantFormatError] = []
    compared: dict[str, Comparison] = {}
    excused: dict[str, list[str]] = {}
    for name in track(inside, "compared layers", len(inside)):
        if folded is not None and name.startswith(folded):
            excused.setdefault(_FOLDED, []).append(name)
            continue
        result = _compare_layer(checkpoint, name, weights.get(f"{inside[name]}.weight"))
        if isinstance(result, ReQuantFormatError):
            found.append(result)
            continue
        compared[name] = result
        found += _judge(checkpoint, name, result)
    expected = other_tensors(lm, set(inside.values()))
    equal = 0
    for name, tensor in checkpoint.other_tensors():
        if name in expected and _same(tensor, expected[name]):
            equal += 1
        elif folded is not None and name.startswith(folded):
            excused.setdefault(_FOLDED, []).append(name)
        elif recipe.get("tune_epochs") and tensor.ndim == 1 and name.endswith(".weight"):
            excused.setdefault(_TUNED, []).append(name)
        else:
            reason = "is not that of the original" if name in expected else "the original has no such tensor"
            found.append(ReQuantFormatError(reason, file=checkpoint.tensors[name].file, tensor=name))
    return {
        "model": source,
        "layers_compared": len(compared),
        "sparse_elements": sum(checkpoint.config.layers[name].nnz for name in compared),
        "relative_error": _summary(compared),
        "other_tensors_equal": equal,
        "not_compared": [
            f"{len(names)} tensors and layers, the first {names[0]}: {why}" for why, names in excused.items()
        ],
        "per_layer": {
            name: {"mean_error": result.mean_error, "max_error": result.max_error} for name, result in compared.items()
        },
    }, found


def _compare_layer(checkpoint: Checkpoint, name: str, weight: Tensor | None) -> Comparison | ReQuantFormatError:
    spec, file = checkpoint.config.layers[name], checkpoint.tensors[f"{name}.qweight"].file
    if weight is None or tuple(weight.shape) != (spec.out_features, spec.in_features):
        have = "has no such layer" if weight is None else f"has one of {list(weight.shape)}"
        return ReQuantFormatError(
            f"is {[spec.out_features, spec.in_features]}, the original {have}", file=file, tensor=name
        )
    return compare_layer(checkpoint.layer(name), weight)


def _judge(checkpoint: Checkpoint, name: str, result: Comparison) -> list[ReQuantFormatError]:
    reasons = []
    if result.broken:
        reasons.append(
            f"{len(result.broken)} of {checkpoint.config.layers[name].nnz} sparse elements do not restore the "
            f"original's weight, the first in row {result.broken[0][0]}, column {result.broken[0][1]}"
        )
    if result.mean_error >= 1:
        reasons.append(f"is no nearer to the original than zeros are (relative error {result.mean_error:.3g})")
    return [
        ReQuantFormatError(reason, file=checkpoint.tensors[f"{name}.qweight"].file, tensor=name) for reason in reasons
    ]


def _same(stored: Tensor, original: Tensor) -> bool:
    # by bytes: what differs in the sign of a zero is not equal
    return (
        stored.dtype == original.dtype
        and stored.shape == original.shape
        and torch.equal(stored.contiguous().view(torch.uint8), original.contiguous().view(torch.uint8))
    )


def _summary(compared: Mapping[str, Comparison]) -> dict[str, Any] | None:
    if not compared:
        return None
    worst = max(compared, key=lambda name: compared[name].mean_error)
    mean = sum(result.mean_error for result in compared.values()) / len(compared)
    return {"mean": mean, "max": compared[worst].mean_error, "worst": worst}
