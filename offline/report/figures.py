"""Figures: a table of numbers each, and how it is drawn. What is not known is left out, not guessed."""

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..card import conditions_text, metric_words, with_errors
from .drawing import COLOURS, INK, MUTED, panel
from .evidence import Conversion, Evidence, place

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

__all__ = ["Figure", "conversion_figures", "result_figures"]

_MIB = 2**20
_WIDTH = 4.4  # inches
_OFF_SCALE = 4.0  # perplexities so many times the original's are named in the caption: nobody would serve them
_CELLS = 40  # a side of a map of positions
_OURS, _CONTROLS = "requant", ("random", "magnitude")
_MARKERS = {"base alone": "o", "ReQuant": "D", "control": "x"}
# arXiv 2503.01901, table 5, Llama 3.2 1B: share of weights, share of PQI
_PAPER_COVERAGE = ((0.0015, 0.0453), (0.0071, 0.1129), (0.0525, 0.3406))


@dataclass(frozen=True)
class Figure:
    """One of them.

    Attributes:
        name: of its files.
        title, caption: for people.
        columns, rows: the numbers.
        draw: puts them on an empty canvas.
        size: of the canvas in inches; a telephone shows about five side by side.
    """

    name: str
    title: str
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    draw: Callable[["Canvas"], None]
    size: tuple[float, float] = (_WIDTH, 3.2)


# of a set of conversions of one model ------------------------------------------------------------------------------


def result_figures(evidence: Evidence) -> Iterator[Figure]:
    """What a sweep and a study of nodes show."""
    for text in evidence.results[0]["scores"] if evidence.results else ():
        yield _pareto(evidence.results, text, "kl_divergence", "KL divergence from the original, nats a token")
        yield _pareto(evidence.results, text, "perplexity", "perplexity")
    yield from _predictions(evidence.results)
    for number, figure in {1: _by_block, 2: _by_step, 3: _by_rule, 8: _ablation}.items():
        if number in evidence.tables:
            yield figure(evidence.tables[number])
    yield from _evaluations(evidence.conversions)


def _evaluations(conversions: Sequence[Conversion]) -> Iterator[Figure]:
    """What ``requant eval`` has recorded, a figure for each score of the same data under the same conditions."""
    found: dict[tuple[str, str, str], list[tuple[str, float, float | None]]] = defaultdict(list)
    for conversion in conversions:
        for entry in conversion.report.get("evaluations") or []:
            conditions = json.dumps(entry["conditions"], sort_keys=True)
            for metric, value, error in with_errors(entry["scores"]):
                found[entry["dataset"], metric, conditions].append((conversion.name, value, error))
    for number, ((dataset, metric, conditions), rows) in enumerate(found.items(), start=1):
        yield _evaluation(f"evaluation-{number}", dataset, metric, json.loads(conditions), rows)


def _evaluation(
    name: str,
    dataset: str,
    metric: str,
    conditions: Mapping[str, Any],
    rows: Sequence[tuple[str, float, float | None]],
) -> Figure:
    def draw(canvas: "Canvas") -> None:
        axes = panel(canvas, xlabel=metric_words(metric))
        axes.grid(False, axis="y")
        for at, (_, value, error) in enumerate(rows):
            axes.errorbar(value, at, xerr=error, fmt="o", color=COLOURS[0], markersize=6, capsize=3)
        axes.set_yticks(range(len(rows)), [row[0] for row in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)

    return Figure(
        name,
        f"{dataset}: {metric_words(metric)}",
        f"{conditions_text(conditions)}." + (" Bars are standard errors." if any(row[2] for row in rows) else ""),
        ["checkpoint", metric, "standard error"],
        rows,
        draw,
        (_WIDTH, 0.9 + 0.3 * len(rows)),
    )


def _kind(run: str) -> str | None:
    """What a run BASE-BITS…, is by the rest of its name; None for an ablation of something else."""
    rest = run.split("-")[2:]
    if not rest:
        return "base alone"
    if rest == [_OURS]:
        return "ReQuant"
    return "control" if any(part in _CONTROLS for part in rest) else None


def _base(run: str) -> str:
    return run.partition("-")[0]


def _base_colours(results: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """A base has one colour in all figures."""
    return dict(zip(sorted({_base(row["name"]) for row in results}), COLOURS, strict=False))


def _pareto(results: Sequence[Mapping[str, Any]], text: str, score: str, label: str) -> Figure:
    shown = sorted((row for row in results if _kind(row["name"])), key=lambda row: row["bits_per_weight"])
    rows = [
        (row["name"], _kind(row["name"]), row["bits_per_weight"], row["scores"][text][score], row["nnz"])
        for row in shown
    ]
    original = shown[0]["scores"][text]["reference_perplexity"] if score == "perplexity" else None
    limit = math.inf if original is None else _OFF_SCALE * original
    controls = any(kind == "control" for _, kind, *_ in rows)
    far = [f"{name} ({value:.4g})" for name, _, _, value, _ in rows if value > limit]

    def draw(canvas: "Canvas") -> None:
        axes = panel(canvas, xlabel="stored bits a weight, everything counted", ylabel=label, yscale="log")
        for base, colour in _base_colours(results).items():
            for kind, marker in _MARKERS.items():
                points = [
                    (bits, value)
                    for name, what, bits, value, _ in rows
                    if _base(name) == base and what == kind and value <= limit
                ]
                if points:
                    axes.plot(
                        *zip(*points, strict=True),
                        marker=marker,
                        linestyle="-" if kind == "ReQuant" else "none",
                        fillstyle="none" if kind == "base alone" else "full",
                        color=colour,
                        markersize=5,
                        linewidth=1,
                    )
            axes.plot([], [], "s", color=colour, label=base)
        for kind, marker in _MARKERS.items():
            if any(row[1] == kind for row in rows):
                fill = "none" if kind == "base alone" else "full"
                axes.plot([], [], marker, color=MUTED, fillstyle=fill, label=kind)
        if original is not None:
            axes.axhline(original, color=MUTED, linestyle=":", linewidth=1)
            axes.text(0.01, original, "original", color=MUTED, va="bottom", transform=axes.get_yaxis_transform())
            ticks = [round(original * factor) for factor in (1, 1.5, 2, 3, 4)]
            axes.set_yticks(ticks, [str(tick) for tick in ticks])
            axes.minorticks_off()
        axes.legend(ncols=2)

    return Figure(
        f"pareto-{score.partition('_')[0]}-{re.sub(r'[^a-z0-9]+', '-', text.lower()).strip('-')}",
        f"{text}: {label.partition(' from')[0]} and size",
        "Open circles are bases alone, diamonds ReQuant with the same base in as many bits"
        + (", crosses controls: other sparse weights in as many bits" if controls else "")
        + ". Lower is better."
        + (f" Off the scale: {', '.join(far)}." if far else ""),
        ["run", "kind", "bits a weight", score.replace("_", " "), "sparse weights"],
        rows,
        draw,
        (_WIDTH, 4.0),
    )


def _predictions(results: Sequence[Mapping[str, Any]]) -> Iterator[Figure]:
    """Every path integral of a sweep against the loss that was measured; nothing if there was none."""
    rows = [
        (row["name"], each["stage"], each["predicted"], each["actual"], each["predicted"] / each["actual"] - 1)
        for row in results
        for each in row.get("report", {}).get("integrals") or ()
        if each["actual"] is not None and min(each["predicted"], each["actual"]) > 0
    ]
    if not rows:
        return

    def draw(canvas: "Canvas") -> None:
        fit = panel(canvas, 1, 2, 1, xlabel="actual ΔF, nats", ylabel="predicted ΔF", xscale="log", yscale="log")
        error = panel(canvas, 1, 2, 2, xlabel="actual ΔF, nats", ylabel="predicted over actual − 1, %", xscale="log")
        for base, colour in _base_colours(results).items():
            own = [row for row in rows if _base(row[0]) == base]
            if not own:
                continue
            actual = [row[3] for row in own]
            fit.plot(actual, [row[2] for row in own], "D", color=colour, markersize=4, label=base)
            error.plot(actual, [100 * row[4] for row in own], "D", color=colour, markersize=4)
        ends = [min(row[3] for row in rows), max(row[3] for row in rows)]
        fit.plot(ends, ends, color=MUTED, linestyle=":", linewidth=1, zorder=0)
        error.axhline(0.0, color=MUTED, linestyle=":", linewidth=1)
        canvas.legend(loc="outside upper center", ncols=len(COLOURS))

    yield Figure(
        "delta-f-of-runs",
        "Predicted and actual ΔF of all runs",
        "What each path integral said that quantization would add to the calibration loss, and what it added. "
        f"The largest error is {max(abs(row[4]) for row in rows):.1%}.",
        ["run", "stage", "predicted", "actual", "relative error"],
        rows,
        draw,
        (_WIDTH, 2.6),
    )


def _by_block(table: Mapping[str, Any]) -> Figure:
    return _expansion(
        "delta-f-by-block",
        "ΔF by block, estimated at the original weights and measured",
        "ΔF when one block is quantized: the first- and second-order terms of the expansion at the original weights, "
        "their sum, and what is really measured; absolute values.",
        table,
        xlabel="block",
    )


def _by_step(table: Mapping[str, Any]) -> Figure:
    return _expansion(
        "delta-f-by-step",
        "How far the expansion reaches",
        "The same for a part λ of the way to the quantized weights: where the sum and the measured ΔF part, the "
        "expansion ends to be of use.",
        table,
        xlabel="λ",
        xscale="log",
    )


def _expansion(name: str, title: str, caption: str, table: Mapping[str, Any], **axis: Any) -> Figure:
    rows = [row for row in table["rows"] if row[0] != "all"]

    def draw(canvas: "Canvas") -> None:
        axes = panel(canvas, ylabel="|ΔF|, nats a token", yscale="log", **axis)
        x, first, second, actual = zip(*rows, strict=True)
        both = [one + two for one, two in zip(first, second, strict=True)]
        lines = {
            "first order": (first, "s:"),
            "second order": (second, "^:"),
            "sum": (both, "x"),
            "actual": (actual, "o-"),
        }
        for colour, (label, (values, style)) in zip(COLOURS, lines.items(), strict=False):
            axes.plot(x, [abs(value) for value in values], style, color=colour, label=label, markersize=4)
        axes.legend(ncols=2)

    return Figure(name, title, caption, table["columns"], table["rows"], draw)


def _by_rule(table: Mapping[str, Any]) -> Figure:
    rows = table["rows"]

    def draw(canvas: "Canvas") -> None:
        axes = panel(canvas, xlabel="gradient evaluations", ylabel="|predicted − actual| / actual ΔF, %")
        for colour, rule in zip(COLOURS, dict.fromkeys(row[0] for row in rows), strict=False):
            points = [(nodes, 100 * error) for of, nodes, _, error in rows if of == rule]
            axes.plot(*zip(*points, strict=True), "o-", color=colour, label=rule, markersize=4)
        axes.set_yscale("log")
        axes.set_xscale("log", base=2)
        ticks = sorted({row[1] for row in rows})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.legend()

    return Figure(
        "delta-f-by-rule",
        "Predicted ΔF by rule and nodes",
        "How far the path integral is from the loss that is measured, by rule of quadrature and number of nodes.",
        table["columns"],
        rows,
        draw,
    )


def _ablation(table: Mapping[str, Any]) -> Figure:
    rows = table["rows"]

    def draw(canvas: "Canvas") -> None:
        axes = panel(canvas, xlabel="perplexity")
        axes.grid(False, axis="y")
        for at, (label, marker) in enumerate((("calibration set", "o"), ("test set", "D")), start=1):
            axes.plot([row[at] for row in rows], range(len(rows)), marker, color=COLOURS[at - 1], label=label)
        axes.set_yticks(range(len(rows)), [row[0] for row in rows])
        axes.invert_yaxis()
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)

    return Figure(
        "ablation",
        "What each part of the method is worth",
        "Perplexity with outliers, significant weights, both, neither, chance in their place, and in several steps.",
        table["columns"],
        rows,
        draw,
        (_WIDTH, 0.9 + 0.26 * len(rows)),
    )


# of one conversion -------------------------------------------------------------------------------------------------


def conversion_figures(conversion: Conversion) -> Iterator[Figure]:
    """What one checkpoint shows, with what its conversion has left beside it."""
    integrals = conversion.report.get("integrals") or []
    if integrals:
        yield _delta_f(integrals)
        if "coverage" in integrals[0]:
            yield _coverage(integrals[0])
        yield from _by_layer(
            "sensitivity",
            "Mean PQI by layer",
            f"How much a weight of each layer costs on average when it is quantized ({integrals[0]['stage']}).",
            "mean PQI",
            _measured(conversion, "mean_pqi"),
            log=True,
        )
    yield from _by_layer(
        "residual-share",
        "Sparse weights by layer",
        "Share of each layer's weights that the residual holds, outliers and significant ones.",
        "share of weights, %",
        {name: 100 * spec.nnz / spec.numel for name, spec in conversion.checkpoint.config.layers.items()},
        log=True,
    )
    yield from _by_layer(
        "outlier-ratio",
        "Outlier ratio by layer",
        "Share of each layer's weights that algorithm 1 removes before the dense part is fitted.",
        "share of weights, %",
        {name: 100 * share for name, share in _measured(conversion, "outlier_share").items()},
    )
    bits = {name: spec.bits_per_weight for name, spec in conversion.checkpoint.config.layers.items()}
    if len({round(value, 1) for value in bits.values()}) > 1:
        yield from _by_layer(
            "bits", "Bits by layer", "Stored bits a weight of each layer, everything counted.", "bits a weight", bits
        )
    yield from _density(conversion)
    yield _sizes(conversion)
    if conversion.timings.get("seconds"):
        yield _stages(conversion.timings)


def _delta_f(integrals: Sequence[Mapping[str, Any]]) -> Figure:
    rows = [(row["stage"], row["predicted"], row["actual"], row["relative_error"]) for row in integrals]

    def draw(canvas: "Canvas") -> None:
        axes = panel(canvas, xlabel="ΔF, nats a token")
        axes.grid(False, axis="y")
        for number, (_, predicted, actual, _) in enumerate(rows):
            axes.plot(predicted, number - 0.12, "D", color=COLOURS[0], markersize=6)
            if actual is not None:
                axes.plot(actual, number + 0.12, "o", color=COLOURS[1], markersize=6)
        axes.plot([], [], "D", color=COLOURS[0], label="predicted by the integral")
        axes.plot([], [], "o", color=COLOURS[1], label="actual")
        axes.set_yticks(range(len(rows)), [_wrapped(row[0]) for row in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        values = [float(value) for row in rows for value in row[1:3] if value is not None]
        axes.set_xlim(1.06 * min(0.0, *values), 1.06 * max(0.0, *values) or 1.0)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)

    return Figure(
        "delta-f",
        "Predicted and actual ΔF",
        "Every path integral of the conversion predicts what quantization adds to the calibration loss; the loss is "
        "then measured.",
        ["stage", "predicted", "actual", "relative error"],
        rows,
        draw,
        (_WIDTH, 1.3 + 0.36 * len(rows)),
    )


def _coverage(integral: Mapping[str, Any]) -> Figure:
    rows = [tuple(point) for point in integral["coverage"]]

    def draw(canvas: "Canvas") -> None:
        axes = panel(canvas, xlabel="share of weights, largest PQI first, %", ylabel="share of all PQI, %")
        axes.plot(*([100 * value for value in part] for part in zip(*rows, strict=True)), "o-", color=COLOURS[0],
                  markersize=3.5, label="this model")  # fmt: skip
        axes.plot(*([100 * value for value in part] for part in zip(*_PAPER_COVERAGE, strict=True)), "D",
                  color=COLOURS[1], label="Llama 3.2 1B in arXiv 2503.01901")  # fmt: skip
        axes.set_xscale("log")
        axes.set_xticks((0.01, 0.1, 1, 10, 100), ("0.01", "0.1", "1", "10", "100"))
        axes.legend()

    return Figure(
        "coverage",
        "Few weights hold much of the sensitivity",
        f"Share of the sum of PQI over all weights that the most sensitive ones make up ({integral['stage']}).",
        ["share of weights", "share of PQI"],
        rows,
        draw,
    )


def _measured(conversion: Conversion, kind: str) -> dict[str, float]:
    return {name: values[kind] for name, values in conversion.measured.items() if kind in values}


def _by_layer(
    name: str, title: str, caption: str, label: str, values: Mapping[str, float], *, log: bool = False
) -> Iterator[Figure]:
    """A map block × sublayer of means; nothing for a model whose layers have no numbers."""
    cells: dict[tuple[int, str], list[float]] = defaultdict(list)
    for layer, value in values.items():
        if (where := place(layer)) is not None:
            cells[where].append(value)
    if not cells or not any(any(found) for found in cells.values()):
        return
    mean = {where: sum(found) / len(found) for where, found in cells.items()}
    blocks = sorted({block for block, _ in mean})
    kinds = list(dict.fromkeys(kind for _, kind in mean))

    def draw(canvas: "Canvas") -> None:
        from matplotlib.colors import LogNorm

        axes = panel(canvas)
        axes.grid(False)
        grid = [[mean.get((block, kind), float("nan")) for kind in kinds] for block in blocks]
        positive = [value for value in mean.values() if value > 0]
        norm = LogNorm(min(positive), max(positive)) if log and min(positive) < max(positive) else None
        image = axes.imshow(grid, aspect="auto", cmap="viridis", norm=norm, interpolation="nearest")
        axes.set_xticks(range(len(kinds)), [kind.removesuffix("_proj") for kind in kinds], rotation=30)
        step = -(-len(blocks) // 16)
        axes.set_yticks(range(0, len(blocks), step), [str(block) for block in blocks[::step]])
        axes.set_ylabel("block")
        axes.spines[["left", "bottom"]].set_visible(False)
        canvas.colorbar(image, ax=axes, label=label).outline.set_visible(False)

    rows = [
        (block, kind, mean[block, kind]) for block, kind in sorted(mean, key=lambda at: (at[0], kinds.index(at[1])))
    ]
    yield Figure(name, title, caption, ["block", "sublayer", label], rows, draw, (_WIDTH, 1.6 + 0.1 * len(blocks)))


def _density(conversion: Conversion) -> Iterator[Figure]:
    """Where in a matrix the residual lies, blocks added up: they read and write the same stream of activations."""
    found: dict[str, torch.Tensor] = {}
    for name, (height, width), rows, columns in conversion.positions():
        where = place(name)
        if where is None:
            continue
        cells = (rows * _CELLS // height) * _CELLS + columns * _CELLS // width
        counts = torch.bincount(cells, minlength=_CELLS * _CELLS).view(_CELLS, _CELLS)
        found[where[1]] = found.get(where[1], torch.zeros_like(counts)) + counts
    if not found:
        return
    table = [
        (kind, row, column, int(counts[row, column]))
        for kind, counts in found.items()
        for row, column in counts.nonzero().tolist()
    ]

    def draw(canvas: "Canvas") -> None:
        across = 4
        down = -(-len(found) // across)
        for number, (kind, counts) in enumerate(found.items(), start=1):
            axes = panel(canvas, down, across, number, title=kind.removesuffix("_proj"), xticks=(), yticks=())
            axes.grid(False)
            axes.spines[["left", "bottom"]].set_visible(False)
            # a few full rows or columns must not leave everything else dark
            axes.imshow((1.0 + counts).log().numpy(), aspect="auto", cmap="viridis", interpolation="nearest")

    yield Figure(
        "residual-density",
        "Where the residual lies",
        f"Sparse weights of all blocks added up, outputs down and inputs to the right, in {_CELLS} × {_CELLS} cells; "
        "brightness is the logarithm of their number. Lines are features of the residual stream.",
        ["sublayer", "cell of rows", "cell of columns", "sparse weights"],
        table,
        draw,
        (_WIDTH, 0.3 + 1.35 * -(-len(found) // 4)),
    )


def _sizes(conversion: Conversion) -> Figure:
    checkpoint = conversion.checkpoint
    parts: Counter[str] = Counter()
    for spec in checkpoint.config.layers.values():
        for suffix, (dtype, shape) in spec.tensors().items():
            parts[suffix] += dtype.itemsize * torch.Size(shape).numel()
    parts["not quantized"] = checkpoint.other_nbytes()
    original = 2 * checkpoint.config.numel + checkpoint.other_nbytes()
    names = {
        "qweight": "codes",
        "qzeros": "zero points",
        "lookup_table": "tables",
        "signs_in": "signs of inputs",
        "signs_out": "signs of outputs",
        "sparse_indptr": "sparse: row pointers",
        "sparse_indices": "sparse: columns",
        "sparse_values": "sparse: values",
    }
    rows = [(names.get(part, part), size, size / sum(parts.values())) for part, size in parts.most_common()]

    def draw(canvas: "Canvas") -> None:
        axes = panel(canvas, xlabel="MiB")
        axes.grid(False, axis="y")
        axes.barh([row[0] for row in rows], [row[1] / _MIB for row in rows], color=COLOURS[0], height=0.6)
        for number, (_, size, share) in enumerate(rows):
            axes.annotate(
                f"{size / _MIB:.3g} MiB, {share:.1%}", (size / _MIB, number), (4, 0), textcoords="offset points",
                va="center", color=INK, fontsize=8,
            )  # fmt: skip
        axes.invert_yaxis()
        axes.margins(x=0.4)

    return Figure(
        "sizes",
        "What the checkpoint's bytes are",
        f"{sum(parts.values()) / _MIB:.1f} MiB in all; {original / _MIB:.1f} MiB in 16 bits.",
        ["part", "bytes", "share"],
        rows,
        draw,
        (_WIDTH, 1.0 + 0.26 * len(rows)),
    )


def _stages(timings: Mapping[str, Mapping[str, float]]) -> Figure:
    seconds, memory = timings["seconds"], timings.get("peak_mib", {})
    rows = [(stage, seconds[stage], memory.get(stage)) for stage in seconds]

    def draw(canvas: "Canvas") -> None:
        names = [row[0].replace("_", " ") for row in rows]
        for number, (label, at) in enumerate((("seconds", 1), ("peak memory, MiB", 2)), start=1):
            axes = panel(canvas, 1, 2, number, xlabel=label)
            axes.grid(False, axis="y")
            axes.barh(names, [float(row[at] or 0) for row in rows], color=COLOURS[number - 1], height=0.6)
            axes.invert_yaxis()
            if number > 1:
                axes.set_yticklabels([])

    return Figure(
        "stages",
        "Time and memory of the conversion",
        "Each stage of the conversion; one inside another counts for both. Memory is the process's largest while the "
        "stage ran.",
        ["stage", "seconds", "peak MiB"],
        rows,
        draw,
        (_WIDTH, 0.9 + 0.2 * len(rows)),
    )


def _wrapped(label: str) -> str:
    return label.replace(", ", ",\n", 1)
