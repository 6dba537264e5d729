"""README's tables and pictures, made from the numbers that are committed beside the code that measured them.

    python -m vllm_requant.offline.studies.readme README.md        # make figures

A table stands between ``<!-- figures: NAME -->`` and ``<!-- end -->``; pictures are drawn beside their numbers.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..tables import contenders
from .memory import memory_table
from .plots import plot_memory, plot_nodes, plot_sweep
from .table import markdown, pair_table

__all__ = ["PICTURES", "TABLES", "ReadmeError", "with_tables"]

_STUDIES = Path(__file__).parent / "results"
_BENCHMARKS = Path(__file__).parents[2] / "kernels" / "bench" / "results"
_SERVERS = Path(__file__).parents[2] / "bench" / "results"
_TEXTS = {"wikitext2": "WikiText-2", "c4": "C4", "gsm8k": "GSM8K", "math": "MATH"}
_CALIBRATION = {
    "self": "the model's own text (the default, needs no network)",
    "c4": "C4",
    "wikitext2-train": "WikiText-2 train",
}
_BATCH, _PROMPT = 16, 2048  # activations
_BASES = {"awq": "AWQ", "gptq": "GPTQ", "qtip": "QTIP", "rtn": "RTN", "squeezellm": "SqueezeLLM"}
_PEERS = {"vLLM-bfloat16": "vLLM, bfloat16", "vLLM-int4": "vLLM, int4", "llama.cpp": "llama.cpp, Q4_0, head Q8_0"}
_SCATTER = 1.25  # largest round over smallest, from which both are shown
_BLOCK = re.compile(r"(<!-- figures: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)


class ReadmeError(Exception):
    """A table is asked for that nobody makes."""


def with_tables(text: str) -> str:
    """Markdown with its tables made anew.

    Raises:
        ReadmeError: one has a name that is not in ``TABLES``.
    """

    def made(block: re.Match[str]) -> str:
        if block[2] not in TABLES:
            raise ReadmeError(f"figures: {block[2]} is none of {', '.join(TABLES)}")
        return f"{block[1]}\n{TABLES[block[2]]()}\n{block[3]}"

    return _BLOCK.sub(made, text)


def _pairs(name: str) -> str:
    """Bases and ReQuant with them."""
    rows = _lines(name)
    return pair_table(
        [row | {"scores": {_TEXTS[text]: score for text, score in row["scores"].items()}} for row in rows]
    )


def _calibration() -> str:
    """Divergence by calibration text, and its mean; the best of each column in bold."""
    values = {}
    for name in _CALIBRATION:
        (row,) = _lines(f"calibration-{name}-smollm2-135m.jsonl")
        own = [row["scores"][text]["kl_divergence"] for text in _TEXTS]
        values[name] = [*own, sum(own) / len(own)]
    best = [min(column) for column in zip(*values.values(), strict=True)]
    rows = [
        [label, *(f"**{v:.3f}**" if v == b else f"{v:.3f}" for v, b in zip(values[name], best, strict=True))]
        for name, label in _CALIBRATION.items()
    ]
    return markdown(["calibrated on", *_TEXTS.values(), "mean"], rows)


def _memory() -> str:
    return memory_table(json.loads((_STUDIES / "memory.json").read_text()))


def _gpu() -> str:
    """Formats by layers: one activation, what residuals cost, and what more activations cost."""
    results = json.loads((_BENCHMARKS / "nvidia-h200.json").read_text())["results"]
    by_format: dict[str, dict[tuple[int, int], dict[int, Mapping[str, Any]]]] = {}
    for row in results:
        layers = by_format.setdefault(f"{row['kind']} {row['bits']} bit", {})
        layers.setdefault((row["out_features"], row["in_features"]), {})[row["batch"]] = row
    rows = []
    for form, layers in by_format.items():
        alone = [batches[1] for batches in layers.values()]
        cells = [
            f"{row['microseconds']:.1f} µs, {100 * row['share_of_copy_bandwidth']:.0f} %, "
            f"{row['speedup_over_cublas_bf16']:.1f}×"
            for row in alone
        ]
        costs = [
            _range([max(0.0, 100 * row["residual_cost"][density]) for row in alone]) for density in ("0.0005", "0.005")
        ]
        more = [batches[_BATCH]["microseconds"] / batches[1]["microseconds"] for batches in layers.values()]
        prompt = [100 * batches[_PROMPT]["speedup_over_cublas_bf16"] for batches in layers.values()]
        rows.append(
            [
                form,
                *cells,
                " / ".join(f"{cost} %" for cost in costs),
                _range(more, 1),
                f"{_range(prompt)} %",
            ]
        )
    shapes = [f"{rows} × {columns}" for rows, columns in next(iter(by_format.values()))]
    return markdown(["format", *shapes, "residual", str(_BATCH), f"{_PROMPT:,}"], rows)


def _speed(file: str) -> str:
    """Tokens a second of servers, what ``requant bench --json`` printed; the best of each column in bold."""
    run = json.loads((_SERVERS / file).read_text(encoding="utf-8"))
    rates = {_contender(name): row for name, row in contenders(run)}
    figures = list(run["results"][0]["median"])
    best = {figure: max(row["median"][figure] for row in rates.values()) for figure in figures}
    rows = []
    for label, row in sorted(rates.items(), key=lambda each: each[0] in _PEERS.values()):  # ours first
        cells = {figure: _rate(row["median"][figure], row["rounds"][figure]) for figure in figures}
        rows.append([label, *(f"**{t}**" if row["median"][f] == best[f] else t for f, t in cells.items())])
    load = run["load"]
    head = [f"{run['threads']} threads: one request", f"prefill, {load['prompt_tokens']} tokens"]
    return markdown(["", *head, f"{load['requests']} requests"], rows)


def _contender(name: str) -> str:
    """What a folder or peer is called in a table: BASE-BITS of ``offline/recipes``, with ReQuant or alone."""
    if name in _PEERS:
        return _PEERS[name]
    base, bits, *ours = name.split("-")
    return f"{_BASES[base]} {bits} bit" + (" + ReQuant" if ours else "")


def _rate(median: float, rounds: Sequence[float]) -> str:
    scattered = max(rounds) > _SCATTER * min(rounds)
    return f"{median:.0f}" + (f" ({min(rounds):.0f}–{max(rounds):.0f})" if scattered else "")


def _range(values: Sequence[float], digits: int = 0) -> str:
    return "–".join(f"{value:.{digits}f}" for value in (min(values), max(values)))


def _lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (_STUDIES / name).read_text(encoding="utf-8").splitlines()]


TABLES: dict[str, Callable[[], str]] = {
    "methods": lambda: _pairs("methods-smollm2-135m.jsonl"),
    "off-grid": lambda: _pairs("methods-off-grid-4-bit.jsonl"),
    "calibration": _calibration,
    "memory": _memory,
    "gpu": _gpu,
    "speed": lambda: _speed("amd-epyc-avx512-2-threads.json"),
}
PICTURES: dict[str, Callable[[Path], None]] = {
    "methods-smollm2-135m.png": lambda file: plot_sweep(_lines("methods-smollm2-135m.jsonl"), file),
    "nodes-smollm2-135m.png": lambda file: plot_nodes(json.loads(file.with_suffix(".json").read_text())["rows"], file),
    "memory.png": lambda file: plot_memory(json.loads(file.with_suffix(".json").read_text()), file),
}


def main(readme: Annotated[Path, typer.Argument(exists=True, help="Markdown with marked tables.")]) -> None:
    """Write the tables and draw the pictures."""
    readme.write_text(with_tables(readme.read_text(encoding="utf-8")), encoding="utf-8")
    for name, draw in PICTURES.items():
        draw(_STUDIES / name)
        typer.echo(f"wrote {_STUDIES / name}")


if __name__ == "__main__":
    typer.run(main)
