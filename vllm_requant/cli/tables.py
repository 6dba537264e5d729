"""``requant tables``: the paper's tables for any model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import Device, find_device
from .output import command_errors, print_json, set_up_logging

if TYPE_CHECKING:
    from ..offline.tables import Table

__all__ = ["command"]


def command(
    model: Annotated[str, typer.Argument(help="Local folder, Hub id, or GGUF file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for tables.md and tables.json.")],
    only: Annotated[str, typer.Option(metavar="NUMBERS", help="Which of them; '' for none.")] = "1,2,3,4,5,8",
    bits: Annotated[int, typer.Option(help="Width of SqueezeLLM's codes.")] = 4,
    calibration_dataset: Annotated[str, typer.Option(help="Calibration text, as for convert.")] = "self",
    num_samples: Annotated[int, typer.Option(help="Calibration sequences; the paper has 100.")] = 8,
    seq_len: Annotated[int, typer.Option(help="Tokens in a sequence; the paper has 2048.")] = 256,
    dataset: Annotated[str, typer.Option(help="Test text of table 8.")] = "python-docs",
    max_tokens: Annotated[int, typer.Option(help="Tokens of it.")] = 8192,
    compute: Annotated[str, typer.Option(help="Precision of the gradients: float32; bfloat16; auto.")] = "float32",
    results: Annotated[
        Path | None,
        typer.Option(exists=True, help="What requant sweep wrote: also tables 6 or 7, 10 and 11."),
    ] = None,
    speed: Annotated[
        list[Path] | None,
        typer.Option(exists=True, help="What requant bench --json printed: also table 9; may be repeated."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub model.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Keeps gradients and integrals [OUTPUT/cache].")] = None,
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Estimates and actual losses, quadratures, PQI by sublayer and share, ablation: tables 1 to 5 and 8."""
    set_up_logging()
    with command_errors():
        from dataclasses import asdict

        from ..format.durable import json_text, null_for_nan, write_bytes
        from ..offline.cache import TensorCache
        from ..offline.calibration import check_dataset, load_calibration
        from ..offline.evaluate import EvaluationText, evaluation_windows
        from ..offline.models import load_causal_lm, resolve_source
        from ..offline.recipe import RecipeError
        from ..offline.report.evidence import Evidence
        from ..offline.tables import TABLES, Tables, result_tables, speed_table

        wanted = [number.strip() for number in only.split(",") if number.strip()]
        if any(number not in map(str, TABLES) for number in wanted) or not (wanted or results or speed):
            raise RecipeError(f"--only {only}: write numbers of {', '.join(map(str, TABLES))}")
        output.mkdir(parents=True, exist_ok=True)
        settings: dict[str, Any] = {"model": Path(model).name}
        made: list[Table] = []

        def content() -> Any:
            return null_for_nan(settings | {"tables": list(map(asdict, made))})

        def keep(tables: "list[Table]") -> None:
            made.extend(tables)
            write_bytes(output / "tables.json", json_text(content()).encode())
            write_bytes(output / "tables.md", "\n".join(map(_markdown, made)).encode())
            if not as_json:
                typer.echo("\n".join(map(_markdown, tables)))

        if results is not None:
            keep(result_tables(Evidence.read([], [results], None).results, model))
        if speed:
            keep([speed_table(speed, model)])
        if wanted:
            check_dataset(calibration_dataset)
            resolve_source(model)
            text = EvaluationText(dataset)
            kept = TensorCache(cache or output / "cache")
            lm = load_causal_lm(model, revision=revision, device=find_device(device))
            calibration = load_calibration(
                calibration_dataset,
                lm.model,
                lm.tokenizer,
                num_samples=num_samples,
                seq_len=seq_len,
                seed=0,
                cache=kept,
            )
            test, conditions = evaluation_windows(text, lm.tokenizer, seq_len=seq_len, max_tokens=max_tokens)
            tables = Tables(lm, calibration.tokens, test.tokens, bits, compute, kept)
            settings |= {"calibration": calibration.describe(), "test": conditions, "bits": bits}
            settings |= {"base": tables.recipe.base, "compute": tables.recipe.compute}
            for number in wanted:
                keep([tables.make(int(number))])  # each is kept when it is made: they take long
        if as_json:
            print_json(content())


def _markdown(table: "Table") -> str:
    """A table, with the paper's numbers to the right of one's own where it has them."""
    beside = {row[: table.keys]: row[table.keys :] for row in map(tuple, table.published or ())}
    head = list(table.columns)
    if beside:
        head += [f"paper: {column}" for column in table.beside or table.columns[table.keys :]]
    lines = [head, ["---"] * len(head)]
    nothing = ("",) * (len(head) - len(table.columns))
    for row in table.rows:
        theirs = beside.pop(tuple(row[: table.keys]), nothing)
        lines.append([_cell(value) for value in (*row, *theirs)])
    for key, theirs in beside.items():  # what only the paper has
        lines.append([_cell(value) for value in (*key, *[""] * (len(table.columns) - table.keys), *theirs)])
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"Table {table.number}. {table.title}\n\n{text}\n"


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "–" if value is None else str(value)
