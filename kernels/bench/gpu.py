"""``python -m vllm_requant.kernels.bench --device cuda``: speed of the kernels of a GPU, cuBLAS's beside it.

For the linear layers of Llama 3 8B, every format and batch: microseconds a call (the median over replays of a CUDA
graph of calls on copies of the layer that together exceed the cache), bytes of weights a second and their share of what
a copy moves, the speed-up over cuBLAS in bfloat16 on the same shape, and the error against reference.py in float64
beside that of a bfloat16 product of the dequantized weight. For one activation also what a residual adds.
"""

import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import kernel_path, linear, repack
from .layers import DENSITIES, DENSITY, FORMATS, LLAMA_3, Format, canonical, residual, weight_of

__all__ = ["main"]

BATCHES = (1, 4, 16, 64, 2048)
COLD_BYTES = 320 << 20


def microseconds(calls: Sequence[Callable[[], object]], replays: int = 9) -> float:
    """Of one of ``calls``, in a graph of all of them: the median over replays."""
    torch.cuda.synchronize()  # another stream does not wait for what made the tensors
    with torch.cuda.stream(torch.cuda.Stream()):
        for call in calls[:2]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times: list[float] = []
    for index in range(replays + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        if index >= 2:
            times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes a second that a copy between two large blocks reads and writes."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_(0, 255)
    target = torch.empty_like(source)
    times: list[float] = []
    for _ in range(11):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(4):
            target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 4e3)
    return 2 * source.numel() / statistics.median(times)


class Layers:
    """Copies of a layer as the kernels take it, so many that none is in the cache when its turn comes."""

    def __init__(self, form: Format, tensors: dict[str, Tensor], shape: tuple[int, int]) -> None:
        self.form, self.shape = form, shape
        layer = repack(form.kind, tensors, **form.settings, in_features=shape[1], device="cuda")
        self.nbytes = sum(tensor.nbytes for name, tensor in layer.items() if name != "locks")
        copies = min(64, max(2, -(-COLD_BYTES // self.nbytes)))
        self.copies = [layer]
        self.copies += [{name: tensor.clone() for name, tensor in layer.items()} for _ in range(copies - 1)]

    def __call__(self, x: Tensor, copy: int = 0) -> Tensor:
        return linear(self.form.kind, x, self.copies[copy], out_features=self.shape[0], **self.form.settings)

    def microseconds(self, x: Tensor) -> float:
        count = len(self.copies) if x.shape[0] <= 64 else 2
        return microseconds([partial(self, x, i) for i in range(count)])


def measure(
    shape: tuple[int, int], formats: Sequence[Format], batches: Sequence[int], bandwidth: float
) -> Iterator[dict[str, Any]]:
    """One result for every format and batch on ``shape``."""
    rows, columns = shape
    generator = torch.Generator("cuda").manual_seed(0)
    inputs = {batch: torch.randn(batch, columns, device="cuda", generator=generator).bfloat16() for batch in batches}
    dense = [
        torch.randn(rows, columns, device="cuda").bfloat16() for _ in range(max(2, (400 << 20) // (rows * columns * 2)))
    ]
    peer = {batch: microseconds([partial(torch.mm, x, w.t()) for w in dense]) for batch, x in inputs.items()}
    del dense
    for form in formats:
        alone: dict[float, float] = {}
        dense_part = canonical(form, rows, columns, "cuda")
        for density in sorted(DENSITIES, key=DENSITY.__eq__):  # the last is what the rest is measured on
            tensors = dense_part | residual(rows, columns, density, "cuda")
            layers = Layers(form, tensors, shape)
            alone[density] = layers.microseconds(inputs[1])
        weight = weight_of(form, tensors, columns)
        exact_weight, rounded = weight.double().t(), weight.bfloat16().t()
        for batch, x in inputs.items():
            took = alone[density] if batch == 1 else layers.microseconds(x)
            exact = x.double() @ exact_weight
            off, peer_off = layers(x).double() - exact, (x @ rounded).double() - exact
            yield {
                "out_features": rows,
                "in_features": columns,
                **form._asdict(),
                "density": density,
                "batch": batch,
                "microseconds": took,
                "weight_gbytes_per_s": layers.nbytes / took / 1e3,
                "share_of_copy_bandwidth": layers.nbytes / took * 1e6 / bandwidth,
                "cublas_bf16_microseconds": peer[batch],
                "speedup_over_cublas_bf16": peer[batch] / took,
                "relative_error": float(off.norm() / exact.norm()),
                "relative_error_of_bf16_product": float(peer_off.norm() / exact.norm()),
                "residual_cost": {str(d): alone[d] / alone[0.0] - 1 for d in DENSITIES[1:]} if batch == 1 else None,
            }
        del weight, exact_weight, rounded, layers, tensors


def main(output: Path | None, shapes: Sequence[tuple[int, int]] = LLAMA_3["8b"]) -> None:
    """Print a table and write the results, by default into the folder ``results`` beside this file."""
    name, bandwidth = torch.cuda.get_device_name(), copy_bandwidth()
    print(f"{name}, {kernel_path('uniform', 'cuda')}, a copy moves {bandwidth / 1e9:.0f} GB/s, x in bfloat16")
    head = f"{'shape':>12} {'format':>10} {'batch':>5} {'µs':>8} {'GB/s':>6} {'of copy':>7} {'x bf16':>6} {'error':>8}"
    print(f"{head} (bf16)    residual of " + ", ".join(f"{density:.2%}" for density in DENSITIES[1:]))
    if output is None:
        output = Path(__file__).parent / "results" / f"{name.lower().replace(' ', '-')}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        "device": name,
        "path": kernel_path("uniform", "cuda"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "copy_gbytes_per_s": bandwidth / 1e9,
    }
    results = []
    for shape in shapes:
        for result in measure(shape, FORMATS, BATCHES, bandwidth):
            results.append(result)
            costs = (result["residual_cost"] or {}).values()
            print(
                f"{'{out_features}x{in_features}'.format(**result):>12} {'{kind}{bits}'.format(**result):>10}"
                f" {result['batch']:5d} {result['microseconds']:8.1f} {result['weight_gbytes_per_s']:6.0f}"
                f" {result['share_of_copy_bandwidth']:7.1%} {result['speedup_over_cublas_bf16']:6.2f}"
                f" {result['relative_error']:8.1e} {result['relative_error_of_bf16_product']:8.1e}  "
                + ", ".join(f"{cost:+.1%}" for cost in costs),
                flush=True,
            )
        # a shape at a time: what is measured stays, whatever ends the rest
        output.write_text(json.dumps(report | {"results": results}, indent=1) + "\n")
    print(f"written to {output}")
