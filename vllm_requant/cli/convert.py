"""``requant convert``: a causal language model in, a ReQuant checkpoint out."""

import logging
import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .dry_run import show_dry_run
from .options import Device, LowMemory, find_device
from .output import byte_size, command_errors, incident_lines, print_json, set_up_logging, share

if TYPE_CHECKING:
    from ..offline.checks import Request
    from ..offline.ranks import Ranks
    from ..offline.recipe import Recipe

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
    replicate: Annotated[
        bool, typer.Option("--replicate", help="Under torchrun: the whole model in every process, faster if it fits.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what speaks against it, what comes out, and what it takes; stop.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output folder.")] = False,
    push_to_hub: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="Upload the finished checkpoint to that repository of the Hub."),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make that repository private if it is new.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Convert a model to a ReQuant checkpoint."""
    with command_errors(), _joined() as ranks:
        import torch

        from ..offline.checks import Request, check
        from ..offline.objections import Objections
        from ..offline.recipe import Recipe, RecipeError
        from ..offline.run_metrics import RunMetrics, check_metrics_file, recording

        # everything that can be refused is refused before a weight is read, and all of it at once
        objections = Objections()
        place, recipe = torch.device("cpu"), None
        with objections.collecting():
            place = find_device(device)
        if private and push_to_hub is None:
            objections.errors.append(RecipeError("--private: goes with --push-to-hub"))
        mapped = stream or ranks.together  # weights stay in their files
        with objections.collecting():
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
        metrics: AbstractContextManager[None] = nullcontext()
        if metrics_file is not None:
            with objections.collecting():
                check_metrics_file(metrics_file)
                if recipe is not None and not dry_run and ranks.first:
                    # from here on, so that a run that is refused does not leave the success of the one before
                    metrics = recording(
                        RunMetrics(metrics_file, model=model, output=output, recipe=recipe, device=str(place))
                    )
        request = Request(
            model=model,
            output=output,
            device=place,
            dataset=calibration_dataset,
            dtype=dtype,
            revision=revision,
            max_shard_size=max_shard_size,
            low_memory=low_memory,
            stream=stream,
            mapped=mapped,
            work_dir=work_dir,
            resume=resume,
            overwrite=overwrite,
            cache=cache,
            replicate=replicate,
            push_to_hub=push_to_hub,
        )
        with metrics:
            planned = check(request, recipe, objections)
            if dry_run:
                if ranks.first:
                    show_dry_run(request, planned, objections.reasons, as_json=as_json)
                objections.raise_any()
                return
            objections.raise_any()
            assert recipe is not None
            result = _convert(request, recipe, snapshot_every)
        if ranks.first:
            if push_to_hub is not None:
                from ..offline.hub import upload

                result["uploaded"] = upload(output, push_to_hub, private=private)
            _show(result, as_json)


@contextmanager
def _joined() -> Iterator["Ranks"]:
    """What torchrun starts is one conversion, of which the first process speaks."""
    from ..offline.ranks import started_ranks

    with started_ranks() as ranks:
        set_up_logging(quiet=not ranks.first)
        yield ranks


def _convert(request: "Request", recipe: "Recipe", snapshot_every: float) -> dict[str, Any]:
    from ..offline.cache import TensorCache
    from ..offline.mapped import load_mapped
    from ..offline.models import Passes, load_causal_lm
    from ..offline.save import convert_and_save
    from ..offline.stages import Stages
    from ..offline.work import WorkFolder

    recipe = recipe.on(request.device)
    opened = WorkFolder.open_together(
        request.work_folder,
        request.arguments(recipe),
        resume=request.resume,
        overwrite=request.overwrite,
        cache=TensorCache(request.cache, snapshot_every=snapshot_every),
    )
    source: dict[str, Any] = {"revision": request.revision, "dtype": request.dtype}
    with opened as work, _resumable(work.path):
        started = time.monotonic()
        log.info("loading %s, on %s", request.model, request.device)
        with Stages().stage("load"):
            if request.mapped:
                passes: Passes = "whole" if request.replicate else "streamed" if request.stream else "sharded"
                lm = load_mapped(request.model, work.path / "rounded", passes=passes, **source)
            else:
                lm = load_causal_lm(request.model, device=request.device, **source)
        config, conversion = convert_and_save(
            lm,
            request.output,
            recipe,
            dataset=request.dataset,
            overwrite=request.overwrite,
            max_shard_size=request.max_shard_size,
            low_memory=request.low_memory,
            work=work,
        )
    report = conversion.report
    return {
        "output": str(request.output),
        "layers": len(config.layers),
        "bits_per_weight": config.bits_per_weight,
        "nnz": config.nnz,
        "quantized_bytes": config.nbytes,
        "integrals": [
            {key: integral[key] for key in ("stage", "predicted", "actual", "relative_error")}
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


def _show(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(result)
        return
    typer.echo(f"{result['layers']} layers at {result['bits_per_weight']:.3f} bits per weight,", nl=False)
    typer.echo(f" {result['nnz']} sparse elements, {result['quantized_bytes'] / 2**20:.1f} MiB")
    for integral in result["integrals"]:
        typer.echo(
            f"ΔF {integral['stage']}: predicted {integral['predicted']:.5f}, actual {integral['actual']:.5f} "
            f"({100 * integral['relative_error']:.2f} % off)"
        )
    for line in incident_lines(result["incidents"]):
        typer.echo(f"incident: {line}")
    if "uploaded" in result:
        typer.echo(f"uploaded to {result['uploaded']}")
    typer.echo(
        f"wrote {result['output']} in {result['seconds']:.0f} s; serve it with: requant serve {result['output']}"
    )
