"""``requant report``: one page of what conversions of a model measured; ``requant plot``: its figures alone."""

import logging
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .inspect import describe, facts
from .options import Changes, Device, EvaluationTexts, changed_choices, evaluation_texts, find_device
from .output import command_errors, incident_lines, prepare_results, set_up_logging

if TYPE_CHECKING:
    from ..offline.report.evidence import Conversion, Evidence
    from ..offline.report.page import Section

__all__ = ["command", "plot_command"]

log = logging.getLogger(__name__)

Results = Annotated[
    list[Path] | None,
    typer.Option("--results", exists=True, help="What requant sweep wrote: quality against size; may be repeated."),
]
PaperTables = Annotated[
    Path | None, typer.Option("--tables", exists=True, help="The tables.json that requant tables wrote.")
]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder for the page, pictures and numbers.")]


def command(
    sources: Annotated[
        list[str] | None, typer.Argument(metavar="[DIR|MODEL]...", help="ReQuant checkpoints, or a model to convert.")
    ] = None,
    output: Output = Path("report"),
    results: Results = None,
    tables: PaperTables = None,
    runs: Annotated[
        Path | None,
        typer.Option(exists=True, help="How MODEL is converted, as for sweep [every base at 2, 3, 4 bits, controls]."),
    ] = None,
    only: Annotated[str, typer.Option(metavar="GLOB", help="Of these, the runs whose name fits.")] = "*",
    changed: Changes = None,
    calibration_dataset: Annotated[str, typer.Option(help="Calibration text of MODEL, as for convert.")] = "self",
    dataset: EvaluationTexts = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens of each held-out text.")] = 16384,
    device: Device = "auto",
    title: Annotated[str | None, typer.Option(help="Of the page.")] = None,
) -> None:
    """Draw a page (report.html) of one or several conversions, with a PNG, CSV and JSON file for each figure.

    A model is converted first, in many ways, which takes long; what is finished stays in the output folder.
    """
    set_up_logging()
    with command_errors():
        from ..offline.evaluate import BUILTIN_DATASET
        from ..offline.report.evidence import Evidence, EvidenceError, is_checkpoint
        from ..offline.report.page import write_figures, write_page
        from ..offline.sweep import ALL_BASES, Sweep, read_runs

        if not (sources or results or tables):
            raise EvidenceError("nothing to report: name checkpoints or a model, or --results of a sweep, or --tables")
        prepare_results(output)
        folders = [Path(source) for source in sources or () if is_checkpoint(Path(source))]
        models = [source for source in sources or () if not is_checkpoint(Path(source))]
        if len(models) > 1:
            raise EvidenceError(f"{', '.join(models)}: no checkpoints; of models, a report is about one")
        for model in models:
            sweep = Sweep(
                source=model,
                runs=read_runs(runs or ALL_BASES, changed_choices(changed)),
                calibration=calibration_dataset,
                evaluation=evaluation_texts(dataset or [BUILTIN_DATASET]),
                output=output / "results.jsonl",
                max_tokens=max_tokens,
                cache=output / "cache",
                checkpoints=output / "checkpoints",
                device=find_device(device),
            )
            for row in sweep.run(only):
                log.info("%s: %.3f bits a weight", row["name"], row["bits_per_weight"])
            results = [*(results or []), sweep.output]
            folders += [output / "checkpoints" / name for name in sweep.results() if fnmatch(name, only)]
        evidence = Evidence.read(folders, results or [], tables)
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
        from ..offline.report.evidence import Evidence, EvidenceError
        from ..offline.report.figures import conversion_figures
        from ..offline.report.page import write_figures

        prepare_results(output)
        (conversion,) = Evidence.read([folder], [], None).conversions
        figures = {figure.name: figure for figure in conversion_figures(conversion)}
        if only and only not in figures:
            raise EvidenceError(f"--only {only}: choose one of {', '.join(figures)}")
        for picture in write_figures(output, [figures[only]] if only else figures.values()):
            typer.echo(str(picture))


def _sections(evidence: "Evidence") -> "list[Section]":
    from ..offline.report.figures import conversion_figures, result_figures
    from ..offline.report.page import Section

    sections = []
    for conversion in evidence.conversions:
        found = describe(conversion.folder)
        size = found["bytes"]["total"] / 2**20
        sections.append(
            Section(
                conversion.name,
                _facts(conversion, found),
                list(conversion_figures(conversion)),
                conversion.name,
                f"{found['bits_per_weight']:.3f} bits a weight, {size:.1f} MiB",
            )
        )
    if figures := list(result_figures(evidence)):
        sections.insert(0, Section("Quality and size", {}, figures))
    return sections


def _facts(conversion: "Conversion", found: dict[str, Any]) -> dict[str, str]:
    from ..offline.card import evaluation_rows

    lines = facts(found)
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
