"""``requant soak``: a checkpoint's server and a reference under mixed traffic, good and bad, for long."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ..bench.servers import ServerError, require_vllm
from .output import command_errors, prepare_results, print_json, set_up_logging, work_folder

__all__ = ["command"]

_OURS, _REFERENCE = "ReQuant", "reference"
_MAX_MODEL_LEN = 1024
# a small cache: all of it is used within a minute, after which it adds nothing to memory, and requests have to wait
# and are preempted. Prefix caching is vLLM's default; only contenders for speed go without.
_FLAGS = ("--enable-prefix-caching", "--block-size", "64", "--num-gpu-blocks-override", "48")
_MODEL = "soak"  # the name on both servers, so that both get the very same bytes


def command(
    context: typer.Context,
    checkpoint: Annotated[Path, typer.Argument(metavar="DIR", help="A ReQuant checkpoint.")],
    reference: Annotated[
        Path, typer.Option(metavar="MODEL", help="A folder that vLLM serves without us, the original say.")
    ],
    minutes: Annotated[
        float, typer.Option(min=0.1, help="How long requests are sent; few show growth that would end.")
    ] = 30,
    seed: Annotated[int, typer.Option(help="Of the requests.")] = 0,
    clients: Annotated[int, typer.Option(min=1, help="That ask at the same time.")] = 6,
    work: Annotated[Path | None, typer.Option(metavar="DIR", help="Keep the servers' logs there.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
    output: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Also write soak.json and soak.png there.")
    ] = None,
) -> None:
    """Send real servers good, abandoned and bad requests; every further argument goes to vLLM.

    Fails if a server ends, or if the checkpoint's answers a kind of request as the reference never does, grows in the
    second half, or has requests or cache blocks left afterwards.
    """
    set_up_logging()
    with command_errors():
        require_vllm()
        from ..bench.contenders import Vllm, running
        from ..bench.plots import plot_soak
        from ..bench.soak import soak, table
        from ..bench.traffic import Limits, stream
        from ..format.reader import Checkpoint

        vocab_size = Checkpoint(checkpoint).model_config["vocab_size"]
        if not reference.exists():
            raise FileNotFoundError(f"--reference: {reference} does not exist")
        prepare_results(output)
        with work_folder(work) as folder:
            servers = [
                Vllm(
                    name,
                    model,
                    folder / f"{name}.log",
                    threads=None,
                    max_model_len=_MAX_MODEL_LEN,
                    max_num_seqs=clients,
                    flags=["--served-model-name", _MODEL, *_FLAGS, *context.args],
                )
                for name, model in ((_OURS, checkpoint), (_REFERENCE, reference))
            ]
            with running(servers) as (_, left_out):
                for name, reason in left_out.items():
                    raise ServerError(f"{name}: {reason}")
                limits = Limits(_MODEL, vocab_size, _MAX_MODEL_LEN)
                streams = [stream(limits, seed, number) for number in range(clients)]
                records, problems = soak(servers[0], servers[1], streams, 60 * minutes, _MAX_MODEL_LEN)
        found = {
            "minutes": minutes,
            "seed": seed,
            "clients": clients,
            "vllm_arguments": context.args,
            "passed": not problems,
            "problems": problems,
            "servers": {name: vars(record) for name, record in records.items()},
        }
        if output is not None:
            (output / "soak.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
            plot_soak(records, output / "soak.png")
        if as_json:
            print_json(found)
        else:
            typer.echo(table(records))
            typer.echo("\n".join(f"failed: {problem}" for problem in problems) or "passed")
        if problems:
            raise typer.Exit(1)
