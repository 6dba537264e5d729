"""What workers report of their load, and the metrics that are made of it."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from tests.serving.vllm_layers import FORMATS, quant_config, random_layer
from vllm_requant.serving import load_report, metrics
from vllm_requant.serving.load_report import FOLDER_VARIABLE, Loading, LoadReport, open_folder, read_reports


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    return tmp_path


def load_two_layers() -> None:
    loading = Loading()
    loading.expect()
    loading.expect()
    for kind, nbytes, share in (("uniform", 100, 1.0), ("lut", 50, 0.5)):
        with loading.repacking():
            pass
        loading.holds(kind, nbytes, device="cpu", kernel="cpu-x", read_share=share)
        assert not read_reports()
        loading.done()


def test_report_comes_with_the_last_layer(folder: Path) -> None:
    load_two_layers()
    (report,) = read_reports()
    assert report.weight_bytes == {"uniform": 100, "lut": 50}
    assert report.step_bytes == 125
    assert report.kernels == {"uniform": "cpu-x", "lut": "cpu-x"}
    assert 0 <= report.repack_seconds <= report.load_seconds < 10
    assert [path.name for path in folder.iterdir()] == ["0-0.json"]


def test_no_report_without_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    load_two_layers()
    assert read_reports() == []
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "gone"))
    load_two_layers()  # a model serves all the same
    assert read_reports() == []


def test_files_of_others_are_passed_over(folder: Path) -> None:
    load_two_layers()
    (folder / "1-0.json").write_text("{")
    (folder / "1-1.json").write_text('{"rank": "0"}')
    assert len(read_reports()) == 1


def test_folder_is_private_and_inherited(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(load_report.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(load_report.atexit, "register", lambda function: None)
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    open_folder()
    made = Path(os.environ[FOLDER_VARIABLE])
    assert made.parent == tmp_path
    assert made.stat().st_mode & 0o777 == 0o700
    open_folder()
    assert Path(os.environ[FOLDER_VARIABLE]) == made
    assert list(tmp_path.iterdir()) == [made]


def engine(quantization: Any, model: Path | str = "no/folder") -> Any:
    return SimpleNamespace(
        quant_config=quantization, model_config=SimpleNamespace(served_model_name=["m", "alias"], model=str(model))
    )


def scrape() -> dict[str, list[tuple[dict[str, str], float]]]:
    families = text_string_to_metric_families(generate_latest(REGISTRY).decode())
    return {
        family.name: [(sample.labels, sample.value) for sample in family.samples]
        for family in families
        if family.name.startswith("requant_") and family.samples
    }


@pytest.fixture
def clean() -> Any:
    yield
    for gauge in metrics._gauges().values():
        gauge.clear()


def test_metrics_of_a_checkpoint(folder: Path, clean: None) -> None:
    layers = {
        f"l{i}": random_layer(64, 128, **FORMATS[name]) for i, name in enumerate(("uniform3-sparse", "lut4-sparse"))
    }
    config = quant_config(layers)
    for rank, engine_index in ((0, 0), (1, 0), (0, 1)):
        report = LoadReport(
            rank=rank,
            engine=engine_index,
            device="cpu",
            weight_bytes={"uniform": 1000, "lut": 500},
            step_bytes=1200,
            kernels={"uniform": "cpu-avx2", "lut": "cpu-avx2"},
            load_seconds=2.5,
            repack_seconds=0.5,
        )
        (folder / f"{engine_index}-{rank}.json").write_text(report.model_dump_json())
    for _ in range(2):  # engines may come and go in one process
        logger = metrics.RequantMetrics(engine(config), [0])
        logger.log_engine_initialized()
        logger.record(scheduler_stats=None, iteration_stats=None, engine_idx=0)
    found = scrape()
    assert found.keys() == metrics.METRICS.keys()
    for name, samples in found.items():
        for labels, _ in samples:
            assert labels.keys() == {"model_name", *metrics.METRICS[name][1]}
            assert labels["model_name"] == "m"
    checkpoint = config.checkpoint
    assert found["requant_bits_per_weight"][0][1] == pytest.approx(checkpoint.bits_per_weight)
    assert found["requant_residual_nnz"][0][1] == checkpoint.nnz > 0
    stored = {labels["kind"]: value for labels, value in found["requant_checkpoint_weight_bytes"]}
    assert stored.keys() == {"uniform", "lut", "residual"}
    assert sum(stored.values()) == checkpoint.nbytes
    assert found["requant_compression_ratio"][0][1] == pytest.approx(2 * checkpoint.numel / checkpoint.nbytes)
    per_token = {labels["engine"]: value for labels, value in found["requant_read_bytes_per_token"]}
    assert per_token == {"0": 2400, "1": 1200}
    assert len(found["requant_kernel_info"]) == 6
    assert all(value == 2.5 for _, value in found["requant_load_seconds"])


def test_nothing_for_another_model(folder: Path, clean: None) -> None:
    logger = metrics.RequantMetrics(engine(None), [0])
    logger.log_engine_initialized()
    logger.record()
    assert scrape() == {}
