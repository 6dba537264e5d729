"""From a finished conversion to a folder: tensors, tokenizer, report, provenance."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers

import vllm_requant
from vllm_requant.format import CheckpointConfig
from vllm_requant.format.writer import staged_folder, write_tensors

from .calibration import Calibration
from .models import CausalLM, model_config, other_tensors
from .pipeline import Conversion
from .recipe import Recipe

__all__ = ["REPORT_NAME", "save"]

REPORT_NAME = "requant_report.json"


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
    config = CheckpointConfig(
        producer={"name": "vllm-requant", "version": vllm_requant.__version__},
        provenance=_provenance(lm, recipe, calibration),
        layers={name: layer.spec for name, layer in conversion.layers.items()},
    )
    with staged_folder(folder, overwrite=overwrite) as staging:
        lm.tokenizer.save_pretrained(staging)
        if lm.model.generation_config is not None:
            lm.model.generation_config.save_pretrained(staging)
        report = {"provenance": config.provenance, **conversion.report}
        (staging / REPORT_NAME).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        write_tensors(
            staging,
            model_config(lm),
            config,
            conversion.layers,
            other_tensors(lm, set(conversion.layers)),
            max_shard_size=max_shard_size,
        )
    return config


def _provenance(lm: CausalLM, recipe: Recipe, calibration: Calibration | None) -> dict[str, Any]:
    return {
        # the last component only: a local path is nobody else's business
        "source": Path(lm.source).name if Path(lm.source).exists() else lm.source,
        "revision": lm.revision,
        "recipe": recipe.describe(),
        "calibration": calibration.describe() if calibration is not None else None,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
