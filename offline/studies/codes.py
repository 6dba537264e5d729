"""What the byte-sum code of the trellis costs beside a Gaussian one, and what it costs to close the strings.

Mean squared error on unit Gaussian values of the best path, each code at its best scale. A random Gaussian table of
one value a state is what the trellis would use if tables were free to decode.

    python -m vllm_requant.offline.studies.codes -o codes.json
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from vllm_requant.kernels.reference import TILE, trellis_code
from vllm_requant.offline.bases.viterbi import trellis_path
from vllm_requant.offline.progress import track

from .table import markdown

__all__ = ["main"]

_STATE_BITS, _BITS = (8, 10, 12, 16), (2, 3, 4)
_OPEN = 256  # length of an open path, as others measure it
_SCALES = tuple(0.80 + 0.04 * step for step in range(10))


def _codes(state_bits: int) -> Iterator[tuple[str, Tensor]]:
    """Values of all states by the name of the code, of unit variance."""
    byte_sum = trellis_code(state_bits)
    yield "byte sum", byte_sum / byte_sum.std()
    gaussian = torch.randn(1 << state_bits, generator=torch.Generator().manual_seed(1))
    yield "Gaussian", (gaussian - gaussian.mean()) / gaussian.std()


def _distortion(values: Tensor, code: Tensor, bits: int, rotations: int) -> float:
    def at(scale: float) -> float:
        found = (code * scale)[trellis_path(values, code * scale, bits, rotations=rotations).long()]
        return float((found - values).square().mean() / values.square().mean())

    return min(map(at, _SCALES))


def main(
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON file.")],
    tiles: Annotated[int, typer.Option(help=f"Strings of {TILE} values to measure on.")] = 96,
) -> None:
    """Measure every size of trellis."""
    values = torch.randn(tiles * TILE, generator=torch.Generator().manual_seed(5))
    trellises = [(state_bits, bits) for state_bits in _STATE_BITS for bits in _BITS]
    rows: list[dict[str, Any]] = []
    for state_bits, bits in track(trellises, "codes", total=len(trellises)):
        for name, code in _codes(state_bits):
            free, closed = (
                _distortion(values.view(-1, length), code, bits, rotations)
                for length, rotations in ((_OPEN, 0), (TILE, 1))
            )
            row = {"state_bits": state_bits, "bits": bits, "code": name, "limit": 4.0**-bits}
            rows.append(row | {"open": free, "closed": closed})
    output.write_text(json.dumps({"values": values.numel(), "rows": rows}, indent=2) + "\n")
    head = ["state bits", "bits", "limit", "code", f"open paths of {_OPEN}", f"closed strings of {TILE}"]
    columns = ("state_bits", "bits", "limit", "code", "open", "closed")
    cells = [[f"{row[key]:.4f}" if isinstance(row[key], float) else str(row[key]) for key in columns] for row in rows]
    typer.echo(markdown(head, cells))


if __name__ == "__main__":
    typer.run(main)
