"""``requant_*`` on the server's own ``/metrics``: which checkpoint it serves, how large, and through which kernels.

vLLM builds :class:`RequantMetrics` in each API server process through the entry point group
``vllm.stat_logger_plugins``, for every model; for one of another format it does nothing. All values are facts of the
load: they are set once, and no decoding step pays for them.
"""

from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

from prometheus_client import Gauge
from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import AggregateStatLoggerBase

from ..format import CheckpointConfig
from .config import RequantConfig
from .load_report import LoadReport, read_reports

__all__ = ["METRICS", "RequantMetrics"]

METRICS: dict[str, tuple[str, tuple[str, ...]]] = {
    "requant_checkpoint_info": (
        "Always 1; what the checkpoint is and where it comes from.",
        ("format_version", "base", "source", "source_revision", "producer_version"),
    ),
    "requant_bits_per_weight": ("Stored bits of the quantized layers over their weights, everything counted.", ()),
    "requant_sparse_share": ("Share of the quantized layers' weights that the residual holds.", ()),
    "requant_residual_nnz": ("Elements of the residual.", ()),
    "requant_compression_ratio": ("Bytes of the quantized layers in 16 bits over their stored bytes.", ()),
    "requant_checkpoint_weight_bytes": (
        "Stored bytes: of the dense part of a kind, of the residual, of what is not quantized.",
        ("kind",),
    ),
    "requant_runtime_weight_bytes": (
        "Bytes of quantized weights in a worker's memory, residual included, by kind.",
        ("engine", "rank", "kind"),
    ),
    "requant_kernel_info": (
        "Always 1; which implementation multiplies a kind on a worker.",
        ("engine", "rank", "kind", "device", "kernel"),
    ),
    "requant_read_bytes_per_token": (
        "Bytes of quantized weights that one decoding step of one request reads on all workers of an engine.",
        ("engine",),
    ),
    "requant_load_seconds": ("From a worker's first layer built to its last one ready.", ("engine", "rank")),
    "requant_repack_seconds": ("Of these, for turning stored tensors into run-time weights.", ("engine", "rank")),
}
"""Help and labels, ``model_name`` apart, by name."""


class RequantMetrics(AggregateStatLoggerBase):
    """See the module.

    Args:
        vllm_config: of the engines.
        engine_indexes: theirs, as the process that serves metrics sees them.
    """

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int]) -> None:
        config = vllm_config.quant_config
        self._checkpoint = config.checkpoint if isinstance(config, RequantConfig) else None
        self._model_name = _served_name(vllm_config)
        self._folder = Path(vllm_config.model_config.model)

    def record(self, *_: Any, **__: Any) -> None:
        """Nothing changes while the model is served."""

    def log_engine_initialized(self) -> None:
        """Set everything; all workers have loaded their part by now."""
        if self._checkpoint is None:
            return
        gauges = _gauges()
        for gauge in gauges.values():
            gauge.clear()
        values = checkpoint_values(self._checkpoint, self._folder) + worker_values(read_reports())
        for name, labels, value in values:
            gauges[name].labels(model_name=self._model_name, **labels).set(value)


Value = tuple[str, dict[str, str], float]


def checkpoint_values(checkpoint: CheckpointConfig, folder: Path) -> list[Value]:
    """What the configuration says, and, of a local folder, the headers of the files."""
    provenance, layers = checkpoint.provenance, checkpoint.layers.values()
    info = {
        "format_version": str(checkpoint.format_version),
        "base": _text(_mapping(provenance.get("recipe")).get("base")),
        "source": _text(provenance.get("source")),
        "source_revision": _text(provenance.get("revision")),
        "producer_version": _text(checkpoint.producer.get("version")),
    }
    by_kind: defaultdict[str, int] = defaultdict(int)
    for spec in layers:
        by_kind[spec.kind] += spec.dense_nbytes
    by_kind["residual"] = sum(spec.sparse_nbytes for spec in layers)
    if folder.is_dir() and any(folder.glob("*.safetensors")):
        from ..format.reader import Checkpoint

        by_kind["unquantized"] = Checkpoint(folder).other_nbytes()
    return [
        ("requant_checkpoint_info", info, 1),
        ("requant_bits_per_weight", {}, checkpoint.bits_per_weight),
        ("requant_sparse_share", {}, checkpoint.nnz / checkpoint.numel),
        ("requant_residual_nnz", {}, checkpoint.nnz),
        ("requant_compression_ratio", {}, 2 * checkpoint.numel / checkpoint.nbytes),
        *(("requant_checkpoint_weight_bytes", {"kind": kind}, nbytes) for kind, nbytes in by_kind.items()),
    ]


def worker_values(reports: list[LoadReport]) -> list[Value]:
    """What the workers say."""
    values: list[Value] = []
    per_token: defaultdict[str, int] = defaultdict(int)
    for report in reports:
        engine = {"engine": str(report.engine)}
        worker = engine | {"rank": str(report.rank)}
        per_token[engine["engine"]] += report.step_bytes
        values += [("requant_load_seconds", worker, report.load_seconds)]
        values += [("requant_repack_seconds", worker, report.repack_seconds)]
        for kind, nbytes in report.weight_bytes.items():
            values.append(("requant_runtime_weight_bytes", worker | {"kind": kind}, nbytes))
        for kind, kernel in report.kernels.items():
            labels = worker | {"kind": kind, "device": report.device, "kernel": kernel}
            values.append(("requant_kernel_info", labels, 1))
    return values + [("requant_read_bytes_per_token", {"engine": name}, nbytes) for name, nbytes in per_token.items()]


@cache
def _gauges() -> dict[str, Gauge]:
    # once per process, however many engines come and go in it; several API servers say the same, so one may speak
    return {
        name: Gauge(name, text, ("model_name", *labels), multiprocess_mode="mostrecent")
        for name, (text, labels) in METRICS.items()
    }


def _served_name(vllm_config: VllmConfig) -> str:
    name = vllm_config.model_config.served_model_name
    return name[0] if isinstance(name, list) else str(name)


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str:
    return "" if value is None else str(value)
