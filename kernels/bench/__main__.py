"""``python -m vllm_requant.kernels.bench [--json FILE]``: speed of the CPU kernels, torch's beside it.

For every shape, kind, width and batch: microseconds a call (the minimum of several repeats), weights and bytes
of weights a second, the share of the read bandwidth measured in this run, and the speed-up over torch's
``F.linear`` in bfloat16 on the same shape. Large layers rotate through copies that exceed most caches, as the
layers of a large model do; small ones stay in the cache, as those of a small model may.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import cpu, kernel_path, linear, repack
from ..bitstream import pack_codes

SHAPES = ((4096, 4096), (14336, 4096), (576, 576), (1536, 576), (576, 1536), (960, 576), (3072, 576))
"""``(out_features, in_features)``; SmolLM2-135M's layers, the last two as vLLM fuses them."""

FORMATS = (
    ("uniform", 2, 64),
    ("uniform", 3, 64),
    ("uniform", 4, 128),
    ("uniform", 8, 128),
    ("lut", 2, 0),
    ("lut", 3, 0),
    ("lut", 4, 0),
)
BATCHES = (1, 16, 512)
DENSITY = 0.0005
COLD_BYTES = 256 << 20


def canonical(kind: str, rows: int, columns: int, bits: int, group_size: int, density: float) -> dict[str, Tensor]:
    """Random canonical tensors of a layer."""
    generator = torch.Generator().manual_seed(0)

    def codes(count: int) -> Tensor:
        return pack_codes(torch.randint(1 << bits, (rows, count), dtype=torch.uint8, generator=generator), bits)

    tensors = {"qweight": codes(columns)}
    if kind == "uniform":
        groups = -(-columns // group_size)
        tensors["scales"] = torch.rand(rows, groups, generator=generator).mul(0.01).add(0.001).half()
        tensors["qzeros"] = codes(groups)
    else:
        tensors["lookup_table"] = torch.randn(rows, 1 << bits, generator=generator).half()
    mask = torch.rand(rows, columns, generator=generator) < density
    if mask.any():
        indptr = torch.zeros(rows + 1, dtype=torch.int32)
        indptr[1:] = mask.sum(1).cumsum(0)
        tensors["sparse_indptr"] = indptr
        tensors["sparse_indices"] = mask.nonzero()[:, 1].to(torch.uint16)
        tensors["sparse_values"] = torch.randn(int(indptr[-1]), generator=generator).half()
    return tensors


def seconds(call: Callable[[int], object], budget: float) -> float:
    """Shortest of the repeats of ``call(i)`` that fit into ``budget`` seconds; at least three."""
    call(0)
    best, start, i = float("inf"), time.perf_counter(), 0
    while i < 3 or time.perf_counter() - start < budget:
        begin = time.perf_counter()
        call(i)
        best = min(best, time.perf_counter() - begin)
        i += 1
    return best


def read_bandwidth(threads: int) -> float:
    """Bytes a second that ``threads`` threads read from a block larger than the caches."""
    block = torch.ones(256 << 20, dtype=torch.uint8)
    native = cpu.library()
    return block.numel() / seconds(lambda _: native.requant_read(block.data_ptr(), block.numel(), threads), 1.0)


def measure(shape: tuple[int, int], budget: float, bandwidth: float) -> Iterator[dict[str, Any]]:
    """One result for every format and batch on ``shape``."""
    rows, columns = shape
    dense = [torch.randn(rows, columns, dtype=torch.bfloat16)]
    dense += [dense[0].clone() for _ in range(_copies(dense[0].nbytes) - 1)]
    inputs = {batch: torch.randn(batch, columns, dtype=torch.bfloat16) for batch in BATCHES}

    def run_dense(batch: int) -> float:
        x = inputs[batch]
        return seconds(lambda i: torch.nn.functional.linear(x, dense[i % len(dense)]), budget)

    peer = {batch: run_dense(batch) for batch in BATCHES}
    for kind, bits, group_size in FORMATS:
        layer = repack(
            kind,
            canonical(kind, rows, columns, bits, group_size, DENSITY),
            bits=bits,
            group_size=group_size,
            in_features=columns,
            device="cpu",
        )
        nbytes = sum(tensor.nbytes for tensor in layer.values())
        layers = [layer] + [
            {name: tensor.clone() for name, tensor in layer.items()} for _ in range(_copies(nbytes) - 1)
        ]

        for batch, x in inputs.items():
            took = _time_linear(kind, x, layers, rows, bits, group_size, budget)
            yield {
                "out_features": rows,
                "in_features": columns,
                "kind": kind,
                "bits": bits,
                "group_size": group_size,
                "density": DENSITY,
                "batch": batch,
                "microseconds": took * 1e6,
                "gweights_per_s": rows * columns / took / 1e9,
                "weight_gbytes_per_s": nbytes / took / 1e9,
                "share_of_read_bandwidth": nbytes / took / bandwidth,
                "bf16_linear_microseconds": peer[batch] * 1e6,
                "speedup_over_bf16_linear": peer[batch] / took,
            }


def _time_linear(
    kind: str, x: Tensor, layers: list[dict[str, Tensor]], rows: int, bits: int, group_size: int, budget: float
) -> float:
    settings = {"out_features": rows, "bits": bits, "group_size": group_size}
    return seconds(lambda i: linear(kind, x, layers[i % len(layers)], **settings), budget)


def _copies(nbytes: int) -> int:
    return max(1, COLD_BYTES // nbytes) if nbytes > 4 << 20 else 1


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m vllm_requant.kernels.bench", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    parser.add_argument("--threads", type=int, help="compute threads (default: torch's)")
    parser.add_argument("--budget", type=float, default=0.1, help="seconds spent on one figure (default: 0.1)")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    threads = torch.get_num_threads()
    bandwidth = read_bandwidth(threads)
    print(f"{kernel_path('uniform', 'cpu')}, {threads} threads, reads {bandwidth / 1e9:.1f} GB/s, x in bfloat16")
    print(f"{'shape':>12} {'format':>10} {'batch':>5} {'µs':>9} {'Gw/s':>7} {'GB/s':>6} {'of read':>7} {'x bf16':>6}")
    results = []
    for shape in SHAPES:
        for result in measure(shape, options.budget, bandwidth):
            results.append(result)
            print(
                f"{'{out_features}x{in_features}'.format(**result):>12} {'{kind}{bits}'.format(**result):>10}"
                f" {result['batch']:5d} {result['microseconds']:9.1f} {result['gweights_per_s']:7.2f}"
                f" {result['weight_gbytes_per_s']:6.2f} {result['share_of_read_bandwidth']:7.1%}"
                f" {result['speedup_over_bf16_linear']:6.2f}",
                flush=True,
            )
    if options.json:
        report = {
            "path": kernel_path("uniform", "cpu"),
            "threads": threads,
            "machine": platform.processor() or platform.machine(),
            "torch": torch.__version__,
            "read_gbytes_per_s": bandwidth / 1e9,
            "results": results,
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
