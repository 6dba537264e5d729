"""A model whose weights stay in their safetensors files: pages come into memory when they are read, and can go again.

For models larger than memory. What has one dimension, norms and biases, is loaded; matrices that are not stored in the
16-bit type that is the reference are written anew, one at a time.
"""

import ctypes
import json
import logging
import mmap
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from vllm_requant.format.durable import write_safetensors
from vllm_requant.format.experts import model_name

from .models import (
    CausalLM,
    ModelError,
    Passes,
    SourceFiles,
    load_config,
    load_tokenizer,
    model_of,
    store_matrices,
    target_dtype,
)

__all__ = ["load_mapped", "map_tensors", "release"]

log = logging.getLogger(__name__)
_M_MMAP_THRESHOLD = -3  # of malloc.h
_RETURNED_BYTES = 2**20
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# where a mapped tensor begins: its file's mapping, and the bytes of it
_places: dict[int, tuple["weakref.ref[mmap.mmap]", int, int]] = {}


def map_tensors(path: Path) -> dict[str, Tensor]:
    """The floating-point tensors of a safetensors file, read-only, without reading them.

    Raises:
        ModelError: the file is not a whole safetensors file.
    """
    try:
        with safe_open(path, framework="pt"):
            pass  # checks lengths, overlaps and shapes
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: is not a whole safetensors file: {error}") from None
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__" or entry["dtype"] not in _DTYPES:
            continue
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        dtype = _DTYPES[entry["dtype"]]
        if begin == end:
            tensors[name] = torch.empty(entry["shape"], dtype=dtype)
            continue
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")  # and nobody writes
            flat = torch.frombuffer(memory, dtype=dtype, count=(end - begin) // dtype.itemsize, offset=begin)
        tensors[name] = flat.view(entry["shape"])
        _places[flat.data_ptr()] = weakref.ref(memory), begin, end
    return tensors


def release(module: nn.Module) -> None:
    """Let go of the pages of a module's mapped weights; they are read again when they are needed."""
    for parameter in module.parameters():
        mapping, begin, end = _places.get(parameter.data_ptr(), (None, 0, 0))
        memory = mapping() if mapping is not None else None
        if memory is not None:
            first = begin - begin % mmap.PAGESIZE
            memory.madvise(mmap.MADV_DONTNEED, first, end - first)


def load_mapped(
    source: str, scratch: Path, *, revision: str | None = None, dtype: str = "auto", passes: Passes = "streamed"
) -> CausalLM:
    """Load a model for conversion and leave its matrices where they are.

    Args:
        source: local folder or Hub id, of safetensors files.
        scratch: folder for matrices that have to be rounded.
        revision, dtype: as for :func:`load_causal_lm`.
        passes: how sequences are to pass it.

    Raises:
        ModelError: as for :func:`load_causal_lm`; or the files do not hold exactly the model's tensors under the
            names that files of its architecture have.
    """
    _return_freed_memory()
    files = SourceFiles(source)
    tokenizer = load_tokenizer(source, revision=revision)
    config = load_config(source, revision=revision)
    folder = Path(source) if Path(source).is_dir() else _download(source, revision)
    model = _without_weights(source, config)
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= {model_name(config, name): tensor for name, tensor in map_tensors(path).items()}
    stored = next(tensors[name].dtype for name, _ in model.named_parameters() if name in tensors)
    target = target_dtype(dtype, stored)
    kept = store_matrices(model)
    named = dict(model.named_parameters(remove_duplicate=False))
    if unknown := sorted(tensors.keys() - named.keys() - dict(model.named_buffers()).keys()):
        raise ModelError(f"{source}: {unknown[0]} is no tensor of a {type(model).__name__}; leave --stream out")
    for name, parameter in list(model.named_parameters()):  # tied ones once
        if name not in tensors:
            raise ModelError(f"{source}: {name} is missing; leave --stream out if the files have it by another name")
        tensor = tensors[name]
        if tensor.shape != parameter.shape:
            raise ModelError(f"{source}: {name} has shape {list(tensor.shape)}, expected {list(parameter.shape)}")
        if id(parameter) not in kept:
            tensor = tensor.to(target).float()
        elif tensor.dtype != target:
            tensor = _rounded(scratch / f"{name}.safetensors", tensor, target)
        # a parameter cannot change its device in place
        owner = model.get_submodule(name.rpartition(".")[0])
        _replace(model, parameter, nn.Parameter(tensor, requires_grad=False), owner)
    model.config.use_cache = False
    commit = getattr(config, "_commit_hash", None)
    return CausalLM(model.eval(), tokenizer, target, source, commit, files, mapped=True, passes=passes)


def _return_freed_memory() -> None:
    """Let what is freed go back to the system: glibc comes to keep blocks of up to 32 MiB, whatever their number."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _RETURNED_BYTES)


def _replace(model: Any, old: nn.Parameter, new: nn.Parameter, owner: nn.Module) -> None:
    """Everywhere: tied weights stay tied."""
    tied = [model.get_input_embeddings(), model.get_output_embeddings()]
    for module in (owner, *(each for each in tied if each is not None)):
        for name, parameter in module.named_parameters(recurse=False):
            if parameter is old:
                setattr(module, name, new)


def _rounded(path: Path, tensor: Tensor, target: torch.dtype) -> Tensor:
    if not path.exists():  # several processes may write the same
        log.info("rounding %s to %s", path.stem, target)
        write_safetensors(path, {"weight": tensor.to(target)})
    return map_tensors(path)["weight"]


def _download(source: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=["*.safetensors", "*.json"]))
    except (OSError, ValueError) as error:
        raise ModelError(f"{source}: cannot be downloaded: {str(error).splitlines()[0]}") from error


def _without_weights(source: str, config: Any) -> Any:
    """The model with its buffers, which are computed, and parameters on "meta"."""
    from transformers import GenerationConfig

    with _parameters_on_meta():
        model: Any = model_of(config, source)
    if (Path(source) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source)
    for name, buffer in model.named_buffers():
        if buffer.is_meta:
            raise ModelError(f"{source}: the buffer {name} cannot be made without the weights; leave --stream out")
    return model


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.data.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
