"""A dashboard as a picture, without Grafana: its panels' queries, asked of a Prometheus and drawn with matplotlib.

    python deploy/grafana/preview.py deploy/grafana/dashboards/service.json -o service.png --minutes 15

Titles, units, legends and places are the dashboard's; the drawing is not Grafana's. It knows what the dashboards here
use: the panels ``stat``, ``timeseries``, ``state-timeline``, ``bargauge`` and ``table``, and variables at All.
"""

import argparse
import json
import math
import re
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 24  # of Grafana's grid
CELL = 0.62, 0.42  # inches
# told apart by colour-blind readers too
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#b3a800")
POINTS = 240  # of a line
TOO_MANY_BARS = 14
Labels = dict[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("dashboard", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True, help="a picture of any type that matplotlib writes")
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090", help="its address")
    parser.add_argument("--minutes", type=float, default=60.0, help="how far back")
    parser.add_argument("--until", type=float, default=None, help="seconds since 1970, if not now")
    parser.add_argument("--rate-interval", default="1m", help="what $__rate_interval becomes: four scrapes or more")
    arguments = parser.parse_args()
    end = arguments.until or time.time()
    source = Prometheus(arguments.prometheus, end - 60 * arguments.minutes, end, arguments.rate_interval)
    draw(json.loads(arguments.dashboard.read_text(encoding="utf-8")), source, arguments.output)


def queries(dashboard: dict[str, Any], rate_interval: str) -> Iterator[tuple[str, str]]:
    """Title of the panel and PromQL of every query, variables at All."""
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            yield panel["title"], with_all(dashboard, target["expr"], rate_interval)


def with_all(dashboard: dict[str, Any], expr: str, rate_interval: str) -> str:
    """``expr`` as Grafana sends it while every variable stands at All.

    Raises:
        ValueError: it has a variable that the dashboard does not declare.
    """
    values = {item["name"]: item.get("allValue", "") for item in dashboard["templating"]["list"]}
    values["__rate_interval"] = rate_interval

    def value(match: re.Match[str]) -> str:
        if match[1] not in values:
            raise ValueError(f"{expr}: ${match[1]} is not a variable of the dashboard")
        return str(values[match[1]])

    return re.sub(r"\$(\w+)", value, expr)


@dataclass(frozen=True)
class Prometheus:
    """Where to ask, and for which time.

    Attributes:
        address: URL of its root.
        begin: seconds since 1970, as ``end``.
        rate_interval: what ``$__rate_interval`` becomes.
    """

    address: str
    begin: float
    end: float
    rate_interval: str

    def last(self, query: str) -> list[tuple[Labels, float]]:
        """Labels and value of every series at the end."""
        answer = self._ask("query", {"query": query, "time": self.end})
        return [(series["metric"], float(series["value"][1])) for series in answer]

    def lines(self, query: str) -> list[tuple[Labels, list[float], list[float]]]:
        """Labels, times and values of every series, with NaN where there is none."""
        step = max(1.0, (self.end - self.begin) / POINTS)
        answer = self._ask("query_range", {"query": query, "start": self.begin, "end": self.end, "step": step})
        found = []
        for series in answer:
            times: list[float] = []
            values: list[float] = []
            for at, value in series["values"]:
                if times and at - times[-1] > 1.5 * step:
                    times.append(at - step)
                    values.append(math.nan)
                times.append(at)
                values.append(float(value))
            if times:
                found.append((series["metric"], times, values))
        return found

    def _ask(self, what: str, parameters: dict[str, Any]) -> list[dict[str, Any]]:
        url = f"{self.address.rstrip('/')}/api/v1/{what}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=30) as answer:
            result: list[dict[str, Any]] = json.load(answer)["data"]["result"]
        return result


def draw(dashboard: dict[str, Any], source: Prometheus, file: Path) -> None:
    """All panels where the dashboard has them."""
    from matplotlib.figure import Figure

    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in dashboard["panels"])
    header = 1.5
    figure = Figure(figsize=(COLUMNS * CELL[0], (rows + header) * CELL[1]))
    figure.text(0.008, 1 - 0.75 / (rows + header), dashboard["title"], size=15, weight="bold", va="center")
    span = f"{_clock(source.begin)} to {_clock(source.end)}"
    figure.text(0.992, 1 - 0.75 / (rows + header), span, size=11, color="0.4", va="center", ha="right")
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        frame = (
            place["x"] / COLUMNS,
            1 - (header + place["y"] + place["h"]) / (rows + header),
            place["w"] / COLUMNS,
            place["h"] / (rows + header),
        )
        found = [
            (target["legendFormat"], with_all(dashboard, target["expr"], source.rate_interval))
            for target in panel["targets"]
        ]
        KINDS[panel["type"]](_axes(figure, frame, place["h"], panel), panel, found, source)
    figure.savefig(file, dpi=75)


def _axes(figure: Any, frame: tuple[float, float, float, float], cells: int, panel: dict[str, Any]) -> "Axes":
    """Room for what a panel shows, below its title and inside a thin frame."""
    from matplotlib.patches import Rectangle

    left, bottom, width, height = frame
    border = Rectangle(
        (left + 0.003, bottom + 0.12 * height / cells),
        width - 0.006,
        height - 0.24 * height / cells,
        transform=figure.transFigure,
        facecolor="none",
        edgecolor="0.85",
    )
    figure.add_artist(border)
    figure.text(left + 0.008, bottom + height * (1 - 0.65 / cells), panel["title"], size=11, weight="bold", va="center")
    below = {"timeseries": 2.0, "state-timeline": 1.0, "bargauge": 0.4}.get(panel["type"], 0.3)
    margin = {"timeseries": 0.06, "state-timeline": 0.1, "bargauge": 0.16}.get(panel["type"], 0.008)
    beside = panel["type"] == "timeseries" and panel["options"]["legend"]["placement"] == "right"
    if beside:
        below -= 0.8
    room = (width - margin - (0.13 if beside else 0.015), height * (1 - (below + 1.3) / cells))
    axes: Axes = figure.add_axes((left + margin, bottom + height * below / cells, *room))
    return axes


def _stat(axes: "Axes", panel: dict[str, Any], found: list[tuple[str, str]], source: Prometheus) -> None:
    axes.axis("off")
    series = [(_legend(form, labels), value) for form, query in found for labels, value in source.last(query)]
    for number, (name, value) in enumerate(series):
        y = 1 - (number + 0.5) / len(series)
        size = 24 / len(series) ** 0.5
        if len(series) > 1:
            axes.text(0.02, y, _short(name, 26), size=9, color="0.35", va="center")
        axes.text(0.98 if len(series) > 1 else 0.5, y, _text(value, panel), size=size, color=COLOURS[0], va="center",
                  ha="right" if len(series) > 1 else "center")  # fmt: skip
    if not series:
        axes.text(0.5, 0.5, "no data", size=13, color="0.6", ha="center", va="center")


def _timeseries(axes: "Axes", panel: dict[str, Any], found: list[tuple[str, str]], source: Prometheus) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator, MultipleLocator

    lines = [
        (_legend(form, labels), times, values) for form, query in found for labels, times, values in source.lines(query)
    ]
    lines.sort(key=lambda line: line[0])
    defaults = panel["fieldConfig"]["defaults"]
    if defaults["custom"].get("stacking") and lines:
        _stack(axes, lines)
    else:
        for number, (name, times, values) in enumerate(lines):
            style = "-" if number < len(COLOURS) else "--"
            axes.plot(times, values, style, color=COLOURS[number % len(COLOURS)], linewidth=1.6, label=name)
    highest = axes.get_ylim()[1] if any(any(values) for _, _, values in lines) else 1.0
    axes.set_ylim(bottom=defaults.get("min"), top=defaults.get("max", highest))
    binary = defaults["unit"] in ("bytes", "Bps")
    axes.yaxis.set_major_locator(MultipleLocator(2 ** math.ceil(math.log2(highest / 8))) if binary else MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _text(value, panel)))
    _time_axis(axes, source)
    if lines:
        beside = panel["options"]["legend"]["placement"] == "right"
        place = {"bbox_to_anchor": (1.01, 1.04)} if beside else {"bbox_to_anchor": (-0.02, -0.12), "ncols": 6}
        axes.legend(loc="upper left", frameon=False, fontsize=9, handlelength=1.2, columnspacing=1.4,
                    labelspacing=0.3, **place)  # fmt: skip
    else:
        axes.text(0.5, 0.5, "no data", size=13, color="0.6", ha="center", va="center", transform=axes.transAxes)


def _state_timeline(axes: "Axes", panel: dict[str, Any], found: list[tuple[str, str]], source: Prometheus) -> None:
    """A row for every series, with a bar while it is not zero."""
    lines = [(_legend(form, labels), times, values) for form, query in found
             for labels, times, values in source.lines(query)]  # fmt: skip
    lines.sort(key=lambda line: next((at for at, value in zip(*line[1:], strict=True) if value), math.inf))
    for row, (_, times, values) in enumerate(lines):
        bars = [(at, later - at) for at, later, value in zip(times, times[1:], values, strict=False) if value > 0]
        axes.broken_barh(bars, (row - 0.4, 0.8), facecolors=COLOURS[0], alpha=0.8)
    axes.set_yticks(range(len(lines)), [name for name, _, _ in lines])
    axes.set_ylim(len(lines) - 0.4, -0.6)
    _time_axis(axes, source)


def _time_axis(axes: "Axes", source: Prometheus) -> None:
    from matplotlib.ticker import FuncFormatter, MultipleLocator

    axes.set_xlim(source.begin, source.end)
    axes.xaxis.set_major_locator(MultipleLocator(_tick(source.end - source.begin)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda at, _: _clock(at)))
    axes.tick_params(labelsize=9, color="0.6")
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _stack(axes: "Axes", lines: list[tuple[str, list[float], list[float]]]) -> None:
    """One on the other; a series that is not there counts as nothing."""
    series = [{at: value for at, value in zip(ats, values, strict=True) if value == value} for _, ats, values in lines]
    times = sorted(set().union(*series))
    heights = [[known.get(at, 0.0) for at in times] for known in series]
    areas = axes.stackplot(times, heights, labels=[name for name, _, _ in lines])
    for number, area in enumerate(areas):
        area.set_facecolor(COLOURS[number % len(COLOURS)])
        area.set_alpha(0.8 if number < len(COLOURS) else 0.4)


def _bargauge(axes: "Axes", panel: dict[str, Any], found: list[tuple[str, str]], source: Prometheus) -> None:
    series = [(_legend(form, labels), value) for form, query in found for labels, value in source.last(query)]
    series = sorted(series, key=lambda item: -abs(item[1]))[:TOO_MANY_BARS]
    axes.set_xticks([])
    axes.spines[:].set_visible(False)
    axes.barh(range(len(series)), [value for _, value in series], 0.7, color=COLOURS[0], alpha=0.8)
    axes.set_yticks(range(len(series)), [_short(name, 34) for name, _ in series], fontsize=9)
    axes.tick_params(length=0)
    axes.set_ylim(max(len(series), 3) - 0.4, -0.6)
    largest = max((abs(value) for _, value in series), default=1.0) or 1.0
    negative = any(value < 0 for _, value in series)
    axes.set_xlim(-1.25 * largest if negative else 0, 1.25 * largest)
    for number, (_, value) in enumerate(series):
        text = f" {_text(value, panel)} "
        axes.text(value, number, text, size=9, va="center", ha="left" if value >= 0 else "right")
    if not series:
        axes.text(0.5, 0.5, "no data", size=13, color="0.6", ha="center", va="center", transform=axes.transAxes)


def _table(axes: "Axes", panel: dict[str, Any], found: list[tuple[str, str]], source: Prometheus) -> None:
    axes.axis("off")
    (organize,) = panel["transformations"]
    hidden = organize["options"]["excludeByName"]
    rows = [labels for _, query in found for labels, _ in source.last(query)]
    columns = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in hidden]
    if not columns:
        axes.text(0.5, 0.5, "no data", size=13, color="0.6", ha="center", va="center")
        return
    cells = {name: [name, *(_short(row.get(name, ""), 36) for row in rows)] for name in columns}
    widths = [max(map(len, column)) + 2 for column in cells.values()]
    lefts = [sum(widths[:number]) / sum(widths) for number in range(len(columns))]
    places = max(len(rows) + 1, 4)
    for left, column in zip(lefts, cells.values(), strict=True):
        for number, text in enumerate(column):
            look: dict[str, Any] = {"weight": "bold", "color": "0.35"} if number == 0 else {}
            axes.text(left, 1 - (number + 0.5) / places, text, size=9, va="center", **look)


KINDS = {
    "stat": _stat,
    "timeseries": _timeseries,
    "state-timeline": _state_timeline,
    "bargauge": _bargauge,
    "table": _table,
}


def _legend(form: str, labels: Labels) -> str:
    return re.sub(r"{{\s*(\w+)\s*}}", lambda match: labels.get(match[1], ""), form)


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _tick(seconds: float) -> int:
    """A round distance of some seven ticks."""
    rounds = (5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 21600, 86400)
    return next((step for step in rounds if seconds / step <= 8), rounds[-1])


def _clock(at: float) -> str:
    return datetime.fromtimestamp(at).strftime("%H:%M:%S" if at % 60 else "%H:%M")


def _text(value: float, panel: dict[str, Any]) -> str:
    """A value in the panel's unit, as the panel maps and rounds it."""
    defaults = panel["fieldConfig"]["defaults"]
    for mapping in defaults.get("mappings", []):
        if (mapped := mapping["options"].get(f"{value:g}")) is not None:
            return str(mapped["text"])
    if math.isnan(value):
        return "NaN"
    unit, decimals = defaults["unit"], defaults.get("decimals")
    if unit == "percentunit":
        value, suffix = 100 * value, " %"
    elif unit in ("bytes", "Bps"):
        value, suffix = _scaled(value, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))
        suffix += "/s" if unit == "Bps" else ""
    elif unit == "s":
        value, suffix = _seconds(value)
    elif unit == "short":
        value, suffix = _scaled(value, 1000, ("", "K", "Mil", "Bil"))
    elif unit == "reqps":
        suffix = " req/s"
    elif unit == "none":
        suffix = ""
    else:
        suffix = " " + unit.removeprefix("suffix:").strip()
    if decimals is None and abs(value) >= 1000:
        decimals = 0
    return (f"{value:.3g}" if decimals is None else f"{value:,.{decimals}f}") + suffix


def _scaled(value: float, base: int, names: tuple[str, ...]) -> tuple[float, str]:
    size = 0
    while abs(value) >= base and size < len(names) - 1:
        value, size = value / base, size + 1
    return value, f" {names[size]}".rstrip()


def _seconds(value: float) -> tuple[float, str]:
    if value and abs(value) < 1:
        return 1000 * value, " ms"
    return (value / 60, " min") if abs(value) >= 120 else (value, " s")


if __name__ == "__main__":
    main()
