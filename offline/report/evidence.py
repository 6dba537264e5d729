"""What is on disk about conversions of a model."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from vllm_requant.format.reader import CONFIG_NAME, Checkpoint
from vllm_requant.kernels.reference import row_index

from ..objections import ObjectionError
from ..save import REPORT_NAME, TIMINGS_NAME

__all__ = ["Conversion", "Evidence", "EvidenceError", "is_checkpoint", "place", "read_object"]

_PLACE = re.compile(r"(?:^|\.)(\d+)\.(.+)$")
_EXPERT = re.compile(r"\.\d+\.")


class EvidenceError(ObjectionError):
    """A file of results cannot be read, or is of another kind than was said."""


def place(layer: str) -> tuple[int, str] | None:
    """Number of a layer's block, and its name inside the block, experts together; None for one in no block."""
    found = _PLACE.search(layer)
    if found is None:
        return None
    return int(found[1]), _EXPERT.sub(".", found[2]).rpartition(".")[2]


def is_checkpoint(path: Path) -> bool:
    """Whether a folder's configuration says that its model is quantized."""
    config = path / CONFIG_NAME
    return config.is_file() and "quantization_config" in read_object(config)


@dataclass(frozen=True)
class Conversion:
    """A checkpoint and what its conversion left beside it.

    Attributes:
        folder: of the checkpoint.
    """

    folder: Path

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return Checkpoint(self.folder)

    @cached_property
    def report(self) -> dict[str, Any]:
        """What was measured; empty if the checkpoint came without."""
        return read_object(self.folder / REPORT_NAME)

    @cached_property
    def timings(self) -> dict[str, Any]:
        """Seconds and memory of the stages; likewise."""
        return read_object(self.folder / TIMINGS_NAME)

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def recipe(self) -> Mapping[str, Any]:
        recipe = self.checkpoint.config.provenance.get("recipe")
        return recipe if isinstance(recipe, dict) else {}

    @cached_property
    def measured(self) -> dict[str, dict[str, float]]:
        """What the conversion found out about each layer, by the names that the checkpoint has; {} if nothing.

        ``mean_pqi`` and ``predicted_delta_f`` are of the first path integral, ``outlier_share`` of algorithm 1.
        """
        integrals = self.report.get("integrals")
        first = integrals[0] if isinstance(integrals, list) and integrals else None
        integral: Mapping[str, Any] = first if isinstance(first, dict) else {}
        kinds = {
            "mean_pqi": integral.get("pqi_by_layer"),
            "predicted_delta_f": integral.get("predicted_by_layer"),
            "outlier_share": self.report.get("outliers"),
        }
        found: dict[str, dict[str, float]] = {}
        for name, spec in self.checkpoint.config.layers.items():
            # whoever made the checkpoint wrote the report
            own = {kind: values.get(name) for kind, values in kinds.items() if isinstance(values, dict)}
            numbers = {kind: float(value) for kind, value in own.items() if isinstance(value, (int, float))}
            for kind in numbers.keys() - {"predicted_delta_f"}:
                numbers[kind] /= spec.numel  # sums over the layer's weights
            if numbers:
                found[name] = numbers
        return found

    def positions(self) -> Iterator[tuple[str, tuple[int, int], torch.Tensor, torch.Tensor]]:
        """The residual of every layer: name, shape, int64 rows and columns of its elements."""
        for name, layer in self.checkpoint.layers():
            if layer.sparse is not None:
                shape = layer.spec.out_features, layer.spec.in_features
                yield name, shape, row_index(layer.sparse.indptr), layer.sparse.indices.to(torch.int64)


@dataclass(frozen=True)
class Evidence:
    """All that a page is made of.

    Attributes:
        conversions: checkpoints that are looked at closely.
        results: of sweeps, one object a run, see :mod:`~..sweep`.
        tables: of the paper, by number, as ``requant tables`` writes them.
    """

    conversions: list[Conversion] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)
    tables: dict[int, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, folders: list[Path], results: list[Path], tables: Path | None) -> "Evidence":
        """Open checkpoints and read files of results.

        Raises:
            ReQuantFormatError: a folder is no checkpoint.
            EvidenceError: a file is not what it is said to be.
        """
        conversions = [Conversion(folder) for folder in folders]
        for conversion in conversions:
            conversion.checkpoint  # noqa: B018  # refused here, before anything is drawn
        rows = [row for path in results for row in _rows(path)]
        return cls(conversions, rows, {} if tables is None else _tables(tables))


def read_object(path: Path) -> dict[str, Any]:
    """A file's JSON object; {} if there is no file.

    Raises:
        EvidenceError: it holds something else.
    """
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise EvidenceError(f"{path}: is not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise EvidenceError(f"{path}: does not hold a JSON object")
    return content


def _tables(path: Path) -> dict[int, dict[str, Any]]:
    tables = read_object(path).get("tables")
    if not isinstance(tables, list) or not all({"number", "columns", "rows"} <= set(table) for table in tables):
        raise EvidenceError(f"{path}: is not a tables.json that requant tables has written")
    return {table["number"]: table for table in tables}


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise EvidenceError(f"{path}: is not a file of sweep results, a JSON object a line ({error})") from None
    if not rows or not all(
        isinstance(row, dict) and {"name", "bits_per_weight", "scores"} <= row.keys() for row in rows
    ):
        raise EvidenceError(
            f"{path}: is not a file of sweep results, with name, bits_per_weight and scores in each line"
        )
    return rows
