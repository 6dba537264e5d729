"""Pictures of studies, with matplotlib (``pip install 'vllm-requant[report]'``)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["OURS", "plot_nodes", "plot_sweep"]

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")  # told apart by colour-blind readers too
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
            colour = _COLOURS[kinds.index(base.partition("-")[0]) % len(_COLOURS)]
            points = [
                (by_name[name]["bits_per_weight"], by_name[name]["scores"][text]["kl_divergence"])
                for name in (base, ours)
            ]
            arrow = {"arrowstyle": "->", "color": colour, "shrinkA": 4, "shrinkB": 4}
            panel.annotate("", xy=points[1], xytext=points[0], arrowprops=arrow)
            panel.plot(*points[0], "o", color=colour, fillstyle="none")
            panel.plot(*points[1], "o", color=colour)
        for number, kind in enumerate(kinds):
            panel.plot([], [], "o", color=_COLOURS[number % len(_COLOURS)], label=kind)
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
    for rule, colour in zip(dict.fromkeys(row["rule"] for row in rows), _COLOURS, strict=False):
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


def _figure(panels: int) -> "tuple[Figure, list[Axes]]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8 * panels, 4.2), layout="constrained")
    made = [figure.add_subplot(1, panels, number + 1) for number in range(panels)]
    for panel in made:
        panel.grid(color="0.9")
        panel.spines[["top", "right"]].set_visible(False)
    return figure, made


def _write(figure: "Figure", file: Path) -> None:
    figure.savefig(file, dpi=150)
