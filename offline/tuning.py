"""Tuning what a quantized layer has in full precision: scales, tables, and the model's norms.

Codes and sparse positions stay. The model with the quantized weights learns from the original one: the Kullback–Leibler
divergence of its predictions on the calibration set is lowered by Adam. Nothing is stored in more bits. The step is our
own choice; it follows the end-to-end tuning of scales in EfficientQAT (arXiv 2407.11062).
"""

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vllm_requant.format import LutSpec, TrellisSpec, UniformSpec
from vllm_requant.kernels.bitstream import unpack_codes
from vllm_requant.kernels.reference import hadamard_blocks, rotated_trellis, signs

from .bases import DenseLayer, relative_error
from .bases.uniform import SMALLEST_SCALE, column_groups
from .cache import Snapshot, TensorCache, fingerprint
from .models import COMPUTE_DTYPES
from .path import Observer, moving_layers
from .pqi import Objective
from .progress import track

__all__ = ["norm_weights", "tunable", "tune"]

log = logging.getLogger(__name__)
_WARM_UP = 8


class Tunable(ABC):
    """The dense part of a layer as a linear function of its float16 tensor.

    Attributes:
        parameter: that tensor, in float32.
    """

    def __init__(self, dense: DenseLayer, tensor: str) -> None:
        self.dense, self.tensor = dense, tensor
        self.parameter = dense.tensors[tensor].float()

    @abstractmethod
    def weight(self) -> Tensor:
        """float32 ``[out_features, in_features]``."""

    @abstractmethod
    def gradient(self, weight: Tensor) -> Tensor:
        """The gradient of :attr:`parameter` from that of the weight."""

    def result(self) -> DenseLayer:
        """The layer with the parameter as it is now."""
        tensors = self.dense.tensors | {self.tensor: self.parameter.to(torch.float16)}
        return DenseLayer(self.dense.spec, tensors)


class _Uniform(Tunable):
    def __init__(self, dense: DenseLayer) -> None:
        super().__init__(dense, "scales")
        spec = dense.spec
        assert isinstance(spec, UniformSpec)
        group = column_groups(spec.in_features, spec.group_size, self.parameter.device)
        # a product with zeros and ones takes scales to columns, and back, several times as fast as an index
        self.columns = nn.functional.one_hot(group, spec.groups).float().t()
        codes = unpack_codes(dense.tensors["qweight"], spec.bits, spec.in_features).float()
        self.steps = codes - unpack_codes(dense.tensors["qzeros"], spec.bits, spec.groups).float() @ self.columns

    def weight(self) -> Tensor:
        self.parameter.clamp_(min=SMALLEST_SCALE)
        return self.steps * (self.parameter @ self.columns)

    def gradient(self, weight: Tensor) -> Tensor:
        return (weight * self.steps) @ self.columns.t()


class _Lut(Tunable):
    def __init__(self, dense: DenseLayer) -> None:
        super().__init__(dense, "lookup_table")
        assert isinstance(dense.spec, LutSpec)
        self.codes = unpack_codes(dense.tensors["qweight"], dense.spec.bits, dense.spec.in_features)

    def weight(self) -> Tensor:
        return self.parameter.gather(1, self.codes.long())

    def gradient(self, weight: Tensor) -> Tensor:
        return torch.zeros_like(self.parameter).scatter_add_(1, self.codes.long(), weight)


class _Trellis(Tunable):
    """``S_out · H_out · A · H_in · S_in``, whose signs and transforms are one small matrix a block on either side."""

    def __init__(self, dense: DenseLayer) -> None:
        super().__init__(dense, "scales")
        spec = dense.spec
        assert isinstance(spec, TrellisSpec)
        self.spec = spec
        signs_in = signs(dense.tensors["signs_in"], spec.in_features).view(-1, 1, spec.block_in)
        signs_out = signs(dense.tensors["signs_out"], spec.out_features).view(-1, spec.block_out, 1)
        eye_in, eye_out = (torch.eye(block, device=signs_in.device) for block in (spec.block_in, spec.block_out))
        self.right = hadamard_blocks(eye_in, spec.block_in) * signs_in
        self.left = hadamard_blocks(eye_out, spec.block_out) * signs_out
        ones = torch.ones_like(dense.tensors["scales"])
        self.units = rotated_trellis(
            dense.tensors["qweight"], ones, bits=spec.bits, state_bits=spec.state_bits, in_features=spec.in_features
        )

    def weight(self) -> Tensor:
        self.parameter.clamp_(min=0)
        scaled = (self._blocks(self.units) * self.parameter[:, None, :, None]).view_as(self.units)
        turned = torch.empty_like(scaled)
        for at, right in self._columns():
            torch.mm(scaled[:, at], right, out=turned[:, at])
        return self._from_left(self.left, turned)

    def gradient(self, weight: Tensor) -> Tensor:
        turned = self._from_left(self.left.mT, weight)
        products = [(turned[:, at] @ right.t()).mul_(self.units[:, at]) for at, right in self._columns()]
        return torch.stack([product.view(len(self.left), -1).sum(1) for product in products], 1)

    def _from_left(self, blocks: Tensor, matrix: Tensor) -> Tensor:
        """Each block of rows of a matrix, multiplied by its own."""
        return (blocks @ matrix.view(len(blocks), self.spec.block_out, -1)).view_as(matrix)

    def _columns(self) -> Iterator[tuple[slice, Tensor]]:
        """Each block of columns, and the matrix on its right."""
        size = self.spec.block_in
        for number, right in enumerate(self.right):
            yield slice(number * size, (number + 1) * size), right

    def _blocks(self, matrix: Tensor) -> Tensor:
        """``[out_features, in_features]`` as ``[blocks of rows, rows, blocks of columns, columns]``."""
        return matrix.view(-1, self.spec.block_out, self.parameter.shape[1], self.spec.block_in)


def tunable(dense: DenseLayer) -> Tunable:
    """The tunable form of a dense part of any kind."""
    kinds: dict[str, type[Any]] = {"uniform": _Uniform, "lut": _Lut, "trellis": _Trellis}
    made: Tunable = kinds[dense.spec.kind](dense)
    return made


def norm_weights(model: nn.Module, layers: Mapping[str, nn.Linear]) -> list[nn.Parameter]:
    """Weights of one dimension outside the quantized layers, of which biases are not."""
    inside = {id(parameter) for layer in layers.values() for parameter in layer.parameters()}
    return [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.ndim == 1 and name.endswith("weight") and id(parameter) not in inside
    ]


def tune(
    objective: Objective,
    dense: Mapping[str, DenseLayer],
    masks: Mapping[str, Tensor],
    *,
    epochs: int,
    rate: float = 0.005,
    norms: bool = True,
    cache: TensorCache | None = None,
) -> tuple[dict[str, DenseLayer], list[float]]:
    """Tune scales and tables, and the model's norms in place.

    Args:
        objective: the original model and the calibration set.
        dense: layers by name.
        masks: positions that hold the original weight.
        epochs: passes over the calibration set.
        rate: of Adam, in units of each tensor's root mean square times the relative error of its layer's weights (for
            norms, that of all of them): what is nearly right is moved less. It warms up and falls like a cosine.
        norms: whether norms are tuned too; they are rounded to the type they are stored in by whoever stores them.
        cache: where the result is kept, and the state of the optimizer on the way.

    Returns:
        The tuned layers, and the divergence before each step, in nats a token.
    """
    masks = dict(masks)  # asked for at every step
    parts = {name: tunable(layer) for name, layer in dense.items()}
    norm_parameters = norm_weights(objective.model, objective.layers) if norms else []
    originals = tuple((parameter, parameter.data.clone()) for parameter in norm_parameters)
    objective = replace(objective, originals=originals)
    tuned = {f"layer.{name}": part.parameter for name, part in parts.items()}
    tuned |= {f"norm.{number}": parameter.data for number, parameter in enumerate(norm_parameters)}

    def key() -> str:
        codes = {f"{name}.{suffix}": t for name, layer in dense.items() for suffix, t in layer.tensors.items()}
        return objective.fingerprint(tuned=fingerprint(codes, masks), epochs=epochs, rate=rate, norms=norms)

    def compute(snapshot: Snapshot) -> dict[str, Tensor]:
        divergence = _learn(objective, parts, masks, norm_parameters, tuned, epochs, rate, snapshot)
        return tuned | {"divergence": divergence}

    result = (cache or TensorCache()).resume("tuned", key, objective.device, compute)
    for name, tensor in tuned.items():
        tensor.copy_(result[name])
    return {name: part.result() for name, part in parts.items()}, result["divergence"].tolist()


def _learn(
    objective: Objective,
    parts: Mapping[str, Tunable],
    masks: Mapping[str, Tensor],
    norm_parameters: list[nn.Parameter],
    tuned: Mapping[str, Tensor],
    epochs: int,
    rate: float,
    snapshot: Snapshot,
) -> Tensor:
    """Tune in place; the divergence before each step, float64 ``[steps]``."""
    original = objective.start
    computed_in = COMPUTE_DTYPES[objective.compute]

    def placed(name: str) -> Tensor:
        return torch.where(masks[name], original[name].float(), parts[name].weight()).to(computed_in)

    end = {name: placed(name) for name in parts}
    errors = [relative_error(end[name].float(), original[name].float()) for name in parts]
    errors += [math.sqrt(sum(error**2 for error in errors) / len(errors))] * len(norm_parameters)
    optimizer = torch.optim.Adam(
        [
            {"params": [tensor], "lr": rate * error * float(tensor.square().mean().sqrt())}
            for tensor, error in zip(tuned.values(), errors, strict=True)
        ],
        betas=(0.9, 0.95),
    )
    rates = [group["lr"] for group in optimizer.param_groups]
    steps = epochs * len(objective.tokens)
    divergence = torch.zeros(steps, dtype=torch.float64)
    state = {**tuned, "divergence": divergence, **_adam_state(optimizer, tuned)}
    first = snapshot.restore(state)

    def learner(name: str) -> Observer:
        # a layer's gradient is brought down to that of its parameter at once: those of all weights never exist together
        def learn(x: Tensor, grad_output: Tensor) -> None:
            parameter = parts[name].parameter
            gradient = parts[name].gradient((grad_output.t() @ x).float().masked_fill_(masks[name], 0.0))
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

        return learn

    with moving_layers(objective.layers, end) as states:
        for name, layer in states.items():
            layer.observer = learner(name)
            layer.end.copy_(placed(name))
        rest = range(first, steps)
        for step in track(rest, "tuning", total=len(rest), tokens_per_item=objective.tokens.shape[1]):
            row = objective.tokens[step % len(objective.tokens)]
            teacher = objective.teacher(row, states)
            for layer in states.values():
                layer.t = 1.0
            for parameter in norm_parameters:
                parameter.requires_grad_(True)
            loss = objective.divergence(row, teacher)
            loss.backward()
            divergence[step] = float(loss.detach())
            for number, parameter in enumerate(norm_parameters):
                tuned[f"norm.{number}"].grad, parameter.grad = parameter.grad, None
                parameter.requires_grad_(False)
            for group, base_rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = base_rate * _schedule(step, steps)
            optimizer.step()
            optimizer.zero_grad()
            for name in parts:
                states[name].end.copy_(placed(name))
            snapshot.offer(step + 1, state)
    return divergence


def _schedule(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / _WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _adam_state(optimizer: torch.optim.Adam, tuned: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The optimizer's own tensors, which it would else make at its first step."""
    state: dict[str, Tensor] = {}
    for name, tensor in tuned.items():
        own = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(tensor), "exp_avg_sq": torch.zeros_like(tensor)}
        optimizer.state[tensor] = own
        state |= {f"adam.{name}.{part}": value for part, value in own.items()}
    return state
