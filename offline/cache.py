"""Costly results kept on disk: neither a conversion that stopped nor one that differs later computes them again.

A file is named by its stage and by a fingerprint of everything that the result depends on, the weights' values
included, so a stale entry cannot be taken for a valid one.
"""

import hashlib
import logging
import time
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from vllm_requant.format.durable import CACHE_LINE, write_safetensors

from . import incidents
from .incidents import Incident
from .lazy import LazyMapping
from .ranks import Ranks, current_ranks

__all__ = ["Snapshot", "TensorCache", "fingerprint", "matrices_changed", "model_fingerprint"]

log = logging.getLogger(__name__)
_SNAPSHOT_SECONDS = 600.0
_STEP = "step"
_INCIDENTS = "incidents"  # in the metadata of a file: what was met when it was made


def fingerprint(*tensors: Tensor | Mapping[str, Tensor], **settings: object) -> str:
    """SHA-256 over names, types, shapes and values of tensors, and over settings.

    Of tensors that a :class:`LazyMapping` knows a digest of, that counts, and they are not made.
    """
    digest = hashlib.sha256(repr(sorted(settings.items())).encode())
    for item in tensors:
        if isinstance(item, LazyMapping) and item.digest is not None:
            for name in item:
                digest.update(f"{name}|{item.digest(name)}|".encode())
            continue
        for name, tensor in {"": item}.items() if isinstance(item, Tensor) else item.items():
            digest.update(f"{name}|{tensor.dtype}|{list(tensor.shape)}|".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


# the matrices' fingerprint of models that live, and by what to see that they are the same still
_matrices: "weakref.WeakKeyDictionary[nn.Module, tuple[dict[str, tuple[int, int]], str]]" = weakref.WeakKeyDictionary()


def model_fingerprint(model: nn.Module) -> str:
    """Of all tensors of a model. Its matrices are read once, and again if they have changed.

    A change through ``parameter.data`` does not show in a matrix: whoever makes one calls :func:`matrices_changed`.
    """
    state = model.state_dict()
    matrices = {name: tensor for name, tensor in state.items() if tensor.ndim >= 2}
    seen = {name: (tensor.data_ptr(), tensor._version) for name, tensor in matrices.items()}
    known = _matrices.get(model)
    if known is None or known[0] != seen:
        known = _matrices[model] = seen, fingerprint(matrices)
    others = {name: tensor for name, tensor in state.items() if name not in matrices}
    return fingerprint(others, matrices=known[1])


def matrices_changed(model: nn.Module) -> None:
    """Weight matrices of a model have been changed in place."""
    _matrices.pop(model, None)


class Snapshot:
    """The state of a long computation, kept every now and then.

    Args:
        path: of the file; None keeps nothing.
        every: seconds between two of them.
    """

    def __init__(self, path: Path | None, every: float) -> None:
        self._path, self._every, self._last = path, every, time.monotonic()

    @property
    def name(self) -> str:
        """Of the computation, apart from all others."""
        return "" if self._path is None else f"{self._path.parent.name}-{self._path.stem}"

    def restore(self, state: Mapping[str, Tensor]) -> int:
        """Copy what was kept into the state's tensors.

        Returns:
            The step that comes next: 0 if nothing was kept.
        """
        if self._path is None or _met(self._path) is None:
            return 0
        kept = _read(self._path, torch.device("cpu"))
        step = int(kept.pop(_STEP))
        for name, tensor in state.items():
            tensor.copy_(kept[name])
        log.info("going on at step %d of what was begun before", step)
        return step

    def offer(self, step: int, state: Mapping[str, Tensor]) -> None:
        """Keep the state before that step, if the last time is long enough ago."""
        if self._path is None or time.monotonic() - self._last < self._every:
            return
        write_safetensors(self._path, {name: t.cpu() for name, t in state.items()} | {_STEP: torch.tensor(step)})
        self._last = time.monotonic()

    def forget(self) -> None:
        """The computation has ended."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


class TensorCache:
    """A folder of named tensors.

    Args:
        folder: created when first written to; None keeps nothing.
        snapshot_every: seconds of a long computation that may be lost.
    """

    def __init__(self, folder: Path | None = None, *, snapshot_every: float = _SNAPSHOT_SECONDS) -> None:
        self.folder, self.snapshot_every = folder, snapshot_every

    @property
    def enabled(self) -> bool:
        return self.folder is not None

    def get(
        self,
        stage: str,
        key: Callable[[], str],
        device: torch.device,
        compute: Callable[[], dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        """The tensors of a stage under a key, computed and stored if they are not there.

        Args:
            stage: what is computed, for people who look at the folder; slashes make folders.
            key: called only if enabled.
            device: where the tensors are wanted.
        """
        return self.resume(stage, key, device, lambda _: compute())

    def resume(
        self,
        stage: str,
        key: Callable[[], str],
        device: torch.device,
        compute: Callable[[Snapshot], dict[str, Tensor]],
        *,
        together: bool = False,
    ) -> dict[str, Tensor]:
        """The same for a long computation, which keeps its state in a snapshot and begins with the one it finds.

        Args:
            together: all processes compute it together, so none may unless all do.
        """
        if self.folder is None:
            return compute(Snapshot(None, self.snapshot_every))
        path = self.folder / stage / f"{key()[:32]}.safetensors"
        ranks = current_ranks() if together else Ranks()
        met = ranks.agree(lambda: _met(path))
        if met is not None:
            incidents.remember(met)
            return _read(path, device)
        snapshot = self._snapshot(path)
        with incidents.collecting() as found:
            made = compute(snapshot)
        if ranks.first:
            _write(path, made, found)
        snapshot.forget()
        ranks.wait()
        return made

    def by_layer(
        self,
        stage: str,
        key: Callable[[], str],
        names: Collection[str],
        device: torch.device,
        compute: Callable[[set[str], Snapshot], Iterable[tuple[str, dict[str, Tensor]]]],
        *,
        lazy: bool = False,
    ) -> Mapping[str, Mapping[str, Tensor]]:
        """Tensors of every layer, a file each.

        Args:
            stage, key, device: as in :meth:`get`.
            names: of the layers.
            compute: makes the tensors of the layers that are missing, and of others if it has to, in any order; each
                is on the disk before the next is asked for.
            lazy: keep nothing in memory, and read a tensor whenever it is asked for.
        """
        if self.folder is None:
            return dict(compute(set(names), Snapshot(None, self.snapshot_every)))
        ending = f"{key()[:32]}.safetensors"
        paths = {name: self.folder / stage / name / ending for name in names}
        ranks = current_ranks()
        met = ranks.agree(lambda: {name: _met(path) for name, path in paths.items()})
        for known in met.values():
            incidents.remember(known or ())
        missing = {name for name, known in met.items() if known is None}
        made = {}
        if missing:
            snapshot = self._snapshot(self.folder / stage / ending)
            for (name, tensors), found in _with_incidents(compute(missing, snapshot)):
                if ranks.first:
                    _write(paths[name], tensors, found)
                if not lazy:
                    made[name] = tensors
                del tensors  # before there are others
            snapshot.forget()
            ranks.wait()
        if lazy:
            return LazyMapping(names, lambda name: _lazily(paths[name], device))
        return {name: made.get(name) or _read(path, device) for name, path in paths.items()}

    def _snapshot(self, path: Path) -> Snapshot:
        """Of what will be a file, for this process."""
        return Snapshot(path.with_name(f"{path.stem}{current_ranks().suffix}.snapshot"), self.snapshot_every)

    def number(
        self, stage: str, key: Callable[[], str], compute: Callable[[], float], *, together: bool = False
    ) -> float:
        """The same for a single number."""

        def tensor() -> dict[str, Tensor]:
            return {"value": torch.tensor(compute(), dtype=torch.float64)}

        cpu = torch.device("cpu")
        return float(self.resume(stage, key, cpu, lambda _: tensor(), together=together)["value"])


def _met(path: Path) -> list[Incident] | None:
    """The incidents that a file knows of; None if there is no file as long as its header says."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            return incidents.from_json((file.metadata() or {}).get(_INCIDENTS, "[]"))
    except SafetensorError:
        log.warning("%s is damaged and will be computed anew", path)
        return None


def _write(path: Path, tensors: Mapping[str, Tensor], found: set[Incident]) -> None:
    write_safetensors(path, tensors, {_INCIDENTS: incidents.to_json(found)} if found else None)
    incidents.remember(found)


Item = TypeVar("Item")


def _with_incidents(items: Iterable[Item]) -> Iterator[tuple[Item, set[Incident]]]:
    """Items, and what was met when each was made."""
    rest = iter(items)
    while True:
        # not around the yield: whoever takes an item would be listened to as well
        with incidents.collecting() as found:
            item = next(rest, None)
        if item is None:
            return
        yield item, found
        del item  # before there is another


def _read(path: Path, device: torch.device) -> dict[str, Tensor]:
    """The tensors of a whole file."""
    log.debug("taken from the cache: %s", path)
    return {name: _own(tensor) for name, tensor in load_file(path, device=str(device)).items()}


def _lazily(path: Path, device: torch.device) -> Mapping[str, Tensor]:
    """The same, each read whenever it is asked for."""
    try:
        file = safe_open(path, framework="pt", device=str(device))
    except SafetensorError:
        raise OSError(f"{path} is damaged: delete it, and go on with --resume") from None
    return LazyMapping(file.keys(), lambda name: _aligned(file.get_tensor(name)))


def _own(tensor: Tensor) -> Tensor:
    """In memory of its own, in the place of that of a mapped file."""
    return tensor.clone()


def _aligned(tensor: Tensor) -> Tensor:
    """A tensor of a mapped file, which stays there if it begins where one in memory could."""
    return tensor if tensor.data_ptr() % CACHE_LINE == 0 else _own(tensor)
