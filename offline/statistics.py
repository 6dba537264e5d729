"""What the inputs of the linear layers look like on the calibration set: second moments and mean magnitudes.

The second moment is what a squared error of a layer's output follows from. :func:`input_statistics` counts all tokens
and outputs alike, as GPTQ does; layers that read the same activation (q, k, v; gate, up) then share one
:class:`InputStatistics`, which is found out by looking, not from names. :func:`guided_statistics` weights a token
with how much the loss depends on the layer's output there, as GuidedQuant does (arXiv 2505.07004, one group of
outputs): a token of huge activations that nothing looks at no longer rules.
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .cache import Snapshot, TensorCache, fingerprint
from .models import computing_in
from .path import Observer
from .pqi import GradientMoments, Objective
from .progress import track

__all__ = ["HESSIANS", "InputStatistics", "guided_statistics", "input_statistics"]

HESSIANS = ("guided", "inputs")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class InputStatistics:
    """Moments of the inputs x of a layer over all calibration tokens.

    Attributes:
        hessian: ``E[s x xᵀ]``, float32 ``[in_features, in_features]``: half the Hessian of the squared output error
            with respect to any row of the weight. s is 1, or the mean over outputs of the squared gradient of a
            token's loss with respect to the layer's output.
        mean_abs: ``E[|x|]``, float32 ``[in_features]``.
    """

    hessian: Tensor
    mean_abs: Tensor

    def output_error(self, error: Tensor) -> float:
        """Mean squared error of the layer's output, ``tr(E H Eᵀ)``, for that of its weight."""
        return float(((error @ self.hessian) * error).sum(dtype=torch.float64))

    def to(self, device: torch.device) -> "InputStatistics":
        """The statistics on a device; themselves if they lie there."""
        return replace(self, hessian=self.hessian.to(device), mean_abs=self.mean_abs.to(device))

    def scaled(self, scale: Tensor) -> "InputStatistics":
        """The statistics of ``x · scale``, elementwise."""
        return InputStatistics(self.hessian * scale * scale[:, None], self.mean_abs * scale)


class _Moments:
    """Running sums in float32 for one group of layers with the same input."""

    def __init__(self, features: int, device: torch.device) -> None:
        self.second = torch.zeros(features, features, device=device)
        self.magnitude = torch.zeros(features, device=device)
        self.tokens = torch.zeros((), dtype=torch.int64)

    def add(self, x: Tensor, importance: Tensor | None = None) -> None:
        """Count inputs ``[tokens, features]``, of the given importance ``[tokens]`` or all alike."""
        x = x.float()
        weighted = x if importance is None else x * importance[:, None]
        with torch.autocast(x.device.type, enabled=False):
            if self.second.device == x.device:
                self.second.addmm_(weighted.t(), x)
            else:
                self.second += (weighted.t() @ x).to(self.second.device)
        self.magnitude += x.abs().sum(0).to(self.magnitude.device)
        self.tokens += len(x)

    def state(self) -> dict[str, Tensor]:
        """All that it has added up."""
        return {"second": self.second, "magnitude": self.magnitude, "tokens": self.tokens}

    def result(self) -> dict[str, Tensor]:
        if self.tokens == 0:  # an expert that none was sent to: all its inputs count alike
            return {"hessian": torch.eye(len(self.second), device=self.second.device), "mean_abs": self.magnitude + 1}
        # what is symmetric by definition is made so up to the last bit
        return {
            "hessian": (self.second + self.second.t()) / (2 * int(self.tokens)),
            "mean_abs": self.magnitude / int(self.tokens),
        }


@torch.no_grad()
def input_statistics(
    model: Any,
    layers: Mapping[str, nn.Linear],
    tokens: Tensor,
    *,
    compute: str = "float32",
    accumulate_on: torch.device | None = None,
    cache: TensorCache | None = None,
    label: str = "input statistics",
) -> dict[str, InputStatistics]:
    """Run the calibration set once and collect the statistics of every layer's input.

    Args:
        model: with the weights that the statistics are to be of.
        layers: by name.
        tokens: int64 ``[num_samples, seq_len]``.
        compute: precision of the model, a key of ``COMPUTE_DTYPES``; sums are in float32.
        accumulate_on: device of the sums; None for the model's.
        cache: where results are kept.

    Returns:
        Statistics by layer name; layers with the same input hold the same object.
    """
    leaders = _shared_inputs(model, layers, tokens[:1, :2])
    firsts = {name: layers[name] for name in set(leaders.values())}
    device = accumulate_on or next(model.parameters()).device
    tensors = (cache or TensorCache()).resume(
        "inputs",
        lambda: fingerprint(model.state_dict(), tokens, inputs=sorted(firsts), compute=compute),
        device,
        lambda snapshot: _collect(model, firsts, tokens, compute, device, label, snapshot),
    )
    results = _statistics(tensors, firsts)
    return {name: results[leaders[name]] for name in layers}


def guided_statistics(
    objective: Objective, *, cache: TensorCache | None = None, label: str = "gradients and input statistics"
) -> tuple[GradientMoments, dict[str, InputStatistics]]:
    """Run the calibration set once forward and backward at the original weights.

    Args:
        objective: the model, its layers and the calibration set.
        cache: where results are kept.

    Returns:
        What :meth:`Objective.gradients` returns, and statistics by layer name, of each layer its own.
    """
    device = objective.accumulators
    seq_len = objective.tokens.shape[1]

    def guided(moments: _Moments) -> Observer:
        # the loss is a mean over the tokens of a sequence; that of each is meant
        return lambda x, grad_output: moments.add(x, (grad_output.float() * seq_len).square().mean(1))

    def collect(snapshot: Snapshot) -> dict[str, Tensor]:
        sums = {name: _Moments(layer.in_features, device) for name, layer in objective.layers.items()}
        observers = {name: guided(part) for name, part in sums.items()}
        moments = objective.walk_start(observers, label=label, snapshot=snapshot, state=_state(sums))
        return moments.flat() | _flat(sums)

    tensors = (cache or TensorCache()).resume(
        "gradients_and_inputs", lambda: objective.fingerprint(gradients="with inputs"), device, collect
    )
    return GradientMoments.from_flat(tensors), _statistics(tensors, objective.layers)


def _flat(moments: Mapping[str, _Moments]) -> dict[str, Tensor]:
    unseen = [name for name, moment in moments.items() if moment.tokens == 0]
    if unseen:
        log.warning(
            "%d layers, such as %s, were given no token of the calibration set: all their inputs count alike; "
            "raise --num-samples",
            len(unseen),
            unseen[0],
        )
    return {f"{part}.{name}": tensor for name, moment in moments.items() for part, tensor in moment.result().items()}


def _state(moments: Mapping[str, _Moments]) -> dict[str, Tensor]:
    return {f"{part}.{name}": tensor for name, moment in moments.items() for part, tensor in moment.state().items()}


def _statistics(tensors: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, InputStatistics]:
    return {name: InputStatistics(tensors[f"hessian.{name}"], tensors[f"mean_abs.{name}"]) for name in names}


def _collect(
    model: Any,
    layers: Mapping[str, nn.Linear],
    tokens: Tensor,
    compute: str,
    accumulators: torch.device,
    label: str,
    snapshot: Snapshot,
) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    moments = {name: _Moments(layer.in_features, accumulators) for name, layer in layers.items()}
    hooks = [
        layers[name].register_forward_pre_hook(lambda _, inputs, m=moment: m.add(inputs[0].flatten(0, -2)))
        for name, moment in moments.items()
    ]
    try:
        state = _state(moments)
        first = snapshot.restore(state)
        with computing_in(compute, device):
            rest = track(tokens[first:], label, total=len(tokens) - first, tokens_per_item=tokens.shape[1])
            for number, row in enumerate(rest, start=first):
                model.base_model(row[None].to(device), use_cache=False)  # no head: nobody looks at predictions
                snapshot.offer(number + 1, state)
    finally:
        for hook in hooks:
            hook.remove()
    return _flat(moments)


def _shared_inputs(model: Any, layers: Mapping[str, nn.Linear], tokens: Tensor) -> dict[str, str]:
    """For every layer the first layer that was given the same tensor object; itself if it was given none."""
    # the tensors are kept alive until the end, so that no address is used twice
    seen: dict[int, tuple[str, Tensor]] = {}
    leaders: dict[str, str] = {}

    def look(name: str, x: Tensor) -> None:
        leaders[name] = seen.setdefault(id(x), (name, x))[0]

    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs, n=name: look(n, inputs[0])) for name, layer in layers.items()
    ]
    try:
        model(tokens.to(next(model.parameters()).device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: leaders.get(name, name) for name in layers}
