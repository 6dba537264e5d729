"""A model's layers and what is known about them, quantized by one base at the precision of each."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

import vllm_requant

from .bases import Base, DenseLayer, LayerData, Need
from .cache import TensorCache, fingerprint
from .lazy import LazyMapping, Positions, each
from .pqi import GradientMoments
from .progress import track
from .ranks import current_ranks
from .recipe import Precision, Recipe
from .statistics import InputStatistics

__all__ = ["Dense", "LayerQuantizer", "Masks"]

Masks = Positions
Dense = Mapping[str, DenseLayer]


@dataclass
class LayerQuantizer:
    """The quantizer of all layers of one model.

    Attributes:
        recipe: names the base and its options.
        weights: w by layer, ``[out_features, in_features]``.
        inputs: statistics of the inputs, of layers for which they were collected.
        start: moments of the gradients at w, if they were collected.
        cache: where layers that were quantized without a sparse part are kept.
        refit_first: whether layers are refitted as soon as they are quantized, so that what is chosen later fits the
            errors that remain.
        lazy: keep nothing of all layers in memory; what the cache holds is read whenever it is asked for.
        precision: of every layer; may be changed between calls.
    """

    recipe: Recipe
    weights: Mapping[str, Tensor]
    inputs: Mapping[str, InputStatistics]
    start: GradientMoments | None
    cache: TensorCache
    refit_first: bool = False
    lazy: bool = False
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
        quantized = self._quantized(removed)
        if self.lazy or removed is not None:
            return self._tracked(quantized, label)
        missing = [name for name in self.weights if (name, self.precision[name]) not in self._pool]
        for name in track(missing, label, total=len(missing)):
            self._pool[name, self.precision[name]] = quantized(name)
        return {name: self._pool[name, self.precision[name]] for name in self.weights}

    def _tracked(self, make: Callable[[str], DenseLayer], label: str) -> Dense:
        """What is made of each layer; everything is made once, and kept in the cache if not in memory."""
        made = {}
        own = current_ranks().mine(list(self.weights))
        for name in track(own, label, total=len(own)):
            layer = make(name)
            if not self.lazy:
                made[name] = layer
        current_ranks().wait()
        return LazyMapping(self.weights, make) if self.lazy else made

    def _quantized(self, removed: Masks | None) -> Callable[[str], DenseLayer]:
        """What quantizes a layer, or takes it from the cache, at the precision that it has now."""
        bases = {name: self._base(name) for name in self.weights}  # a lazy layer may be asked for later

        @functools.cache  # of all that it stands for a key is computed once
        def key(name: str) -> str:
            base = bases[name]
            needs = base.needs | (base.refit_needs if self.refit_first else frozenset())
            given = {} if removed is None else {"removed": removed[name]}
            return _key(base, self._layer(name), needs, given, refit=self.refit_first)

        def compute(name: str) -> dict[str, Tensor]:
            base, layer = bases[name], self._layer(name)
            mask = None if removed is None else removed[name]
            dense = base.quantize(layer, mask)
            if self.refit_first:
                dense = base.refit(layer, dense, _no_mask(layer.weight) if mask is None else mask)
            return dense.tensors

        def quantized(name: str) -> DenseLayer:
            tensors = self.cache.get(f"quantized/{name}", lambda: key(name), self._device, lambda: compute(name))
            return DenseLayer(bases[name].spec(*self.weights[name].shape[::-1]), tensors)

        return quantized

    def expected_error(self, precision: Precision, label: str) -> dict[str, float]:
        """About the error of every layer at a precision, comparable between precisions of one layer only."""
        base = self.recipe.make_base(precision)

        def error(name: str) -> float:
            layer = self._layer(name)
            return self.cache.number(
                f"expected_error/{name}",
                lambda: _key(base, layer, layer.known, {}),  # errors are those of whatever is known
                lambda: base.expected_error(layer),
            )

        own = current_ranks().mine(list(self.weights))
        errors = {name: error(name) for name in track(own, label, total=len(own))}
        everywhere = {name: value for part in current_ranks().gather(errors) for name, value in part.items()}
        return {name: everywhere[name] for name in self.weights}

    def refit(self, dense: Dense, removed: Masks, label: str) -> Dense:
        """Quantize every layer again, now that the sparse part is final."""

        bases = {name: self._base(name) for name in self.weights}

        @functools.cache
        def key(name: str) -> str:
            base, given = bases[name], dense[name].tensors | {"removed": removed[name]}
            return _key(base, self._layer(name), base.needs | base.refit_needs, given)

        def compute(name: str) -> dict[str, Tensor]:
            return bases[name].refit(self._layer(name), dense[name], removed[name]).tensors

        def refitted(name: str) -> DenseLayer:
            tensors = self.cache.get(f"refitted/{name}", lambda: key(name), self._device, lambda: compute(name))
            return DenseLayer(dense[name].spec, tensors)

        return self._tracked(refitted, label)

    def forget(self) -> None:
        """Release the layers that are kept."""
        self._pool.clear()

    def no_masks(self) -> Masks:
        """Masks of an empty sparse part."""
        return Positions.empty({name: weight.shape for name, weight in self.weights.items()}, self._device)

    def restored(self, dense: Dense, masks: Masks) -> Mapping[str, Tensor]:
        """w̃: dense weights with the masked positions at full precision.

        In float32, or if the recipe computes in bfloat16 in the type of the original, which halves them.
        """
        dtype = torch.float32 if self.recipe.compute == "float32" else None

        def restore(name: str) -> Tensor:
            weight = self.weights[name]
            return torch.where(masks[name], weight.float(), dense[name].weight()).to(dtype or weight.dtype)

        indices = masks.indices()

        def digest(name: str) -> str:
            spec, tensors = dense[name]
            return fingerprint(indices[name], tensors, spec=spec, dtype=dtype)

        return each(self.weights, restore, lazy=self.lazy, digest=digest)

    @property
    def _device(self) -> torch.device:
        return next(iter(self.weights.values())).device

    def _base(self, name: str) -> Base:
        return self.recipe.make_base(self.precision[name])

    def _layer(self, name: str) -> LayerData:
        weight = self.weights[name]
        # what was collected may lie on another device
        fisher = self.start.square[name].to(weight.device) if self.start is not None else None
        inputs = self.inputs[name].to(weight.device) if name in self.inputs else None
        return LayerData(weight.float(), fisher=fisher, inputs=inputs)


def _key(base: Base, layer: LayerData, needs: frozenset[Need], given: Mapping[str, Tensor], **settings: object) -> str:
    """Of what a base makes of a layer from what it needs to know, and of further tensors."""
    seen: list[Tensor] = [layer.weight]
    if Need.INPUTS in needs:
        inputs = layer.require_inputs()
        seen += [inputs.hessian, inputs.mean_abs]
    if Need.FISHER in needs:
        seen.append(layer.require_fisher())
    version = vllm_requant.__version__
    return fingerprint(*seen, given, base=base.name, version=version, **settings, **vars(base))


def _no_mask(weight: Tensor) -> Tensor:
    return torch.zeros((), dtype=torch.bool, device=weight.device).expand_as(weight)
