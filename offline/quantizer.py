"""A model's layers and what is known about them, quantized by one base at the precision of each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

import vllm_requant

from .bases import Base, DenseLayer, LayerData, Need
from .cache import TensorCache, fingerprint
from .pqi import GradientMoments
from .progress import track
from .recipe import Precision, Recipe
from .statistics import InputStatistics

__all__ = ["Dense", "LayerQuantizer", "Masks"]

Masks = dict[str, Tensor]
Dense = Mapping[str, DenseLayer]


@dataclass
class LayerQuantizer:
    """The quantizer of all layers of one model.

    Attributes:
        recipe: names the base and its options.
        weights: w by layer, float32 ``[out_features, in_features]``.
        inputs: statistics of the inputs, of layers for which they were collected.
        start: moments of the gradients at w, if they were collected.
        cache: where layers that were quantized without a sparse part are kept.
        precision: of every layer; may be changed between calls.
    """

    recipe: Recipe
    weights: Mapping[str, Tensor]
    inputs: Mapping[str, InputStatistics]
    start: GradientMoments | None
    cache: TensorCache
    precision: dict[str, Precision] = field(init=False)
    _pool: dict[tuple[str, Precision], DenseLayer] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.precision = dict.fromkeys(self.weights, self.recipe.precision)

    def quantize(self, removed: Masks | None, label: str) -> Dense:
        """Quantize every layer.

        Args:
            removed: positions that the sparse part holds; None for none. Layers quantized without are kept and come
                from memory the next time.
            label: for the progress bar.
        """
        if removed is not None:
            return {
                name: self._base(name).quantize(self._layer(name), removed[name])
                for name in track(self.weights, label, total=len(self.weights))
            }
        missing = [name for name in self.weights if (name, self.precision[name]) not in self._pool]
        if missing:
            device = self.weights[missing[0]].device
            tensors = self.cache.get(
                lambda: self._fingerprint(missing), device, lambda: self._quantize_all(missing, label)
            )
            for name in missing:
                spec = self._base(name).spec(*self.weights[name].shape[::-1])
                parts = {suffix: tensors[f"{name}.{suffix}"] for suffix in spec.dense_tensors()}
                self._pool[name, self.precision[name]] = DenseLayer(spec, parts)
        return {name: self._pool[name, self.precision[name]] for name in self.weights}

    def _quantize_all(self, names: Sequence[str], label: str) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for name in track(names, label, total=len(names)):
            dense = self._base(name).quantize(self._layer(name))
            tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in dense.tensors.items()}
        return tensors

    def _fingerprint(self, names: Sequence[str]) -> str:
        bases = {name: self._base(name) for name in names}
        needs = {need for base in bases.values() for need in base.needs}
        seen = [{name: self.weights[name] for name in names}]
        if Need.INPUTS in needs:
            seen.append({name: self.inputs[name].hessian for name in names})
        if Need.FISHER in needs and self.start is not None:
            seen.append({name: self.start.square[name] for name in names})
        settings = {name: sorted(vars(base).items()) for name, base in bases.items()}
        return fingerprint(*seen, base=self.recipe.base, version=vllm_requant.__version__, **settings)

    def refit(self, dense: Dense, removed: Masks, label: str) -> Dense:
        """Quantize every layer again, now that the sparse part is final."""
        return {
            name: self._base(name).refit(self._layer(name), dense[name], removed[name])
            for name in track(self.weights, label, total=len(self.weights))
        }

    def forget(self) -> None:
        """Release the layers that are kept."""
        self._pool.clear()

    def no_masks(self) -> Masks:
        """Masks of an empty sparse part."""
        return {name: torch.zeros_like(weight, dtype=torch.bool) for name, weight in self.weights.items()}

    def restored(self, dense: Dense, masks: Masks) -> dict[str, Tensor]:
        """w̃: dense weights with the masked positions at full precision."""
        return {name: torch.where(masks[name], self.weights[name], dense[name].weight()) for name in dense}

    def error(self, name: str, dense: DenseLayer) -> float:
        """Squared error of the layer's output, or of its weight where nothing is known about the inputs."""
        error = dense.weight() - self.weights[name]
        inputs = self.inputs.get(name)
        if inputs is not None:
            return float(((error @ inputs.hessian) * error).sum(dtype=torch.float64))
        if self.start is not None:
            return float((error.square() * self.start.square[name]).sum(dtype=torch.float64))
        return float(error.square().sum(dtype=torch.float64))

    def _base(self, name: str) -> Base:
        return self.recipe.make_base(self.precision[name])

    def _layer(self, name: str) -> LayerData:
        fisher = self.start.square[name] if self.start is not None else None
        return LayerData(self.weights[name], fisher=fisher, inputs=self.inputs.get(name))
