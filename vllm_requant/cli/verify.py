"""``requant verify``: a checkpoint against every rule of the format, and against the model that it was made of."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .output import command_errors, print_json, set_up_logging

if TYPE_CHECKING:
    from ..format import ReQuantFormatError

__all__ = ["command"]


def command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A ReQuant checkpoint.")],
    against: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The original: compare weights with it (folder, GGUF file or Hub id)."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Read a checkpoint completely and print a line for everything that is wrong with it; exit status 1 if any is."""
    set_up_logging()
    with command_errors():
        result = _verify(folder, against)
        if as_json:
            print_json(result)
        else:
            _show(result)
    raise typer.Exit(0 if result["good"] else 1)


def _verify(folder: Path, against: str | None) -> dict[str, Any]:
    from ..format.checksums import SUMS_NAME
    from ..format.reader import Checkpoint
    from ..format.validation import findings
    from ..offline.models import resolve_source
    from ..offline.progress import track

    if against is not None:
        resolve_source(against)
    found = list(findings(folder, track))
    result: dict[str, Any] = {
        "folder": str(folder),
        "good": not found,
        "checksums": (folder / SUMS_NAME).exists(),
        "findings": _entries(found),
    }
    if found:
        return result
    checkpoint = Checkpoint(folder)
    result |= {"layers": len(checkpoint.config.layers), "other_tensors": len(checkpoint.other_names)}
    if against is not None:
        from .verify_original import compare_with_original

        comparison, found = compare_with_original(checkpoint, against)
        result |= {"good": not found, "findings": _entries(found), "against": comparison}
    return result


def _entries(found: "Iterable[ReQuantFormatError]") -> list[dict[str, Any]]:
    return [
        {"file": error.file, "tensor": error.tensor, "reason": error.reason, "message": str(error)} for error in found
    ]


def _show(result: dict[str, Any]) -> None:
    for finding in result["findings"]:
        typer.echo(finding["message"])
    comparison = result.get("against")
    if comparison:
        typer.echo(
            f"{comparison['layers_compared']} layers compared with {comparison['model']}: "
            f"{comparison['sparse_elements']} sparse elements"
        )
        errors = comparison["relative_error"]
        if errors:
            typer.echo(
                f"relative error elsewhere {errors['mean']:.4f} on average, {errors['max']:.4f} in {errors['worst']}"
            )
        typer.echo(f"{comparison['other_tensors_equal']} other tensors equal")
        for what in comparison["not_compared"]:
            typer.echo(f"not compared: {what}")
    if not result["good"]:
        typer.echo(f"{result['folder']}: broken, findings: {len(result['findings'])}")
        return
    sums = "checksums agree" if result["checksums"] else "no SHA256SUMS: nothing says which bytes were written"
    typer.echo(f"{result['folder']}: good; {result['layers']} layers, {result['other_tensors']} other tensors; {sums}")
