"""Loading a causal language model, finding the layers to quantize, saving what stays 16-bit.

A source is a local folder, a GGUF file, or a Hub id. Everything that can be refused is refused before
weights are read. No remote code and no pickle is ever executed.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vllm_requant.format.experts import MIXTURES, separate_experts, stored_name
from vllm_requant.format.sparse import all_finite
from vllm_requant.kernels.cpu import multiplies_bfloat16

from .objections import ObjectionError, by_reason
from .ranks import current_ranks

__all__ = [
    "COMPUTE_DTYPES",
    "DTYPES",
    "CausalLM",
    "ModelError",
    "Passes",
    "SourceFiles",
    "check_finite",
    "computing_in",
    "decoder_blocks",
    "fastest_compute",
    "find_layers",
    "head_module",
    "load_causal_lm",
    "load_config",
    "load_tokenizer",
    "model_config",
    "model_of",
    "other_tensors",
    "other_weights",
    "resolve_source",
    "round_weights",
    "skeleton",
    "store_matrices",
    "target_dtype",
]

COMPUTE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DTYPES = ("auto", "bfloat16", "float16")
_CAST_AT_ONCE = 1 << 25  # elements of a large matrix, such as the head of a large vocabulary
_NOT_LINEAR = "Conv1D, or experts of an architecture that is unknown here): this architecture is not supported yet"
_MODEL_FILES = ("*.safetensors", "*.json")
log = logging.getLogger(__name__)


class ModelError(ObjectionError):
    """The model cannot be loaded or is not one that the converter supports."""


class SourceFiles:
    """The files of a local model, to notice that they change while they are converted.

    Args:
        source: folder or file; a Hub id, whose files nobody changes, has none.
    """

    def __init__(self, source: str) -> None:
        path = Path(source)
        self._files = [path] if path.is_file() else [p for pattern in _MODEL_FILES for p in path.glob(pattern)]
        self._seen = self._look()

    def check(self) -> None:
        """Raises:
        ModelError: a file is not what it was.
        """
        for path, now in self._look().items():
            if now != self._seen[path]:
                raise ModelError(
                    f"{path} was changed while it was being converted; nothing was written. Begin anew, "
                    "with --overwrite, once the model is complete"
                )

    def _look(self) -> dict[Path, tuple[int, int, int] | None]:
        return {path: _identity(path) for path in self._files}


def _identity(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


Passes = Literal["whole", "streamed", "sharded"]
"""Each sequence through all blocks, or all through each block: as it lies in files, or as the processes hold parts"""


@dataclass(frozen=True)
class CausalLM:
    """A loaded model.

    Attributes:
        model: in evaluation mode. Matrices of linear layers and embeddings are in ``dtype`` and cast when they run;
            everything else is in float32, with values representable in ``dtype``.
        tokenizer: its tokenizer.
        dtype: the 16-bit type in which unquantized tensors are stored.
        source: as the user gave it.
        revision: resolved Hub commit, or None for a local source.
        files: of a local source, as they were when it was loaded.
        mapped: the matrices lie in files, and come into memory when they are read.
        passes: how sequences pass it.
    """

    model: Any
    tokenizer: Any
    dtype: torch.dtype
    source: str
    revision: str | None
    files: SourceFiles
    mapped: bool = False
    passes: Passes = "whole"

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = self.model.device
        return device


def resolve_source(source: str) -> dict[str, Any]:
    """Keyword arguments with which transformers finds the model.

    Raises:
        ModelError: the source is neither a readable folder, a GGUF file nor the form of a Hub id.
    """
    path = Path(source)
    if source.lower().endswith(".gguf"):
        if not path.is_file():
            raise ModelError(f"{source}: no such GGUF file")
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    if path.is_dir():
        config = path / "config.json"
        if not config.is_file():
            raise ModelError(f"{source}: the folder holds no config.json, so it is not a Hugging Face model")
        try:
            content = json.loads(config.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ModelError(f"{config}: is not valid JSON ({error})") from None
        if "quantization_config" in content:
            method = content["quantization_config"].get("quant_method", "unknown")
            raise ModelError(f"{source}: the model is quantized already ({method}); give the 16-bit original")
        if not any(path.glob("*.safetensors")):
            raise ModelError(
                f"{source}: holds no .safetensors file; other weight files are not read, convert them first"
            )
        return {"pretrained_model_name_or_path": source}
    if path.exists():
        raise ModelError(f"{source}: is neither a folder nor a .gguf file")
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ModelError(f"{source}: no such folder")
    return {"pretrained_model_name_or_path": source}


def load_tokenizer(source: str, *, revision: str | None = None) -> Any:
    """The tokenizer of a model source."""
    from transformers import AutoTokenizer

    return _from_pretrained(AutoTokenizer, source, revision=revision)


def load_config(source: str, *, revision: str | None = None) -> Any:
    """transformers' configuration of a model source."""
    from transformers import AutoConfig

    return _from_pretrained(AutoConfig, source, revision=revision)


def skeleton(source: str, *, revision: str | None = None) -> nn.Module:
    """The model on the "meta" device: all modules and shapes, no weights.

    Raises:
        ModelError: nothing there, or not a causal language model.
    """
    with torch.device("meta"):
        return model_of(load_config(source, revision=revision), source)


def model_of(config: Any, source: str) -> nn.Module:
    """A model that a configuration describes, experts as modules of their own, where the block around puts it.

    Raises:
        ModelError: it describes no causal language model.
    """
    from transformers import AutoModelForCausalLM

    try:
        model: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (ValueError, KeyError) as error:
        raise ModelError(f"{source}: not a causal language model: {str(error).splitlines()[0]}") from error
    separate_experts(model)
    return model


def load_causal_lm(
    source: str, *, revision: str | None = None, dtype: str = "auto", device: torch.device | str = "cpu"
) -> CausalLM:
    """Load a model for conversion.

    Args:
        source: local folder, GGUF file or Hub id.
        revision: branch, tag or commit, for a Hub id.
        dtype: "bfloat16", "float16", or "auto": the model's own type if it has 16 bits, else bfloat16.
        device: where the model goes once its weights are rounded.

    Raises:
        ModelError: nothing there, not a causal language model, or not supported.
    """
    from transformers import AutoModelForCausalLM, GgufConfig

    extra: dict[str, Any] = {"dtype": "auto"}
    if source.lower().endswith(".gguf"):
        # without it the weights stay packed and can neither be differentiated nor saved
        extra["quantization_config"] = GgufConfig(dequantize=True)
    else:
        extra["use_safetensors"] = True
    files = SourceFiles(source)
    tokenizer = load_tokenizer(source, revision=revision)
    model = _from_pretrained(AutoModelForCausalLM, source, revision=revision, **extra)
    separate_experts(model)
    target = target_dtype(dtype, next(model.parameters()).dtype)
    round_weights(model, target)
    model = model.eval().to(device)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.use_cache = False
    model.requires_grad_(False)
    commit = getattr(model.config, "_commit_hash", None)
    return CausalLM(model, tokenizer, target, source, commit, files)


def round_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Round a model to the 16-bit type that is the reference, once; from here on it computes in float32.

    Matrices are held in that type. Buffers such as the rotary frequencies are computed, not stored, and must not be
    rounded.
    """
    kept = store_matrices(model)
    for parameter in model.parameters():
        rounded = parameter.data.to(dtype)
        parameter.data = rounded if id(parameter) in kept else rounded.float()
    for buffer in model.buffers():
        buffer.data = buffer.data.float() if buffer.is_floating_point() else buffer.data


def check_finite(lm: CausalLM) -> None:
    """Refuse a model with NaN or infinite values, of which nothing finite could be computed.

    Raises:
        ModelError: a tensor holds one.
    """
    bad = current_ranks().agree(
        lambda: next((name for name, tensor in lm.model.state_dict().items() if not all_finite(tensor)), None)
    )
    if bad is not None:
        raise ModelError(
            f"{lm.source}: {bad} holds values that are not finite in {str(lm.dtype).removeprefix('torch.')}: the file "
            "is damaged, or the model needs --dtype bfloat16"
        )


def target_dtype(dtype: str, stored: torch.dtype) -> torch.dtype:
    """The 16-bit type that is the reference, for a key of ``DTYPES`` and the type that files have."""
    if dtype != "auto":
        chosen: torch.dtype = getattr(torch, dtype)
        return chosen
    return stored if stored in (torch.bfloat16, torch.float16) else torch.bfloat16


class StoredLinear(nn.Linear):
    """A linear layer whose parameters are held in fewer bits than it computes in."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        if self.weight.numel() > _CAST_AT_ONCE and dtype != self.weight.dtype and bias is None:
            product: Tensor = _ProductInParts.apply(x.to(dtype), self.weight)
            return product
        return nn.functional.linear(x.to(dtype), self.weight.to(dtype), bias)


class _ProductInParts(torch.autograd.Function):
    """``x · weightᵀ`` in the type of x, which no more than a part of the weight is cast to at a time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        flat = x.flatten(0, -2)
        product = torch.empty(len(flat), len(weight), dtype=x.dtype, device=x.device)
        for rows in _parts(weight):
            product[:, rows] = flat @ weight[rows].to(x.dtype).t()
        return product.view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (grad,) = grad_outputs
        flat = grad.flatten(0, -2)
        result = torch.zeros(len(flat), ctx.weight.shape[1], dtype=grad.dtype, device=grad.device)
        for rows in _parts(ctx.weight):
            result.addmm_(flat[:, rows], ctx.weight[rows].to(grad.dtype))
        return result.view(*grad.shape[:-1], -1), None


def _parts(weight: Tensor) -> Iterator[slice]:
    rows = max(1, _CAST_AT_ONCE // weight.shape[1])
    for first in range(0, len(weight), rows):
        yield slice(first, first + rows)


class StoredEmbedding(nn.Embedding):
    """An embedding whose rows are held in fewer bits than the model computes in."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids).float()


def store_matrices(model: nn.Module) -> set[int]:
    """Let linear layers and embeddings cast their weights when they run; identities of those weights."""
    kept, others = set(), set()
    for name, module in list(model.named_modules()):
        stored: nn.Linear | nn.Embedding
        if type(module) is nn.Linear:
            stored = StoredLinear(module.in_features, module.out_features, module.bias is not None, device="meta")
            stored.bias = module.bias
        elif type(module) is nn.Embedding:
            stored = StoredEmbedding(
                module.num_embeddings, module.embedding_dim, padding_idx=module.padding_idx, device="meta"
            )
        else:
            others |= {id(parameter) for parameter in module.parameters(recurse=False)}
            continue
        stored.weight = module.weight  # a tied one stays tied
        model.set_submodule(name, stored)
        kept.add(id(module.weight))
    return kept - others  # a head may be tied to an embedding of another class, which casts nothing


def fastest_compute(device: torch.device) -> str:
    """The key of ``COMPUTE_DTYPES`` in which a device multiplies fastest."""
    on_gpu = device.type == "cuda"
    native = torch.cuda.is_bf16_supported(including_emulation=False) if on_gpu else multiplies_bfloat16()
    return "bfloat16" if native else "float32"


def computing_in(compute: str, device: torch.device) -> AbstractContextManager[object]:
    """A block in which models compute in a precision, a key of ``COMPUTE_DTYPES``; "bfloat16" is mixed precision."""
    dtype = COMPUTE_DTYPES[compute]
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and modules of the list of decoder blocks.

    Raises:
        ModelError: the model holds no list of modules.
    """
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ModelError(f"{type(model).__name__}: no list of decoder blocks found")
    # the list that holds most parameters is the decoder's; lists inside a block are smaller
    return max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))


def find_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of the decoder blocks, by name, in the order of the forward pass.

    Embeddings, the output head and what routes tokens to experts are not among them.

    Raises:
        ModelError: the blocks hold weight matrices that are not ``nn.Linear``.
    """
    prefix, blocks = decoder_blocks(model)
    mixture = MIXTURES.get(getattr(model.config, "model_type", ""))
    routers = {f"{number}.{name}" for number in range(len(blocks)) for name in (mixture.routers if mixture else ())}
    layers = {
        f"{prefix}.{name}": module
        for name, module in blocks.named_modules()
        if isinstance(module, nn.Linear) and name not in routers
    }
    known = {id(module.weight) for module in layers.values()}
    known |= {id(parameter) for name, parameter in blocks.named_parameters() if name.rpartition(".")[0] in routers}
    others = [
        (f"{prefix}.{name}", f"{list(parameter.shape)} is a weight but not an nn.Linear ({_NOT_LINEAR}")
        for name, parameter in blocks.named_parameters()
        if parameter.ndim >= 2 and id(parameter) not in known
    ]
    if others:
        raise ModelError(*by_reason(others))
    if not layers:
        raise ModelError(f"{type(model).__name__}: the decoder blocks hold no nn.Linear")
    return layers


def head_module(model: nn.Module) -> tuple[str, Tensor]:
    """Name and weight of the matrix that makes the logits: the embedding when both are tied."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    tied = head is None or head.weight is embedding.weight
    target = embedding if tied else head
    name = next(name for name, module in model.named_modules() if module is target)
    return name, target.weight.data


def other_tensors(lm: CausalLM, quantized: set[str]) -> dict[str, Tensor]:
    """What is stored beside the quantized layers, by stored name in ``lm.dtype``, without doubles of tied weights."""
    return {
        stored_name(lm.model.config, name): tensor.to(lm.dtype) if tensor.is_floating_point() else tensor
        for name, tensor in other_weights(lm.model, quantized).items()
    }


def other_weights(model: Any, quantized: set[str]) -> dict[str, Tensor]:
    """All tensors of a model beside its quantized layers, tied ones once; the model may be on "meta"."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    skip = {f"{name}.weight" for name in quantized}
    if head is not None and head.weight is embedding.weight:
        skip |= {f"{name}.weight" for name, module in model.named_modules() if module is head}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in skip}


def model_config(lm: CausalLM) -> dict[str, Any]:
    """``config.json`` of the stored model, without ``quantization_config``."""
    config: dict[str, Any] = json.loads(lm.model.config.to_json_string(use_diff=True))
    config.pop("_name_or_path", None)
    config["architectures"] = [type(lm.model).__name__]
    config["dtype"] = str(lm.dtype).removeprefix("torch.")
    config["use_cache"] = True
    return config


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """transformers draws bars of its own, also into log files; loading is a line of ours instead."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _from_pretrained(auto_class: Any, source: str, *, revision: str | None, **extra: Any) -> Any:
    arguments = resolve_source(source) | extra
    if revision is not None:
        arguments["revision"] = revision
    try:
        with _no_progress_bars():
            return auto_class.from_pretrained(trust_remote_code=False, **arguments)
    except (OSError, ValueError, KeyError, ImportError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"{source}: cannot be loaded: {first_line}") from error
