"""Memory of a conversion over time, in a group of processes that may have no more than a limit.

    python -m vllm_requant.offline.studies.memory gptq -o memory.json --limit 1260 --model MODEL \
        -- requant convert MODEL -o DIR --stream --base gptq --calibration-dataset c4.txt

Runs of other names are added to the file; the picture goes beside it. The process's own memory is what nothing but it
holds; pages of files that it has mapped come from the disk again if the system takes them away. Without the right to
make a group of processes (Linux, versions 1 and 2) nothing is limited, and the file says so.
"""

import json
import logging
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from .plots import plot_memory
from .table import markdown

__all__ = ["Sample", "main", "memory_table", "thinned"]

log = logging.getLogger(__name__)
_EVERY_SECONDS = 0.25
_LONGEST_STEP = 5.0  # seconds: what is stopped and goes on later stands still meanwhile, in the picture too
_POINTS = 400  # of a run that are kept
_GROUPS = Path("/sys/fs/cgroup")
_STAGE = re.compile(r'^requant_convert_stage_running\{.*stage="(\w+)"\} 1', re.MULTILINE)

Sample = tuple[float, int, int, str]
"""Seconds since the start, bytes of own memory, bytes of mapped files in memory, the stage that runs or nothing."""


@contextmanager
def _limited(limit: int) -> Iterator[Path | None]:
    """A group of processes with a memory limit, by its folder; None where there is no right to make one."""
    first = (_GROUPS / "memory").is_dir()  # version 1 has a tree for every resource
    folder = (_GROUPS / "memory" if first else _GROUPS) / f"requant-{os.getpid()}"
    try:
        folder.mkdir()
        (folder / ("memory.limit_in_bytes" if first else "memory.max")).write_text(str(limit))
    except OSError as error:
        log.warning("memory is not limited: %s", error)
        with suppress(OSError):
            folder.rmdir()
        yield None
        return
    try:
        yield folder
    finally:
        folder.rmdir()


def _uncached(folder: Path) -> None:
    """Drop files of which pages are in memory already: they would count to whoever has read them."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _watched(process: subprocess.Popen[bytes], metrics: Path) -> Iterator[Sample]:
    seconds, last = 0.0, time.monotonic()
    while process.poll() is None:
        now = time.monotonic()
        seconds, last = seconds + min(now - last, _LONGEST_STEP), now
        with suppress(OSError, KeyError):  # it may end meanwhile
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            status = dict(line.split(":", 1) for line in lines if ":" in line)
            own, mapped = (int(status[name].split()[0]) << 10 for name in ("RssAnon", "RssFile"))
            running = _STAGE.findall(metrics.read_text()) if metrics.exists() else []
            yield seconds, own, mapped, running[-1] if running else ""
        time.sleep(_EVERY_SECONDS)


def thinned(samples: Sequence[Sample], points: int = _POINTS) -> list[Sample]:
    """At most so many samples, evenly spread in time, of which each is the largest of those it stands for."""
    step = -(-len(samples) // points) if samples else 1
    return [max(samples[at : at + step], key=lambda sample: sample[1]) for at in range(0, len(samples), step)]


def memory_table(runs: Sequence[dict[str, Any]]) -> str:
    """Markdown: the peaks of each run."""
    head = ["base", "peak of own memory", "limit of the group", "model", "minutes"]
    rows = [
        [
            run["name"],
            f"{run['peak_bytes'] / 2**20:.0f} MiB",
            f"{run['limit_bytes'] / 2**20:.0f} MiB" if run["limited"] else "none",
            f"{run['model_bytes'] / 2**20:.0f} MiB",
            f"{run['seconds'] / 60:.0f}",
        ]
        for run in runs
    ]
    return markdown(head, rows)


def main(
    name: Annotated[str, typer.Argument(help="Of the run, in the picture.")],
    command: Annotated[list[str], typer.Argument(help="What to run, after --: requant convert with its flags.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON file.")],
    limit: Annotated[int, typer.Option(metavar="MIB", help="All that the group may have.")],
    model: Annotated[Path, typer.Option(help="Folder of the model that is converted.")],
) -> None:
    """Run a conversion in a limited group and record its memory."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    _uncached(model)
    with tempfile.TemporaryDirectory() as scratch, _limited(limit << 20) as group:
        metrics = Path(scratch) / "metrics.prom"

        def join() -> None:
            if group is not None:
                (group / "cgroup.procs").write_text(str(os.getpid()))

        process = subprocess.Popen([*command, "--metrics-file", str(metrics)], preexec_fn=join)
        samples = list(_watched(process, metrics))
    if not samples:
        raise typer.Exit(1)
    run = {
        "name": name,
        "status": process.returncode,
        "limited": group is not None,
        "limit_bytes": limit << 20,
        "model_bytes": sum(path.stat().st_size for path in model.glob("*.safetensors")),
        "seconds": round(samples[-1][0], 1),
        "peak_bytes": max(sample[1] for sample in samples),
        "samples": [[round(at, 1), own, mapped, stage] for at, own, mapped, stage in thinned(samples)],
    }
    before = json.loads(output.read_text()) if output.exists() else []
    runs = [other for other in before if other["name"] != name] + [run]
    # a run a line, and not a number a line
    output.write_text("[\n" + ",\n".join(map(json.dumps, runs)) + "\n]\n")
    plot_memory(runs, output.with_suffix(".png"))
    typer.echo(memory_table(runs))
    raise typer.Exit(0 if process.returncode == 0 else 1)


if __name__ == "__main__":
    typer.run(main)
