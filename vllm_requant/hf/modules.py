"""Quantized layers as torch modules: stored tensors come in as buffers, and leave for the kernels' layout."""

from typing import Any

import torch
from torch import Tensor, nn

from .. import kernels
from ..format import LayerSpec, QuantizedLayer, ReQuantFormatError

__all__ = ["QuantizedEmbedding", "QuantizedLinear", "QuantizedModule", "TiedHead"]


class QuantizedModule(nn.Module):
    """A layer between the checkpoint and the kernels.

    Until :meth:`repack` it has a buffer for every stored tensor, of the stored type and shape; afterwards run-time
    weights, which belong to one device.

    Args:
        name: in the model, for messages.
        spec: of the layer.
    """

    def __init__(self, name: str, spec: LayerSpec) -> None:
        super().__init__()
        self.name, self.spec = name, spec
        self.weights: dict[str, Tensor] = {}
        for suffix, (dtype, shape) in spec.tensors().items():
            self.register_buffer(suffix, torch.empty(shape, dtype=dtype))

    def repack(self) -> None:
        """From buffers to run-time weights, on the device where they lie.

        Raises:
            ReQuantFormatError: a tensor never came, or breaks the format.
        """
        tensors = dict(self.named_buffers(recurse=False))
        for suffix, tensor in tensors.items():
            # transformers fills what a checkpoint lacks with anything, and marks what it had
            if tensor.is_meta or not getattr(tensor, "_is_hf_initialized", False):
                raise ReQuantFormatError("missing from the checkpoint", tensor=f"{self.name}.{suffix}")
        device = tensors["qweight"].device
        layer = QuantizedLayer(self.spec, {suffix: tensor.cpu() for suffix, tensor in tensors.items()})
        layer.check(name=self.name)
        self.weights = kernels.repack(
            self.spec.kind,
            layer.tensors,
            **self.spec.kernel_settings,
            in_features=self.spec.in_features,
            device=device,
        )
        for suffix in tensors:
            delattr(self, suffix)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        for tensor in self.weights.values():
            if fn(tensor.new_empty(0)).device != tensor.device:
                raise RuntimeError(
                    f"{self.name}: run-time weights are laid out for {tensor.device} and cannot move; load the model "
                    "where it will compute, with from_pretrained(..., device_map=...)"
                )
        return super()._apply(fn, recurse)

    def _multiply(self, x: Tensor) -> Tensor:
        y: Tensor = kernels.linear(
            self.spec.kind, x, self.weights, out_features=self.spec.out_features, **self.spec.kernel_settings
        )
        return y

    def extra_repr(self) -> str:
        spec = self.spec
        return f"{spec.kind}, {spec.in_features} -> {spec.out_features}, {spec.bits_per_weight:.2f} bits a weight"


class QuantizedLinear(QuantizedModule):
    """In place of ``nn.Linear``: ``[..., in_features]`` to ``[..., out_features]`` in the input's type."""

    def __init__(self, name: str, spec: LayerSpec, bias: nn.Parameter | None) -> None:
        super().__init__(name, spec)
        self.bias = bias
        self.in_features, self.out_features = spec.in_features, spec.out_features

    def forward(self, x: Tensor) -> Tensor:
        y = self._multiply(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class QuantizedEmbedding(QuantizedModule):
    """In place of ``nn.Embedding``: int64 ``[...]`` to ``[..., hidden]``.

    Args:
        name, spec: as above.
        dtype: of the result.
        scale: what rows are multiplied with, as Gemma does.
    """

    def __init__(self, name: str, spec: LayerSpec, dtype: torch.dtype, scale: float | None) -> None:
        super().__init__(name, spec)
        self.dtype, self.scale = dtype, scale
        self.num_embeddings, self.embedding_dim = spec.out_features, spec.in_features

    def forward(self, ids: Tensor) -> Tensor:
        rows = kernels.embedding(
            self.spec.kind,
            ids,
            self.weights,
            **self.spec.kernel_settings,
            in_features=self.spec.in_features,
            dtype=self.dtype,
        )
        # rounded to the type of the rows before it is multiplied, as transformers does
        return rows if self.scale is None else rows * torch.tensor(self.scale, dtype=self.dtype, device=rows.device)


class TiedHead(nn.Module):
    """A head that computes with the weights of a quantized embedding."""

    def __init__(self, embedding: QuantizedEmbedding) -> None:
        super().__init__()
        self.of = (embedding,)  # no child: its weights are the embedding's
        self.in_features, self.out_features = embedding.spec.in_features, embedding.spec.out_features

    def forward(self, x: Tensor) -> Tensor:
        return self.of[0]._multiply(x)
