"""Pictures of studies, with matplotlib (``pip install 'vllm-requant[report]'``)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..report.drawing import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["OURS", "plot_memory", "plot_nodes", "plot_sweep"]

_NARROWEST = 0.05  # share of a picture's width in which the name of a stage fits
OURS = "requant"  # NAME-requant is ReQuant with the base NAME


def plot_sweep(results: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Divergence from the original against size: each base, and an arrow to ReQuant in as many bits.

    Args:
        results: objects of the file that a sweep writes; NAME is a base, NAME-requant ReQuant with it.
        file: a picture of any type that matplotlib writes.
    """
    by_name = {row["name"]: row for row in results}
    pairs = {name: f"{name}-{OURS}" for name in by_name if f"{name}-{OURS}" in by_name}
    kinds = sorted({name.partition("-")[0] for name in pairs})
    texts = list(results[0]["scores"])
    figure, panels = _figure(len(texts))
    for text, panel in zip(texts, panels, strict=True):
        for base, ours in pairs.items():
            colour = COLOURS[kinds.index(base.partition("-")[0]) % len(COLOURS)]
            points = [
                (by_name[name]["bits_per_weight"], by_name[name]["scores"][text]["kl_divergence"])
                for name in (base, ours)
            ]
            arrow = {"arrowstyle": "->", "color": colour, "shrinkA": 4, "shrinkB": 4}
            panel.annotate("", xy=points[1], xytext=points[0], arrowprops=arrow)
            panel.plot(*points[0], "o", color=colour, fillstyle="none")
            panel.plot(*points[1], "o", color=colour)
        for number, kind in enumerate(kinds):
            panel.plot([], [], "o", color=COLOURS[number % len(COLOURS)], label=kind)
        panel.plot([], [], "o", color="0.4", fillstyle="none", label="base alone")
        panel.plot([], [], "o", color="0.4", label="base + ReQuant")
        panel.set(title=text, xlabel="stored bits a weight", ylabel="KL divergence from the original, nats a token")
        panel.set_yscale("log")
    panels[0].legend()
    _write(figure, file)


def plot_nodes(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Error of the predicted ΔF, and agreement about the most significant weights, against nodes of each rule.

    Args:
        rows: of the file that :mod:`.nodes` writes.
        file: a picture of any type that matplotlib writes.
    """
    figure, (error, agreement) = _figure(2)
    for rule, colour in zip(dict.fromkeys(row["rule"] for row in rows), COLOURS, strict=False):
        mine = [row for row in rows if row["rule"] == rule]
        nodes = [row["nodes"] for row in mine]
        error.plot(nodes, [100 * row["relative_error"] for row in mine], "o-", color=colour, label=rule)
        agreement.plot(nodes, [100 * row["agreement"] for row in mine], "o-", color=colour, label=rule)
    error.set(title="prediction of the loss", xlabel="nodes", ylabel="|predicted − actual| / actual ΔF, %")
    error.set_yscale("log")
    agreement.set(
        title=f"the {rows[0]['top_share']:.1%} of largest PQI", xlabel="nodes", ylabel="shared with the finest, %"
    )
    for panel in (error, agreement):
        panel.set_xscale("log", base=2)
        panel.set_xticks(sorted({row["nodes"] for row in rows}), [str(n) for n in sorted({r["nodes"] for r in rows})])
        panel.minorticks_off()
    error.legend()
    _write(figure, file)


def plot_memory(runs: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Memory over time: a panel a run, with what the process may have, the size of the model, and the stages.

    Args:
        runs: of the file that :mod:`.memory` writes.
        file: a picture of any type that matplotlib writes.
    """
    figure, panels = _figure(len(runs), columns=1, size=(9.6, 2.1))
    own, mapped, limit, model = "#8fc1e3", COLOURS[2], COLOURS[1], "0.2"
    top = 1.12 * max(run["model_bytes"] for run in runs) / 2**30
    for run, panel in zip(runs, panels, strict=True):
        seconds, anonymous, files, _ = zip(*run["samples"], strict=True)
        minutes = [at / 60 for at in seconds]
        panel.fill_between(minutes, [size / 2**30 for size in anonymous], color=own, lw=0, label="own memory")
        panel.plot(minutes, [size / 2**30 for size in files], color=mapped, lw=0.9, label="mapped files")
        panel.axhline(run["limit_bytes"] / 2**30, color=limit, lw=1.2, label="limit of all its memory")
        panel.axhline(run["model_bytes"] / 2**30, color=model, lw=1.2, ls="--", label="size of the model")
        for begin, end, stage in _stages(run["samples"]):
            panel.axvline(begin / 60, color="0.75", lw=0.6, zorder=0)
            if (end - begin) / run["seconds"] > _NARROWEST:
                where = ((begin + end) / 120, 0.55 * top)
                panel.annotate(stage.replace("_", " "), where, ha="center", va="center", fontsize=7, color="0.35")
        panel.set(ylabel="GiB", ylim=(0, top), xlim=(0, run["seconds"] / 60))
        panel.set_title(f"{run['name']}: {run['peak_bytes'] / 2**20:.0f} MiB at most", fontsize=10, loc="left")
    panels[-1].set_xlabel("minutes")
    panels[0].legend(ncols=4, fontsize=7, loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
    _write(figure, file)


def _stages(samples: Sequence[Sequence[Any]]) -> list[tuple[float, float, str]]:
    """When each stage began and ended, in seconds; what lies between stages is left out."""
    stages: list[tuple[float, float, str]] = []
    for at, _, _, stage in samples:
        if stages and stages[-1][2] == stage:
            stages[-1] = stages[-1][0], at, stage
        else:
            stages.append((at, at, stage))
    return [stage for stage in stages if stage[2]]


def _figure(
    panels: int, *, columns: int | None = None, size: tuple[float, float] = (4.8, 4.2)
) -> "tuple[Figure, list[Axes]]":
    """Panels of a size in inches, side by side or in so many columns."""
    from matplotlib.figure import Figure

    columns = columns or panels
    rows = -(-panels // columns)
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    made = [figure.add_subplot(rows, columns, number + 1) for number in range(panels)]
    for panel in made:
        panel.grid(color="0.9")
        panel.spines[["top", "right"]].set_visible(False)
    return figure, made


def _write(figure: "Figure", file: Path) -> None:
    figure.savefig(file, dpi=150)
