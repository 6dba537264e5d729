"""``quantization_config`` of a ReQuant checkpoint as vLLM's ``QuantizationConfig``."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import LoadConfig, VllmConfig, get_current_vllm_config_or_none
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from .. import __version__, kernels
from ..format import QUANT_METHOD, CheckpointConfig, LayerSpec, ReQuantFormatError, parse_config
from ..format.validation import validate
from .embedding import RequantEmbeddingMethod, TieableHeadMethod
from .experts import RequantExpertsMethod, expert_modules
from .linear import RequantLinearMethod
from .load_report import Loading, open_folder

if TYPE_CHECKING:
    from vllm.model_executor.models.utils import WeightsMapper

__all__ = ["RefusedCheckpointError", "RequantConfig"]

# what models call their token embedding, and never their head
_EMBEDDING_NAMES = frozenset(
    {"embed_in", "embed_tokens", "embedding", "embeddings", "tok_embeddings", "word_embeddings", "wte"}
)
_NAMES_IN_MESSAGE = 5
_COMPILE_KEY = "requant_plugin"
# vLLM's --load-format: those that only read pickled files, and those that do where they find no others
_PICKLES = ("pt", "npcache")
_GUESSES = ("auto", "hf")


class RefusedCheckpointError(RuntimeError):
    """A checkpoint breaks a rule of SPEC.md; the message is that of the ``ReQuantFormatError``.

    No ``ValueError``: vLLM reads checkpoints while pydantic builds its configuration, and pydantic makes one of those
    into an error of its own, of several lines, the last of which leads to pydantic's documentation.
    """


@contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except ReQuantFormatError as error:
        raise RefusedCheckpointError(str(error)) from None


class RequantConfig(QuantizationConfig):
    """Which modules of the model are quantized, and how.

    Attributes:
        checkpoint: the entry of ``config.json`` as it stands.
        layers: its layers under vLLM's module names (see :meth:`apply_vllm_mapper`).
        dummy: vLLM runs with ``--load-format dummy``.
        adapters: vLLM serves LoRA adapters on top of the layers.
        activation_bits: see :func:`vllm_requant.kernels.linear`. ``--additional-config.requant.activation_bits 8``
            sets it: vLLM's own place for what belongs to a plugin, and part of what its compile cache goes by.
    """

    def __init__(self, checkpoint: CheckpointConfig) -> None:
        super().__init__()
        self.checkpoint = checkpoint
        self.layers: dict[str, LayerSpec] = dict(checkpoint.layers)
        self.dummy = False
        self.activation_bits = 16
        self.adapters = False
        self.loading = Loading()
        self._claimed: set[str] = set()
        self._pipeline_parallel = False

    def __repr__(self) -> str:
        bits = self.checkpoint.bits_per_weight
        return f"{type(self).__name__}(layers={len(self.layers)}, bits_per_weight={bits:.2f})"

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 75  # Turing, the oldest that vLLM and Triton serve

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # the entry stands in config.json, nowhere else

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "RequantConfig":
        """From the ``quantization_config`` entry.

        Raises:
            RefusedCheckpointError: it breaks the schema.
        """
        with _refusals():
            return cls(parse_config(config))

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Validate a local checkpoint, in the process that starts the server, before anything is allocated.

        Raises:
            RefusedCheckpointError: it breaks a rule of SPEC.md.
        """
        open_folder()
        folder = Path(model_name)
        # a folder with config.json alone serves --load-format dummy
        if folder.is_dir() and any(folder.glob("*.safetensors*")):
            with _refusals():
                validate(folder)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: "WeightsMapper") -> None:
        """Rename the layers as the model class renames its modules.

        Raises:
            ValueError: two layers get the same name, or one gets none.
        """
        renamed = hf_to_vllm_mapper.apply_dict(self.layers)
        if len(renamed) != len(self.layers):
            raise ValueError("the model class maps two quantized layers to one name; it cannot serve this checkpoint")
        self.layers = renamed
        self._claimed = set(hf_to_vllm_mapper.apply_list(list(self._claimed)))

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method of a module that vLLM builds, ``prefix`` being its name; None for vLLM's default.

        Raises:
            ValueError: only a part of a fused layer, or of the experts of a block, is quantized.
        """
        self._observe_engine()
        if isinstance(layer, LinearBase):
            modules = self._stored_modules(prefix)
            return RequantLinearMethod(self, modules) if modules else UnquantizedLinearMethod()
        if isinstance(layer, ParallelLMHead):
            # with tied embeddings the head's fate is known only when the model ties it
            return self._embedding_method(prefix) or TieableHeadMethod(self)
        if isinstance(layer, VocabParallelEmbedding):
            return self._embedding_method(prefix or self._nameless_embedding(layer))
        if isinstance(layer, RoutedExperts):
            return self._experts_method(layer, prefix)
        return None

    def require_all_claimed(self) -> None:
        """Called when all modules exist: every quantized layer must belong to one of them.

        A layer that the model class builds without its quantization config, or under another name, would
        otherwise be left unloaded by some of vLLM's loaders. With pipeline parallelism most layers live in
        other processes, and vLLM's own complaint about unknown tensors must do.

        Raises:
            ValueError: some belong to none.
        """
        unclaimed = sorted(self.layers.keys() - self._claimed)
        if unclaimed and not self._pipeline_parallel:
            shown = ", ".join(unclaimed[:_NAMES_IN_MESSAGE]) + (", …" if len(unclaimed) > _NAMES_IN_MESSAGE else "")
            raise ValueError(
                f"{len(unclaimed)} quantized layers of the checkpoint have no quantizable module "
                f"in vLLM's model: {shown}"
            )

    def _observe_engine(self) -> None:
        engine = get_current_vllm_config_or_none()
        if engine is not None:
            self.activation_bits = _activation_bits(engine.additional_config)
            _join_compile_key(engine)
            self.dummy = engine.load_config.load_format == "dummy"
            _require_safetensors(engine.load_config)
            self.adapters = engine.lora_config is not None
            self._pipeline_parallel = engine.parallel_config.pipeline_parallel_size > 1

    def _stored_modules(self, prefix: str) -> dict[str, LayerSpec]:
        """The quantized modules that make up the linear layer ``prefix``, in order; none if unquantized."""
        if prefix in self.layers:
            names = [prefix]
        else:
            parent, _, last = prefix.rpartition(".")
            siblings = self.packed_modules_mapping.get(last, [])
            names = [f"{parent}.{sibling}" if parent else sibling for sibling in siblings]
            missing = [name for name in names if name not in self.layers]
            if len(missing) == len(names):
                return {}
            if missing:
                raise ValueError(
                    f"vLLM computes {', '.join(names)} as one layer, but the checkpoint does not quantize "
                    f"{', '.join(missing)}; quantize all of them or none"
                )
        self._claimed.update(names)
        return {name: self.layers[name] for name in names}

    def _embedding_method(self, name: str) -> RequantEmbeddingMethod | None:
        if name not in self.layers:
            return None
        self._claimed.add(name)
        return RequantEmbeddingMethod(self, name, self.layers[name])

    def _nameless_embedding(self, layer: VocabParallelEmbedding) -> str:
        """The quantized embedding that vLLM builds without telling its name (Llama's, among many).

        Raises:
            ValueError: several would fit.
        """
        shape = (layer.org_vocab_size, layer.embedding_dim)
        fitting = [
            name
            for name, spec in self.layers.items()
            if name.rpartition(".")[2] in _EMBEDDING_NAMES and (spec.out_features, spec.in_features) == shape
        ]
        if len(fitting) > 1:
            raise ValueError(
                f"vLLM builds a token embedding of {list(shape)} without a name, and {', '.join(fitting)} would all fit"
            )
        return fitting[0] if fitting else ""

    def _experts_method(self, layer: RoutedExperts, prefix: str) -> RequantExpertsMethod | None:
        """None if no expert of a block is quantized.

        Raises:
            ValueError: some are and some are not.
        """
        names = expert_modules(layer, prefix)
        missing = [name for name in names.values() if name not in self.layers]
        if len(missing) == len(names):
            return None
        if missing:
            raise ValueError(
                f"{prefix}: the checkpoint quantizes some of its experts, but not {missing[0]}; quantize all or none"
            )
        self._claimed.update(names.values())
        modules = {place: (name, self.layers[name]) for place, name in names.items()}
        return RequantExpertsMethod(self, layer.moe_config, modules)


def _activation_bits(additional_config: Any) -> int:
    """What vLLM's ``--additional-config`` says under ``requant``.

    Raises:
        ValueError: a key or value that means nothing.
    """
    ours = additional_config.get(QUANT_METHOD, {}) if isinstance(additional_config, Mapping) else {}
    known = isinstance(ours, Mapping) and ours.keys() <= {"activation_bits"}
    bits: int | None = ours.get("activation_bits", 16) if known else None
    if bits not in (8, 16):
        raise ValueError(f"--additional-config: {QUANT_METHOD} is {ours}, it takes activation_bits, 8 or 16")
    return bits


def _require_safetensors(load_config: LoadConfig) -> None:
    """Keep vLLM from looking for weights in pickled files, or in safetensors files that are not the checkpoint's.

    Raises:
        ValueError: it was told to read pickled files.
    """
    if load_config.load_format in _PICKLES:
        raise ValueError(
            f"--load-format {load_config.load_format} reads pickled files, which can run code; "
            "a ReQuant checkpoint consists of safetensors files"
        )
    if load_config.load_format in _GUESSES:
        load_config.load_format = "safetensors"


def _join_compile_key(engine: VllmConfig) -> None:
    """Let vLLM keep what it compiles for this version of the plugin apart from what it compiled for another.

    Its key covers its own version, the checkpoint's configuration and ``additional_config``, no plugin.
    """
    if isinstance(engine.additional_config, dict):
        path = kernels.kernel_path("uniform", torch.device(engine.device_config.device_type))
        engine.additional_config[_COMPILE_KEY] = {"version": __version__, "kernels": path}
