"""The decoder blocks of a model, run one at a time: a block that has seen all sequences is not needed again.

The model's own code runs, with what is not wanted left out: :meth:`Blocks.embed` makes the input of the first block,
:meth:`Blocks.run` runs one block, :meth:`Blocks.predict` goes from the last block's output to the logits. What a block
is given beside its input (masks, rotations) depends on the length of a sequence only, and is recorded once.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .mapped import release
from .models import computing_in, decoder_blocks

__all__ = ["Blocks"]


class Blocks:
    """The blocks of one model, for sequences of one length.

    Args:
        model: a causal language model.
        layers: the quantized layers, by name.
        row: int64 ``[seq_len]``, any sequence.
        compute: precision of the passes, a key of ``COMPUTE_DTYPES``.
    """

    def __init__(self, model: Any, layers: Mapping[str, nn.Linear], row: Tensor, compute: str) -> None:
        self.model, self.compute = model, compute
        self.device: torch.device = next(model.parameters()).device
        prefix, self.modules = decoder_blocks(model)
        self.called = self.modules  # by the model itself
        self.layers = [
            {name: layer for name, layer in layers.items() if name.startswith(f"{prefix}.{number}.")}
            for number in range(len(self.modules))
        ]
        self._given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def record(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            self._given.append((args, kwargs))
            return hidden

        with torch.no_grad(), self._instead([record] * len(self)):
            self._base(row)

    def __len__(self) -> int:
        return len(self.modules)

    @torch.no_grad()
    def embed(self, row: Tensor) -> Tensor:
        """The first block's input ``[1, seq_len, hidden]`` for a sequence."""
        seen: list[Tensor] = []

        def look(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
            seen.append(hidden)
            return hidden

        with self._instead([look, *[_pass_on] * (len(self) - 1)]):
            self._base(row)
        return seen[0]

    def run(self, number: int, hidden: Tensor) -> Tensor:
        """A block's output, shaped like its input ``[1, seq_len, hidden]``."""
        args, kwargs = self._given[number]
        with computing_in(self.compute, self.device):
            output: Tensor = self.modules[number](hidden, *args, **kwargs)
        return output

    def predict(self, row: Tensor, hidden: Tensor) -> Tensor:
        """Logits ``[seq_len − 1, vocabulary]`` of a sequence of which the last block made ``hidden``."""
        with (
            self._instead([lambda *_, **__: hidden, *[_pass_on] * (len(self) - 1)]),
            computing_in(self.compute, self.device),
        ):
            logits: Tensor = self.model(row[None].to(self.device), use_cache=False).logits[0, :-1]
        return logits

    def _base(self, row: Tensor) -> None:
        with computing_in(self.compute, self.device):
            self.model.base_model(row[None].to(self.device), use_cache=False)

    @contextmanager
    def resident(self, number: int) -> Iterator[None]:
        """A block's weights may be in memory while something is done with it, and are not afterwards."""
        try:
            yield
        finally:
            release(self.modules[number])

    @contextmanager
    def _instead(self, forwards: Sequence[Callable[..., Tensor]]) -> Iterator[None]:
        """Something else in the place of what each block computes."""
        try:
            for module, forward in zip(self.called, forwards, strict=True):
                module.forward = forward  # an attribute of the instance goes before the method of the class
            yield
        finally:
            for module in self.called:
                module.__dict__.pop("forward", None)


def _pass_on(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden
