"""A conversion as Prometheus text in one file, for the textfile collector of node_exporter.

The file is replaced as a whole, so that no scrape sees half of it: at every change of the stage, every few seconds in
between, and at the end, failed or not. A process that is killed leaves ``requant_convert_completed 0`` and a
``requant_convert_last_update_timestamp_seconds`` that grows old.
"""

import logging
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, write_to_textfile
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

import vllm_requant
from vllm_requant.format import CheckpointConfig

from .observer import RunObserver, observing
from .recipe import Recipe, RecipeError

__all__ = ["METRICS", "RunMetrics", "check_metrics_file", "recording"]

log = logging.getLogger(__name__)
SUFFIX = ".prom"

METRICS: dict[str, tuple[str, tuple[str, ...]]] = {
    "requant_convert_info": (
        "Always 1; how the conversion was asked for; bits are mixed under a target size.",
        ("base", "bits", "device", "version"),
    ),
    "requant_convert_start_timestamp_seconds": ("When the conversion began.", ()),
    "requant_convert_last_update_timestamp_seconds": ("When these values were written.", ()),
    "requant_convert_end_timestamp_seconds": ("When the conversion ended; absent before.", ()),
    "requant_convert_completed": ("1 once the conversion has ended, failed or not.", ()),
    "requant_convert_success": ("1 once the checkpoint is complete.", ()),
    "requant_convert_failure_info": (
        "Always 1, absent without a failure; the class of the exception and the stage that began last.",
        ("error", "stage"),
    ),
    "requant_convert_stage_running": ("1 for the stage that runs, 0 for those that have ended.", ("stage",)),
    "requant_convert_stage_seconds": ("Time that the stage has taken, all its runs so far.", ("stage",)),
    "requant_convert_stage_peak_memory_bytes": (
        "Largest memory while the stage ran: of the process (host), of the accelerator (cuda).",
        ("stage", "memory"),
    ),
    "requant_convert_work_items": ("Items of the loop that runs or ran last; 0 if the stage has had none.", ()),
    "requant_convert_work_done_items": ("Of these, how many are done.", ()),
    "requant_convert_tokens_total": (
        "Calibration tokens that the model computed on, those of every pass, forward alone or with backward.",
        ("stage",),
    ),
    "requant_convert_tokens_per_second": ("The same by the time of the loops over them.", ("stage",)),
    "requant_convert_predicted_delta_loss_nats": (
        "Change of the calibration loss by quantization as a path integral predicts it.",
        ("integral",),
    ),
    "requant_convert_actual_delta_loss_nats": ("The same change, measured.", ("integral",)),
    "requant_convert_calibration_loss_nats": (
        "Calibration loss with the weights of the original or the result.",
        ("weights",),
    ),
    "requant_convert_bits_per_weight": ("Stored bits of the quantized layers over their weights, all counted.", ()),
    "requant_convert_residual_nnz": ("Elements of the residual.", ()),
    "requant_convert_quantized_bytes": ("Stored bytes of the quantized layers.", ()),
}
"""Help and labels by name; all have ``model`` and ``output`` beside these."""

Value = tuple[str, dict[str, str], float]


def check_metrics_file(path: Path) -> None:
    """Refuse a file that could not be written, or that nobody would read.

    Raises:
        RecipeError: the name does not end with ``.prom``.
        OSError: the folder does not exist or cannot be written to, or the target is a folder.
    """
    if path.suffix != SUFFIX:
        raise RecipeError(f"--metrics-file {path}: must end with {SUFFIX}; node_exporter reads no other files")
    if path.is_dir():
        raise IsADirectoryError(f"--metrics-file {path}: is a folder")
    if not path.parent.is_dir():
        raise NotADirectoryError(f"--metrics-file {path}: there is no folder {path.parent}")
    try:
        # what replaces the target has to be created beside it; permissions alone do not tell
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise PermissionError(f"--metrics-file {path}: {path.parent} cannot be written to: {error.strerror}") from None


@contextmanager
def recording(metrics: "RunMetrics") -> Iterator[None]:
    """Let ``metrics`` watch a block, which is the whole conversion: how it ends is recorded too."""
    with observing(metrics):
        try:
            yield
        except BaseException as error:  # an interrupt is a failure as well
            metrics.end(error)
            raise
        metrics.end(None)


class RunMetrics(RunObserver, Collector):
    """What is known of a conversion, and the file that says so.

    Args:
        path: of the file; see :func:`check_metrics_file`.
        model: as the user named it.
        output: folder of the checkpoint. Its absolute path tells the series of several files on one machine apart.
        recipe: what is done.
        device: that does it.
        interval: seconds, at least, from one file to the next within a stage.
    """

    def __init__(
        self, path: Path, *, model: str, output: Path, recipe: Recipe, device: str, interval: float = 5.0
    ) -> None:
        self.path = path
        self.interval = interval
        self._labels = {"model": model, "output": str(output.absolute())}
        self._info = {
            "base": recipe.base,
            "bits": "mixed" if recipe.has_target else str(recipe.bits),
            "device": device,
            "version": vllm_requant.__version__,
        }
        self._started, self._ended = time.time(), 0.0
        self._failure: dict[str, str] | None = None
        self._running: list[tuple[str, float]] = []  # name and beginning, the innermost last
        self._began_last = ""
        self._stage_seconds: dict[str, float] = {}
        self._peak_bytes: dict[tuple[str, str], int] = {}
        self._work = self._work_done = 0
        self._item_began = 0.0
        self._tokens: defaultdict[str, int] = defaultdict(int)
        self._token_seconds: defaultdict[str, float] = defaultdict(float)
        self._results: list[Value] = []
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        self._written, self._warned = 0.0, False
        self._write()

    # what the conversion says ---------------------------------------------------------------------------------

    def stage_began(self, stage: str) -> None:
        self._running.append((stage, time.monotonic()))
        self._began_last = stage
        self._stage_seconds.setdefault(stage, 0.0)
        self._work = self._work_done = 0
        self._write()

    def stage_ended(self, stage: str, seconds: float, peak_bytes: Mapping[str, int]) -> None:
        self._running.pop()
        self._stage_seconds[stage] += seconds
        self._peak_bytes |= {(stage, memory): peak for memory, peak in peak_bytes.items()}
        self._write()

    def advanced(self, done: int, total: int, tokens: int) -> None:
        now = time.monotonic()
        if tokens:
            stage = self._running[-1][0] if self._running else ""
            self._tokens[stage] += tokens
            self._token_seconds[stage] += now - self._item_began
        self._item_began = now
        self._work, self._work_done = total, done
        if now - self._written >= self.interval:
            self._write()

    def integrated(self, integral: Mapping[str, Any]) -> None:
        labels = {"integral": str(integral["stage"])}
        self._results.append(("requant_convert_predicted_delta_loss_nats", labels, integral["predicted"]))
        self._results.append(("requant_convert_actual_delta_loss_nats", labels, integral["actual"]))

    def converted(self, config: CheckpointConfig, report: Mapping[str, Any]) -> None:
        self._results += [
            ("requant_convert_bits_per_weight", {}, config.bits_per_weight),
            ("requant_convert_residual_nnz", {}, config.nnz),
            ("requant_convert_quantized_bytes", {}, config.nbytes),
        ]
        for weights, key in (("original", "calibration_loss_original"), ("result", "calibration_loss")):
            if (loss := report.get(key)) is not None:  # there is none without calibration text
                self._results.append(("requant_convert_calibration_loss_nats", {"weights": weights}, loss))

    def end(self, error: BaseException | None) -> None:
        """The conversion is over, by an exception or not."""
        self._ended = time.time()
        if error is not None:
            self._failure = {"error": type(error).__name__, "stage": self._began_last}
        self._write()

    # the file -------------------------------------------------------------------------------------------------

    def values(self) -> list[Value]:
        """Name, own labels and value of every sample."""
        seconds = dict(self._stage_seconds)
        for stage, began in self._running:
            seconds[stage] += time.monotonic() - began
        running = self._running[-1][0] if self._running else None
        succeeded = bool(self._ended) and self._failure is None
        values: list[Value] = [
            ("requant_convert_info", self._info, 1),
            ("requant_convert_start_timestamp_seconds", {}, self._started),
            ("requant_convert_last_update_timestamp_seconds", {}, time.time()),
            ("requant_convert_completed", {}, bool(self._ended)),
            ("requant_convert_success", {}, succeeded),
            ("requant_convert_work_items", {}, self._work),
            ("requant_convert_work_done_items", {}, self._work_done),
        ]
        if self._ended:
            values.append(("requant_convert_end_timestamp_seconds", {}, self._ended))
        if self._failure is not None:
            values.append(("requant_convert_failure_info", self._failure, 1))
        for stage, spent in seconds.items():
            values.append(("requant_convert_stage_seconds", {"stage": stage}, spent))
            values.append(("requant_convert_stage_running", {"stage": stage}, stage == running))
        for (stage, memory), peak in self._peak_bytes.items():
            values.append(("requant_convert_stage_peak_memory_bytes", {"stage": stage, "memory": memory}, peak))
        for stage, tokens in self._tokens.items():
            values.append(("requant_convert_tokens_total", {"stage": stage}, tokens))
            if spent := self._token_seconds[stage]:
                values.append(("requant_convert_tokens_per_second", {"stage": stage}, tokens / spent))
        return values + self._results

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """The samples by name, in the order of :data:`METRICS`; for prometheus_client."""
        by_name = defaultdict(list)
        for name, labels, value in self.values():
            by_name[name].append((labels, value))
        for name, (text, own) in METRICS.items():
            if name not in by_name:
                continue
            family = (CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily)(
                name, text, labels=[*self._labels, *own]
            )
            for labels, value in by_name[name]:
                family.add_metric(
                    [_text(label) for label in (*self._labels.values(), *(labels[key] for key in own))], value
                )
            yield family

    def _write(self) -> None:
        """Replace the file. What cannot be written is no reason to lose hours of work."""
        self._written = time.monotonic()
        try:
            write_to_textfile(os.fspath(self.path), self._registry)
        except OSError as error:
            if not self._warned:
                log.warning("metrics are out of date from now on: %s cannot be written: %s", self.path, error)
            self._warned = True


def _text(label: str) -> str:
    """A label that UTF-8 can hold: names of files may hold bytes that are no text."""
    return label.encode("utf-8", "replace").decode("utf-8")
