"""``requant eval``: perplexity of a checkpoint, and how far it is from the original."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import Device, find_device
from .output import command_errors, print_json, set_up_logging

__all__ = ["command"]


def command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A ReQuant checkpoint.")],
    against: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The original: adds KL divergence and top-1 agreement."),
    ] = None,
    dataset: Annotated[
        str, typer.Option(help="Text or JSONL file, Hub data set, or python-docs (built in, no network).")
    ] = "python-docs",
    seq_len: Annotated[int, typer.Option(help="Tokens in a window.")] = 2048,
    max_tokens: Annotated[int | None, typer.Option(help="Use at most that many tokens.")] = None,
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Measure a checkpoint in float32 with its exact weights."""
    set_up_logging()
    with command_errors():
        from .. import hf
        from ..format.reader import Checkpoint
        from ..offline.calibration import check_dataset
        from ..offline.evaluate import BUILTIN_DATASET, EvaluationText, compare, evaluation_windows, predictions
        from ..offline.models import load_causal_lm, resolve_source
        from ..offline.recipe import RecipeError

        if seq_len < 2:
            raise RecipeError(f"--seq-len {seq_len}: must be at least 2")
        if max_tokens is not None and max_tokens < seq_len:
            raise RecipeError(f"--max-tokens {max_tokens}: less than one window of --seq-len {seq_len}")
        place = find_device(device)
        Checkpoint(folder)
        if against is not None:
            resolve_source(against)
        if dataset != BUILTIN_DATASET:
            check_dataset(dataset)
        windows, conditions = evaluation_windows(
            EvaluationText(dataset), hf.load_tokenizer(folder), seq_len=seq_len, max_tokens=max_tokens
        )
        model = hf.load_dequantized(folder).to(place)
        reference = predictions(load_causal_lm(against, device=place).model, windows) if against is not None else None
        scores = compare(windows, predictions(model, windows), reference)
        result: dict[str, Any] = {
            "folder": str(folder),
            "against": against,
            **scores,
            "conditions": conditions,
        }
        if as_json:
            print_json(result)
        else:
            _show(result)


def _show(result: dict[str, Any]) -> None:
    conditions = result["conditions"]
    typer.echo(
        f"{conditions['dataset']}: {conditions['windows']} windows of {conditions['seq_len']} tokens, "
        f"{conditions['scored_tokens']} scored, BOS {conditions['bos']}"
    )
    typer.echo(f"perplexity {result['perplexity']:.3f}")
    if "kl_divergence" in result:
        typer.echo(f"perplexity of the original {result['reference_perplexity']:.3f}")
        typer.echo(f"KL divergence {result['kl_divergence']:.5f} nats a token")
        typer.echo(f"top-1 agreement {100 * result['top1_agreement']:.2f} %")
