"""What serving a checkpoint takes of every device's memory, by tensor-parallel size, before the checkpoint exists.

vLLM's way of splitting a model is data here: which layers it computes as one, which it splits by output features and
which by input features.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from vllm_requant.format import LayerSpec
from vllm_requant.format.rows import same_format
from vllm_requant.format.runtime import DEVICE_TYPES, runtime_nbytes
from vllm_requant.format.splitting import column_parts, require_row_borders, require_split

from .models import head_module, other_weights

__all__ = ["SERVED_SIZES", "ServedModel"]

SERVED_SIZES = (1, 2, 4, 8)
"""Tensor-parallel sizes that are always spoken of; others up to the last are if they are possible."""

_STORED_BYTES = 2  # of a value that is not quantized, and of one in the cache
_VOCABULARY_QUANTUM = 64  # to a multiple of which vLLM pads embeddings and heads
# by the last part of a name: the layer of vLLM that it belongs to, whose output features are split
_FUSED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "qkv_proj"), "qkv"),
    **dict.fromkeys(("gate_proj", "up_proj", "gate_up_proj", "w1", "w3"), "gate_up"),
}
_BY_COLUMNS = ("o_proj", "down_proj", "w2")  # whose input features are split


class ServedModel:
    """A model and its quantized layers, as vLLM will hold them.

    Args:
        model: on the "meta" device.
        specs: of its quantized layers, by module name; the embedding or head among them if it is quantized.
    """

    def __init__(self, model: Any, specs: Mapping[str, LayerSpec]) -> None:
        config = model.config.get_text_config()
        self.model, self.config = model, config
        name, _ = head_module(model)
        self.head = specs.get(name)
        self.layers = {layer: spec for layer, spec in specs.items() if layer != name}
        self.others = other_weights(model, set(specs))
        self.heads: int = config.num_attention_heads
        self.kv_heads: int = getattr(config, "num_key_value_heads", None) or self.heads
        self.head_size: int = getattr(config, "head_dim", None) or config.hidden_size // self.heads

    def describe(self) -> dict[str, Any]:
        """Bytes per device at every size that is spoken of, or why it is not possible; and what is left out."""
        if notes := self._unknown():
            return {"sizes": [], "notes": notes}
        sizes: list[dict[str, Any]] = []
        for ranks in range(1, SERVED_SIZES[-1] + 1):
            if reason := self.objection(ranks):
                if ranks in SERVED_SIZES:
                    sizes.append({"tensor_parallel_size": ranks, "refused": reason})
                continue
            sizes.append(
                {
                    "tensor_parallel_size": ranks,
                    "quantized_bytes": {device: self.quantized_bytes(ranks, device) for device in DEVICE_TYPES},
                    "unquantized_bytes": self.unquantized_bytes(ranks),
                    "kv_cache_bytes_per_token": self.kv_cache_bytes(ranks),
                }
            )
        return {"sizes": sizes, "notes": self._notes()}

    def objection(self, ranks: int) -> str | None:
        """Why vLLM or the plugin cannot split the model over so many ranks; None if they can."""
        if self.heads % ranks:
            return f"its {self.heads} attention heads are no multiple of {ranks}"
        if self.kv_heads % ranks and ranks % self.kv_heads:
            return f"its {self.kv_heads} key/value heads can neither be divided among {ranks} nor repeated evenly"
        if self._padded_vocabulary % ranks:
            return f"its vocabulary, {self._padded_vocabulary} with padding, is no multiple of {ranks}"
        try:
            for name, spec in self.layers.items():
                if _last(name) in _BY_COLUMNS:
                    require_split(name, spec, ranks)
                    continue
                for part in self._partitions(name, spec, 1):
                    if part % ranks and part != self.kv_heads * self.head_size:
                        return f"{name}: {part} output features are no multiple of {ranks}"
                require_row_borders(name, spec, [(0, part) for part in self._partitions(name, spec, ranks)])
        except ValueError as error:
            return str(error)
        return None

    def quantized_bytes(self, ranks: int, device_type: str) -> int:
        """Run-time weights of the quantized layers on the rank that has most, as the plugin counts them.

        Args:
            ranks: a size without an :meth:`objection`.
            device_type: "cpu" or "cuda".
        """
        return max(
            sum(runtime_nbytes(spec, device_type) for spec in self._segments(ranks, rank)) for rank in range(ranks)
        )

    def unquantized_bytes(self, ranks: int) -> int:
        """16-bit weights of a rank: embedding and head by vocabulary, biases with their layers, the rest whole."""
        by_vocabulary = {id(self.model.get_input_embeddings().weight)}
        if (head := self.model.get_output_embeddings()) is not None:
            by_vocabulary.add(id(head.weight))
        state = dict(self.model.named_parameters(remove_duplicate=False))
        values = 0
        for name, tensor in self.others.items():
            layer = name.rpartition(".")[0]
            if id(state.get(name)) in by_vocabulary:
                values += self._padded_vocabulary // ranks * tensor.shape[1]
            elif layer in self.layers and _last(layer) in _FUSED:
                values += sum(self._partitions(layer, self.layers[layer], ranks))
            else:
                values += tensor.numel()
        return _STORED_BYTES * values

    def kv_cache_bytes(self, ranks: int) -> int:
        """What a rank caches of a token, in 16 bits, over all layers."""
        return _STORED_BYTES * 2 * self.config.num_hidden_layers * self._kv_features(ranks)

    @property
    def _padded_vocabulary(self) -> int:
        rows: int = self.model.get_input_embeddings().weight.shape[0]
        return -(-rows // _VOCABULARY_QUANTUM) * _VOCABULARY_QUANTUM

    def _kv_features(self, ranks: int) -> int:
        """Of the keys of a rank, and of its values; heads that do not suffice for all ranks are repeated."""
        return max(1, self.kv_heads // ranks) * self.head_size

    def _partitions(self, name: str, spec: LayerSpec, ranks: int) -> list[int]:
        """Output features that a rank has of a layer, one number for each matrix that vLLM knows in it."""
        queries, keys = self.heads // ranks * self.head_size, self._kv_features(ranks)
        own = spec.out_features // ranks
        fused = {
            "q_proj": [queries],
            "k_proj": [keys],
            "v_proj": [keys],
            "qkv_proj": [queries, keys, keys],
            "gate_up_proj": [own // 2, own // 2],
        }
        return fused.get(_last(name), [own])

    def _segments(self, ranks: int, rank: int) -> list[LayerSpec]:
        """What the plugin makes run-time weights of: siblings of one format are stacked."""
        parts: defaultdict[tuple[str, str], list[LayerSpec]] = defaultdict(list)
        for name, spec in self.layers.items():
            last = _last(name)
            if last in _BY_COLUMNS:
                part = column_parts(spec.model_copy(update={"nnz": 0}), ranks)[rank]
            else:
                part = spec.model_copy(update={"out_features": sum(self._partitions(name, spec, ranks))})
            part = part.model_copy(update={"nnz": round(spec.nnz * part.numel / spec.numel)})
            fused = parts[name.rpartition(".")[0], _FUSED.get(last, last)]
            if fused and same_format(fused[-1], part):
                both = {key: getattr(fused[-1], key) + getattr(part, key) for key in ("out_features", "nnz")}
                fused[-1] = part.model_copy(update=both)
            else:
                fused.append(part)
        if self.head is not None:
            parts["", ""] = [self.head.model_copy(update={"out_features": self._padded_vocabulary // ranks})]
        return [segment for fused in parts.values() for segment in fused]

    def _unknown(self) -> list[str]:
        """What keeps this from saying anything."""
        for name, spec in self.layers.items():
            last = _last(name)
            known = last in _BY_COLUMNS or last in _FUSED
            if not known or (last in _FUSED and sum(self._partitions(name, spec, 1)) != spec.out_features):
                return [f"how vLLM splits {name} is not known here: no memory is foretold"]
        return []

    def _notes(self) -> list[str]:
        window = getattr(self.config, "sliding_window", None)
        sliding = (getattr(self.config, "layer_types", None) or []).count("sliding_attention")
        if window and sliding:
            return [f"the cache keeps of {sliding} layers no more than the last {window} tokens"]
        return []


def _last(name: str) -> str:
    return name.rpartition(".")[2]
