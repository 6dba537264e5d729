"""``requant serve``: check the checkpoint, then become vLLM's OpenAI-compatible server."""

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from ..bench.servers import require_vllm, server_command, server_environment
from .output import command_errors, set_up_logging

__all__ = ["command", "server_arguments"]


def command(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="DIR", help="A ReQuant checkpoint, or its Hub id.")],
    activation_bits: Annotated[
        Literal["16", "8"],
        typer.Option(help="On a CPU: 16 loses nothing against bfloat16; 8 is faster, and costs accuracy."),
    ] = "16",
) -> None:
    """Serve a checkpoint over the OpenAI API; every further argument goes to vLLM as it is."""
    set_up_logging()
    with command_errors():
        require_vllm()
        if Path(model).exists() or model.startswith((".", "/", "~")):
            from ..format.validation import validate

            validate(model)
    arguments = server_arguments(model, context.args, activation_bits=activation_bits)
    sys.stdout.flush()
    os.execve(arguments[0], arguments, os.environ | server_environment())


def server_arguments(model: str, extra: list[str], *, activation_bits: str = "16") -> list[str]:
    """The command line that serves ``model``.

    Raises:
        BadParameter: both it and ``extra`` say what vLLM takes from one option only.
    """
    ours = []
    if activation_bits != "16":
        if any(argument.replace("_", "-").startswith("--additional-config") for argument in extra):
            raise typer.BadParameter(
                "--activation-bits does not go with --additional-config; "
                f'write {{"requant": {{"activation_bits": {activation_bits}}}}} into that'
            )
        ours = ["--additional-config.requant.activation_bits", activation_bits]
    return server_command(model, [*ours, *extra])
