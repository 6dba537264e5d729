"""What the inputs of the linear layers look like on the calibration set: second moments and mean magnitudes.

Layers that read the same activation (q, k, v; gate, up) share one :class:`InputStatistics`; it is found out by
looking, not from names.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .cache import TensorCache, fingerprint
from .models import computing_in
from .progress import track

__all__ = ["InputStatistics", "input_statistics"]


@dataclass(frozen=True)
class InputStatistics:
    """Moments of the inputs x of a layer over all calibration tokens.

    Attributes:
        hessian: ``E[x xᵀ]``, float32 ``[in_features, in_features]``: half the Hessian of the squared output error
            with respect to any row of the weight.
        mean_abs: ``E[|x|]``, float32 ``[in_features]``.
    """

    hessian: Tensor
    mean_abs: Tensor

    def output_error(self, error: Tensor) -> float:
        """Mean squared error of the layer's output, ``tr(E H Eᵀ)``, for that of its weight."""
        return float(((error @ self.hessian) * error).sum(dtype=torch.float64))

    def scaled(self, scale: Tensor) -> "InputStatistics":
        """The statistics of ``x · scale``, elementwise."""
        return InputStatistics(self.hessian * scale * scale[:, None], self.mean_abs * scale)


class _Moments:
    """Running sums for one group of layers with the same input."""

    def __init__(self, features: int, device: torch.device) -> None:
        # summed in float32 over one sequence at a time, in float64 over sequences
        self.second = torch.zeros(features, features, dtype=torch.float64, device=device)
        self.magnitude = torch.zeros(features, dtype=torch.float64, device=device)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        x = x.flatten(0, -2).float()
        with torch.autocast(x.device.type, enabled=False):
            self.second += x.t() @ x
        self.magnitude += x.abs().sum(0)
        self.tokens += len(x)

    def result(self) -> dict[str, Tensor]:
        return {
            "hessian": (self.second / self.tokens).float(),
            "mean_abs": (self.magnitude / self.tokens).float(),
        }


@torch.no_grad()
def input_statistics(
    model: Any,
    layers: Mapping[str, nn.Linear],
    tokens: Tensor,
    *,
    compute: str = "float32",
    cache: TensorCache | None = None,
    label: str = "input statistics",
) -> dict[str, InputStatistics]:
    """Run the calibration set once and collect the statistics of every layer's input.

    Args:
        model: with the weights that the statistics are to be of.
        layers: by name.
        tokens: int64 ``[num_samples, seq_len]``.
        compute: precision of the model, a key of ``COMPUTE_DTYPES``; sums are of float32 or more.
        cache: where results are kept.

    Returns:
        Statistics by layer name; layers with the same input hold the same object.
    """
    leaders = _shared_inputs(model, layers, tokens[:1, :2])
    firsts = {name: layers[name] for name in set(leaders.values())}
    device = next(model.parameters()).device
    tensors = (cache or TensorCache()).get(
        lambda: fingerprint(model.state_dict(), tokens, inputs=sorted(firsts), compute=compute),
        device,
        lambda: _collect(model, firsts, tokens, compute, label),
    )
    results = {name: InputStatistics(tensors[f"{name}.hessian"], tensors[f"{name}.mean_abs"]) for name in firsts}
    return {name: results[leaders[name]] for name in layers}


def _collect(
    model: Any, layers: Mapping[str, nn.Linear], tokens: Tensor, compute: str, label: str
) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    moments = {name: _Moments(layer.in_features, device) for name, layer in layers.items()}
    hooks = [
        layers[name].register_forward_pre_hook(lambda _, inputs, m=moment: m.add(inputs[0]))
        for name, moment in moments.items()
    ]
    try:
        with computing_in(compute, device):
            for row in track(tokens, label, total=len(tokens)):
                model.base_model(row[None].to(device), use_cache=False)  # no head: nobody looks at predictions
    finally:
        for hook in hooks:
            hook.remove()
    return {f"{name}.{part}": tensor for name, moment in moments.items() for part, tensor in moment.result().items()}


def _shared_inputs(model: Any, layers: Mapping[str, nn.Linear], tokens: Tensor) -> dict[str, str]:
    """For every layer the first layer that was given the same tensor object."""
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
    silent = sorted(layers.keys() - leaders.keys())
    if silent:
        raise ValueError(f"{silent[0]} took no part in the forward pass")
    return leaders
