"""``requant report``: one page of what conversions of a model measured; ``requant plot``: its figures alone."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .inspect import describe, facts
from .output import command_errors, incident_lines, prepare_results, set_up_logging

if TYPE_CHECKING:
    from ..offline.report.evidence import Conversion, Evidence
    from ..offline.report.page import Section

__all__ = ["command", "plot_command"]

Results = Annotated[
    list[Path] | None,
    typer.Option("--results", exists=True, help="What requant sweep wrote: quality against size; may be repeated."),
]
Nodes = Annotated[
    Path | None, typer.Option(exists=True, help="What the study of nodes wrote: predicted and actual ΔF by rule.")
]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder for the page, pictures and numbers.")]


def command(
    folders: Annotated[list[Path] | None, typer.Argument(metavar="[DIR]...", help="ReQuant checkpoints.")] = None,
    output: Output = Path("report"),
    results: Results = None,
    nodes: Nodes = None,
    title: Annotated[str | None, typer.Option(help="Of the page.")] = None,
) -> None:
    """Draw a page (report.html) of one or several conversions, with a PNG, CSV and JSON file for each figure."""
    set_up_logging()
    with command_errors():
        from ..offline.report.page import write_figures, write_page

        prepare_results(output)
        evidence = _evidence(folders, results, nodes)
        sections = _sections(evidence)
        for section in sections:
            write_figures(output / section.name, section.figures)
        write_page(output / "report.html", title or _title(evidence), sections)
        typer.echo(f"wrote {output / 'report.html'}: {sum(len(section.figures) for section in sections)} figures")


def plot_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A ReQuant checkpoint.")],
    output: Output = Path("plots"),
    only: Annotated[str, typer.Option(metavar="NAME", help="Draw only the figure of that name.")] = "",
) -> None:
    """Draw the figures of one checkpoint, as PNG, CSV and JSON."""
    set_up_logging()
    with command_errors():
        from ..offline.report.evidence import EvidenceError
        from ..offline.report.figures import conversion_figures
        from ..offline.report.page import write_figures

        prepare_results(output)
        (conversion,) = _evidence([folder], None, None).conversions
        figures = {figure.name: figure for figure in conversion_figures(conversion)}
        if only and only not in figures:
            raise EvidenceError(f"--only {only}: choose one of {', '.join(figures)}")
        for picture in write_figures(output, [figures[only]] if only else figures.values()):
            typer.echo(str(picture))


def _evidence(folders: list[Path] | None, results: list[Path] | None, nodes: Path | None) -> "Evidence":
    from ..offline.report.evidence import Evidence, EvidenceError

    if not (folders or results or nodes):
        raise EvidenceError("nothing to report: name checkpoints, or --results of a sweep, or --nodes")
    return Evidence.read(folders or [], results or [], nodes)


def _sections(evidence: "Evidence") -> "list[Section]":
    from ..offline.report.figures import conversion_figures, result_figures
    from ..offline.report.page import Section

    sections = [
        Section(conversion.name, _facts(conversion), list(conversion_figures(conversion)), conversion.name)
        for conversion in evidence.conversions
    ]
    if figures := list(result_figures(evidence)):
        sections.insert(0, Section("Quality and size", {}, figures))
    return sections


def _facts(conversion: "Conversion") -> dict[str, str]:
    from ..offline.card import evaluation_rows

    lines = facts(describe(conversion.folder))
    original, result = (conversion.report.get(f"calibration_loss{of}") for of in ("_original", ""))
    if original is not None and result is not None:
        lines["calibration loss"] = f"{original:.5f} → {result:.5f}"
    rows = evaluation_rows(conversion.report.get("evaluations", []))
    for number, (data, metric, value, conditions) in enumerate(rows, start=1):
        lines[f"evaluation {number}"] = f"{data}: {metric} {value} ({conditions})"
    for number, line in enumerate(incident_lines(conversion.checkpoint.config.provenance.get("incidents")), start=1):
        lines[f"incident {number}"] = line
    return lines


def _title(evidence: "Evidence") -> str:
    sources = {str(each.checkpoint.config.provenance.get("source")) for each in evidence.conversions}
    return "ReQuant: " + (", ".join(sorted(sources)) if sources else "conversions")
