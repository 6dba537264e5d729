"""Many conversions of one model, each scored on held-out text: what tables and ablations are made of.

Runs are named and written in TOML, or in YAML with the same names; a table ``[all]`` holds what they share::

    [all]
    compute = "auto"
    num_samples = 64

    [runs.gptq-3]
    base = "gptq"
    bits = 3
    outliers = 0
    significant = 0

    [runs.gptq-3-requant]
    base = "gptq"
    size_of = "gptq-3"      # as many stored bits as that run has

Fields are those of :class:`~.recipe.Recipe`. The scores, and the checkpoints if they are wanted, are all that is saved.
A JSON object a line is appended when a run ends: a sweep that was interrupted goes on where it stopped, and several
processes may share one file.
"""

import json
import logging
import time
import tomllib
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, get_type_hints

import torch
import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor, nn

from .cache import TensorCache
from .evaluate import EvaluationText, Windows, compare, evaluation_windows, predictions
from .models import find_layers, load_causal_lm, other_weights
from .recipe import Recipe, RecipeError
from .save import convert_on, save

__all__ = ["ALL_BASES", "Sweep", "read_runs"]

log = logging.getLogger(__name__)
_SIZE_OF = "size_of"
ALL_BASES = Path(__file__).parent / "studies" / "methods.toml"
"""runs of every base alone and with ReQuant, at 2, 3 and 4 bits, and controls"""


_TABLES = TypeAdapter(dict[str, dict[str, Any]])
_CHOICES: dict[str, TypeAdapter[Any]] = {
    name: TypeAdapter(hint, config=ConfigDict(strict=True))
    for name, hint in (get_type_hints(Recipe) | {_SIZE_OF: str}).items()
}


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a name that stands twice is a mistake, as it is in TOML."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        for place, name in enumerate(names):
            if name in names[:place]:
                raise yaml.MarkedYAMLError(problem=f"{name} stands twice", problem_mark=node.value[place][0].start_mark)
        return super().construct_mapping(node, deep)


def read_runs(path: Path, changed: Mapping[str, Any] | None = None) -> dict[str, dict[str, Any]]:
    """The runs of a file: choices by name, those of all runs included.

    Args:
        path: YAML if it is called ``.yaml`` or ``.yml``, else TOML.
        changed: choices that take the place of those of the file, in all runs.

    Raises:
        RecipeError: the file cannot be read as that, names a field that a recipe does not have, a choice that is not
            possible, or a run that comes later or not at all.
    """
    content = _content(path)
    shared = content.pop("all", {})
    try:
        runs = _TABLES.validate_python(content.pop("runs", {}))
    except ValidationError as error:
        raise RecipeError(f"{path}: runs: {_first(error)}") from None
    if content or not runs:
        raise RecipeError(f"{path}: holds {', '.join(content) or 'nothing'} beside [all]; runs are tables [runs.NAME]")
    result: dict[str, dict[str, Any]] = {}
    for name, own in runs.items():
        choices = shared | own | dict(changed or {})
        _check_types(f"{path}: run {name}", choices)
        if _SIZE_OF in choices and choices[_SIZE_OF] not in result:
            raise RecipeError(f"{path}: run {name}: size_of names {choices[_SIZE_OF]}, which is no earlier run")
        try:
            Recipe(**{key: value for key, value in choices.items() if key != _SIZE_OF})
        except RecipeError as error:
            raise RecipeError(*(f"{path}: run {name}: {reason}" for reason in error.args)) from None
        result[name] = choices
    return result


def _content(path: Path) -> dict[str, dict[str, Any]]:
    """The tables of a file of either kind."""
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix in (".yaml", ".yml"):
            return _TABLES.validate_python(yaml.load(text, _UniqueKeys))
        return _TABLES.validate_python(tomllib.loads(text))
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: is not valid YAML: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path}: is not valid TOML: {error}") from None
    except ValidationError as error:
        raise RecipeError(f"{path}: {_first(error)}") from None


def _check_types(run: str, choices: Mapping[str, Any]) -> None:
    for name, value in choices.items():
        if name not in _CHOICES:
            raise RecipeError(f"{run}: {name} is not a choice of a recipe")
        try:
            _CHOICES[name].validate_python(value)
        except ValidationError as error:
            raise RecipeError(f"{run}: {name}: {_first(error)}") from None


def _first(error: ValidationError) -> str:
    """What a value is that it should not be: where, if it lies deeper, and what belongs there."""
    found = error.errors(include_url=False)[0]
    place = ".".join(map(str, found["loc"]))
    return f"{place}: " * bool(place) + f"{found['input']!r}: {found['msg']}"


@dataclass
class Sweep:
    """Runs on one model.

    Attributes:
        source: the model, as for a conversion.
        runs: choices by name.
        calibration: text for all of them.
        evaluation: texts by the names under which their scores are kept.
        output: file of results.
        seq_len, max_tokens: of the evaluation.
        cache: folder of path integrals.
        checkpoints: folder in which every run leaves its checkpoint, under its name; None leaves none.
    """

    source: str
    runs: Mapping[str, Mapping[str, Any]]
    calibration: str
    evaluation: Mapping[str, str]
    output: Path
    seq_len: int = 512
    max_tokens: int | None = None
    cache: Path | None = None
    checkpoints: Path | None = None
    device: torch.device | str = "cpu"
    low_memory: bool = False

    def results(self) -> dict[str, dict[str, Any]]:
        """What is finished, by name.

        Raises:
            RecipeError: a result was made by another recipe than the run of that name has now.
        """
        if not self.output.exists():
            return {}
        rows = [json.loads(line) for line in self.output.read_text(encoding="utf-8").splitlines()]
        for row in rows:
            if row["name"] in self.runs and row["choices"] != dict(self.runs[row["name"]]):
                raise RecipeError(
                    f"{self.output}: {row['name']} was run with {row['choices']}, which is not what it says now; "
                    "rename the run or remove the line"
                )
        return {row["name"]: row for row in rows}

    def run(self, pattern: str = "*") -> Iterator[dict[str, Any]]:
        """Run what is not finished and fits the pattern; yields each result after it was written."""
        reference: dict[str, tuple[Windows, list[Tensor], dict[str, Any]]] = {}
        self.results()
        for name, choices in self.runs.items():
            if not fnmatch(name, pattern) or name in self.results():
                continue
            log.info("run %s", name)
            if not reference:
                reference = dict(self._references())
            row = {"name": name, "choices": dict(choices)} | self._one(name, self._recipe(name, choices), reference)
            self.output.parent.mkdir(parents=True, exist_ok=True)
            with self.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            yield row

    def _recipe(self, name: str, choices: Mapping[str, Any]) -> Recipe:
        choices = dict(choices)
        other = choices.pop(_SIZE_OF, None)
        if other is not None:
            if other not in self.results():
                raise RecipeError(f"run {name}: {other}, whose size it is to have, has not been run")
            choices["target_bpw"] = self.results()[other]["bits_per_weight"]
        return Recipe(**choices)

    def _references(self) -> Iterator[tuple[str, tuple[Windows, list[Tensor], dict[str, Any]]]]:
        """Windows of each text, the original's predictions of them, and the conditions."""
        lm = load_causal_lm(self.source, device=self.device)
        for name, dataset in self.evaluation.items():
            windows, conditions = evaluation_windows(
                EvaluationText(dataset, name), lm.tokenizer, seq_len=self.seq_len, max_tokens=self.max_tokens
            )
            log.info("predictions of the original: %s", name)
            # for differences of about a tenth of a nat half precision is plenty
            yield name, (windows, list(predictions(lm.model, windows, torch.float16)), conditions)

    def _one(
        self, name: str, recipe: Recipe, reference: Mapping[str, tuple[Windows, list[Tensor], dict[str, Any]]]
    ) -> dict[str, Any]:
        started = time.monotonic()
        lm = load_causal_lm(self.source, device=self.device)
        recipe = recipe.on(lm.device)
        conversion, calibration = convert_on(
            lm, recipe, self.calibration, cache=TensorCache(self.cache), low_memory=self.low_memory
        )
        seconds = time.monotonic() - started
        if self.checkpoints is not None:
            # without a line in the results the run starts anew, and what it had written is replaced
            save(self.checkpoints / name, lm, recipe, calibration, conversion, overwrite=True)
        blocks = [conversion.specs[layer] for layer in find_layers(lm.model)]
        others = other_weights(lm.model, set(conversion.layers)).values()
        for layer, quantized in conversion.layers.items():
            # exact, in float32; a parameter of its own, since a head may be the embedding's too
            weight = nn.Parameter(quantized.weight().to(self.device), requires_grad=False)
            lm.model.get_submodule(layer).weight = weight
        scores = {}
        for text, (windows, original, conditions) in reference.items():
            measured = compare(windows, predictions(lm.model, windows), original)
            scores[text] = measured | {"conditions": conditions}
            log.info("%s: perplexity %.3f, KL %.4f", text, measured["perplexity"], measured["kl_divergence"])
        report = {key: value for key, value in conversion.report.items() if key != "layers"}
        return {
            # without the head, as a target counts
            "bits_per_weight": 8 * sum(spec.nbytes for spec in blocks) / sum(spec.numel for spec in blocks),
            "nbytes": sum(spec.nbytes for spec in conversion.specs.values())
            + sum(2 * tensor.numel() for tensor in others),
            "nnz": sum(spec.nnz for spec in conversion.specs.values()),
            "seconds": round(seconds, 1),
            "scores": scores,
            "recipe": recipe.describe(),
            "calibration": calibration.describe() if calibration is not None else None,
            "report": report,
        }
