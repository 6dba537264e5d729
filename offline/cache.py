"""Costly results kept on disk: conversions that differ in what comes after them need not compute them again.

The key is a fingerprint of everything that the result depends on, the weights' values included, so a stale entry
cannot be taken for a valid one.
"""

import hashlib
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = ["TensorCache", "fingerprint"]

log = logging.getLogger(__name__)


def fingerprint(*tensors: Tensor | Mapping[str, Tensor], **settings: object) -> str:
    """SHA-256 over names, types, shapes and values of tensors, and over settings."""
    digest = hashlib.sha256(repr(sorted(settings.items())).encode())
    for item in tensors:
        for name, tensor in {"": item}.items() if isinstance(item, Tensor) else item.items():
            digest.update(f"{name}|{tensor.dtype}|{list(tensor.shape)}|".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class TensorCache:
    """A folder of named tensors.

    Args:
        folder: created when first written to; None keeps nothing.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder

    @property
    def enabled(self) -> bool:
        return self.folder is not None

    def get(
        self, key: Callable[[], str], device: torch.device, compute: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """The tensors under ``key``, computed and stored if they are not there; ``key`` is called only if enabled."""
        if self.folder is None:
            return compute()
        path = self.folder / f"{key()}.safetensors"
        if path.is_file():
            try:
                tensors = load_file(path, device=str(device))
                log.debug("taken from the cache: %s", path)
                return tensors
            except SafetensorError:
                log.warning("%s is damaged and will be computed anew", path)
        tensors = compute()
        self.folder.mkdir(parents=True, exist_ok=True)
        staging = path.with_suffix(f".{os.getpid()}.partial")  # another process may be writing the same
        save_file(tensors, staging)
        staging.replace(path)
        return tensors
