"""A second device where there is none: tensors that lie on the CPU but say that they lie on "meta".

Every operation checks, as CUDA does, that its tensors lie on one device, and then computes on the CPU. So a whole
conversion can be run as on a GPU, and a tensor that was forgotten on the host is found. Values are the CPU's.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

__all__ = ["DEVICE", "pretend_device"]

DEVICE = torch.device("meta")  # the one other device that autograd serves without a backend
_aten = torch.ops.aten
_COPIES = (_aten._to_copy.default, _aten.copy_.default)
# these take positions from anywhere, also with CUDA
_INDEXING = (_aten.index.Tensor, _aten.index_put_.default, _aten._unsafe_index.Tensor)


class _Elsewhere(Tensor):
    """A tensor on the pretended device; ``held`` has the values."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "_Elsewhere":
        made: _Elsewhere = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
            requires_grad=held.requires_grad,
        )
        made.held = held
        return made

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"Elsewhere({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(op, args, kwargs or {})


class _Mode(TorchDispatchMode):
    """Sees also what makes a tensor from nothing, and moves to and from the device."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(op, args, kwargs or {})


class _Literals(TorchFunctionMode):
    """From Python's numbers to tensors and back: on "meta" values would be lost."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.tensor and torch.device(kwargs.get("device") or "cpu") == DEVICE:
            return torch.tensor(*args, **kwargs | {"device": "cpu"}).to(DEVICE)
        if function is Tensor.tolist and isinstance(args[0], _Elsewhere):
            return args[0].held.tolist()  # a tensor of another class has none
        if getattr(function, "__self__", None) is Tensor.data and len(args) == 2 and isinstance(args[0], _Elsewhere):
            args[0].held = args[1].held  # an assignment to .data replaces only what the wrapper says of itself
        return function(*args, **kwargs)


def _run(op: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [item for item in tree_iter((args, kwargs)) if isinstance(item, Tensor)]
    target = kwargs.get("device")
    away = [isinstance(tensor, _Elsewhere) for tensor in tensors]
    if target is not None:
        target = torch.device(target)
        kwargs = kwargs | {"device": torch.device("cpu")}
    if op not in _COPIES:
        checked = tensors[:1] if op in _INDEXING else [tensor for tensor in tensors if tensor.ndim]
        kinds = {isinstance(tensor, _Elsewhere) for tensor in checked}
        if len(kinds) > 1 or (any(away) and not kinds <= {True}):
            shapes = [("elsewhere" if isinstance(t, _Elsewhere) else "cpu", list(t.shape)) for t in tensors]
            raise RuntimeError(f"{op}: tensors on different devices: {shapes}")
    to_device = target == DEVICE if target is not None else (isinstance(tensors[0], _Elsewhere) if tensors else False)
    if target is None and op not in (*_COPIES, *_INDEXING):
        to_device = any(away)
    result = op(*tree_map(_held, args), **tree_map(_held, kwargs))
    if op is _aten._local_scalar_dense.default:
        return result
    # what is written in place keeps its wrapper
    known = {id(tensor.held): tensor for tensor in tensors if isinstance(tensor, _Elsewhere)}

    def wrap(item: Any) -> Any:
        if not isinstance(item, Tensor) or not to_device:
            return item
        return known[id(item)] if id(item) in known else _Elsewhere(item)

    return tree_map(wrap, result)


def _held(item: Any) -> Any:
    return item.held if isinstance(item, _Elsewhere) else item


def _known(device_type: str) -> str:
    return "cpu" if device_type == DEVICE.type else device_type


@contextmanager
def pretend_device() -> Iterator[torch.device]:
    """A block in which :data:`DEVICE` is a device like another."""
    # autocast knows no such device; what it is asked here is whether it is on
    enabled, autocast = torch.is_autocast_enabled, torch.autocast
    with (
        patch.object(torch, "is_autocast_enabled", lambda device_type="cpu": enabled(_known(device_type))),
        patch.object(
            torch, "autocast", lambda device_type, *args, **kwargs: autocast(_known(device_type), *args, **kwargs)
        ),
        _Mode(),
        _Literals(),
    ):
        yield DEVICE
