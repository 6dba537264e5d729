"""``python -m vllm_requant.kernels.bench [--json FILE]``: speed of the CPU kernels, torch's beside it.

For every shape, format and batch: microseconds a call (the median of the repeats), weights and bytes of weights a
second, the share of the read bandwidth measured beside it, the speed-up over torch's ``F.linear`` in bfloat16 on
the same shape, and the error against reference.py in float64, relative to the size of the output; for one and for
sixteen also what the residual adds. Large layers rotate through copies that exceed most caches, as the layers of a
large model do; small ones stay in the cache, as those of a small model may.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import cpu, kernel_path, linear, repack
from ..cpu import memory
from . import gpu, tune
from .layers import DENSITIES, DENSITY, FORMATS, LLAMA_3, Format, canonical, residual, weight_of

SHAPES = ((4096, 4096), (14336, 4096), (576, 576), (1536, 576), (576, 1536), (960, 576), (3072, 576))
"""``(out_features, in_features)``; SmolLM2-135M's layers, the last two as vLLM fuses them."""
BATCHES = (1, 4, 16, 64, 512)
RESIDUAL_BATCHES = (1, 16)
"""for which the layer is timed with every share of sparse weights"""
COLD_BYTES = 512 << 20


def seconds(call: Callable[[int], object], budget: float) -> float:
    """Median of the repeats of ``call(i)`` that fit into ``budget`` seconds; at least three.

    Not the shortest: now and then a cache as large as a server's still holds what was read many calls ago.
    """
    call(0)
    took: list[float] = []
    start = time.perf_counter()
    while len(took) < 3 or time.perf_counter() - start < budget:
        begin = time.perf_counter()
        call(len(took))
        took.append(time.perf_counter() - begin)
    return statistics.median(took)


class Reading:
    """What memory delivers to so many threads: measured again and again, since on a shared machine it changes."""

    def __init__(self, threads: int) -> None:
        self.threads, self.block = threads, memory.empty(COLD_BYTES).fill_(1)
        self.measured: list[float] = []

    def bandwidth(self, budget: float) -> float:
        """Bytes a second, of a block larger than the caches."""
        native, start, size = cpu.library(), self.block.data_ptr(), self.block.numel()
        self.measured.append(size / seconds(lambda _: native.requant_read(start, size, self.threads), budget))
        return self.measured[-1]


class Layers:
    """A layer as the kernels take it, and as many copies as it takes to find none in the cache.

    Args:
        form: its format.
        tensors: canonical.
        shape: its output and input features.
        activation_bits: as the kernels take it.
    """

    def __init__(self, form: Format, tensors: dict[str, Tensor], shape: tuple[int, int], activation_bits: int) -> None:
        self.form, self.shape, self.activation_bits = form, shape, activation_bits
        layer = repack(form.kind, tensors, **form.settings, in_features=shape[1], device="cpu")
        self.nbytes = sum(tensor.nbytes for tensor in layer.values())
        self.copies = [layer] + [
            {name: memory.empty(len(packed)).copy_(packed) for name, packed in layer.items()}
            for _ in range(_copies(self.nbytes) - 1)
        ]

    def __call__(self, x: Tensor, copy: int = 0) -> Tensor:
        return linear(
            self.form.kind,
            x,
            self.copies[copy % len(self.copies)],
            out_features=self.shape[0],
            **self.form.settings,
            activation_bits=self.activation_bits,
        )

    def seconds(self, x: Tensor, budget: float) -> float:
        return seconds(lambda i: self(x, i), budget)


def measure(shape: tuple[int, int], budget: float, reading: Reading, activation_bits: int) -> Iterator[dict[str, Any]]:
    """One result for every format and batch on ``shape``."""
    rows, columns = shape
    dense = [torch.randn(rows, columns, dtype=torch.bfloat16)]
    dense += [dense[0].clone() for _ in range(_copies(dense[0].nbytes) - 1)]
    inputs = {batch: torch.randn(batch, columns, dtype=torch.bfloat16) for batch in BATCHES}

    def run_dense(batch: int) -> float:
        x = inputs[batch]
        return seconds(lambda i: torch.nn.functional.linear(x, dense[i % len(dense)]), budget)

    peer = {batch: run_dense(batch) for batch in BATCHES}
    for form in FORMATS:
        tensors = canonical(form, rows, columns)
        by_density = {density: tensors | residual(rows, columns, density) for density in DENSITIES}
        layers = Layers(form, by_density[DENSITY], shape, activation_bits)
        bandwidth = reading.bandwidth(budget)
        timed: dict[float, dict[int, float]] = {}
        for density, stored in by_density.items():
            of_density = layers if density == DENSITY else Layers(form, stored, shape, activation_bits)
            timed[density] = {batch: of_density.seconds(inputs[batch], budget) for batch in RESIDUAL_BATCHES}
        weight = weight_of(form, by_density[DENSITY], columns).double().t()
        for batch, x in inputs.items():
            took = timed[DENSITY].get(batch) or layers.seconds(x, budget)
            exact = x.double() @ weight
            off = layers(x).double() - exact
            yield {
                "out_features": rows,
                "in_features": columns,
                **form._asdict(),
                "density": DENSITY,
                "activation_bits": activation_bits,
                "batch": batch,
                "microseconds": took * 1e6,
                "gweights_per_s": rows * columns / took / 1e9,
                "weight_gbytes_per_s": layers.nbytes / took / 1e9,
                "share_of_read_bandwidth": layers.nbytes / took / bandwidth,
                "bf16_linear_microseconds": peer[batch] * 1e6,
                "speedup_over_bf16_linear": peer[batch] / took,
                "relative_error": float(off.norm() / exact.norm()),
                "residual_cost": {str(d): timed[d][batch] / timed[0.0][batch] - 1 for d in DENSITIES[1:]}
                if batch in RESIDUAL_BATCHES
                else None,
            }


def _copies(nbytes: int) -> int:
    return max(1, COLD_BYTES // nbytes) if nbytes > 4 << 20 else 1


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m vllm_requant.kernels.bench", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    parser.add_argument("--threads", type=int, help="compute threads (default: torch's)")
    parser.add_argument("--budget", type=float, default=0.1, help="seconds spent on one figure (default: 0.1)")
    parser.add_argument("--activation-bits", type=int, choices=(8, 16), default=16, help="default: 16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu; see bench/gpu.py")
    parser.add_argument(
        "--tune",
        nargs="*",
        choices=tuple(LLAMA_3),
        metavar="MODEL",
        help=f"cuda: first measure which kernels to use, and keep that; for layers of Llama 3 {', '.join(LLAMA_3)}",
    )
    options = parser.parse_args()
    if options.device == "cuda":
        if options.tune is not None:
            tune.tune(options.tune or list(LLAMA_3))
        gpu.main(options.json)
        return
    if options.threads:
        torch.set_num_threads(options.threads)
    threads = torch.get_num_threads()
    reading = Reading(threads)
    print(f"{kernel_path('uniform', 'cpu')}, {threads} threads, x in bfloat16")
    head = f"{'shape':>12} {'format':>10} {'batch':>5} {'µs':>9} {'Gw/s':>7} {'GB/s':>6} {'of read':>7} {'x bf16':>6}"
    print(head + f" {'error':>8}  residual of " + ", ".join(f"{density:.2%}" for density in DENSITIES[1:]))
    results = []
    for shape in SHAPES:
        for result in measure(shape, options.budget, reading, options.activation_bits):
            results.append(result)
            costs = (result["residual_cost"] or {}).values()
            print(
                f"{'{out_features}x{in_features}'.format(**result):>12} {'{kind}{bits}'.format(**result):>10}"
                f" {result['batch']:5d} {result['microseconds']:9.1f} {result['gweights_per_s']:7.2f}"
                f" {result['weight_gbytes_per_s']:6.2f} {result['share_of_read_bandwidth']:7.1%}"
                f" {result['speedup_over_bf16_linear']:6.2f} {result['relative_error']:8.1e}  "
                + ", ".join(f"{cost:+.1%}" for cost in costs),
                flush=True,
            )
    if options.json:
        report = {
            "path": kernel_path("uniform", "cpu"),
            "threads": threads,
            "machine": _processor(),
            "torch": torch.__version__,
            "read_gbytes_per_s": statistics.median(reading.measured) / 1e9,
            "results": results,
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def _processor() -> str:
    """What the processor calls itself, where Linux says so."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
