"""Everything that can be refused before a weight is read, for a conversion as a user asks for it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from vllm_requant.format import LayerSpec
from vllm_requant.format.writer import check_output, check_shard_size

from .bases import BASES, Need
from .calibration import SELF, check_calibration, check_dataset
from .hub import check_hub
from .models import DTYPES, ModelError, find_layers, load_tokenizer, skeleton
from .objections import Objections
from .plan import check_stream, plan, tokens_to_refit, with_target
from .ranks import current_ranks
from .recipe import Recipe, RecipeError
from .resources import check_disk, check_memory, disk_needed, memory_needed
from .work import WorkFolder, arguments_of, default_folder
from .workload import Workload, workload

__all__ = ["Planned", "Request", "check"]


@dataclass(frozen=True)
class Request:
    """A conversion as a user asks for it, the recipe apart: flags of ``requant convert``.

    Attributes:
        mapped: the weights stay in their files, because of ``stream`` or of several processes.
        replicate: of several processes, each passes sequences through the whole model.
        push_to_hub: repository for the checkpoint; None uploads nothing.
    """

    model: str
    output: Path
    device: torch.device
    dataset: str
    dtype: str
    revision: str | None
    max_shard_size: str
    low_memory: bool
    stream: bool
    mapped: bool
    work_dir: Path | None
    resume: bool
    overwrite: bool
    cache: Path | None
    replicate: bool = False
    push_to_hub: str | None = None

    @property
    def work_folder(self) -> Path:
        return self.work_dir or default_folder(self.output)

    def arguments(self, recipe: Recipe) -> dict[str, object]:
        """What has to be the same when the conversion goes on."""
        flags = {
            "--calibration-dataset": self.dataset,
            "--dtype": self.dtype,
            "--revision": self.revision,
            "--max-shard-size": self.max_shard_size,
            "--device": self.device.type,
            "--low-memory": self.low_memory,
            "--stream": self.stream,
        }
        return arguments_of(recipe.on(self.device), MODEL=self.model, **flags)


@dataclass(frozen=True)
class Planned:
    """What is known of a conversion.

    Attributes:
        model: on the "meta" device.
        recipe: with what depends on the device and the model decided.
        specs: of the layers that will be written.
        work: what is done.
        memory: bytes that it holds at least, by type of device; empty for a model that passes block by block.
        disk: bytes of "checkpoint" and "work".
    """

    model: Any
    recipe: Recipe
    specs: dict[str, LayerSpec]
    work: Workload
    memory: dict[str, int]
    disk: dict[str, int]


def check(request: Request, recipe: Recipe | None, objections: Objections) -> Planned | None:
    """Collect what speaks against a conversion.

    Args:
        request: what is asked for.
        recipe: likewise; None if it is impossible, of which the objections speak already. What depends on it is then
            not looked at.
        objections: where they go.

    Returns:
        None if it is not known what would be written.
    """
    with objections.collecting():
        _check_flags(request)
    with objections.collecting():
        check_output(request.output, overwrite=request.overwrite)
    if current_ranks().first and request.push_to_hub is not None:
        with objections.collecting():
            check_hub(request.push_to_hub)
    if current_ranks().first and recipe is not None:
        with objections.collecting():
            WorkFolder.check(
                request.work_folder, request.arguments(recipe), resume=request.resume, overwrite=request.overwrite
            )
    if recipe is not None and request.mapped:
        with objections.collecting():
            check_stream(request.model, recipe, request.device)
    model = None
    with objections.collecting():
        model = skeleton(request.model, revision=request.revision)
    if recipe is None or recipe.needs_calibration:
        with objections.collecting():
            _check_text(request, recipe, has_model=model is not None)
    if model is None:
        return None
    with objections.collecting():
        _check_files(request.model)
    if recipe is None:
        with objections.collecting():
            find_layers(model)
        return None
    planned = None
    with objections.collecting():
        planned = _plan(request, recipe.on(request.device), model)
    if planned is not None:
        _check_room(request, planned, objections)
    return planned


def _check_flags(request: Request) -> None:
    reasons = []
    if request.dtype not in DTYPES:
        reasons.append(f"--dtype {request.dtype}: choose one of {', '.join(DTYPES)}")
    try:
        check_shard_size(request.max_shard_size)
    except ValueError as error:
        reasons.append(f"--max-shard-size {request.max_shard_size}: {error}")
    if request.replicate and request.stream:
        reasons.append("--replicate: puts the whole model into every process, which --stream is to avoid; choose one")
    if request.replicate and not current_ranks().together:
        reasons.append("--replicate: is about several processes; start the command with torchrun")
    if reasons:
        raise RecipeError(*reasons)


def _check_text(request: Request, recipe: Recipe | None, *, has_model: bool) -> None:
    if request.dataset == SELF or recipe is None or not has_model:
        check_dataset(request.dataset)
        return
    tokenizer = load_tokenizer(request.model, revision=request.revision)
    check_calibration(request.dataset, tokenizer, num_samples=recipe.num_samples, seq_len=recipe.seq_len)


def _check_files(model: str) -> None:
    """Raises:
    ModelError: files of a local folder are not whole.
    """
    reasons = []
    for path in sorted(Path(model).glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass  # reads the header and holds it against the length of the file
        except (SafetensorError, OSError) as error:
            reasons.append(f"{path}: is not a whole safetensors file ({error}); copy it anew")
    if reasons:
        raise ModelError(*reasons)


def _plan(request: Request, recipe: Recipe, model: Any) -> Planned:
    """Raises:
    ObjectionError: as :func:`~.plan.plan`.
    """
    specs = plan(model, recipe)
    recipe = with_target(model, recipe)
    layers = find_layers(model)
    fitted = (recipe.num_samples - recipe.path_samples) * recipe.seq_len
    base = BASES[recipe.base]
    refits = recipe.refits and (Need.INPUTS not in base.refit_needs or fitted >= tokens_to_refit(model, layers))
    work = workload(recipe, writes_text=request.dataset == SELF, refits=refits)
    memory = {}
    if request.replicate or not request.mapped:
        memory = memory_needed(
            model,
            layers,
            recipe,
            work,
            device=request.device,
            low_memory=request.low_memory,
            processes=current_ranks().here,
        )
    return Planned(model, recipe, specs, work, memory, disk_needed(model, specs, work))


def _check_room(request: Request, planned: Planned, objections: Objections) -> None:
    with objections.collecting():
        check_memory(planned.memory, device=request.device, low_memory=request.low_memory)
    kept, flag = (request.work_folder, "--work-dir") if request.cache is None else (request.cache, "--cache")
    there = sum(path.stat().st_size for path in kept.rglob("*") if path.is_file()) if request.resume else 0
    with objections.collecting():
        check_disk(
            [
                (request.output.absolute().parent, planned.disk["checkpoint"], "-o"),
                (kept, max(0, planned.disk["work"] - there), flag),
            ]
        )
