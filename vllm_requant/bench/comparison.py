"""Contenders side by side on one machine: all loaded, asked in turn, medians."""

import logging
import time
from collections.abc import Sequence
from typing import Any

from .contenders import Contender, running
from .measure import FIGURES, Load, Rates, measure_round

__all__ = ["compare", "table"]

log = logging.getLogger(__name__)

REST_SECONDS = 2.0
"""Before a contender's turn: vLLM's processes keep a core busy for a second after their last message."""


def compare(contenders: Sequence[Contender], load: Load, rounds: int) -> list[dict[str, Any]]:
    """Time all contenders in every round, one after the other, so that a slow minute of the machine strikes all alike.

    Args:
        contenders: the first one must run; of the others those that cannot are reported and left out.
        load: what they are asked.
        rounds: timed, after one that is not.

    Returns:
        For each contender ``name`` and either ``error`` or ``description``, ``rounds`` (the rates of each) and
        ``median``, both by the names of :data:`FIGURES`.

    Raises:
        ServerError: the first contender does not run, or one that ran went away.
    """

    def try_out(contender: Contender) -> None:
        measure_round(contender, load, rounds, Rates())

    with running(contenders, try_out) as (ready, left_out):
        timed = [(contender, Rates()) for contender in ready]
        for number in range(rounds):
            for contender, rates in timed:
                time.sleep(REST_SECONDS)
                measure_round(contender, load, number, rates)
            log.info("round %d of %d done", number + 1, rounds)
    measured = [
        {
            "name": contender.name,
            "description": contender.description,
            "rounds": rates.rounds,
            "median": {figure: rates.median(figure) for figure in FIGURES},
        }
        for contender, rates in timed
    ]
    return measured + [{"name": name, "error": error} for name, error in left_out.items()]


def table(results: Sequence[dict[str, Any]]) -> str:
    """A line a contender: medians, and how many times as fast the first one is."""
    ours = results[0]["median"]
    width = max(len(row["name"]) for row in results)
    lines = [" " * width + "".join(f"{title:>32}" for title in FIGURES.values())]
    for row in results:
        if "error" in row:
            lines.append(f"{row['name']:<{width}}  left out: {row['error'].splitlines()[0]}")
            continue
        cells = [
            f"{row['median'][figure]:.1f} " + f"({ours[figure] / row['median'][figure]:.2f} ×)".rjust(10)
            for figure in FIGURES
        ]
        lines.append(f"{row['name']:<{width}}" + "".join(f"{cell:>32}" for cell in cells))
    return "\n".join([*lines, f"(…): how many times as fast {results[0]['name']} is; medians"])
