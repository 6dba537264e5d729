"""``requant``: convert, inspect, verify, eval, sweep, tables, report, serve, bench, load, soak. One file a command.

Results go to stdout, progress and logs to stderr. Exit status: 0 good, 1 failed, 2 wrong usage.
"""

from typing import Annotated

import typer

from .. import __version__
from . import bench, convert, evaluate, inspect, load, report, serve, soak, sweep, tables, verify

__all__ = ["app", "main"]

app = typer.Typer(
    name="requant",
    help="Low-bit language models with a sparse residual, for vLLM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("convert")(convert.command)
app.command("inspect")(inspect.command)
app.command("verify")(verify.command)
app.command("eval")(evaluate.command)
app.command("sweep")(sweep.command)
app.command("tables")(tables.command)
app.command("report")(report.command)
app.command("plot")(report.plot_command)
# what these do not know is vLLM's
_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
app.command("serve", context_settings=_PASS_ON)(serve.command)
app.command("bench", context_settings=_PASS_ON)(bench.command)
app.command("load", context_settings=_PASS_ON)(load.command)
app.command("soak", context_settings=_PASS_ON)(soak.command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"requant {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Low-bit language models with a sparse residual, for vLLM."""


def main() -> None:
    """Entry point of the console script."""
    app()
