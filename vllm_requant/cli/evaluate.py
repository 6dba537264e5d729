"""``requant eval``: how good a checkpoint is: on text, against the original, and in tasks."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .backends import Backend, task_model
from .options import Device, EvaluationTexts, evaluation_texts, find_device
from .output import command_errors, print_json, set_up_logging

if TYPE_CHECKING:
    import torch

    from ..offline.evaluate import EvaluationText

__all__ = ["command"]


def command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A ReQuant checkpoint.")],
    against: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The original: adds KL divergence and top-1 agreement on text."),
    ] = None,
    dataset: EvaluationTexts = None,
    seq_len: Annotated[int, typer.Option(help="Tokens in a window.")] = 2048,
    stride: Annotated[
        int | None,
        typer.Option(
            help="Tokens between windows. Side by side by default, as GPTQ's authors do; with less they overlap, and "
            "every token has at least seq-len - stride before it."
        ),
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Use at most that many tokens of each text.")] = None,
    tasks: Annotated[
        str, typer.Option(metavar="TASK,…", help="Tasks of lm-eval, such as gsm8k,minerva_math; text only if named.")
    ] = "",
    backend: Annotated[
        Backend, typer.Option(help="What computes tasks; endpoint: a running server (--url).")
    ] = "transformers",
    url: Annotated[str | None, typer.Option(metavar="http://HOST:PORT/v1", help="Of the running server.")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples in a task's prompt; each task has its own number.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use that many documents of each task.")] = None,
    include_path: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of further tasks, whose code is run.")
    ] = None,
    model_args: Annotated[
        str,
        typer.Option(metavar="NAME=VALUE,…", help="For lm-eval's model: batch_size=32, gpu_memory_utilization=0.8."),
    ] = "",
    record: Annotated[bool, typer.Option(help="Add the results to the checkpoint's report and model card.")] = True,
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Measure a checkpoint: perplexity in float32 with its exact weights; tasks as it is served."""
    set_up_logging()
    with command_errors():
        from ..format.reader import Checkpoint
        from ..offline.evaluate import BUILTIN_DATASET, EvaluationText
        from ..offline.models import resolve_source
        from ..offline.recipe import RecipeError
        from ..offline.save import record_evaluation
        from ..offline.tasks import Tasks

        if seq_len < 2:
            raise RecipeError(f"--seq-len {seq_len}: must be at least 2")
        if stride is not None and not 1 <= stride <= seq_len:
            raise RecipeError(f"--stride {stride}: must be between 1 and --seq-len {seq_len}")
        if max_tokens is not None and max_tokens < seq_len:
            raise RecipeError(f"--max-tokens {max_tokens}: less than one window of --seq-len {seq_len}")
        names = [name.strip() for name in tasks.split(",") if name.strip()]
        if against is not None and names and not dataset:
            raise RecipeError("--against: compares predictions of text; add --dataset")
        place = find_device(device)
        Checkpoint(folder)
        if record and not os.access(folder, os.W_OK):
            raise PermissionError(f"{folder} is not writable, so results cannot be added to it; pass --no-record")
        if against is not None:
            resolve_source(against)
        texts = [
            EvaluationText(text, name)
            for name, text in evaluation_texts(dataset or ([] if names else [BUILTIN_DATASET])).items()
        ]
        load = task_model(backend, folder, device=place, url=url, arguments=model_args) if names else None
        loaded = Tasks.load(names, include_path) if names else None

        def evaluations() -> Iterator[dict[str, Any]]:
            if texts:
                yield from _on_text(folder, against, texts, place, seq_len, stride, max_tokens)
            if load is not None and loaded is not None:
                for entry in loaded.run(load(), num_fewshot=num_fewshot, limit=limit):
                    yield entry | {"conditions": {"backend": backend} | entry["conditions"]}

        entries = []
        for entry in evaluations():
            if record:
                record_evaluation(folder, entry)
            if not as_json:
                _show(entry)
            entries.append(entry)
        if as_json:
            print_json({"folder": str(folder), "evaluations": entries})


def _on_text(
    folder: Path,
    against: str | None,
    texts: "list[EvaluationText]",
    device: "torch.device",
    seq_len: int,
    stride: int | None,
    max_tokens: int | None,
) -> Iterator[dict[str, Any]]:
    from .. import hf
    from ..offline.evaluate import compare, evaluation_windows, predictions
    from ..offline.models import load_causal_lm

    tokenizer = hf.load_tokenizer(folder)
    cut = [evaluation_windows(text, tokenizer, seq_len=seq_len, max_tokens=max_tokens, stride=stride) for text in texts]
    model = hf.load_dequantized(folder).to(device)
    original = None if against is None else load_causal_lm(against, device=device).model
    for text, (windows, conditions) in zip(texts, cut, strict=True):
        reference = None if original is None else predictions(original, windows)
        scores = compare(windows, predictions(model, windows), reference)
        if against is not None:
            # the last component only: a local path is nobody else's business
            conditions["against"] = Path(against).name if Path(against).exists() else against
        yield {"dataset": text.name, "scores": scores, "conditions": conditions | {"dtype": "float32"}}


def _show(entry: dict[str, Any]) -> None:
    from ..offline.card import evaluation_rows

    rows = list(evaluation_rows([entry]))
    typer.echo(f"{entry['dataset']} ({rows[0][-1]})" if rows else f"{entry['dataset']}: no score")
    for _, metric, value, _ in rows:
        typer.echo(f"  {metric:<30} {value}")
