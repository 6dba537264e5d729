"""What ``config.json`` says beside ``quantization_config``, as far as the two and the files must agree."""

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import ReQuantFormatError
from .experts import MIXTURES
from .schema import CheckpointConfig

__all__ = ["check_counts", "check_experts", "check_no_code", "check_tying", "without_code"]

_CODE = "auto_map"
_HEAD = "lm_head"
# what configurations call the number of decoder blocks
_BLOCKS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_EXPERT = re.compile(r"(?P<block>.*\bexperts)\.(?P<number>[0-9]+)\.(?P<matrix>[^.]+)")


def without_code(model_config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration without what tells transformers to run code of the model's repository."""
    return {
        key: without_code(value) if isinstance(value, Mapping) else value
        for key, value in model_config.items()
        if key != _CODE
    }


def check_no_code(model_config: Mapping[str, Any], *, file: Path) -> None:
    """A checkpoint is data.

    Raises:
        ReQuantFormatError: the configuration names code to be run.
    """
    if without_code(model_config) != model_config:
        raise ReQuantFormatError(f"{_CODE} names code to be run; a checkpoint needs none, remove it", file=file)


def check_tying(model_config: Mapping[str, Any], config: CheckpointConfig, *, file: Path) -> None:
    """With tied embeddings the head has no weights of its own.

    Raises:
        ReQuantFormatError: it is named as a quantized layer all the same.
    """
    named = [name for name in config.layers if name.rpartition(".")[2] == _HEAD]
    if model_config.get("tie_word_embeddings") is True and named:
        raise ReQuantFormatError(
            "is quantized on its own, but tie_word_embeddings is true; a checkpoint with tied embeddings must not "
            "name the head",
            file=file,
            tensor=named[0],
        )


def check_experts(model_config: Mapping[str, Any], config: CheckpointConfig, *, file: Path) -> None:
    """Of a block all matrices of all experts are quantized, or none.

    Raises:
        ReQuantFormatError: some are missing from ``layers``.
    """
    blocks: defaultdict[str, defaultdict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name in config.layers:
        match = _EXPERT.fullmatch(name)
        if match:
            blocks[match["block"]][int(match["number"])].add(match["matrix"])
    mixture = MIXTURES.get(_text(model_config, "model_type"))
    for block, experts in blocks.items():
        matrices = {mixture.gate, mixture.up, mixture.down} if mixture else set().union(*experts.values())
        count = model_config.get(mixture.count) if mixture else None
        wanted = count if isinstance(count, int) else max(experts) + 1
        # counted, not walked through: the configuration may speak of any number
        if len(experts) != wanted or max(experts) >= wanted:
            raise ReQuantFormatError(
                f"{len(experts)} of its {wanted} experts are quantized; quantize all or none", file=file, tensor=block
            )
        for number, named in experts.items():
            if named != matrices:
                raise ReQuantFormatError(
                    f"{', '.join(sorted(named))} of the expert are quantized, but its matrices are "
                    f"{', '.join(sorted(matrices))}; quantize all or none",
                    file=file,
                    tensor=f"{block}.{number}",
                )


def check_counts(model_config: Mapping[str, Any], tensors: int, *, file: Path) -> None:
    """A block and an expert have at least one tensor, so that no program need build more of them than there are.

    Args:
        tensors: in the files.

    Raises:
        ReQuantFormatError: the model is said to have more blocks or experts than the files have tensors.
    """
    for key in (*_BLOCKS, *{mixture.count for mixture in MIXTURES.values()}):
        count = model_config.get(key)
        if isinstance(count, int) and not 0 <= count <= tensors:
            raise ReQuantFormatError(f"is {count!r:.40}, but the files hold {tensors} tensors", file=file, tensor=key)


def _text(model_config: Mapping[str, Any], key: str) -> str:
    value = model_config.get(key)
    return value if isinstance(value, str) else ""
