"""Passes through a model of which no more than a block is in memory.

A model that was loaded with its weights left in their files is walked block by block: all sequences, at all points of
a path, go through one block before the next, and back the same way. What lies between two blocks is kept on disk for
the way back; sums over a block's layers are finished, and written, before the next block's begin. The sums are those
of :class:`~.pqi.Objective` and :func:`~.statistics.input_statistics`, in the same order.
"""

import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from vllm_requant.format.durable import write_safetensors

from .blocks import Blocks
from .cache import Snapshot
from .losses import sequence_loss
from .path import LayerMoments, LayerSums, MovingLayer, adding_inputs, moving_layers, results
from .pqi import Objective
from .progress import track
from .ranks import current_ranks
from .sharding import ShardedBlocks

__all__ = ["StreamedObjective", "Walk", "streamed_inputs"]

_SUMS_BYTES = 400 << 20  # of sums over layers that are held at a time; where a block's are more, it is passed again


class Activations:
    """What lies between blocks, one file a place; a run that stopped finds there how far it came.

    Args:
        folder: of its own.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, place: str, tensors: list[Tensor]) -> None:
        # a process may have no sequences
        write_safetensors(self._path(place), {"activations": torch.cat(tensors) if tensors else torch.zeros(0)})

    def load(self, place: str) -> list[Tensor]:
        """The tensors ``[1, seq_len, hidden]``, in memory of their own."""
        activations = load_file(self._path(place))["activations"].clone()
        return list(activations.split(1)) if len(activations) else []

    def has(self, place: str) -> bool:
        """Whether all processes kept it."""
        return all(current_ranks().gather(self._path(place).exists()))

    def forget(self, place: str) -> None:
        self._path(place).unlink(missing_ok=True)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, place: str) -> Path:
        return self.folder / f"{place}.safetensors"


class Walk:
    """How passes go through the blocks of a model that stays in its files.

    Args:
        scratch: folder for what lies between blocks.
        sharded: the processes hold parts of every block in memory, and do not read it from the files in every pass.
    """

    def __init__(self, scratch: Path, *, sharded: bool = False) -> None:
        self.scratch, self._kind = scratch, ShardedBlocks if sharded else Blocks
        self._blocks: dict[tuple[int, int, str], Blocks] = {}

    def blocks(self, model: Any, layers: Mapping[str, nn.Linear], row: Tensor, compute: str) -> Blocks:
        """Arguments as for :class:`Blocks`."""
        key = id(model), len(row), compute
        if key not in self._blocks:
            self._blocks[key] = self._kind(model, layers, row, compute)
        return self._blocks[key]

    def forget(self) -> None:
        """The model's weights have changed."""
        self._blocks.clear()


@dataclass(frozen=True)
class StreamedObjective(Objective):
    """F, by passes through one block at a time.

    Attributes:
        walk: how they go.
    """

    lazy: bool = True
    walk: Walk = field(kw_only=True)

    def _blocks(self) -> Blocks:
        return self.walk.blocks(self.model, self.layers, self.tokens[0], self.compute)

    @torch.no_grad()
    def _losses(self, weights: Mapping[str, Tensor], label: str) -> list[float]:
        blocks = self._blocks()
        teachers = self._last(blocks, self.start, f"{label}, original") if self.labels == "model" else None
        losses = []
        for number, (row, hidden) in enumerate(zip(self._rows, self._last(blocks, weights, label), strict=True)):
            teacher = None if teachers is None else blocks.predict(row, teachers[number])
            losses.append(float(sequence_loss(blocks.predict(row, hidden), row, teacher)))
        return current_ranks().whole(losses, len(self.tokens))

    @torch.no_grad()
    def _last(self, blocks: Blocks, weights: Mapping[str, Tensor], label: str) -> list[Tensor]:
        """What the last block makes of each sequence with those weights."""
        hidden = [blocks.embed(row) for row in self._rows]
        ticks = _ticks(len(hidden) * len(blocks), self.tokens.shape[1], label)
        for number in range(len(blocks)):
            with blocks.resident(number), moving_layers(blocks.layers[number], weights) as states:
                for state in states.values():
                    state.t = 1.0
                for item in range(len(hidden)):
                    next(ticks)
                    hidden[item] = blocks.run(number, hidden[item])
        next(ticks, None)  # ends the bar
        return hidden

    def _collect(
        self,
        end: Mapping[str, Tensor],
        path: list[tuple[float, float]],
        squares: bool,
        sums: Callable[[str], LayerSums] | None,
        label: str,
        missing: Collection[str],
        snapshot: Snapshot,
    ) -> Iterator[tuple[str, dict[str, Tensor]]]:
        blocks = self._blocks()
        kept = Activations(self.walk.scratch / snapshot.name)
        self._forward(blocks, kept, end, path, f"{label}, forward")
        end_of_way = min((n for n in range(len(blocks)) if kept.has(f"gradient-{n}")), default=len(blocks))
        if end_of_way == len(blocks):
            self._turn(blocks, kept, path, label)
        gradients = kept.load(f"gradient-{end_of_way}")
        groups = [_groups(layers, missing, squares, sums is not None) for layers in blocks.layers[:end_of_way]]
        ticks = _ticks(len(gradients) * sum(map(len, groups)), self.tokens.shape[1], f"{label}, back")
        for number in reversed(range(end_of_way)):
            with blocks.resident(number), moving_layers(blocks.layers[number], end) as states:
                for group in groups[number]:
                    hidden = kept.load(f"input-{number}")
                    layers = {
                        name: LayerMoments(
                            states[name], len(self.tokens), squares, self.accumulators, sums and sums(name)
                        )
                        for name in group
                    }
                    for item, (x, grad) in enumerate(zip(hidden, gradients, strict=True)):
                        next(ticks)
                        _at(*path[item % len(path)], states, layers)
                        x.requires_grad_(number > 0)
                        blocks.run(number, x).backward(grad)
                        if (item + 1) % len(path) == 0:
                            _end_sequence(layers)
                    yield from _summed(layers)
                    del layers  # before there are others
            if number:
                gradients = [x.grad for x in hidden]  # type: ignore[misc]
                kept.save(f"gradient-{number}", gradients)
            kept.forget(f"gradient-{number + 2}")
        next(ticks, None)  # ends the bar
        kept.remove()

    @torch.no_grad()
    def _forward(
        self,
        blocks: Blocks,
        kept: Activations,
        end: Mapping[str, Tensor],
        path: list[tuple[float, float]],
        label: str,
    ) -> None:
        """Keep the input of every block, and the last one's output, of every sequence at every point of the path."""
        items = [(row, t) for row in self._rows for t, _ in path]
        begin = max((n for n in range(len(blocks) + 1) if kept.has(f"input-{n}")), default=0)
        if begin == 0:
            kept.save("input-0", [blocks.embed(row) for row, _ in items])
        hidden = kept.load(f"input-{begin}")
        ticks = _ticks(len(items) * (len(blocks) - begin), self.tokens.shape[1], label)
        for number in range(begin, len(blocks)):
            with blocks.resident(number), moving_layers(blocks.layers[number], end) as states:
                for item, (_, t) in enumerate(items):
                    next(ticks)
                    for state in states.values():
                        state.t = t
                    hidden[item] = blocks.run(number, hidden[item])
            kept.save(f"input-{number + 1}", hidden)
        next(ticks, None)  # ends the bar

    def _turn(self, blocks: Blocks, kept: Activations, path: list[tuple[float, float]], label: str) -> None:
        """Keep the gradient of each item's loss with respect to the last block's output."""
        place = f"gradient-{len(blocks)}"
        if kept.has(place):
            return
        teachers = None
        if self.labels == "model":
            teachers = self._last(blocks, self.start, f"{label}, original")
        gradients = []
        for item, hidden in enumerate(kept.load(f"input-{len(blocks)}")):
            row = self._rows[item // len(path)]
            with torch.no_grad():
                teacher = None if teachers is None else blocks.predict(row, teachers[item // len(path)])
            hidden.requires_grad_(True)
            sequence_loss(blocks.predict(row, hidden), row, teacher).backward()
            assert hidden.grad is not None
            gradients.append(hidden.grad)
        kept.save(place, gradients)


@torch.no_grad()
def streamed_inputs(
    model: Any,
    layers: Mapping[str, nn.Linear],
    tokens: Tensor,
    compute: str,
    sums: Mapping[str, Callable[[], Any]],
    missing: Collection[str],
    walk: Walk,
    snapshot: Snapshot,
    label: str,
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Statistics of the inputs of some layers.

    Args:
        model, layers: as for :class:`Blocks`.
        sums: by layer, makes what adds up inputs, with ``add(x [tokens, features])``, ``state()`` and ``result()``.
        missing: layers that are still wanted.
        walk: how passes go.
        snapshot: names the computation.
    """
    blocks = walk.blocks(model, layers, tokens[0], compute)
    kept = Activations(walk.scratch / snapshot.name)
    begin = max((n for n in range(len(blocks)) if kept.has(f"input-{n}")), default=0)
    rows = current_ranks().mine(tokens)
    hidden = kept.load(f"input-{begin}") if begin else [blocks.embed(row) for row in rows]
    ticks = _ticks(len(rows) * (len(blocks) - begin), tokens.shape[1], label)
    for number in range(begin, len(blocks)):
        wanted = {name: sums[name]() for name in blocks.layers[number] if name in sums and name in missing}
        with blocks.resident(number), adding_inputs(layers, wanted):
            for item in range(len(hidden)):
                next(ticks)
                hidden[item] = blocks.run(number, hidden[item])
        yield from results(wanted)
        del wanted  # before there are others
        kept.save(f"input-{number + 1}", hidden)
        kept.forget(f"input-{number - 1}")  # another process may not have kept the next one yet
    next(ticks, None)  # ends the bar
    kept.remove()


def _at(t: float, share: float, states: Mapping[str, MovingLayer], layers: Mapping[str, LayerMoments]) -> None:
    for state in states.values():
        state.t = t
    for layer in layers.values():
        layer.at(t, share)


def _end_sequence(layers: Mapping[str, LayerMoments]) -> None:
    for layer in layers.values():
        layer.end_sequence()


def _summed(layers: Mapping[str, LayerMoments]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Results over all processes; the layers add up nothing more."""
    yield from results(layers)
    for layer in layers.values():
        layer.close()


def _groups(layers: Mapping[str, nn.Linear], missing: Collection[str], squares: bool, seconds: bool) -> list[list[str]]:
    """The layers of a block of which sums are missing, in groups whose sums are held at the same time.

    Args:
        layers, missing: by name.
        squares: whether gradients are squared.
        seconds: whether second moments of the inputs are added up too.

    Returns:
        At least one group, of no layers if nothing is missing.
    """
    groups: list[list[str]] = [[]]
    left = _SUMS_BYTES
    for name, layer in layers.items():
        if name not in missing:
            continue
        size = 4 * (layer.weight.numel() * (3 if squares else 1) + (layer.in_features**2 if seconds else 0))
        if size > left and groups[-1]:
            groups.append([])
            left = _SUMS_BYTES
        groups[-1].append(name)
        left -= size
    return groups


def _ticks(passes: int, seq_len: int, label: str) -> Iterator[int]:
    return iter(track(range(passes), label, total=passes, tokens_per_item=seq_len))
