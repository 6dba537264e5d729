"""From a finished conversion to a folder: tensors, tokenizer, report, provenance."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

import vllm_requant
from vllm_requant.format import CheckpointConfig
from vllm_requant.format.checksums import SUMS_NAME, amended_sums, file_sum, read_sums
from vllm_requant.format.durable import json_text, null_for_nan, write_bytes
from vllm_requant.format.experts import stored_name
from vllm_requant.format.reader import Checkpoint
from vllm_requant.format.writer import staged_folder, write_tensors

from .cache import TensorCache, model_fingerprint
from .calibration import Calibration, load_calibration
from .card import CARD_NAME, inherited, kept, model_card
from .lazy import LazyMapping
from .models import CausalLM, check_finite, model_config, other_tensors
from .observer import current_observer
from .pipeline import Conversion, convert
from .ranks import current_ranks
from .recipe import Recipe
from .stages import Stages
from .work import WorkFolder

__all__ = ["REPORT_NAME", "TIMINGS_NAME", "convert_and_save", "convert_on", "record_evaluation", "save"]

REPORT_NAME = "requant_report.json"
TIMINGS_NAME = "requant_timings.json"


def convert_and_save(
    lm: CausalLM,
    folder: Path,
    recipe: Recipe,
    *,
    dataset: str = "self",
    overwrite: bool = False,
    max_shard_size: str = "5GB",
    cache: TensorCache | None = None,
    low_memory: bool = False,
    work: WorkFolder | None = None,
) -> tuple[CheckpointConfig, Conversion]:
    """The whole way from a loaded model to a checkpoint in ``folder``.

    Args:
        lm: the model.
        folder: where the checkpoint goes.
        recipe: what to do.
        dataset: calibration text, as in :func:`load_calibration`; not read if the recipe needs none.
        overwrite: replace an existing checkpoint.
        max_shard_size: of a safetensors file, such as ``5GB``.
        cache, low_memory: as in :func:`convert`.
        work: where the conversion keeps what it has done, in the place of ``cache``; removed once the checkpoint is
            complete.

    Returns:
        The configuration that was written and the conversion itself.

    Raises:
        CalibrationError: the calibration text is missing or too short.
        WorkError: the model or the text is not that with which the work was begun.
        ModelError: a weight is not finite, or the model's files have changed since it was loaded.
        OSError: ``folder`` cannot be written.
    """
    recipe = recipe.on(lm.device)  # what is kept says what was done
    if work is not None:
        work.agree("the model", model_fingerprint(lm.model))
        cache = work.cache
    conversion, calibration = convert_on(lm, recipe, dataset, cache=cache, low_memory=low_memory, work=work)
    lm.files.check()
    with Stages().stage("save"):
        config = current_ranks().agree(
            lambda: save(
                folder, lm, recipe, calibration, conversion, overwrite=overwrite, max_shard_size=max_shard_size
            )
        )
    if work is not None:
        work.remove()
    current_observer().converted(config, conversion.report)
    return config, conversion


def convert_on(
    lm: CausalLM,
    recipe: Recipe,
    dataset: str,
    *,
    cache: TensorCache | None = None,
    low_memory: bool = False,
    work: WorkFolder | None = None,
) -> tuple[Conversion, Calibration | None]:
    """Convert a model with calibration text, which is not read if the recipe needs none; arguments as above.

    Raises:
        ModelError: a weight is not finite.
        CalibrationError, WorkError: as above.
    """
    check_finite(lm)
    calibration = None
    if recipe.needs_calibration:
        calibration = load_calibration(
            dataset,
            lm.model,
            lm.tokenizer,
            num_samples=recipe.num_samples,
            seq_len=recipe.seq_len,
            seed=recipe.seed,
            cache=cache,
        )
        if work is not None:
            work.agree("the calibration text", calibration.fingerprint)
    tokens = calibration.tokens if calibration is not None else None
    return convert(lm, recipe, tokens, cache=cache, low_memory=low_memory), calibration


def save(
    folder: Path,
    lm: CausalLM,
    recipe: Recipe,
    calibration: Calibration | None,
    conversion: Conversion,
    *,
    overwrite: bool,
    max_shard_size: str = "5GB",
) -> CheckpointConfig:
    """Write the checkpoint; ``folder`` appears only when it is complete.

    Returns:
        The configuration that was written.
    """
    names = {stored_name(lm.model.config, name): name for name in conversion.layers}
    config = CheckpointConfig(
        producer={"name": "vllm-requant", "version": vllm_requant.__version__},
        provenance=_provenance(lm, recipe, calibration) | {"incidents": conversion.incidents},
        layers={stored: conversion.specs[name] for stored, name in names.items()},
    )
    with staged_folder(folder, overwrite=overwrite) as staging:
        lm.tokenizer.save_pretrained(staging)
        if lm.model.generation_config is not None:
            lm.model.generation_config.save_pretrained(staging)
        report = {"provenance": config.provenance, **conversion.report}
        timings = report.pop("stages")
        (staging / REPORT_NAME).write_text(json_text(null_for_nan(report)), encoding="utf-8")
        others = other_tensors(lm, set(conversion.layers))
        card = model_card(config, sum(tensor.nbytes for tensor in others.values()), report, inherited(lm.source))
        (staging / CARD_NAME).write_text(card, encoding="utf-8")
        write_tensors(
            staging,
            model_config(lm),
            config,
            LazyMapping(names, lambda stored: conversion.layers[names[stored]]),
            others,
            max_shard_size=max_shard_size,
        )
        # apart, and without a checksum: all other files are the same, byte by byte, whenever the same is converted
        (staging / TIMINGS_NAME).write_text(json_text(null_for_nan(timings)), encoding="utf-8")
    return config


def record_evaluation(folder: Path, evaluation: Mapping[str, Any]) -> None:
    """Add a result to a checkpoint's report, and to its card unless somebody has changed that.

    Args:
        folder: of the checkpoint.
        evaluation: ``dataset``, ``scores`` by metric, and ``conditions`` that make it comparable; one of the same data
            and conditions is replaced.

    Raises:
        ReQuantFormatError: the folder is no checkpoint.
        OSError: it cannot be written.
    """
    checkpoint = Checkpoint(folder)
    path, card = folder / REPORT_NAME, folder / CARD_NAME
    report = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    told = ("dataset", "conditions")
    report["evaluations"] = [
        entry for entry in report.get("evaluations", []) if any(entry[key] != evaluation[key] for key in told)
    ] + [dict(evaluation)]
    changed = {REPORT_NAME: json_text(null_for_nan(report)).encode()}
    sums = read_sums(folder) or {}
    if card.exists() and sums.get(CARD_NAME) == file_sum(card):
        text = model_card(checkpoint.config, checkpoint.other_nbytes(), report, kept(folder))
        changed[CARD_NAME] = text.encode()
    for name, content in changed.items():
        write_bytes(folder / name, content)
    if sums:
        write_bytes(folder / SUMS_NAME, amended_sums(sums, changed))


def _provenance(lm: CausalLM, recipe: Recipe, calibration: Calibration | None) -> dict[str, Any]:
    return {
        # the last component only: a local path is nobody else's business
        "source": Path(lm.source).name if Path(lm.source).exists() else lm.source,
        "revision": lm.revision,
        "recipe": recipe.describe(),
        "calibration": calibration.describe() if calibration is not None else None,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
