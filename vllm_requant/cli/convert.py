"""``requant convert``: a causal language model in, a ReQuant checkpoint out."""

import logging
import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import Device, LowMemory, find_device
from .output import byte_size, command_errors, incident_lines, print_json, set_up_logging, share

if TYPE_CHECKING:
    import torch

    from ..format import LayerSpec
    from ..offline.ranks import Ranks
    from ..offline.recipe import Recipe
    from ..offline.work import WorkFolder

__all__ = ["command"]

log = logging.getLogger(__name__)


def command(
    model: Annotated[str, typer.Argument(help="Local folder, Hub id, or GGUF file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the checkpoint; must not exist.")],
    base: Annotated[str, typer.Option(help="Dense quantizer: qtip, squeezellm, awq, gptq or rtn.")] = "squeezellm",
    bits: Annotated[int, typer.Option(help="Bits of a dense code.")] = 4,
    target_bpw: Annotated[
        float | None, typer.Option(help="Stored bits a weight, all included: chooses each layer's width.")
    ] = None,
    target_size: Annotated[
        int | None,
        typer.Option(
            parser=byte_size, metavar="SIZE", help="The same as size of the checkpoint's weights: 90MB, 1.5GiB."
        ),
    ] = None,
    group_size: Annotated[int, typer.Option(help="Weights that share a scale (rtn, gptq, awq, and the head).")] = 64,
    state_bits: Annotated[
        int | None,
        typer.Option(help="Width of a trellis state (qtip): 12 is fast, 16 is best [12; 16 if a GPU converts]."),
    ] = None,
    outliers: Annotated[
        float | None,
        typer.Option(parser=share, metavar="SHARE", help="Outliers removed before the dense fit [0.45%; qtip 0]."),
    ] = None,
    significant: Annotated[
        float | None,
        typer.Option(
            parser=share, metavar="SHARE", help="Significant weights detached after it [0.05%; chosen under a target]."
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(help="Steps in which the significant weights are detached: r_s / β.")] = 2,
    metric: Annotated[
        str,
        typer.Option(
            help="Ranks weights: pqi-fisher, pqi (the paper's), path-fisher, fisher, first-order, magnitude, random."
        ),
    ] = "pqi-fisher",
    outlier_rule: Annotated[
        str, typer.Option(help="Outliers in a layer: magnitude, range, or base (its own rule for all sparse weights).")
    ] = "magnitude",
    refit: Annotated[bool, typer.Option(help="Quantize anew around the detached weights.")] = True,
    tune_epochs: Annotated[
        int | None,
        typer.Option(help="Passes over the calibration set that tune scales, tables and norms [1; 0 without text]."),
    ] = None,
    hessian: Annotated[
        str, typer.Option(help="Weights of a layer's output errors: guided (by gradients), or inputs (all alike).")
    ] = "guided",
    lm_head_bits: Annotated[int, typer.Option(help="8 or 4 quantizes the output head (rtn); 16 leaves it.")] = 16,
    calibration_dataset: Annotated[
        str, typer.Option(help="self (sampled from the model), a text or JSONL file, or a Hub data set.")
    ] = "self",
    num_samples: Annotated[int, typer.Option(help="Calibration sequences.")] = 64,
    seq_len: Annotated[int, typer.Option(help="Tokens in a sequence.")] = 512,
    quadrature: Annotated[str, typer.Option(help="Rule of the path integral: gauss, midpoint, uniform.")] = "gauss",
    nodes: Annotated[int, typer.Option(help="Gradient evaluations on the path.")] = 4,
    labels: Annotated[
        str, typer.Option(help="What the loss compares with: the text's next tokens, or the model's predictions.")
    ] = "text",
    path_samples: Annotated[
        int | None,
        typer.Option(help="Sequences set apart for losses and path integrals; 0: all serve everything [a quarter]."),
    ] = None,
    compute: Annotated[
        str, typer.Option(help="Precision of the gradients: float32; bfloat16; auto: the faster on the device.")
    ] = "float32",
    dtype: Annotated[str, typer.Option(help="Type of unquantized tensors: auto, bfloat16, float16.")] = "auto",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub model.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of calibration and controls.")] = 0,
    max_shard_size: Annotated[str, typer.Option(help="Largest safetensors file.")] = "5GB",
    work_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keeps what is done until all is, for --resume [beside the output]."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a conversion that stopped.")] = False,
    snapshot_every: Annotated[
        float, typer.Option(metavar="SECONDS", help="Most of a long computation that a crash may cost.")
    ] = 600.0,
    cache: Annotated[Path | None, typer.Option(help="Folder that keeps what later conversions can use.")] = None,
    metrics_file: Annotated[
        Path | None,
        typer.Option(metavar="PATH.prom", help="Keep the run's state there, for node_exporter's textfile collector."),
    ] = None,
    device: Device = "auto",
    low_memory: LowMemory = False,
    stream: Annotated[
        bool, typer.Option("--stream", help="Leave the weights in their files and work block by block: any size.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would come out, and stop.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output folder.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Convert a model to a ReQuant checkpoint."""
    with command_errors(), _joined() as ranks:
        from ..format.writer import check_output
        from ..offline.cache import TensorCache
        from ..offline.calibration import check_dataset
        from ..offline.models import DTYPES, skeleton
        from ..offline.plan import check_stream, plan
        from ..offline.recipe import Recipe, RecipeError
        from ..offline.work import WorkFolder, arguments_of, default_folder

        place = find_device(device)
        mapped = stream or ranks.together  # weights stay in their files
        recipe = Recipe(
            base=base,
            bits=bits,
            target_bpw=target_bpw,
            target_size=target_size,
            group_size=group_size,
            state_bits=(16 if place.type == "cuda" else 12) if state_bits is None else state_bits,
            outliers=outliers,  # type: ignore[arg-type]
            significant=significant,
            rounds=rounds,
            metric=metric,
            outlier_rule=outlier_rule,
            refit=refit,
            tune_epochs=0 if mapped and tune_epochs is None else tune_epochs,  # type: ignore[arg-type]
            hessian=hessian,
            quadrature=quadrature,
            nodes=nodes,
            labels=labels,
            path_samples=path_samples,  # type: ignore[arg-type]
            compute=compute,
            lm_head_bits=lm_head_bits,
            num_samples=num_samples,
            seq_len=seq_len,
            seed=seed,
        )
        if mapped:
            check_stream(model, recipe, place)
        if dtype not in DTYPES:
            raise RecipeError(f"--dtype {dtype}: choose one of {', '.join(DTYPES)}")
        # everything that can be refused is refused before a weight is read
        metrics: AbstractContextManager[None] = nullcontext()
        if metrics_file is not None:
            from ..offline.run_metrics import RunMetrics, check_metrics_file, recording

            check_metrics_file(metrics_file)
            if not dry_run and ranks.first:
                # from here on, so that a run that is refused does not leave the success of the one before
                metrics = recording(
                    RunMetrics(metrics_file, model=model, output=output, recipe=recipe, device=str(place))
                )
        with metrics:
            check_output(output, overwrite=overwrite)
            if recipe.needs_calibration:
                check_dataset(calibration_dataset)
            planned = _describe_plan(plan(skeleton(model, revision=revision), recipe))
            if dry_run:
                _show(planned | {"dry_run": True, "model": model, "has_target": recipe.has_target}, as_json)
                return
            recipe = recipe.on(place)
            arguments = arguments_of(
                recipe,
                MODEL=model,
                **{
                    "--calibration-dataset": calibration_dataset,
                    "--dtype": dtype,
                    "--revision": revision,
                    "--max-shard-size": max_shard_size,
                    "--device": place.type,
                    "--low-memory": low_memory,
                    "--stream": stream,
                },
            )
            with (
                WorkFolder.open_together(
                    work_dir or default_folder(output),
                    arguments,
                    resume=resume,
                    overwrite=overwrite,
                    cache=TensorCache(cache, snapshot_every=snapshot_every),
                ) as work,
                _resumable(work.path),
            ):
                result = _convert(
                    model,
                    output,
                    recipe,
                    work,
                    dataset=calibration_dataset,
                    dtype=dtype,
                    revision=revision,
                    overwrite=overwrite,
                    max_shard_size=max_shard_size,
                    device=place,
                    low_memory=low_memory,
                    mapped=mapped,
                    sharded=mapped and not stream,
                )
        if ranks.first:
            _show(result, as_json)


@contextmanager
def _joined() -> Iterator["Ranks"]:
    """What torchrun starts is one conversion, of which the first process speaks."""
    from ..offline.ranks import started_ranks

    with started_ranks() as ranks:
        set_up_logging(quiet=not ranks.first)
        yield ranks


def _convert(
    model: str,
    output: Path,
    recipe: "Recipe",
    work: "WorkFolder",
    *,
    dataset: str,
    dtype: str,
    revision: str | None,
    overwrite: bool,
    max_shard_size: str,
    device: "torch.device",
    low_memory: bool,
    mapped: bool,
    sharded: bool,
) -> dict[str, Any]:
    from ..offline.mapped import load_mapped
    from ..offline.models import load_causal_lm
    from ..offline.save import convert_and_save
    from ..offline.stages import Stages

    started = time.monotonic()
    log.info("loading %s, on %s", model, device)
    with Stages().stage("load"):
        if mapped:
            lm = load_mapped(model, work.path / "rounded", revision=revision, dtype=dtype, sharded=sharded)
        else:
            lm = load_causal_lm(model, revision=revision, dtype=dtype, device=device)
    config, conversion = convert_and_save(
        lm,
        output,
        recipe,
        dataset=dataset,
        overwrite=overwrite,
        max_shard_size=max_shard_size,
        low_memory=low_memory,
        work=work,
    )
    report = conversion.report
    return {
        "output": str(output),
        "layers": len(config.layers),
        "bits_per_weight": config.bits_per_weight,
        "nnz": config.nnz,
        "quantized_bytes": config.nbytes,
        "integrals": [
            {key: value for key, value in integral.items() if key != "predicted_by_layer"}
            for integral in report["integrals"]
        ],
        "calibration_loss_original": report.get("calibration_loss_original"),
        "calibration_loss": report.get("calibration_loss"),
        "incidents": conversion.incidents,
        "seconds": round(time.monotonic() - started, 1),
    }


@contextmanager
def _resumable(work: Path) -> Iterator[None]:
    """Whatever ends a block before its time, SIGTERM included, the user learns how to go on."""

    def end(*_: object) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except BaseException:
        if work.exists():
            typer.echo(f"requant: what was done is kept in {work}; the same command with --resume goes on", err=True)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _describe_plan(specs: "dict[str, LayerSpec]") -> dict[str, Any]:
    from ..format import CheckpointConfig

    config = CheckpointConfig(layers=specs)
    return {
        "layers": len(specs),
        "weights": config.numel,
        "bits_per_weight": config.bits_per_weight,
        "nnz": config.nnz,
        "quantized_bytes": config.nbytes,
    }


def _show(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(result)
        return
    typer.echo(f"{result['layers']} layers at {result['bits_per_weight']:.3f} bits per weight,", nl=False)
    typer.echo(f" {result['nnz']} sparse elements, {result['quantized_bytes'] / 2**20:.1f} MiB")
    if "dry_run" in result:
        if result["has_target"]:
            typer.echo("each layer's precision and the sparse part will be chosen, up to the target")
        typer.echo("dry run: nothing was written")
        return
    for integral in result["integrals"]:
        typer.echo(
            f"ΔF {integral['stage']}: predicted {integral['predicted']:.5f}, actual {integral['actual']:.5f} "
            f"({100 * integral['relative_error']:.2f} % off)"
        )
    for line in incident_lines(result["incidents"]):
        typer.echo(f"incident: {line}")
    typer.echo(
        f"wrote {result['output']} in {result['seconds']:.0f} s; serve it with: requant serve {result['output']}"
    )
