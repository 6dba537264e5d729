"""Mixtures of experts: one module for every matrix of every expert.

transformers keeps the experts of a block in two tensors of three dimensions. Checkpoints, and vLLM's loaders, name
every expert's matrices as modules of their own, and so does ReQuant: each is quantized like any linear layer.
:func:`separate_experts` gives a transformers model that form. What chooses the experts stays as it is.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["MIXTURES", "Mixture", "SeparateExperts", "model_name", "routed_share", "separate_experts", "stored_name"]


@dataclass(frozen=True)
class Mixture:
    """What is known about the mixtures of an architecture.

    Attributes:
        gate, up, down: what files call an expert's matrices.
        count: what the model's configuration calls the number of experts.
        routers: modules of a block that choose or weigh experts.
        block: what transformers and files call the block's mixture, where they differ.
    """

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    count: str = "num_experts"
    routers: tuple[str, ...] = ("mlp.gate",)
    block: tuple[str, str] | None = None


MIXTURES: dict[str, Mixture] = {
    "mixtral": Mixture("w1", "w3", "w2", count="num_local_experts", block=("mlp", "block_sparse_moe")),
    "qwen2_moe": Mixture(routers=("mlp.gate", "mlp.shared_expert_gate")),
    "qwen3_moe": Mixture(),
}
"""By ``model_type``."""


class SeparateExperts(nn.ModuleList):
    """The experts of a block, each with three linear layers; computes what transformers' module does.

    Args:
        mixture: names the layers.
        gate_up: ``[experts, 2 · intermediate, hidden]``, of which the layers' weights are views.
        down: ``[experts, hidden, intermediate]``, likewise.
        activation: of the gate.
    """

    def __init__(self, mixture: Mixture, gate_up: Tensor, down: Tensor, activation: nn.Module) -> None:
        super().__init__()
        self.mixture = mixture
        for both, last in zip(gate_up, down, strict=True):
            gate, up = both.chunk(2)
            weights = {mixture.gate: gate, mixture.up: up, mixture.down: last}
            self.append(nn.ModuleDict({name: _linear(weight) for name, weight in weights.items()}))
        self.activation = (activation,)  # no child: those are the experts

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sum over each token's experts.

        Args:
            hidden_states: ``[tokens, hidden]``.
            top_k_index: int64 ``[tokens, k]``, the experts of each token.
            top_k_weights: ``[tokens, k]``.

        Returns:
            ``[tokens, hidden]`` in the type of ``hidden_states``.
        """
        (activate,) = self.activation
        result = torch.zeros_like(hidden_states)
        for number in torch.unique(top_k_index).tolist():
            expert: Any = self[number]
            token, place = torch.where(top_k_index == number)
            x = hidden_states[token]
            inner = activate(expert[self.mixture.gate](x)) * expert[self.mixture.up](x)
            y = expert[self.mixture.down](inner) * top_k_weights[token, place, None]
            result = result.index_add(0, token, y.to(result.dtype))
        return result


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def separate_experts(model: Any) -> None:
    """Put :class:`SeparateExperts` in place of every module of experts, without a copy; the model may be on "meta".

    A model without experts, or of an architecture that :data:`MIXTURES` does not know, is left alone.
    """
    mixture = MIXTURES.get(model.config.model_type)
    if mixture is None:
        return
    for name, module in list(model.named_modules()):
        gate_up = getattr(module, "gate_up_proj", None)
        if isinstance(gate_up, nn.Parameter) and gate_up.ndim == 3:
            experts = SeparateExperts(mixture, gate_up.data, module.down_proj.data, module.act_fn)
            model.set_submodule(name, experts.train(module.training))


def routed_share(config: Any) -> float:
    """The share of all tokens that an expert of a model sees on average; 1 for a model without experts."""
    mixture = MIXTURES.get(config.model_type)
    return config.num_experts_per_tok / getattr(config, mixture.count) if mixture else 1.0


def stored_name(config: Any, name: str) -> str:
    """What files call a module or tensor of a model, given transformers' configuration and name."""
    return _renamed(config, name, (0, 1))


def model_name(config: Any, name: str) -> str:
    """Inverse of :func:`stored_name`."""
    return _renamed(config, name, (1, 0))


def _renamed(config: Any, name: str, direction: tuple[int, int]) -> str:
    mixture = MIXTURES.get(config.model_type)
    if mixture is None or mixture.block is None:
        return name
    here, there = (mixture.block[end] for end in direction)
    return name.replace(f".{here}.", f".{there}.")
