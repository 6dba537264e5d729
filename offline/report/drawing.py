"""Pictures of figures: a PNG of each, and an SVG whose colours are those of the page around it."""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

    from .figures import Figure

__all__ = ["COLOURS", "INK", "MUTED", "VARIABLES", "panel", "write_png", "write_svg"]

INK, MUTED, _GRID, _PAPER = "#1f2328", "#6e7781", "#d8dee4", "#fdfefe"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b5478e", "#b07d00", "#3a8fc4", "#7a5195")
"""told apart by colour-blind readers too"""
VARIABLES = {INK: "ink", MUTED: "muted", _GRID: "grid", _PAPER: "paper"} | {
    colour: f"colour-{number}" for number, colour in enumerate(COLOURS)
}
"""names of a page's variables by the colour that a picture has for each"""
_STYLE: dict[str, Any] = {
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.facecolor": "none",
    "figure.facecolor": _PAPER,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": _GRID,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.fonttype": "none",  # text stays text: found by a search, drawn in the page's font
}
_DPI = 160


def panel(canvas: "Canvas", rows: int = 1, columns: int = 1, number: int = 1, **settings: Any) -> "Axes":
    """One of a canvas's panels, with a grid under it and no frame at the top and right."""
    made = canvas.add_subplot(rows, columns, number)
    made.grid(True, linewidth=0.6)
    made.set_axisbelow(True)
    made.spines[["top", "right"]].set_visible(False)
    made.set(**settings)
    return made


def write_png(figure: "Figure", path: Path) -> None:
    """A picture for everything that is no page."""
    with _drawn(figure) as canvas:
        canvas.savefig(path, dpi=_DPI)


def write_svg(figure: "Figure", *, salt: str = "") -> str:
    """An ``<svg>`` element that follows the page's width and its :data:`VARIABLES`.

    Args:
        salt: sets its names apart from those of other pictures on the page.
    """
    with _drawn(figure, salt) as canvas:
        file = io.StringIO()
        canvas.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    meant = set(re.findall(r"#([\w-]+)", svg))
    # the others are the same in every picture
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in meant else "", svg)
    svg = re.sub(r'^<svg ([^>]*?)width="[^"]*" height="[^"]*"', r"<svg \1", svg)
    svg = re.sub(r"font: ([^;\"]*?) '[^;\"]*", r"font: \1 var(--font)", svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return svg


@contextmanager
def _drawn(figure: "Figure", salt: str = "") -> Iterator["Canvas"]:
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    # names inside a picture are made from its content and this: the same in every run, others in every picture
    style: Any = _STYLE | {"svg.hashsalt": f"{salt}/{figure.name}"}
    with matplotlib.rc_context(style):
        canvas = Canvas(figsize=figure.size, layout="constrained")
        figure.draw(canvas)
        yield canvas
