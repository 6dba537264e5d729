"""Tables 1 to 11 of arXiv 2503.01901 for any model, beside the paper's own numbers for its own.

Tables 6, 7, 10 and 11 are of conversions, which a sweep has made, table 9 of servers that were timed; the others are
measured here. What the paper does not say of its settings is in the arguments. Weights are SqueezeLLM's, 4 bit, as
there: its perplexities before and after quantization differ by the ΔF of tables 1 to 3.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .cache import TensorCache
from .models import CausalLM, find_layers
from .paper import published
from .pipeline import convert
from .pqi import Breakdown, Objective, PathIntegral
from .quantizer import LayerQuantizer
from .recipe import Recipe
from .report.evidence import EvidenceError, place, read_object
from .second_order import expand

__all__ = ["TABLES", "Table", "Tables", "contenders", "result_tables", "speed_table"]

_LAMBDAS = (1e-1, 5e-2, 1e-2, 5e-3, 1e-3)
_RULES = (("uniform", 4), ("uniform", 8), ("uniform", 16), ("uniform", 32), ("gauss", 2), ("gauss", 4), ("gauss", 8))
_OUTLIERS, _SIGNIFICANT = 0.0045, 0.0005


@dataclass(frozen=True)
class Table:
    """One of them.

    Attributes:
        number: in the paper.
        title: for people.
        columns, rows: the numbers; the first ``keys`` columns say what a row is about.
        published: the paper's rows, for one of its models.
        beside: what the paper's columns are, if not the same.
    """

    number: int
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    keys: int = 1
    published: Sequence[Sequence[Any]] | None = None
    beside: Sequence[str] = ()


@dataclass
class Tables:
    """What the tables of one model have in common is computed once.

    Attributes:
        lm: the model.
        tokens: the calibration set, int64 ``[num_samples, seq_len]``.
        test: text that is not calibrated on, likewise.
        bits: of the codes.
        compute: precision of forward and backward passes, as in a recipe.
        cache: keeps gradients and integrals.
    """

    lm: CausalLM
    tokens: Tensor
    test: Tensor
    bits: int = 4
    compute: str = "float32"
    cache: TensorCache = field(default_factory=TensorCache)

    def __post_init__(self) -> None:
        # nothing sparse, and of the method what the paper has of it; table 8 varies the former
        self.recipe = Recipe(
            "squeezellm",
            self.bits,
            outliers=0.0,
            significant=0.0,
            metric="pqi",
            refit=False,
            tune_epochs=0,
            path_samples=0,
            compute=self.compute,
        ).on(self.lm.device)
        self.layers = find_layers(self.lm.model)
        self.objective = Objective(self.lm.model, self.layers, self.tokens, compute=self.recipe.compute)

    def make(self, number: int) -> Table:
        """One of ``TABLES``."""
        title, columns, keys, rows = TABLES[number]
        return Table(number, title, columns(self), list(rows(self)), keys, published(number, self.lm.source))

    @cached_property
    def loss(self) -> float:
        """F at the original weights."""
        return self.objective.loss(cache=self.cache, label="loss of the original")

    @cached_property
    def end(self) -> Mapping[str, Tensor]:
        """The quantized weights, without anything sparse."""
        start = self.objective.gradients(cache=self.cache)
        quantizer = LayerQuantizer(self.recipe, self.objective.start, {}, start, self.cache)
        return quantizer.restored(quantizer.quantize(None, "quantizing"), quantizer.no_masks())

    @cached_property
    def delta_f(self) -> float:
        """ΔF of all layers."""
        return self._actual(self.end, "all")

    @cached_property
    def blocks(self) -> dict[int, list[str]]:
        """Names of the layers, by block."""
        blocks: dict[int, list[str]] = defaultdict(list)
        for name in self.layers:
            where = place(name)
            if where is not None:
                blocks[where[0]].append(name)
        return dict(blocks)

    @cached_property
    def expansion(self) -> Any:
        """Terms of each block's step, and of all."""
        return expand(self.objective, self.end, list(self.blocks.values()))

    def integral(self, rule: str, nodes: int) -> PathIntegral:
        return self.objective.integrate(
            self.end, rule=rule, nodes=nodes, cache=self.cache, label=f"integral, {rule}, {nodes} nodes"
        )

    @cached_property
    def breakdown(self) -> Breakdown:
        """Of the integral with the default rule."""
        return self.integral("gauss", 4).breakdown()

    def _actual(self, weights: Mapping[str, Tensor], label: str) -> float:
        return self.objective.loss(weights, cache=self.cache, label=f"loss, {label}") - self.loss

    # the tables -----------------------------------------------------------------------------------------------

    def by_block(self) -> Iterator[tuple[Any, ...]]:
        """Table 1."""
        alone, together = self.expansion
        for (block, names), terms in zip(self.blocks.items(), alone, strict=True):
            weights = self.objective.start | {name: self.end[name] for name in names}
            yield block, *terms, self._actual(weights, f"block {block}")
        yield "all", *together, self.delta_f

    def by_step(self) -> Iterator[tuple[Any, ...]]:
        """Table 2."""
        _, (first, second) = self.expansion
        start = self.objective.start
        for part in _LAMBDAS:
            moved = {name: torch.lerp(start[name].float(), end.float(), part) for name, end in self.end.items()}
            yield part, part * first, part * part * second, self._actual(moved, f"λ = {part:g}")

    def by_rule(self) -> Iterator[tuple[Any, ...]]:
        """Table 3."""
        for rule, nodes in _RULES:
            predicted = sum(self.integral(rule, nodes).predicted().values())
            yield rule, nodes, predicted, abs(predicted - self.delta_f) / abs(self.delta_f)

    def by_sublayer(self) -> Iterator[tuple[Any, ...]]:
        """Table 4."""
        total = self.breakdown.pqi
        cells: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        for block in self._looked_at():
            for name in self.blocks[block]:
                _, kind = place(name) or (block, name)
                cells[kind][block].append(total[name] / self.layers[name].weight.numel())
        for kind, means in cells.items():
            yield kind, *(sum(found) / len(found) for found in means.values())

    def _looked_at(self) -> list[int]:
        """Blocks at the places of the paper's 1, 5, 8 and 11 of 16."""
        count = len(self.blocks)
        return sorted({min(count - 1, round(part * count / 16)) for part in (1, 5, 8, 11)})

    def by_share(self) -> Iterator[tuple[Any, ...]]:
        """Table 5."""
        yield from self.breakdown.coverage

    def ablation(self) -> Iterator[tuple[Any, ...]]:
        """Table 8."""
        test = replace(self.objective, tokens=self.test)

        def scores(weights: Mapping[str, Tensor] | None, label: str) -> tuple[float, float]:
            losses = (of.loss(weights, cache=self.cache, label=f"loss, {label}") for of in (self.objective, test))
            calibration, held_out = map(math.exp, losses)
            return calibration, held_out

        yield "original", *scores(None, "original")
        both = {"outliers": _OUTLIERS, "significant": _SIGNIFICANT}
        variants: dict[str, dict[str, Any]] = {
            "outliers and significant": both | {"rounds": 1},
            "outliers": {"outliers": _OUTLIERS},
            "outliers of SqueezeLLM's own rule": {"outliers": _OUTLIERS, "outlier_rule": "base"},
            "significant": {"significant": _SIGNIFICANT, "rounds": 1},
            "dense": {},
            "random": both | {"metric": "random"},
            "β = r_s / 4": both | {"rounds": 4},
            "β = r_s / 2": both | {"rounds": 2},
        }
        for what, choices in variants.items():
            made = convert(self.lm, replace(self.recipe, **choices), self.tokens, cache=self.cache)
            yield what, *scores({name: layer.weight() for name, layer in made.layers.items()}, what)


def result_tables(results: Sequence[Mapping[str, Any]], source: str) -> list[Table]:
    """Tables 6 (of QTIP) and 7 (of the others), 10 and 11, from what a sweep has written.

    Args:
        results: objects of the sweep's file, named as in ``offline/recipes``.
        source: of the model.
    """
    by_base = {6: [row for row in results if row["recipe"]["base"] == "qtip"]}
    by_base[7] = [row for row in results if row["recipe"]["base"] != "qtip"]
    made = [
        Table(
            number,
            "Bits, size and quality",
            ("run", "bits a weight", "GB", *(f"{text}: perplexity" for text in rows[0]["scores"])),
            [
                (
                    row["name"],
                    row["bits_per_weight"],
                    row["nbytes"] / 1e9,
                    *(score["perplexity"] for score in row["scores"].values()),
                )
                for row in rows
            ],
            published=published(number, source),
            beside=("bits", "GB", "WikiText-2: perplexity", "MATH, 4-shot"),
        )
        for number, rows in by_base.items()
        if rows
    ]
    settings = ("base", "num_samples", "seq_len", "quadrature", "nodes", "rounds", "outliers", "significant")
    made.append(
        Table(
            10,
            "Settings",
            ("run", "calibration text", *settings),
            [
                (row["name"], (row["calibration"] or {}).get("dataset"), *(row["recipe"][key] for key in settings))
                for row in results
            ],
        )
    )
    made.append(
        Table(
            11,
            "Time of the integrals, losses included",
            ("run", "sequences", "tokens", "hours"),
            [
                (row["name"], count, count * row["recipe"]["seq_len"], _hours(row["report"]["stages"]["seconds"]))
                for row in results
                for count in [row["recipe"]["path_samples"] or row["recipe"]["num_samples"]]
            ],
        )
    )
    return made


def speed_table(files: Sequence[Path], source: str) -> Table:
    """Table 9, from what ``requant bench --json`` has printed.

    Args:
        files: of that, asked alike; a checkpoint whose folder, and contenders whose names are as runs of
            ``offline/recipes`` are called stand beside the paper's. Of what is in several, the first counts.
        source: of the model.

    Raises:
        EvidenceError: one is something else, or its requests were others.
    """
    rows: dict[str, tuple[str, float, float]] = {}
    asked: set[tuple[int, int]] = set()
    for file in files:
        measured = read_object(file)
        try:
            prompt, new = measured["load"]["prompt_tokens"], measured["load"]["new_tokens"]
            for name, row in contenders(measured):
                rates = row["median"]
                rows.setdefault(name, (name, 1000 * prompt / rates["prefill"], 1000 * new / rates["decode"]))
        except (KeyError, TypeError) as error:
            raise EvidenceError(f"{file}: is not what requant bench --json prints ({error} is missing)") from None
        asked.add((prompt, new))
        if len(asked) > 1:
            raise EvidenceError(f"{file}: prompt and decoded tokens are {prompt, new}, those of {files[0]} others")
    title = f"Time of one request: {prompt} tokens of a prompt, {new} decoded"
    return Table(9, title, ("run", "prefill, ms", "decode, ms"), list(rows.values()), published=published(9, source))


def contenders(measured: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Those that ran in what ``requant bench --json`` has printed: names, the checkpoint's folder first, and entries.

    Raises:
        KeyError, TypeError: it is something else.
    """
    for number, row in enumerate(measured["results"]):
        if "median" in row:
            yield row["name"] if number else measured["checkpoint"], row


def _hours(seconds: Mapping[str, float]) -> float:
    return sum(seconds.get(stage, 0.0) for stage in ("outlier_ratio", "significant", "candidates")) / 3600


def _fixed(*columns: str) -> Callable[[Tables], Sequence[str]]:
    return lambda _: columns


Rows = Callable[[Tables], Iterator[tuple[Any, ...]]]
TABLES: dict[int, tuple[str, Callable[[Tables], Sequence[str]], int, Rows]] = {
    1: (
        "Estimates of ΔF at the original weights, and actual ΔF, one block quantized at a time",
        _fixed("block", "first order", "second order", "actual ΔF"),
        1,
        Tables.by_block,
    ),
    2: (
        "The same for a part of the way, w + λΔ",
        _fixed("λ", "first order", "second order", "actual ΔF"),
        1,
        Tables.by_step,
    ),
    3: (
        "ΔF predicted by the integral",
        _fixed("rule", "nodes", "predicted ΔF", "relative error"),
        2,
        Tables.by_rule,
    ),
    4: (
        "Mean PQI by sublayer",
        lambda tables: ["sublayer", *(f"block {block}" for block in tables._looked_at())],
        1,
        Tables.by_sublayer,
    ),
    5: ("Share of PQI that the most sensitive weights hold", _fixed("of weights", "of PQI"), 1, Tables.by_share),
    8: (
        "Perplexity with parts of the method",
        _fixed("sparse part", "calibration set", "test set"),
        1,
        Tables.ablation,
    ),
}
