"""Linear layers whose weight lies anywhere on the line from the original to the quantized one.

The weight ``w + t (w̃ − w)`` is made when a layer runs and again when it is differentiated, and its gradient goes
straight into an accumulator: beside w, w̃ and the accumulators, a pass holds one layer's weight at a time.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vllm_requant.format.sparse import all_finite

from . import incidents
from .ranks import current_ranks

__all__ = [
    "NOT_FINITE",
    "LayerMoments",
    "LayerSums",
    "MovingLayer",
    "Observer",
    "adding_inputs",
    "moving_layers",
    "results",
]

NOT_FINITE = "what calibration adds up is not finite"

Observer = Callable[[Tensor, Tensor], None]
"""``(x [tokens, in_features], gradient of the output [tokens, out_features])``, in the precision of the pass"""


@dataclass
class MovingLayer:
    """The state of one layer.

    Attributes:
        start, end: w and w̃, ``[out_features, in_features]``, of any floating types.
        t: where between them the layer computes.
        share: what gradients are multiplied with before they are added up.
        gradient: float32 sum of gradients; None collects none.
        observer: sees what every backward pass brings to the layer.
    """

    start: Tensor
    end: Tensor
    t: float = 0.0
    share: float = 1.0
    gradient: Tensor | None = None
    observer: Observer | None = None
    # a graph is built only if something in it asks for a gradient; the first layers' input does not
    _anchor: Tensor = field(default_factory=lambda: torch.zeros((), requires_grad=True))

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The weight at ``t`` in ``dtype``."""
        if self.t == 0.0:
            return self.start.to(dtype)
        if self.t == 1.0:
            return self.end.to(dtype)
        if self.start.dtype == self.end.dtype == dtype:
            return torch.lerp(self.start, self.end, self.t)  # in float32 inside, and rounded once
        return self.start.to(torch.float32, copy=True).lerp_(self.end.float(), self.t).to(dtype)

    def collect(self, grad_output: Tensor, x: Tensor) -> None:
        """Add ``share · grad_outputᵀ x``, and tell the observer."""
        x, grad_output = x.flatten(0, -2), grad_output.flatten(0, -2)
        if self.gradient is not None:
            product = grad_output.t() @ x
            self.gradient.add_(product.to(self.gradient.device), alpha=self.share)
        if self.observer is not None:
            self.observer(x, grad_output)


class LayerSums(Protocol):
    """Something that is added up over the passes through a layer."""

    def observe(self, x: Tensor, grad_output: Tensor) -> None:
        """See what a backward pass brings to the layer, as an :data:`Observer`."""

    def state(self) -> dict[str, Tensor]:
        """All that it has added up, in place."""

    def result(self) -> dict[str, Tensor]:
        """What it comes to."""


class LayerMoments:
    """Moments over sequences of a layer's path-averaged gradient, and other sums, while passes go through the layer.

    Args:
        layer: through which they go.
        count: sequences.
        squares: collect second moments too.
        device: of what is added up.
        sums: something else that is.
    """

    def __init__(
        self, layer: MovingLayer, count: int, squares: bool, device: torch.device, sums: LayerSums | None
    ) -> None:
        self._layer, self._count, self._sums = layer, count, sums
        self.gradient = torch.zeros(layer.start.shape, dtype=torch.float32, device=device)
        self.square = torch.zeros_like(self.gradient) if squares else None
        # of one sequence, or of all where nothing is squared
        layer.gradient = torch.zeros_like(self.gradient) if squares else self.gradient
        layer.observer = None if sums is None else sums.observe

    def at(self, t: float, share: float) -> None:
        """The next passes are at ``t`` and count so much."""
        self._layer.t = t
        self._layer.share = share / self._count if self.square is None else share

    def end_sequence(self) -> None:
        """All passes of a sequence are through."""
        if self.square is not None:
            own = self._layer.gradient
            assert own is not None
            self.gradient.add_(own, alpha=1 / self._count)
            self.square.addcmul_(own, own, value=1 / self._count)
            own.zero_()

    def close(self) -> None:
        """What passes bring to the layer is no longer added up."""
        self._layer.gradient = self._layer.observer = None

    def state(self) -> dict[str, Tensor]:
        """All that was added up after the end of a sequence."""
        return self._moments() | ({} if self._sums is None else self._sums.state())

    def result(self) -> dict[str, Tensor]:
        """Float32 "gradient", "square" if it was asked for, and what the other sums come to."""
        if not all(map(all_finite, self._moments().values())):
            incidents.note(NOT_FINITE, "its gradients count as zero")
            for tensor in self._moments().values():
                tensor.zero_()
        return self._moments() | ({} if self._sums is None else self._sums.result())

    def _moments(self) -> dict[str, Tensor]:
        return {"gradient": self.gradient} | ({} if self.square is None else {"square": self.square})


def results(sums: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """What sums of each layer come to, by ``result()``, over the sequences of all processes."""
    for each in sums.values():
        current_ranks().add_up(each.state())
    for name, each in sums.items():
        with incidents.about(name):
            made = each.result()
        yield name, made
        del made  # it may be large, and whoever took it may be done with it


class _MovingLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, bias: Tensor | None, layer: MovingLayer) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x)
        return nn.functional.linear(x, layer.weight(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, None, None, None]:
        (grad_output,) = grad_outputs
        (x,) = ctx.saved_tensors
        layer: MovingLayer = ctx.layer
        layer.collect(grad_output, x)
        grad_input = grad_output @ layer.weight(grad_output.dtype) if ctx.needs_input_grad[0] else None
        return grad_input, None, None, None


@contextmanager
def adding_inputs(layers: Mapping[str, nn.Linear], sums: Mapping[str, Any]) -> Iterator[None]:
    """Let some layers' sums see the inputs of every pass through them, ``add(x [tokens, in_features])``."""
    hooks = [
        layers[name].register_forward_pre_hook(lambda _, inputs, m=each: m.add(inputs[0].flatten(0, -2)))
        for name, each in sums.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def moving_layers(layers: Mapping[str, nn.Linear], end: Mapping[str, Tensor]) -> Iterator[dict[str, MovingLayer]]:
    """Let layers compute with the weights of their :class:`MovingLayer` while a block runs.

    Args:
        layers: of a model; their own weights are the start and stay as they are.
        end: w̃ by name.
    """
    states = {name: MovingLayer(layer.weight.data, end[name].to(layer.weight.device)) for name, layer in layers.items()}

    def forward_of(layer: nn.Linear, state: MovingLayer) -> Any:
        def forward(x: Tensor) -> Tensor:
            if torch.is_autocast_enabled(x.device.type):
                x = x.to(torch.get_autocast_dtype(x.device.type))
            return _MovingLinear.apply(x, state._anchor, layer.bias, state)

        return forward

    try:
        for name, layer in layers.items():
            # an attribute of the instance goes before the method of the class
            layer.forward = forward_of(layer, states[name])  # type: ignore[method-assign]
        yield states
    finally:
        for layer in layers.values():
            layer.__dict__.pop("forward", None)
        states.clear()  # w̃ goes with the block
