"""``requant bench``: how fast a checkpoint is served, beside its peers."""

import logging
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from ..bench.servers import require_vllm
from .options import named_models
from .output import command_errors, print_json, set_up_logging, work_folder

__all__ = ["command"]

_OURS = "ReQuant"
log = logging.getLogger(__name__)


def command(
    context: typer.Context,
    checkpoint: Annotated[Path, typer.Argument(metavar="DIR", help="A ReQuant checkpoint.")],
    peers: Annotated[
        bool,
        typer.Option("--peers", help="Also its weights in vLLM's bfloat16 and int4, and in llama.cpp's Q4_0."),
    ] = False,
    peer: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=MODEL", help="Also a folder for vLLM, or a .gguf file for llama.cpp; repeatable."),
    ] = None,
    node_folder: Annotated[
        Path, typer.Option(help="Where `npm install node-llama-cpp` ran; llama.cpp comes from there.")
    ] = Path(),
    threads: Annotated[
        int | None, typer.Option(min=1, help="Compute threads of all, on a CPU; otherwise vLLM's choice, all cores.")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of the prompt of the prefill figure.")] = 512,
    new_tokens: Annotated[int, typer.Option(min=8, help="Tokens that a request decodes.")] = 128,
    requests: Annotated[int, typer.Option(min=1, help="Requests at once in the batch figure.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Of each figure; the median counts.")] = 5,
    work: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep the peers' models and the servers' logs there.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Time real servers: decoding, prefill, many requests at once; every further argument goes to all of vLLM's."""
    set_up_logging()
    with command_errors():
        require_vllm()
        from ..bench.comparison import compare, table
        from ..bench.contenders import Contender, LlamaCpp, Vllm, require_llama_cpp
        from ..bench.measure import Load
        from ..bench.peers import PEERS
        from ..format.reader import Checkpoint

        vocab_size = Checkpoint(checkpoint).model_config["vocab_size"]
        named = named_models(peer, (_OURS, *PEERS))
        if any(model.suffix == ".gguf" for model in named.values()):
            require_llama_cpp(node_folder)
        load = Load(vocab_size, prompt_tokens, new_tokens, requests)
        limits: dict[str, Any] = {"max_model_len": load.max_model_len, "max_num_seqs": load.requests}
        with work_folder(work) as folder:
            models = {_OURS: checkpoint}
            left_out: list[dict[str, Any]] = []
            for name, write in PEERS.items() if peers else ():
                written = folder / name.lower()
                written.mkdir(exist_ok=True)
                try:
                    models[name] = write(checkpoint, written)
                except ValueError as error:
                    log.warning("%s: left out, %s", name, error)
                    left_out.append({"name": name, "error": str(error)})
            contenders: list[Contender] = []
            for name, model in (models | named).items():
                server_log = folder / f"{name}.log"
                if model.suffix == ".gguf":
                    count = threads or os.cpu_count() or 1
                    contenders.append(LlamaCpp(name, model, server_log, node_folder, threads=count, **limits))
                else:
                    contenders.append(Vllm(name, model, server_log, threads=threads, flags=context.args, **limits))
            results = compare(contenders, load, rounds) + left_out
        if as_json:
            settings = {"checkpoint": checkpoint.resolve().name, "threads": threads, "load": vars(load)}
            print_json(settings | {"vllm_arguments": context.args, "results": results})
        else:
            typer.echo(table(results))
