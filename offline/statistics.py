"""What the inputs of the linear layers look like on the calibration set: second moments and mean magnitudes.

The second moment is what a squared error of a layer's output follows from. :func:`input_statistics` counts all tokens
and outputs alike, as GPTQ does; layers that read the same activation (q, k, v; gate, up) then share one
:class:`InputStatistics`, which is found out by looking, not from names. :func:`guided_statistics` weights a token
with how much the loss depends on the layer's output there, as GuidedQuant does (arXiv 2505.07004, one group of
outputs): a token of huge activations that nothing looks at no longer rules.
"""

import functools
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vllm_requant.format.sparse import all_finite

from . import incidents
from .cache import Snapshot, TensorCache, fingerprint, model_fingerprint
from .lazy import LazyMapping, each
from .models import computing_in
from .path import NOT_FINITE, adding_inputs, results
from .pqi import GradientMoments, Kept, Objective
from .progress import track
from .ranks import current_ranks
from .streaming import Walk, streamed_inputs

__all__ = ["HESSIANS", "InputStatistics", "guided_statistics", "input_statistics"]

HESSIANS = ("guided", "inputs")
_ALIKE = "all its inputs count alike"
_PANEL = 1024  # rows and columns of a large matrix that are worked on at a time
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
        return InputStatistics((self.hessian * scale).mul_(scale[:, None]), self.mean_abs * scale)


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
        """The statistics, and the number of tokens."""
        finite = all_finite(self.second) and all_finite(self.magnitude)
        if not finite:
            incidents.note(NOT_FINITE, _ALIKE)
        if self.tokens == 0:  # an expert that none was sent to; there may be hundreds, which one line tells of
            incidents.note("no token of the calibration set came here", _ALIKE, level=logging.DEBUG)
        if not finite or self.tokens == 0:
            hessian, mean_abs = torch.eye(len(self.second), device=self.second.device), torch.ones_like(self.magnitude)
        else:
            # what is symmetric by definition is made so up to the last bit
            hessian = _add_transpose_(self.second).div_(2 * int(self.tokens))
            mean_abs = self.magnitude / int(self.tokens)
        return {"hessian": hessian, "mean_abs": mean_abs, "tokens": self.tokens}


def _add_transpose_(matrix: Tensor) -> Tensor:
    """``A + Aᵀ`` in the place of A: the matrix may be larger than all else."""
    panels = [slice(first, first + _PANEL) for first in range(0, len(matrix), _PANEL)]
    for number, rows in enumerate(panels):
        for columns in panels[number:]:
            both = matrix[rows, columns] + matrix[columns, rows].t()
            matrix[rows, columns] = both
            matrix[columns, rows] = both.t()
    return matrix


class _Guided(_Moments):
    """Of which a token counts as much as its loss depends on the layer's output."""

    def __init__(self, features: int, device: torch.device, seq_len: int) -> None:
        super().__init__(features, device)
        self.seq_len = seq_len

    def observe(self, x: Tensor, grad_output: Tensor) -> None:
        # the loss is a mean over the tokens of a sequence; that of each is meant
        self.add(x, (grad_output.float() * self.seq_len).square().mean(1))


@torch.no_grad()
def input_statistics(
    model: Any,
    layers: Mapping[str, nn.Linear],
    tokens: Tensor,
    *,
    compute: str = "float32",
    accumulate_on: torch.device | None = None,
    cache: TensorCache | None = None,
    walk: Walk | None = None,
    label: str = "input statistics",
) -> Mapping[str, InputStatistics]:
    """Run the calibration set once and collect the statistics of every layer's input.

    Args:
        model: with the weights that the statistics are to be of.
        layers: by name.
        tokens: int64 ``[num_samples, seq_len]``.
        compute: precision of the model, a key of ``COMPUTE_DTYPES``; sums are in float32.
        accumulate_on: device of the sums; None for the model's.
        cache: where results are kept.
        walk: for a model that stays in its files: how passes go through its blocks.

    Returns:
        Statistics by layer name; layers with the same input hold the same object.
    """
    leaders = _shared_inputs(model, layers, tokens[:1, :2])
    firsts = {name: layers[name] for name in set(leaders.values())}
    device = accumulate_on or next(model.parameters()).device

    def collect(missing: Collection[str], snapshot: Snapshot) -> Iterator[tuple[str, dict[str, Tensor]]]:
        sums = {name: functools.partial(_Moments, layer.in_features, device) for name, layer in firsts.items()}
        if walk is None:
            return _collect(model, firsts, tokens, compute, sums, label, snapshot)
        return streamed_inputs(model, layers, tokens, compute, sums, missing, walk, snapshot, label)

    kept = (cache or TensorCache()).by_layer(
        "inputs",
        lambda: fingerprint(tokens, model=model_fingerprint(model), inputs=sorted(firsts), compute=compute),
        firsts,
        device,
        collect,
        lazy=walk is not None,
    )
    _warn_of_unseen([name for name in kept if not kept[name]["tokens"]])
    statistics = _statistics(kept)
    return each(layers, lambda name: statistics[leaders[name]], lazy=walk is not None)


def guided_statistics(
    objective: Objective, *, cache: TensorCache | None = None, label: str = "gradients and input statistics"
) -> tuple[GradientMoments, Mapping[str, InputStatistics]]:
    """Run the calibration set once forward and backward at the original weights.

    Args:
        objective: the model, its layers and the calibration set.
        cache: where results are kept.

    Returns:
        What :meth:`Objective.gradients` returns, and statistics by layer name, of each layer its own.
    """
    device, seq_len = objective.accumulators, objective.tokens.shape[1]
    kept = objective.walk_start(
        "gradients_and_inputs",
        lambda name: _Guided(objective.layers[name].in_features, device, seq_len),
        cache=cache,
        label=label,
    )
    _warn_of_unseen([name for name in kept if not kept[name]["tokens"]])
    return GradientMoments.of(kept), _statistics(kept)


def _warn_of_unseen(names: list[str]) -> None:
    if names:
        log.warning(
            "%d layers, such as %s, were given no token of the calibration set: %s; raise --num-samples",
            len(names),
            names[0],
            _ALIKE,
        )


def _statistics(kept: Kept) -> Mapping[str, InputStatistics]:
    def of(name: str) -> InputStatistics:
        tensors = kept[name]
        return InputStatistics(tensors["hessian"], tensors["mean_abs"])

    return each(kept, of, lazy=isinstance(kept, LazyMapping))


def _collect(
    model: Any,
    layers: Mapping[str, nn.Linear],
    tokens: Tensor,
    compute: str,
    sums: Mapping[str, Callable[[], _Moments]],
    label: str,
    snapshot: Snapshot,
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    device = next(model.parameters()).device
    moments = {name: make() for name, make in sums.items()}
    state = {f"{part}.{name}": t for name, moment in moments.items() for part, t in moment.state().items()}
    first = snapshot.restore(state)
    rows = current_ranks().mine(tokens)
    with adding_inputs(layers, moments), computing_in(compute, device):
        rest = track(rows[first:], label, total=len(rows) - first, tokens_per_item=tokens.shape[1])
        for number, row in enumerate(rest, start=first):
            model.base_model(row[None].to(device), use_cache=False)  # no head: nobody looks at predictions
            snapshot.offer(number + 1, state)
    yield from results(moments)


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
