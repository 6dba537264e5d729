"""Quantized token embeddings and output heads.

Both are one stored matrix ``[vocabulary, hidden]`` whose rows vLLM pads to a multiple of 64 and splits over
the tensor-parallel ranks. With tied embeddings the checkpoint holds the embedding alone, and the head
computes with the embedding's run-time weights (SPEC.md, section 3).
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from .. import kernels
from ..format import LayerSpec
from ..format.rows import zero_layer
from .segments import Segment, install_segments, segment_weights, segments_linear, stand_in_weight
from .stash import StoredModule, WeightStash

if TYPE_CHECKING:
    from .config import RequantConfig

__all__ = ["RequantEmbeddingMethod", "TieableHeadMethod", "TiedHeadMethod"]


class RequantEmbeddingMethod(QuantizeMethodBase):
    """A quantized embedding, or a quantized head with weights of its own.

    Args:
        config: the checkpoint's quantization config in vLLM.
        name, spec: the stored module.
    """

    def __init__(self, config: "RequantConfig", name: str, spec: LayerSpec) -> None:
        self.config, self.name, self.spec = config, name, spec
        self.segments: tuple[Segment, ...] = ()
        self.serves_head = False
        self._stash: WeightStash | None = None

    def create_weights(
        self,
        layer: VocabParallelEmbedding,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register the stash; the rows of this rank are those of ``layer.shard_indices``.

        Raises:
            ValueError: the checkpoint's matrix is not the model's.
        """
        if self.spec.kind == "trellis":
            raise ValueError(f"{self.name}: an embedding or a head cannot be of the trellis kind, whose rows are mixed")
        stored, wanted = (self.spec.out_features, self.spec.in_features), (layer.org_vocab_size, input_size)
        if stored != wanted:
            raise ValueError(
                f"{self.name} is {list(stored)} in the checkpoint, "
                f"the model's vocabulary and hidden size are {list(wanted)}"
            )
        shard = layer.shard_indices
        rows = (shard.org_vocab_start_index, shard.org_vocab_end_index)
        # a small vocabulary may leave the last ranks nothing but padding
        module = StoredModule(self.name, self.spec, frozenset({None}), [rows] if rows[0] < rows[1] else [])
        self._stash = WeightStash([module], dummy=self.config.dummy)
        self._stash.attach(layer)
        self.serves_head |= isinstance(layer, ParallelLMHead)
        self.config.loading.expect()

    def process_weights_after_loading(self, layer: VocabParallelEmbedding) -> None:
        """Turn what was loaded into run-time weights, padded with zero rows to the size that vLLM expects.

        Raises:
            ReQuantFormatError: a tensor never came.
            ValueError: the checkpoint names modules that no layer of the model asked for.
        """
        if self._stash is None:
            return
        self.config.require_all_claimed()
        parts, device = self._stash.finish(layer)
        self._stash = None
        padding = layer.num_embeddings_per_partition - sum(part.spec.out_features for part in parts)
        if padding:
            with torch.device("cpu"):
                parts.append(zero_layer(self.spec, padding))
        self.segments = install_segments(layer, parts, device, self.config, read_share=float(self.serves_head))

    def embedding(self, layer: VocabParallelEmbedding, input_: Tensor) -> Tensor:
        """Rows of the token ids: int64 ``[...]`` to ``[..., hidden]`` in the layer's ``params_dtype``."""
        (segment,) = self.segments
        return kernels.embedding(
            segment.kind,
            input_,
            segment_weights(layer, segment),
            **segment.settings,
            in_features=segment.in_features,
            dtype=layer.params_dtype,
        )

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Logits of this rank: ``[..., hidden]`` to ``[..., padded vocabulary part]`` in ``x.dtype``."""
        return segments_linear(layer, self.segments, x, bias)

    def tie_weights(self, layer: torch.nn.Module, embed_tokens: torch.nn.Module) -> torch.nn.Module:
        """A head that the checkpoint names has weights of its own and cannot be tied.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"{self.name} is quantized on its own, but config.json says tie_word_embeddings; "
            "a checkpoint with tied embeddings must not name the head"
        )


class TieableHeadMethod(UnquantizedEmbeddingMethod):
    """A head that the checkpoint does not name: ordinary, unless the model ties it to a quantized embedding.

    vLLM ties after it built the head, so the ordinary weight is allocated first and dropped then, as it is in
    any tied model.

    Args:
        config: the checkpoint's quantization config in vLLM.
    """

    def __init__(self, config: "RequantConfig") -> None:
        self.config = config

    def tie_weights(self, layer: torch.nn.Module, embed_tokens: VocabParallelEmbedding) -> torch.nn.Module:
        """Share the weights of ``embed_tokens``, quantized or not; returns the head."""
        if not isinstance(embed_tokens.quant_method, RequantEmbeddingMethod):
            return super().tie_weights(layer, embed_tokens)
        embed_tokens.quant_method.serves_head = True
        device: Any = layer.weight.device
        del layer.weight
        if self.config.adapters:
            stand_in_weight(layer, device)
        layer.quant_method = TiedHeadMethod(embed_tokens)
        return layer


class TiedHeadMethod(QuantizeMethodBase):
    """A head without weights: it computes with those of a quantized embedding.

    The head stays a module of its own (models read its bias and shard sizes); the embedding is held here,
    where torch does not count it as a child of the head.
    """

    def __init__(self, embed_tokens: VocabParallelEmbedding) -> None:
        self.embed_tokens = embed_tokens

    def create_weights(self, layer: torch.nn.Module, *weight_args: Any, **extra_weight_attrs: Any) -> None:
        """Nothing to create."""

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Logits of this rank, as :meth:`RequantEmbeddingMethod.apply`."""
        return self.embed_tokens.quant_method.apply(self.embed_tokens, x, bias)
