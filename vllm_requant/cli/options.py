"""Options that several commands have."""

from typing import Annotated

import typer

__all__ = ["Device", "LowMemory"]

Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1; auto takes a GPU if there is one.")]
LowMemory = Annotated[
    bool,
    typer.Option("--low-memory", help="Compute activations twice, collect statistics in host memory (see --device)."),
]
