"""Pictures of what ``requant load`` and ``requant soak`` found, with matplotlib."""

import importlib.util
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .soak import Record, memory_growth
from .traffic import KINDS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_load", "plot_soak", "require_matplotlib"]

# told apart by colour-blind readers too
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#f0e442")
_MIB = 2**20


def require_matplotlib() -> None:
    """Say how to install matplotlib where it is missing, before hours of work.

    Raises:
        OSError: it is.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise OSError("matplotlib, which --output draws with, is missing; install vllm-requant with the extra 'report'")


def plot_load(results: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Throughput, time to first token and inter-token latency against the number of clients.

    Args:
        results: of :func:`.load.compare_load`; those with an error are left out.
        file: a picture of any type that matplotlib writes.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

    measured = [row for row in results if "error" not in row]
    figure = Figure(figsize=(14.4, 4.6), layout="constrained")
    throughput, ttft, itl = (_tidied(figure.add_subplot(1, 3, number + 1)) for number in range(3))
    clients = [level["concurrency"] for level in measured[0]["levels"]]
    for number, row in enumerate(measured):
        medians = [level["median"] for level in row["levels"]]
        colour = _COLOURS[number % len(_COLOURS)]

        def draw(panel: "Axes", name: str, style: str, medians: Any = medians, colour: str = colour) -> None:
            panel.plot(clients, [median[name] for median in medians], style, color=colour, markersize=5)

        draw(throughput, "output_throughput", "o-")
        for panel, name in ((ttft, "ttft"), (itl, "itl")):
            draw(panel, f"p50_{name}_ms", "o-")
            draw(panel, f"p99_{name}_ms", "^:")
        throughput.plot([], [], "o-", color=colour, label=row["name"])
    throughput.set(title="output", ylabel="generated tokens a second")
    ttft.set(title="time to first token", ylabel="ms", yscale="log")
    ttft.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ttft.yaxis.set_major_formatter(ScalarFormatter())
    ttft.yaxis.set_minor_locator(NullLocator())
    itl.set(title="time between tokens", ylabel="ms")
    for panel in (throughput, ttft, itl):
        panel.set_xscale("log", base=2)
        panel.set_xlabel("clients at the same time")
        panel.set_xticks(clients, [str(count) for count in clients])
        panel.xaxis.set_minor_locator(NullLocator())
    for panel in (ttft, itl):
        panel.plot([], [], "o-", color="0.4", label="median of requests")
        panel.plot([], [], "^:", color="0.4", label="99th percentile")
        panel.legend()
    for panel in (throughput, itl):
        panel.set_ylim(bottom=0)
    throughput.legend()
    figure.savefig(file, dpi=150)


def plot_soak(records: Mapping[str, Record], file: Path) -> None:
    """Memory over time, also beside what counts as growth, and requests of every kind by outcome, a bar a server.

    Args:
        records: of :func:`.soak.drive`.
        file: a picture of any type that matplotlib writes.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(14.4, 8.4), layout="constrained")
    panels = figure.subplot_mosaic([["memory", "requests"], ["change", "requests"]])
    memory, change, requests = (_tidied(panels[name]) for name in ("memory", "change", "requests"))
    for number, (name, record) in enumerate(records.items()):
        minutes = [at / 60 for at, _ in record.memory]
        memory.plot(minutes, [size / _MIB for _, size in record.memory], color=_COLOURS[number], label=name)
        if growth := memory_growth(record.memory):
            moved = [(size - growth.middle) / _MIB for _, size in record.memory]
            change.plot(minutes, moved, color=_COLOURS[number])
            change.axhline(growth.allowed / _MIB, color=_COLOURS[number], linestyle=":")
    change.plot([], [], ":", color="0.4", label="allowed at the end")
    memory.set(title="anonymous memory of all processes", ylabel="MiB")
    memory.set_ylim(bottom=0)
    change.set(title="beside the middle of the run", xlabel="minutes", ylabel="MiB")
    memory.legend(loc="lower right")
    change.legend(loc="lower right")
    outcomes = sorted({o for record in records.values() for counts in record.outcomes.values() for o in counts})
    colours = {outcome: _COLOURS[number % len(_COLOURS)] for number, outcome in enumerate(outcomes)}
    thickness = 0.8 / len(records)
    for number, record in enumerate(records.values()):
        rows = [row + thickness * (number - (len(records) - 1) / 2) for row in range(len(KINDS))]
        lefts = [0] * len(KINDS)
        for outcome in outcomes:
            counts = [record.outcomes.get(kind, Counter())[outcome] for kind in KINDS]
            requests.barh(rows, counts, 0.9 * thickness, lefts, color=colours[outcome])
            lefts = [left + count for left, count in zip(lefts, counts, strict=True)]
    for outcome, colour in colours.items():
        requests.bar([0], [0], color=colour, label=outcome)
    requests.set(title=f"requests by outcome; upper bar {next(iter(records))}", xlabel="requests")
    requests.set_yticks(range(len(KINDS)), KINDS)
    requests.set_ylim(len(KINDS) - 0.5, -0.5)
    requests.grid(visible=False, axis="y")
    requests.xaxis.set_major_locator(MaxNLocator(integer=True))
    requests.legend(loc="lower right")
    figure.savefig(file, dpi=150)


def _tidied(panel: "Axes") -> "Axes":
    panel.grid(color="0.9")
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    return panel
