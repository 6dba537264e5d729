"""The model card: what people and the Hub read of a checkpoint, from its configuration and report alone."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from vllm_requant.format import CheckpointConfig
from vllm_requant.format.checksums import SUMS_NAME

__all__ = [
    "CARD_NAME",
    "STDERR",
    "conditions_text",
    "evaluation_rows",
    "inherited",
    "kept",
    "metric_words",
    "model_card",
    "recipe_rows",
    "with_errors",
]

log = logging.getLogger(__name__)
CARD_NAME = "README.md"
STDERR = "_stderr"
"""End of the name of a score that is the standard error of another."""
_INHERITED = ("license", "license_name", "license_link", "language")
_MIB = 2**20


def inherited(source: str) -> dict[str, Any]:
    """What a checkpoint's card takes over from its original: licence and languages, and who that is on the Hub.

    Args:
        source: as the user gave it: a local folder, whose own card is read if it has one, a GGUF file, or a Hub id.
    """
    path = Path(source)
    return _metadata(path, _INHERITED) if path.exists() else {"base_model": source}


def kept(folder: Path) -> dict[str, Any]:
    """The same from the card of a checkpoint, for another of its cards."""
    return _metadata(folder, (*_INHERITED, "base_model"))


def _metadata(folder: Path, keys: Sequence[str]) -> dict[str, Any]:
    card = folder / CARD_NAME
    if not card.is_file():
        return {}
    try:
        data = ModelCard.load(card).data.to_dict()
    except Exception as error:  # of the YAML parser, of the decoder; the card of a model may hold anything
        log.warning("%s: its metadata cannot be read (%s), so the new card takes over no licence", card, error)
        return {}
    return {key: data[key] for key in keys if data.get(key)}


def model_card(
    config: CheckpointConfig,
    other_nbytes: int,
    report: Mapping[str, Any],
    original: Mapping[str, Any],
) -> str:
    """The content of ``README.md``.

    Args:
        config: the checkpoint's ``quantization_config``.
        other_nbytes: of the tensors that are not quantized.
        report: content of ``requant_report.json``.
        original: of :func:`inherited`.
    """
    recipe = config.provenance.get("recipe") or {}
    source = str(config.provenance.get("source"))
    name = f"{source.rpartition('/')[2].removesuffix('.gguf')}-ReQuant-{config.bits_per_weight:.2f}bpw"
    bits = sorted({spec.bits for spec in config.layers.values()})
    evaluations = report.get("evaluations", [])
    relation: dict[str, Any] = {"base_model_relation": "quantized"} if "base_model" in original else {}
    data = ModelCardData(
        **original,
        **relation,
        model_name=name,
        library_name="vllm",
        pipeline_tag="text-generation",
        tags=["requant", "quantized", "vllm", "sparse-residual", *(f"{width}-bit" for width in bits)]
        + ([recipe["base"]] if "base" in recipe else []),
        eval_results=list(_results(evaluations)) or None,
    )
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {name}",
        f"{source} with {config.bits_per_weight:.3f} stored bits a weight in its quantized layers: low-bit weights and "
        f"a sparse 16-bit residual of {100 * config.nnz / config.numel:.3f} % of them (ReQuant, arXiv 2503.01901).",
        "## Serve\n```\npip install 'vllm-requant[cuda]'      # or [cpu]\n"
        "requant serve PATH      # or: vllm serve PATH\n```\n"
        "`requant verify PATH` checks every value and checksum, `requant inspect PATH --layers` lists the layers.",
        "## Size\n" + _table(("", "MiB"), _sizes(config, other_nbytes)),
    ]
    if evaluations:
        head = ("data", "metric", "value", "conditions")
        parts.append("## Quality\n" + _table(head, evaluation_rows(evaluations)))
    if "calibration_loss" in report:
        parts.append(
            f"On the calibration set the loss went from {report['calibration_loss_original']:.5f} to "
            f"{report['calibration_loss']:.5f} nats a token."
        )
    parts.append("## Recipe\n" + _table(("choice", "value"), _recipe(config.provenance)))
    incidents = config.provenance.get("incidents") or []
    if incidents:
        rows = [(each["trouble"], each["fallback"], each["first"], each["places"]) for each in incidents]
        parts.append("Numerical trouble that was met:\n\n" + _table(("trouble", "fallback", "first", "places"), rows))
    parts.append(f"`{SUMS_NAME}` has the checksums of all files, `requant_report.json` what was measured.")
    return "\n\n".join(parts) + "\n"


def _sizes(config: CheckpointConfig, other: int) -> Iterator[tuple[str, str]]:
    dense = sum(spec.dense_nbytes for spec in config.layers.values())
    for what, size in (
        ("dense part of the quantized layers", dense),
        ("sparse part", config.nbytes - dense),
        ("not quantized", other),
        ("all weights", config.nbytes + other),
        ("the same in 16 bits", 2 * config.numel + other),
    ):
        yield what, f"{size / _MIB:.1f}"


def _recipe(provenance: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield from recipe_rows(provenance.get("recipe") or {})
    for part in ("calibration", "versions"):
        yield from _choices(provenance.get(part) or {})
    if provenance.get("revision"):
        yield "revision of the original", str(provenance["revision"])


def recipe_rows(recipe: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Choices of a recipe and what they are; those that others leave without a meaning are left out."""
    chosen = recipe.get("target_bpw") is not None or recipe.get("target_size") is not None
    unused = {"bits", "group_size"} if chosen else ()
    return _choices({choice: value for choice, value in recipe.items() if choice not in unused})


def _choices(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if value is not None:
            yield key.replace("_", " "), f"{value:g}" if isinstance(value, float) else str(value)


def evaluation_rows(evaluations: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str, str, str]]:
    """Data, metric, value with its standard error where that is known, and conditions, of recorded evaluations."""
    for entry in evaluations:
        for metric, value, error in with_errors(entry["scores"]):
            shown = f"{value:.5g}" + ("" if error is None else f" ± {error:.2g}")
            yield entry["dataset"], metric_words(metric), shown, conditions_text(entry["conditions"])


def with_errors(scores: Mapping[str, float]) -> Iterator[tuple[str, float, float | None]]:
    """Metric, value, and its standard error where that is known."""
    for metric, value in scores.items():
        if not metric.endswith(STDERR):
            yield metric, value, scores.get(metric + STDERR)


def metric_words(name: str) -> str:
    """``exact_match,strict-match``: exact match (strict-match)."""
    metric, _, chosen = name.partition(",")
    return metric.replace("_", " ") + (f" ({chosen})" if chosen else "")


def conditions_text(conditions: Mapping[str, Any]) -> str:
    """Conditions of a result in a line, without those that say nothing to a reader."""
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in _told(conditions).items())


def _told(conditions: Mapping[str, Any]) -> dict[str, Any]:
    """Those that say something to a reader: no checksums, no limits that were not set."""
    return {key: value for key, value in conditions.items() if value is not None and len(str(value)) < 60}


def _results(evaluations: Sequence[Mapping[str, Any]]) -> Iterator[EvalResult]:
    for entry in evaluations:
        for metric, value, _ in with_errors(entry["scores"]):
            yield EvalResult(
                task_type="text-generation",
                dataset_type=entry["dataset"],
                dataset_name=entry["dataset"],
                metric_type=metric.partition(",")[0],
                metric_name=metric_words(metric),
                metric_value=value,
                # of two results of one data set nothing else says what they differ in
                metric_args=_told(entry["conditions"]),
            )


def _table(head: Sequence[str], rows: Any) -> str:
    def line(cells: Sequence[Any]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"

    return "\n".join(map(line, [head, ["---"] * len(head), *rows]))
