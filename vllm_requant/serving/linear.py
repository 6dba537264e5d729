"""Quantized linear layers: which rows and columns of which stored module a rank computes.

vLLM fuses sibling modules (q, k, v; gate, up) into one layer of several *partitions* and splits each
partition, or the input features, over the tensor-parallel ranks. The checkpoint stores either the siblings
or, as Phi-3 does, the fused matrix; both come down to row ranges of a stored matrix (SPEC.md, section 6).
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, QKVParallelLinear

from ..format import LayerSpec
from ..format.splitting import require_row_borders, require_split
from .segments import Segment, install_segments, segments_linear
from .stash import ShardId, StoredModule, WeightStash

if TYPE_CHECKING:
    from .config import RequantConfig

__all__ = [
    "Partition",
    "RequantLinearMethod",
    "layer_partitions",
    "plan_modules",
]


class Partition(NamedTuple):
    """One logical matrix inside a vLLM layer.

    Attributes:
        shard_id: vLLM's name for it.
        width: output features over all ranks.
        start, size: this rank's output features among them.
    """

    shard_id: str | int
    width: int
    start: int
    size: int


def layer_partitions(layer: LinearBase, local_sizes: Sequence[int], output_size: int) -> list[Partition]:
    """The partitions of a vLLM linear layer as its own tensor-parallel rank sees them.

    Args:
        layer: any ``LinearBase``; its ``tp_rank`` counts, not the process's.
        local_sizes: output features of each partition on this rank.
        output_size: output features over all ranks, of a layer that is not fused.
    """
    rank: int = layer.tp_rank
    ids: Sequence[str | int] = range(len(local_sizes))
    ranks = [rank] * len(local_sizes)
    if isinstance(layer, QKVParallelLinear):
        if len(local_sizes) != 3:
            raise ValueError(f"{type(layer).__name__} is not a layer that requant can split")
        ids = ("q", "k", "v")
        # vLLM's own output_sizes count a replicated head once per rank
        heads, kv_heads = layer.total_num_heads, layer.total_num_kv_heads
        widths = [heads * layer.head_size, kv_heads * layer.head_size, kv_heads * layer.v_head_size]
        ranks[1] = ranks[2] = rank // layer.num_kv_head_replicas
    else:
        widths = list(getattr(layer, "output_sizes", [output_size]))
    return [
        Partition(shard_id, width, 0 if size == width else at * size, size)
        for shard_id, width, at, size in zip(ids, widths, ranks, local_sizes, strict=True)
    ]


def plan_modules(
    modules: Mapping[str, LayerSpec], partitions: Sequence[Partition], columns: tuple[int, int] | None
) -> list[StoredModule]:
    """Assign to each stored module the consecutive partitions that it holds.

    Args:
        modules: the stored modules of the layer in the order of the partitions.
        partitions: of the layer.
        columns: this rank's input features, None for all.

    Raises:
        ValueError: the output features do not add up.
    """
    plan, rest = [], list(partitions)
    for name, spec in modules.items():
        ids: list[str | int] = []
        rows: list[tuple[int, int]] = []
        offset = 0
        while rest and offset + rest[0].width <= spec.out_features:
            partition = rest.pop(0)
            start = offset + partition.start
            if rows and rows[-1][1] == start:
                rows[-1] = (rows[-1][0], start + partition.size)
            else:
                rows.append((start, start + partition.size))
            offset += partition.width
            ids.append(partition.shard_id)
        if offset != spec.out_features or not ids:
            raise ValueError(
                f"{name} has {spec.out_features} output features in the checkpoint, "
                f"the model's layer has {[p.width for p in partitions]}"
            )
        shard_ids: set[ShardId] = {tuple(ids)}  # type: ignore[arg-type]
        if len(ids) == 1:
            shard_ids.add(ids[0])
        if len(ids) == len(partitions):
            shard_ids.add(None)
        plan.append(StoredModule(name, spec, frozenset(shard_ids), rows, columns))
    if rest:
        stored = [spec.out_features for spec in modules.values()]
        raise ValueError(
            f"the checkpoint's {', '.join(modules)} have {stored} output features, "
            f"the model's layer has {[p.width for p in partitions]}"
        )
    return plan


class RequantLinearMethod(LinearMethodBase):
    """The linear method of one vLLM layer.

    Args:
        config: the checkpoint's quantization config in vLLM.
        modules: the stored modules that make up the layer, in the order of its output features.
    """

    def __init__(self, config: "RequantConfig", modules: Mapping[str, LayerSpec]) -> None:
        self.config = config
        self.modules = dict(modules)
        self.segments: tuple[Segment, ...] = ()
        self._stash: WeightStash | None = None

    def create_weights(
        self,
        layer: LinearBase,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register the stash; the sizes are vLLM's, ``per_partition`` meaning per rank.

        Raises:
            ValueError: the sizes differ from the checkpoint's, or cannot be split over the ranks.
        """
        for name, spec in self.modules.items():
            if spec.in_features != input_size:
                raise ValueError(
                    f"{name} has {spec.in_features} input features in the checkpoint, "
                    f"the model's layer has {input_size}"
                )
        columns = None
        if input_size_per_partition != input_size:
            start = layer.tp_rank * input_size_per_partition
            columns = (start, start + input_size_per_partition)
            for name, spec in self.modules.items():
                require_split(name, spec, input_size // input_size_per_partition)
        partitions = layer_partitions(layer, output_partition_sizes, output_size)
        modules = plan_modules(self.modules, partitions, columns)
        for module in modules:
            require_row_borders(module.name, module.spec, module.rows)
        self._stash = WeightStash(modules, dummy=self.config.dummy)
        self._stash.attach(layer)
        self.config.loading.expect()

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Turn what was loaded into run-time weights.

        Raises:
            ReQuantFormatError: a tensor of this layer never came.
            ValueError: the checkpoint names modules that no layer of the model asked for.
        """
        if self._stash is None:
            return
        self.config.require_all_claimed()
        parts, device = self._stash.finish(layer)
        self._stash = None
        self.segments = install_segments(layer, parts, device, self.config, read_share=1.0)

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]`` of this rank, in ``x.dtype``."""
        return segments_linear(layer, self.segments, x, bias)
