"""Between vLLM's weight loaders and the kernels: collect a layer's stored tensors, keep this rank's part.

vLLM's loaders narrow every tensor by fixed row or column ranges of a parameter of known size, which neither
bit streams nor CSR arrays of data-dependent length allow. So each tensor gets a zero-size parameter under its
stored name, whose loader hands the whole tensor to a :class:`WeightStash`. Once all tensors of a module have
come, the module is checked, cut to this rank and the rest released: no rank ever holds more than one whole
module. vLLM does not notice missing tensors of quantized models; :meth:`WeightStash.finish` does.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from ..format import LayerSpec, QuantizedLayer, ReQuantFormatError
from ..format.rows import synthetic_layer

__all__ = ["ShardId", "StoredModule", "WeightStash"]

ShardId = str | int | tuple[int, ...] | tuple[int, str] | None
"""How vLLM names the part of a fused layer that a tensor belongs to; an expert's number and matrix; None where nothing
is fused."""


@dataclass
class StoredModule:
    """One module of the checkpoint and the part of it that this rank computes.

    Attributes:
        name: module name, for messages.
        spec: as the checkpoint's configuration states it, unsliced.
        shard_ids: the ids under which its tensors arrive.
        rows: output features of this rank, half-open ranges in the order in which they are stacked.
        columns: input features of this rank, None for all.
    """

    name: str
    spec: LayerSpec
    shard_ids: frozenset[ShardId]
    rows: list[tuple[int, int]]
    columns: tuple[int, int] | None = None
    _arrived: dict[str, Tensor] = field(default_factory=dict, repr=False)
    _parts: list[QuantizedLayer] | None = field(default=None, repr=False)

    def add(self, suffix: str, tensor: Tensor) -> None:
        if suffix not in self.spec.tensors():
            raise ReQuantFormatError("does not belong to this layer", tensor=f"{self.name}.{suffix}")
        if self._parts is not None or suffix in self._arrived:
            raise ReQuantFormatError("arrived twice", tensor=f"{self.name}.{suffix}")
        # a copy: some of vLLM's loaders reuse the buffer, and a view would pin the mapped file
        self._arrived[suffix] = tensor.detach().to("cpu", copy=True)
        if len(self._arrived) == len(self.spec.tensors()):
            layer = QuantizedLayer(self.spec, self._arrived)
            layer.check(name=self.name)
            self._parts, self._arrived = self.cut(layer), {}

    def cut(self, layer: QuantizedLayer) -> list[QuantizedLayer]:
        """This rank's part of the whole module, one layer per range of rows.

        Raises:
            ValueError: the kind cannot be cut at these columns.
        """
        if self.rows == [(0, layer.spec.out_features)] and self.columns is None:
            return [layer]
        return [layer.slice(rows, self.columns) for rows in self.rows]

    def take(self, *, dummy: bool) -> list[QuantizedLayer]:
        """Hand over the parts and forget them; with ``dummy`` synthesise what never came."""
        if self._parts is None and dummy and not self._arrived:
            self._parts = self.cut(synthetic_layer(self.spec))
        if self._parts is None:
            missing = ", ".join(sorted(self.spec.tensors().keys() - self._arrived.keys()))
            raise ReQuantFormatError(f"tensors missing from the checkpoint: {missing}", tensor=self.name)
        parts, self._parts = self._parts, None
        return parts


class WeightStash:
    """Receives the tensors of one vLLM layer.

    It must not refer to the vLLM layer: vLLM keeps the parameters' attributes, hence the stash, in a registry
    keyed weakly by the layer, which a reference would keep alive.

    Args:
        modules: the stored modules that make up the layer, in the order of their output features.
        dummy: vLLM runs with ``--load-format dummy``, so no tensor will come.
        prefix: what vLLM puts in front of the suffixes of this layer's tensors.
        others: modules that go to other ranks, but whose tensors vLLM offers to this one, too.
    """

    def __init__(
        self,
        modules: Sequence[StoredModule],
        *,
        dummy: bool,
        prefix: str = "",
        others: Sequence[LayerSpec] = (),
    ) -> None:
        self.modules = list(modules)
        self.dummy = dummy
        self.by_shard = {shard_id: module for module in modules for shard_id in module.shard_ids}
        self._dtypes = {
            prefix + suffix: dtype
            for spec in (*(module.spec for module in modules), *others)
            for suffix, (dtype, _) in spec.tensors().items()
        }
        self._prefix = prefix

    def attach(self, layer: torch.nn.Module) -> None:
        """Register one zero-size parameter per stored tensor, under the suffix that it has on disk."""
        for name, dtype in self._dtypes.items():
            param = torch.nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            param.weight_loader = self.loader(name.removeprefix(self._prefix))  # type: ignore[attr-defined]
            layer.register_parameter(name, param)

    def loader(self, suffix: str) -> Callable[..., object]:
        """The ``weight_loader`` of the parameter of a suffix, as this kind of layer calls it."""
        return partial(self.receive, suffix)

    def receive(
        self, suffix: str, param: torch.nn.Parameter, loaded_weight: Tensor, loaded_shard_id: ShardId = None
    ) -> None:
        """Take a whole tensor.

        Raises:
            ReQuantFormatError: the tensor is unexpected, doubled, or breaks the format.
        """
        if loaded_shard_id in self.by_shard:
            # vLLM may run loaders under the target device as default device
            with torch.device("cpu"):
                self.by_shard[loaded_shard_id].add(suffix, loaded_weight)
            return
        names = ", ".join(module.name for module in self.modules)
        raise ReQuantFormatError(f"arrived for shard {loaded_shard_id!r}, unknown to {names}", tensor=suffix)

    def finish(self, layer: torch.nn.Module) -> tuple[list[QuantizedLayer], torch.device]:
        """Remove the parameters and hand over this rank's parts in order, with the device to put them on.

        Raises:
            ReQuantFormatError: a tensor never came.
        """
        with torch.device("cpu"):
            parts = [part for module in self.modules for part in module.take(dummy=self.dummy)]
        device = getattr(layer, f"{self._prefix}qweight").device  # a tensor that every kind has
        for name in self._dtypes:
            delattr(layer, name)
        return parts, device
