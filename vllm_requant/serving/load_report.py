"""What a server's workers say when they have loaded their part of a model.

Weights live in worker processes, metrics are served by another one. The process that reads the checkpoint's
configuration first makes a private folder and names it in its environment, which its children inherit. There every
worker leaves one small file, and the metrics (:mod:`.metrics`) are made of these. Workers on other machines inherit
nothing and report nothing.
"""

import atexit
import os
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from vllm.logger import init_logger

__all__ = ["LoadReport", "Loading", "open_folder", "read_reports"]

FOLDER_VARIABLE = "REQUANT_LOAD_REPORTS"
logger = init_logger(f"vllm.{__name__}")


class LoadReport(BaseModel):
    """One worker's part.

    Attributes:
        rank: of the worker among those of its engine, pipeline stages and tensor-parallel ranks counted together.
        engine: data-parallel rank.
        device: type of the device that it computes on.
        weight_bytes: of run-time weights, residual included, by kind.
        step_bytes: of those that a decoding step of one request reads: no embeddings that serve no head, and of experts
            those that a token is sent to.
        kernels: implementation by kind.
        load_seconds: from the first layer built to the last one ready.
        repack_seconds: of these, for turning stored tensors into run-time weights.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    rank: int = Field(ge=0)
    engine: int = Field(ge=0)
    device: str
    weight_bytes: dict[str, int]
    step_bytes: int = Field(ge=0)
    kernels: dict[str, str]
    load_seconds: float = Field(ge=0)
    repack_seconds: float = Field(ge=0)


class Loading:
    """The load of one model in this process, from :meth:`expect` of its first layer to :meth:`done` of the last."""

    def __init__(self) -> None:
        self._begin = 0.0
        self._pending = 0
        self._repack_seconds = 0.0
        self._device = ""
        self._step_bytes = 0
        self._weight_bytes: defaultdict[str, int] = defaultdict(int)
        self._kernels: dict[str, str] = {}

    def expect(self) -> None:
        """One more layer will be loaded."""
        self._begin = self._begin or time.monotonic()
        self._pending += 1

    @contextmanager
    def repacking(self) -> Iterator[None]:
        """Times the body."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self._repack_seconds += time.monotonic() - begin

    def holds(self, kind: str, nbytes: int, *, device: str, kernel: str, read_share: float) -> None:
        """Run-time weights that are ready, and the share of them that a decoding step of one request reads."""
        self._weight_bytes[kind] += nbytes
        self._step_bytes += round(nbytes * read_share)
        self._device, self._kernels[kind] = device, kernel

    def done(self) -> None:
        """A layer is ready; after the last one the report is written, if this process was told where to."""
        self._pending -= 1
        folder = os.environ.get(FOLDER_VARIABLE)
        if self._pending == 0 and folder:
            self._write(Path(folder))

    def _write(self, folder: Path) -> None:
        rank, engine = _place()
        report = LoadReport(
            rank=rank,
            engine=engine,
            device=self._device,
            weight_bytes=dict(self._weight_bytes),
            step_bytes=self._step_bytes,
            kernels=self._kernels,
            load_seconds=time.monotonic() - self._begin,
            repack_seconds=self._repack_seconds,
        )
        target = folder / f"{engine}-{rank}.json"
        try:
            unfinished = target.with_suffix(".tmp")
            unfinished.write_text(report.model_dump_json())
            unfinished.replace(target)
        except OSError as error:
            # a model serves without metrics
            logger.warning("ReQuant's load report cannot be written, its metrics will lack this worker: %s", error)


def open_folder() -> None:
    """Make the folder, unless a parent process has; it goes when this process ends."""
    if FOLDER_VARIABLE in os.environ:
        return
    folder = tempfile.mkdtemp(prefix="requant-")
    os.environ[FOLDER_VARIABLE] = folder
    owner = os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # not in a fork
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)


def read_reports() -> list[LoadReport]:
    """Those of all workers so far, by engine and rank."""
    reports = []
    folder = os.environ.get(FOLDER_VARIABLE)
    for path in Path(folder).glob("*.json") if folder else ():
        with suppress(OSError, ValidationError):
            reports.append(LoadReport.model_validate_json(path.read_bytes()))
    return sorted(reports, key=lambda report: (report.engine, report.rank))


def _place() -> tuple[int, int]:
    """This process's rank in its engine, and the engine's."""
    from vllm.config import get_current_vllm_config_or_none
    from vllm.distributed import parallel_state

    config = get_current_vllm_config_or_none()
    # not the rank, which vLLM sets to 0 in engines that need not know of each other
    engine = config.parallel_config.data_parallel_index if config else 0
    if not parallel_state.model_parallel_is_initialized():
        return 0, engine
    tensor, pipeline = parallel_state.get_tp_group(), parallel_state.get_pp_group()
    return pipeline.rank_in_group * tensor.world_size + tensor.rank_in_group, engine
