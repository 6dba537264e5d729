"""What ``requant convert --dry-run`` says of a conversion that has not begun."""

from typing import TYPE_CHECKING, Any

import typer

from .output import print_json

if TYPE_CHECKING:
    from ..offline.checks import Planned, Request

__all__ = ["show_dry_run"]


def show_dry_run(request: "Request", planned: "Planned | None", reasons: list[str], *, as_json: bool) -> None:
    """Print what is known of a conversion.

    Args:
        request, planned: as :func:`..offline.checks.check` has them.
        reasons: that speak against it; here they are printed in JSON only. No time is foretold if there are any.
    """
    result: dict[str, Any] = {"dry_run": True, "model": request.model, "objections": reasons}
    if planned is not None:
        result |= _describe(request, planned, reasons)
    if as_json:
        print_json(result)
    elif "layers" in result:
        _show(result)


def _describe(request: "Request", planned: "Planned", reasons: list[str]) -> dict[str, Any]:
    from ..format import CheckpointConfig
    from ..offline.estimate import estimate
    from ..offline.serving_memory import ServedModel

    config = CheckpointConfig(layers=planned.specs)
    seconds = None
    if not reasons:
        typer.echo("requant: timing this machine", err=True)
        try:
            seconds = estimate(
                planned.model, planned.recipe, planned.work, device=request.device, low_memory=request.low_memory
            )
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            # one block of an architecture that nobody has tried may be built or called in other ways
            typer.echo(f"requant: no time is foretold, a block cannot be timed: {error}", err=True)
    return {
        "has_target": planned.recipe.has_target,
        "layers": len(config.layers),
        "weights": config.numel,
        "bits_per_weight": config.bits_per_weight,
        "nnz": config.nnz,
        "quantized_bytes": config.nbytes,
        "checkpoint_bytes": planned.disk["checkpoint"],
        "work_bytes": planned.disk["work"],
        "memory_bytes": planned.memory,
        "serving": ServedModel(planned.model, planned.specs).describe(),
        "expected_seconds": seconds,
    }


def _show(result: dict[str, Any]) -> None:
    from ..offline.resources import size_text

    typer.echo(
        f"{result['layers']} layers at {result['bits_per_weight']:.3f} bits per weight, "
        f"{result['nnz']} sparse elements, {size_text(result['quantized_bytes'])}"
    )
    if result["has_target"]:
        typer.echo("each layer's precision and the sparse part will be chosen, up to the target")
    typer.echo(
        f"checkpoint {size_text(result['checkpoint_bytes'])}, work folder {size_text(result['work_bytes'])} until then"
    )
    for device_type, nbytes in result["memory_bytes"].items():
        typer.echo(f"converting holds at least {size_text(nbytes)} ({'host' if device_type == 'cpu' else device_type})")
    _show_serving(result["serving"])
    if result["expected_seconds"] is not None:
        _show_time(result["expected_seconds"], about=result["has_target"])
    typer.echo("dry run: nothing was written")


def _show_time(seconds: dict[str, float], *, about: bool) -> None:
    total = sum(seconds.values())
    typer.echo(f"{'about ' if about else ''}{_duration(total)} on this machine as busy as it is now, files apart:")
    for stage, value in seconds.items():
        typer.echo(f"  {stage:<16} {_duration(value):>8}  {value / max(total, 1e-9):>4.0%}")


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"


def _show_serving(serving: dict[str, Any]) -> None:
    if serving["sizes"]:
        typer.echo("serving, MiB a device:")
        typer.echo(f"  {'ranks':>5}  {'quantized: CPU':>14}  {'CUDA':>8}  {'16 bit':>8}  {'cache a token':>13}")
    for size in serving["sizes"]:
        ranks = size["tensor_parallel_size"]
        if "refused" in size:
            typer.echo(f"  {ranks:>5}  not possible: {size['refused']}")
            continue
        quantized = {device: nbytes / 2**20 for device, nbytes in size["quantized_bytes"].items()}
        typer.echo(
            f"  {ranks:>5}  {quantized['cpu']:>14.1f}  {quantized['cuda']:>8.1f}  "
            f"{size['unquantized_bytes'] / 2**20:>8.1f}  {size['kv_cache_bytes_per_token'] / 2**10:>9.1f} KiB"
        )
    for note in serving["notes"]:
        typer.echo(f"  {note}")
