"""A sweep as a Markdown table: each base, ReQuant in the same number of bits, and the share of the gap that it closes.

    python -m vllm_requant.offline.studies.table methods.jsonl --pairs --plot methods.png --stages

Runs NAME and NAME-SUFFIX make a row each; a suffix other than "requant" is a control or an ablation.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .plots import OURS, plot_sweep

__all__ = ["gap_closed", "markdown", "pair_table", "stage_table", "table"]


def gap_closed(original: float, base: float, ours: float) -> float:
    """Share of ``base − original`` by which ``ours`` is below ``base``."""
    return (base - ours) / (base - original)


def table(results: list[dict[str, Any]]) -> str:
    """Markdown of a sweep's results.

    Args:
        results: objects of the file that a sweep writes; a base comes before what is compared with it.
    """
    by_name = {row["name"]: row for row in results}
    texts = list(results[0]["scores"])
    head = ["run", "bits"] + [f"{text} {what}" for text in texts for what in ("perplexity", "KL", "gap closed")]
    rows = []
    for name, row in sorted(by_name.items()):
        base = next((by_name[other] for other in by_name if name.startswith(f"{other}-")), None)
        cells = [name, f"{row['bits_per_weight']:.3f}"]
        for text in texts:
            score = row["scores"][text]
            cells += [f"{score['perplexity']:.2f}", f"{score['kl_divergence']:.4f}"]
            if base is None:
                cells.append("")
                continue
            other = base["scores"][text]
            share = gap_closed(score["reference_perplexity"], other["perplexity"], score["perplexity"])
            cells.append(f"{share:.0%} (KL {gap_closed(0.0, other['kl_divergence'], score['kl_divergence']):.0%})")
        rows.append(cells)
    original = ", ".join(f"{text} {results[0]['scores'][text]['reference_perplexity']:.2f}" for text in texts)
    return markdown(head, rows) + f"\nOriginal: {original}.\n"


def pair_table(results: list[dict[str, Any]]) -> str:
    """Markdown of each base beside ReQuant with it, widest first: perplexity and divergence, before and after.

    Args:
        results: as for :func:`table`; NAME is a base, NAME-requant ReQuant with it.
    """
    by_name = {row["name"]: row for row in results}
    pairs = [(row, by_name[f"{name}-{OURS}"]) for name, row in by_name.items() if f"{name}-{OURS}" in by_name]
    texts = list(results[0]["scores"])
    head = ["base", "bits"] + [f"{text}: {what}" for text in texts for what in ("perplexity", "gap closed", "KL")]
    rows = []
    for base, ours in sorted(pairs, key=lambda pair: -pair[0]["bits_per_weight"]):
        cells = [base["name"].partition("-")[0], f"{base['bits_per_weight']:.3f}"]
        for text in texts:
            before, after = base["scores"][text], ours["scores"][text]
            perplexities = before["perplexity"], after["perplexity"]
            cells += [
                " → ".join(f"{value:.4g}" if value >= 1000 else f"{value:.2f}" for value in perplexities),
                f"{gap_closed(before['reference_perplexity'], *perplexities):.0%}",
                f"{before['kl_divergence']:.3f} → {after['kl_divergence']:.3f}",
            ]
        rows.append(cells)
    return markdown(head, rows)


def stage_table(results: list[dict[str, Any]]) -> str:
    """Markdown of what the stages of every run took: seconds, and the peak memory of the process in GiB.

    What a run found in the cache of another took no time.

    Args:
        results: as for :func:`table`.
    """
    taken = {row["name"]: row["report"]["stages"] for row in results}
    stages = list(dict.fromkeys(stage for run in taken.values() for stage in run["seconds"]))
    rows = []
    for name, run in sorted(taken.items()):
        seconds, peaks = run["seconds"], run["peak_mib"]
        cells = [f"{seconds[at]:.0f} s, {peaks[at] / 1024:.1f} GiB" if at in seconds else "" for at in stages]
        rows.append([name, *cells])
    return markdown(["run", *stages], rows)


def markdown(head: list[str], rows: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [head, ["---"] * len(head), *rows])


def main(
    results: Annotated[Path, typer.Argument(help="File that requant sweep wrote.", exists=True)],
    plot: Annotated[Path | None, typer.Option(help="Also draw it: a .png or .svg file.")] = None,
    pairs: Annotated[bool, typer.Option("--pairs", help="Only bases and ReQuant with them, side by side.")] = False,
    stages: Annotated[bool, typer.Option("--stages", help="Also print time and peak memory a stage.")] = False,
) -> None:
    """Print the table."""
    rows = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    typer.echo(pair_table(rows) if pairs else table(rows))
    if stages:
        typer.echo(stage_table(rows))
    if plot is not None:
        plot_sweep(rows, plot)


if __name__ == "__main__":
    typer.run(main)
