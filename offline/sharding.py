"""Decoder blocks of which every process holds a part, put together while a block runs (PyTorch FSDP2).

The original model stays in its files; layers are quantized from there. What passes go through are copies of its
blocks, which :func:`torch.distributed.fsdp.fully_shard` divides among the processes, in the memory of the device.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from .blocks import Blocks
from .models import decoder_blocks
from .progress import track

__all__ = ["ShardedBlocks"]


class ShardedBlocks(Blocks):
    """Blocks of a model, divided among all processes; arguments as for :class:`Blocks`."""

    def __init__(self, model: Any, layers: Mapping[str, nn.Linear], row: Tensor, compute: str) -> None:
        super().__init__(model, layers, row, compute)
        prefix, _ = decoder_blocks(model)
        own = []
        for module in track(self.modules, "sharding", total=len(self.modules)):
            block = copy.deepcopy(module)
            fully_shard(block)
            assert isinstance(block, FSDPModule)
            # many sequences pass a block before the next: it stays whole until then
            block.set_reshard_after_forward(False)
            block.set_reshard_after_backward(False)
            own.append(block)
        self.modules = nn.ModuleList(own)
        self.layers = [
            {name: block.get_submodule(name.removeprefix(f"{prefix}.{number}.")) for name in names}  # type: ignore[misc]
            for number, (block, names) in enumerate(zip(own, self.layers, strict=True))
        ]

    @contextmanager
    def resident(self, number: int) -> Iterator[None]:
        block = self.modules[number]
        assert isinstance(block, FSDPModule)
        block.unshard()
        try:
            yield
        finally:
            block.reshard()
