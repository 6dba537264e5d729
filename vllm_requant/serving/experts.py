"""Quantized mixtures of experts: every expert's matrices are stored modules, loaded and cut like any linear layer.

A tensor-parallel rank holds its part of every expert, an expert-parallel one all of some experts. vLLM routes tokens
and sums up ranks; here a token's experts are computed.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

from ..format import LayerSpec
from ..format.splitting import require_row_borders, require_split
from ..kernels import experts as kernels
from ..kernels.gpu import experts as gpu
from ..kernels.gpu.weights import expert_of, stack
from .segments import Segment, joined, make_segments, parts_linear, register_segments, report_ready, with_weights
from .stash import StoredModule, WeightStash

if TYPE_CHECKING:
    from .config import RequantConfig

__all__ = ["RequantExpertsMethod", "expert_modules"]


def on_cpu(device: torch.device) -> bool:
    """Whether experts of a layer on this device are computed by the kernels' own op."""
    return torch.device(device).type == "cpu"


def expert_modules(layer: RoutedExperts, prefix: str) -> dict[tuple[int, str], str]:
    """The modules that the experts of a layer consist of.

    Args:
        layer: knows how the checkpoint of its architecture calls them.
        prefix: of the layer; vLLM may build the experts one module deeper than checkpoints name them.

    Returns:
        Names by number of the expert and vLLM's name of the matrix: w1 is gate, w3 is up, w2 is down.
    """
    experts = prefix.removesuffix(".routed_experts")
    matrices = {"w1": layer.ckpt_gate_proj_name, "w3": layer.ckpt_up_proj_name, "w2": layer.ckpt_down_proj_name}
    return {
        (number, shard): f"{experts}.{number}.{name}"
        for number in range(layer.moe_config.num_logical_experts)
        for shard, name in matrices.items()
        if name is not None
    }


class ExpertStash(WeightStash):
    """A stash whose tensors arrive as vLLM's loader of experts hands them over."""

    def loader(self, suffix: str) -> Any:
        return partial(self.receive_expert, suffix)

    def receive_expert(
        self,
        suffix: str,
        param: torch.nn.Parameter,
        loaded_weight: Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        """The ``weight_loader`` of a parameter; what belongs to experts of other ranks is let go."""
        here = (expert_id, shard_id) in self.by_shard
        if here:
            self.receive(suffix, param, loaded_weight, (expert_id, shard_id))
        return here if return_success else None


class RequantExpertsMethod(FusedMoEMethodBase):
    """The method of the experts of one block.

    Args:
        config: the checkpoint's quantization config in vLLM.
        moe: vLLM's own of the layer.
        modules: the stored modules by number of the expert and name of the matrix, see :func:`expert_modules`.
    """

    def __init__(
        self, config: "RequantConfig", moe: FusedMoEConfig, modules: Mapping[tuple[int, str], tuple[str, LayerSpec]]
    ) -> None:
        super().__init__(moe)
        self.config = config
        self.modules = dict(modules)
        # gate and up, and down: of every expert, or of all in one
        self.segments: list[tuple[tuple[Segment, ...], tuple[Segment, ...]]] = []
        self.stacked: tuple[tuple[Segment, ...], tuple[Segment, ...]] | None = None
        self.intermediate = 0
        self.activation = ""
        self._stashes: tuple[ExpertStash, ExpertStash] | None = None

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> FusedMoEQuantConfig | None:
        return None  # describes vLLM's own kernels

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register the stashes; sizes are vLLM's, ``num_experts`` those of this rank.

        Raises:
            ValueError: the model asks of its experts what is not implemented; the sizes differ from the checkpoint's,
                or cannot be split over the ranks.
        """
        self.activation, self.intermediate = layer.activation.value, intermediate_size_per_partition
        self._refuse_unsupported(layer)
        ranks, rank = self.moe.tp_size, self.moe.tp_rank
        total = ranks * intermediate_size_per_partition
        part = (rank * intermediate_size_per_partition, (rank + 1) * intermediate_size_per_partition)
        first: dict[int, list[StoredModule]] = {}
        second: dict[int, StoredModule] = {}
        for (number, shard), (name, spec) in self.modules.items():
            wanted = (hidden_size, total) if shard == "w2" else (total, hidden_size)
            if (spec.out_features, spec.in_features) != wanted:
                raise ValueError(
                    f"{name} is {[spec.out_features, spec.in_features]} in the checkpoint, "
                    f"the model's experts have {list(wanted)}"
                )
            local = layer.expert_map_manager.map_global_to_local(number)
            if local < 0:
                continue
            ids = frozenset({(number, shard)})
            if shard == "w2":
                if ranks > 1:
                    require_split(name, spec, ranks)
                columns = part if ranks > 1 else None
                second[local] = StoredModule(name, spec, ids, [(0, spec.out_features)], columns)
            else:
                require_row_borders(name, spec, [part])
                first.setdefault(local, []).append(StoredModule(name, spec, ids, [part]))
        specs = [(shard, spec) for (_, shard), (_, spec) in self.modules.items()]
        self._stashes = (
            ExpertStash(
                [module for local in range(num_experts) for module in first[local]],
                dummy=self.config.dummy,
                prefix="w13_",
                others=[spec for shard, spec in specs if shard != "w2"],
            ),
            ExpertStash(
                [second[local] for local in range(num_experts)],
                dummy=self.config.dummy,
                prefix="w2_",
                others=[spec for shard, spec in specs if shard == "w2"],
            ),
        )
        for stash in self._stashes:
            stash.attach(layer)
        self.config.loading.expect()

    def _refuse_unsupported(self, layer: RoutedExperts) -> None:
        problems = {
            f"the activation {self.activation}": self.activation not in kernels.ACTIVATIONS,
            "experts without a gate": not self.moe.is_act_and_mul,
            "experts with biases": self.moe.has_bias,
            "activations with limits": layer.swiglu_limit is not None or layer.swiglu_alpha is not None,
            "routing weights on inputs": layer.apply_router_weight_on_input,
            "LoRA adapters on experts": self.moe.is_lora_enabled,
        }
        for what, present in problems.items():
            if present:
                raise ValueError(f"{layer.layer_name}: {what} cannot be combined with quantized experts")

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Turn what was loaded into run-time weights.

        Raises:
            ReQuantFormatError: a tensor never came.
            ValueError: the checkpoint names modules that no layer of the model asked for.
        """
        if self._stashes is None:
            return
        self.config.require_all_claimed()
        stashes, self._stashes = self._stashes, None
        (first, device), (second, _) = (stash.finish(layer) for stash in stashes)
        share = layer.top_k / layer.global_num_experts
        made = [
            (
                make_segments(first[2 * number : 2 * number + 2], device, self.config, read_share=share),
                make_segments([down], device, self.config, read_share=share),
            )
            for number, down in enumerate(second)
        ]
        if on_cpu(device):
            packed = [([weights["packed"] for _, weights in both], last[0][1]["packed"]) for both, last in made]
            for name, tensor in kernels.join(packed).items():
                layer.register_parameter(f"experts_{name}", torch.nn.Parameter(tensor, requires_grad=False))
        elif all(_of_one_format([expert[i] for expert in made], device) for i in range(2)):
            both, last = (
                [
                    (parts[0][0], stack([weights for _, weights in parts]))
                    for parts in zip(*(expert[i] for expert in made), strict=True)
                ]
                for i in range(2)
            )
            self.stacked = register_segments(layer, both, "experts_w13_"), register_segments(layer, last, "experts_w2_")
        else:
            self.segments = [
                (
                    register_segments(layer, both, f"expert{number}_w13_"),
                    register_segments(layer, last, f"expert{number}_w2_"),
                )
                for number, (both, last) in enumerate(made)
            ]
        report_ready(self.config, device)

    def apply(
        self,
        layer: RoutedExperts,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        """``[tokens, hidden]`` to this rank's part of the routed experts' sum; vLLM adds shared experts itself."""
        ids = topk_ids if layer.expert_map is None else layer.expert_map[topk_ids]
        if self.stacked is not None and gpu.takes(x, ids):
            return self._chosen_experts(layer, self.stacked, x, topk_weights, ids)
        if self.stacked is None and not self.segments:
            return kernels.packed_experts(
                x,
                topk_weights,
                ids,
                {"packed": layer.experts_packed, "pieces": layer.experts_pieces},
                intermediate=self.intermediate,
                activation=self.activation,
                activation_bits=self.config.activation_bits,
            )
        return self._every_expert(layer, x, topk_weights, ids)

    def _chosen_experts(
        self,
        layer: RoutedExperts,
        stacked: tuple[tuple[Segment, ...], tuple[Segment, ...]],
        x: Tensor,
        routing: Tensor,
        ids: Tensor,
    ) -> Tensor:
        """Every token through its own experts, without the host's knowing which these are."""

        def products(segments: tuple[Segment, ...], x: Tensor, share: int) -> Tensor:
            return joined(
                [
                    gpu.linear(
                        segment.kind,
                        x,
                        ids.flatten(),
                        weights,
                        share=share,
                        out_features=segment.out_features,
                        **segment.settings,
                    )
                    for segment, weights in with_weights(layer, segments)
                ]
            )

        gate, up = products(stacked[0], x, ids.shape[1]).float().chunk(2, dim=-1)
        inner = (kernels.ACTIVATIONS[self.activation](gate) * up).to(x.dtype)
        y = products(stacked[1], inner, 1).view(*ids.shape, -1)
        return (y.float() * routing[:, :, None]).sum(1).to(x.dtype)

    def _every_expert(self, layer: RoutedExperts, x: Tensor, routing: Tensor, ids: Tensor) -> Tensor:
        """All tokens through all experts: where that is no more work, or no kernel finds a token's own."""
        activate = kernels.ACTIVATIONS[self.activation]
        result = torch.zeros_like(x, dtype=torch.float32)
        for number, (both, down) in enumerate(self._experts(layer)):
            gate, up = parts_linear(both, x).float().chunk(2, dim=-1)
            y = parts_linear(down, (activate(gate) * up).to(x.dtype))
            result += y.float() * (routing * (ids == number)).sum(1, keepdim=True)
        return result.to(x.dtype)

    def _experts(self, layer: RoutedExperts) -> Iterator[list[list[tuple[Segment, dict[str, Tensor]]]]]:
        """Every expert's segments and their run-time tensors: gate and up, and down."""
        if self.stacked is None:
            for expert in self.segments:
                yield [with_weights(layer, segments) for segments in expert]
            return
        whole = [with_weights(layer, segments) for segments in self.stacked]
        for number in range(len(whole[0][0][1]["codes"])):
            yield [[(segment, expert_of(weights, number)) for segment, weights in parts] for parts in whole]


def _of_one_format(experts: Sequence[Sequence[tuple[Segment, Mapping[str, Tensor]]]], device: torch.device) -> bool:
    """Whether a kernel finds the experts that tokens are sent to: all have the same segments, of its kinds."""
    first = [segment for segment, _ in experts[0]]
    same = all([segment for segment, _ in expert] == first for expert in experts)
    return same and all(gpu.serves(segment.kind, segment.in_features, device) for segment in first)
