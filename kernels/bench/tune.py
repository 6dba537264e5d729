"""``python -m vllm_requant.kernels.bench --device cuda --tune``: measure which variant of a kernel is the fastest.

For the layers of Llama 3 models, each format and class of batches; see gpu/tuning.py.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..gpu import native, ops, tuning
from ..gpu.weights import NAMES, Weights
from .gpu import Layers, microseconds
from .layers import FORMATS, LLAMA_3, canonical

__all__ = ["tune"]


def tune(models: Sequence[str]) -> None:
    """Measure, print and keep.

    Args:
        models: keys of :data:`LLAMA_3`.
    """
    for shape in dict.fromkeys(shape for model in models for shape in LLAMA_3[model]):
        table: tuning.Table = {}
        for form in FORMATS:
            layers = Layers(form, canonical(form, *shape, "cuda"), shape)
            kind, bits, group_size, state_bits = form
            copies = [
                Weights(*[layer[name] for name in NAMES], *(kind, bits, group_size, state_bits, shape[1], shape[0]))  # type: ignore[call-arg, arg-type]
                for layer in layers.copies
            ]
            entries = {str(size): _best(copies, size) for size in tuning.CLASSES}
            table[f"{kind}{bits}"] = {f"{shape[0]}x{shape[1]}": entries}
            print(f"{shape[0]}x{shape[1]} {kind}{bits}: {entries}", flush=True)
        path = tuning.save(table)  # a shape at a time: what is measured stays, whatever ends the rest
    print(f"written to {path}")


def _best(copies: list[Weights], size: int) -> list[int] | None:
    """The entry of the fastest variant for a batch of the class."""
    w = copies[0]
    x = torch.randn(size if size != 8 else 4, w.in_features, device="cuda").bfloat16()
    calls: dict[tuple[int, ...] | None, Callable[[Weights], Tensor]] = {}
    if size >= 16:
        calls[None] = lambda w: ops.by_panels(x, w)
    if w.kind == "trellis":
        for index, trellis in enumerate(native.trellis_candidates(w, x.shape[0])):
            if size <= 32 and trellis is not None:
                calls[(index,)] = lambda w, v=trellis: native.trellis(w, x, v)  # type: ignore[misc]
    else:
        for matvec in native.matvec_candidates(w, size):
            index = native.MATVEC_VARIANTS.index(matvec._replace(splits=1, blocks=1))
            calls[index, matvec.splits, matvec.blocks] = lambda w, v=matvec: native.matvec(w, x, v)  # type: ignore[misc]
    took = {key: microseconds([lambda w=w: call(w) for w in copies[:24]], 5) for key, call in calls.items()}  # type: ignore[misc]  # noqa: B023
    best = min(took, key=lambda key: took[key])
    return None if best is None else list(best)
