"""``requant sweep``: many conversions of one model, scored on held-out text."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import Changes, Device, EvaluationTexts, LowMemory, changed_choices, evaluation_texts, find_device
from .output import command_errors, print_json, set_up_logging

__all__ = ["command"]


def command(
    model: Annotated[str, typer.Argument(help="Local folder, Hub id, or GGUF file.")],
    runs: Annotated[Path, typer.Option(help="TOML or YAML; see vllm_requant/offline/sweep.py.", exists=True)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Results, a JSON object a line; finished runs stay.")],
    calibration_dataset: Annotated[str, typer.Option(help="Calibration text, as for convert.")] = "self",
    dataset: EvaluationTexts = None,
    seq_len: Annotated[int, typer.Option(help="Tokens in an evaluation window.")] = 512,
    max_tokens: Annotated[int | None, typer.Option(help="Use at most that many tokens of each text.")] = None,
    changed: Changes = None,
    only: Annotated[str, typer.Option(metavar="GLOB", help="Run only runs whose name fits.")] = "*",
    cache: Annotated[Path | None, typer.Option(help="Folder that keeps what runs have in common.")] = None,
    checkpoints: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also write the checkpoint of every run, to DIR/NAME.")
    ] = None,
    device: Device = "auto",
    low_memory: LowMemory = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Convert a model in many ways and compare the results."""
    set_up_logging()
    with command_errors():
        from ..offline.calibration import check_dataset
        from ..offline.evaluate import BUILTIN_DATASET
        from ..offline.models import resolve_source
        from ..offline.sweep import Sweep, read_runs

        evaluation = evaluation_texts(dataset or [BUILTIN_DATASET])
        check_dataset(calibration_dataset)
        resolve_source(model)
        sweep = Sweep(
            source=model,
            runs=read_runs(runs, changed_choices(changed)),
            calibration=calibration_dataset,
            evaluation=evaluation,
            output=output,
            seq_len=seq_len,
            max_tokens=max_tokens,
            cache=cache,
            checkpoints=checkpoints,
            device=find_device(device),
            low_memory=low_memory,
        )
        for row in sweep.run(only):
            if not as_json:
                _show(row)
        results = sweep.results()
        if as_json:
            print_json({"results": [results[name] for name in sweep.runs if name in results]})


def _show(row: dict[str, Any]) -> None:
    scores = "  ".join(
        f"{name} {score['perplexity']:.3f} (KL {score['kl_divergence']:.4f})" for name, score in row["scores"].items()
    )
    typer.echo(f"{row['name']:<32} {row['bits_per_weight']:.3f} bits  {scores}  {row['seconds']:.0f} s")
