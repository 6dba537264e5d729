"""``requant inspect``: what a checkpoint holds, from its configuration, headers and report."""

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from .output import command_errors, incident_lines, print_json, set_up_logging

__all__ = ["command", "describe", "facts"]

_MEASURED = {"mean_pqi": "PQI", "predicted_delta_f": "ΔF", "outlier_share": "outliers"}


def command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A ReQuant checkpoint.")],
    layers: Annotated[
        bool, typer.Option("--layers", help="A line for every layer, with what its conversion measured.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Say what a checkpoint holds: kinds, bits per weight, sparse elements, bytes, provenance."""
    set_up_logging()
    with command_errors():
        result = describe(folder, with_layers=layers)
        if as_json:
            print_json(result)
        else:
            _show(result)


def describe(folder: Path, *, with_layers: bool = False) -> dict[str, Any]:
    """The facts that ``requant inspect`` prints.

    Raises:
        ReQuantFormatError: the configuration or a header is malformed.
    """
    from ..offline.report.evidence import Conversion

    conversion = Conversion(folder)
    checkpoint = conversion.checkpoint
    config = checkpoint.config
    kinds = Counter(f"{spec.kind} {spec.bits} bit" for spec in config.layers.values())
    other = checkpoint.other_nbytes()
    result: dict[str, Any] = {
        "folder": str(folder),
        "format_version": config.format_version,
        "producer": config.producer,
        "kinds": dict(sorted(kinds.items())),
        "layers": len(config.layers),
        "weights": config.numel,
        "bits_per_weight": config.bits_per_weight,
        "nnz": config.nnz,
        "sparse_share": config.nnz / config.numel,
        "bytes": {
            "dense": sum(spec.dense_nbytes for spec in config.layers.values()),
            "sparse": sum(spec.sparse_nbytes for spec in config.layers.values()),
            "unquantized": other,
            "total": config.nbytes + other,
            "total_16bit": 2 * config.numel + other,
        },
        "provenance": config.provenance,
    }
    if with_layers:
        result["per_layer"] = {
            name: spec.model_dump()
            | {"bytes": spec.nbytes, "bits_per_weight": spec.bits_per_weight}
            | conversion.measured.get(name, {})
            for name, spec in config.layers.items()
        }
    return result


def facts(result: dict[str, Any]) -> dict[str, str]:
    """What :func:`describe` found, in words."""
    from ..offline.card import recipe_rows

    mib = {name: value / 2**20 for name, value in result["bytes"].items()}
    lines = {
        "kinds": ", ".join(f"{kind} × {count}" for kind, count in result["kinds"].items()),
        "bits per weight": f"{result['bits_per_weight']:.4f} (every stored byte counted)",
        "sparse": f"{result['nnz']} elements, {100 * result['sparse_share']:.3f} %",
        "quantized": f"{mib['dense']:.1f} MiB dense + {mib['sparse']:.1f} MiB sparse",
        "unquantized": f"{mib['unquantized']:.1f} MiB",
        "total": f"{mib['total']:.1f} MiB; {mib['total_16bit']:.1f} MiB in 16 bit",
    }
    recipe = result["provenance"].get("recipe")
    if recipe:
        lines["source"] = str(result["provenance"].get("source"))
        lines["recipe"] = ", ".join(f"{choice} {value}" for choice, value in recipe_rows(recipe))
    return lines


def _show(result: dict[str, Any]) -> None:
    typer.echo(f"{result['folder']}: format version {result['format_version']}")
    for name, value in facts(result).items():
        typer.echo(f"  {name:<16} {value}")
    for line in incident_lines(result["provenance"].get("incidents")):
        typer.echo(f"  incident         {line}")
    for name, layer in result.get("per_layer", {}).items():
        group = f" group {layer['group_size']}" if "group_size" in layer else ""
        typer.echo(
            f"  {name:<44} {layer['kind']} {layer['bits']} bit{group}  "
            f"{layer['out_features']}×{layer['in_features']}  nnz {layer['nnz']}  {layer['bits_per_weight']:.3f}"
            + "".join(f"  {what} {layer[key]:.3g}" for key, what in _MEASURED.items() if key in layer)
        )
