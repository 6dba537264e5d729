"""One self-contained page of figures: no script, nothing loaded, light or dark as the reader's system is."""

import csv
import html
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from vllm_requant.format.durable import json_text, null_for_nan, write_bytes

from .drawing import VARIABLES, write_png, write_svg
from .figures import Figure

__all__ = ["Section", "table_text", "write_figures", "write_page"]

_MIB = 2**20
_SHOWN_ROWS = 400  # of a table on the page; its file has all
_STYLE = "page.css"


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        title: its heading.
        facts: lines of a small table.
        figures: in their order.
        name: of its folder of files; empty for the page's own.
        brief: what stands beside the heading of a part that is closed.
    """

    title: str
    facts: Mapping[str, str]
    figures: Sequence[Figure]
    name: str = ""
    brief: str = ""


def write_figures(folder: Path, figures: Iterable[Figure]) -> list[Path]:
    """Each figure as NAME.png, NAME.csv and NAME.json; the pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    for figure in figures:
        pictures.append(folder / f"{figure.name}.png")
        write_png(figure, pictures[-1])
        write_bytes(folder / f"{figure.name}.csv", table_text(figure).encode())
        content = {
            "title": figure.title,
            "caption": figure.caption,
            "rows": [dict(zip(figure.columns, row, strict=True)) for row in figure.rows],
        }
        write_bytes(folder / f"{figure.name}.json", json_text(null_for_nan(content)).encode())
    return pictures


def table_text(figure: Figure) -> str:
    """The numbers as CSV."""
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([figure.columns, *figure.rows])
    return file.getvalue()


def write_page(path: Path, title: str, sections: Sequence[Section]) -> None:
    """Write the page.

    Raises:
        OSError: it cannot be written.
    """
    style = resources.files(__package__).joinpath(_STYLE).read_text(encoding="utf-8")
    light = "".join(f"--{name}:{colour};" for colour, name in VARIABLES.items())
    body = "".join(_section(section, whole=number == 0) for number, section in enumerate(sections))
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>:root{{{light}}}\n{style}</style></head>\n"
        f"<body><main><h1>{html.escape(title)}</h1>\n{body}</main></body></html>\n"
    )
    write_bytes(path, page.encode())


def _section(section: Section, *, whole: bool) -> str:
    facts = "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in section.facts.items()
    )
    figures = "".join(_figure(section, figure) for figure in section.figures)
    content = f'<dl>{facts}</dl><div class="figures">{figures}</div>'
    if whole:  # what a reader comes for is open
        return f"<section><h2>{html.escape(section.title)}</h2>{content}</section>\n"
    heading = f"<h2>{html.escape(section.title)}</h2> <span>{html.escape(section.brief)}</span>"
    return f"<details class=section><summary>{heading}</summary>{content}</details>\n"


def _figure(section: Section, figure: Figure) -> str:
    title, caption = html.escape(figure.title), html.escape(figure.caption)
    # ids of a picture are made from its figure's name, which other sections have too
    svg = write_svg(figure, salt=section.name)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)
    head = "".join(f"<th>{html.escape(column)}</th>" for column in figure.columns)
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(_shown(value))}</td>" for value in row) + "</tr>"
        for row in figure.rows[:_SHOWN_ROWS]
    )
    file = html.escape(f"{section.name}/{figure.name}.csv".lstrip("/"))
    left = len(figure.rows) - _SHOWN_ROWS
    more = f"<p>{left} more rows are in {file}.</p>" if left > 0 else ""
    return (
        f"<figure><h3>{title}</h3>{svg}<figcaption>{caption}</figcaption>"
        f"<details><summary>numbers ({file})</summary><div class=table><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{rows}</tbody></table>{more}</div></details></figure>\n"
    )


def _shown(value: Any) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    return f"{value:.5g}" if isinstance(value, float) else str(value)
