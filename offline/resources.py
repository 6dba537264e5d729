"""Memory and disk that a conversion takes, known from the model's shapes; and what this machine has."""

import shutil
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vllm_requant.format import LayerSpec
from vllm_requant.format.writer import existing_folder

from .models import find_layers, other_weights
from .objections import ObjectionError
from .recipe import Recipe
from .workload import Workload

__all__ = ["check_disk", "check_memory", "disk_needed", "memory_needed", "size_text"]

_MOMENTS = 8  # bytes a weight: a gradient and its square in float32
_SEQUENCE = 4  # the gradient of one sequence
_STORED_BYTES = 2  # of what is not quantized
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def memory_needed(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    recipe: Recipe,
    work: Workload,
    *,
    device: torch.device,
    low_memory: bool,
    processes: int = 1,
) -> dict[str, int]:
    """Bytes that a conversion in memory holds at the same time at least: activations and temporaries come on top.

    Args:
        model: may be on "meta".
        layers: that are quantized.
        recipe, work: what is done.
        device, low_memory: as for a conversion.
        processes: on the host's processors, which share the model's files and nothing else.

    Returns:
        By type of device, "cpu" being the host.
    """
    done = {name for counts in work.values() for name, count in counts.items() if count}
    quantized = sum(layer.weight.numel() for layer in layers.values())
    stored = 2 * sum(parameter.numel() for parameter in model.parameters())
    on_device = 0
    if done & {"forward", "tune"}:
        on_device += (4 if recipe.compute == "float32" else 2) * quantized  # those that a loss is taken at
    collected = _hessians(layers, done)
    if done & {"guided", "gradient"}:
        collected += (_MOMENTS + _SEQUENCE) * quantized
    if "integral" in done and _keeps_start(work):
        collected += _MOMENTS * quantized
    if device.type == "cpu":
        return {"cpu": stored + processes * (on_device + collected)}
    on_device += stored
    return {"cpu": collected, device.type: on_device} if low_memory else {device.type: on_device + collected}


def disk_needed(model: Any, specs: Mapping[str, LayerSpec], work: Workload) -> dict[str, int]:
    """Bytes of the checkpoint, and of the results that a conversion keeps until it is complete.

    Args:
        model: may be on "meta".
        specs: of the layers that will be written.
        work: what is done.
    """
    layers = find_layers(model)
    quantized = sum(layer.weight.numel() for layer in layers.values())
    dense = sum(specs[name].dense_nbytes for name in layers)
    count = Counter[str]()
    for counts in work.values():
        count.update(counts)
    kept = _MOMENTS * quantized * (count["integral"] + _keeps_start(work))
    kept += _hessians(layers, {name for name, times in count.items() if times})
    kept += dense * (count["quantize"] + count["refit"])
    others = sum(_STORED_BYTES * tensor.numel() for tensor in other_weights(model, set(specs)).values())
    return {"checkpoint": sum(spec.nbytes for spec in specs.values()) + others, "work": kept}


def check_memory(needed: Mapping[str, int], *, device: torch.device, low_memory: bool) -> None:
    """Refuse a conversion that cannot fit this machine, whatever else runs on it.

    Args:
        needed: as :func:`memory_needed` has it.
        device, low_memory: as for the conversion.

    Raises:
        ObjectionError: a device is too small.
    """
    reasons = []
    for device_type, nbytes in needed.items():
        present = _host_memory() if device_type == "cpu" else torch.cuda.mem_get_info(device)[1]
        if nbytes > present:
            where = "memory" if device_type == "cpu" else "memory of the GPU"
            out = "--low-memory" if device_type != "cpu" and not low_memory else "--stream, with --device cpu,"
            reasons.append(
                f"the conversion takes {size_text(nbytes)} of {where}, there are {size_text(present)}; {out} takes less"
            )
    if reasons:
        raise ObjectionError(*reasons)


def check_disk(places: Iterable[tuple[Path, int, str]]) -> None:
    """Refuse to begin what would fill a disk.

    Args:
        places: folders, bytes that will be written to each, and the flag that names another one.

    Raises:
        ObjectionError: for every file system that has too little room.
    """
    wanted: defaultdict[int, list[tuple[Path, int, str]]] = defaultdict(list)
    for folder, nbytes, flag in places:
        wanted[existing_folder(folder).stat().st_dev].append((folder, nbytes, flag))
    reasons = []
    for alike in wanted.values():
        free, total = shutil.disk_usage(existing_folder(alike[0][0])).free, sum(nbytes for _, nbytes, _ in alike)
        if total > free:
            named = " and ".join(f"{folder} takes {size_text(nbytes)}" for folder, nbytes, _ in alike)
            flags = " or ".join(flag for _, _, flag in alike)
            reasons.append(
                f"{named}, but {size_text(free)} are free there; make room, or name another place with {flags}"
            )
    if reasons:
        raise ObjectionError(*reasons)


def _keeps_start(work: Workload) -> bool:
    """Whether moments of the gradients at the original weights are kept."""
    return any(work.get(stage, {}).get(name) for stage, name in (("inputs", "guided"), ("gradients", "gradient")))


def _hessians(layers: Mapping[str, nn.Linear], done: Collection[str]) -> int:
    """Bytes of the second moments of the inputs: of every layer, or of every input that layers have in common."""
    if "guided" in done:
        return sum(4 * layer.in_features**2 for layer in layers.values())
    inputs = {(name.rpartition(".")[0], layer.in_features) for name, layer in layers.items()}
    return sum(4 * features**2 for _, features in inputs) if "inputs" in done else 0


def _host_memory() -> int:
    """Bytes of memory and swap that this process may have."""
    status = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    present = sum(1024 * int(status[name].split()[0]) for name in ("MemTotal", "SwapTotal"))
    limit = _CGROUP_LIMIT.read_text().strip() if _CGROUP_LIMIT.exists() else "max"
    return present if limit == "max" else min(present, int(limit))


def size_text(nbytes: int) -> str:
    """Bytes as people write them."""
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 1 << 30 else f"{nbytes / 2**20:.1f} MiB"
