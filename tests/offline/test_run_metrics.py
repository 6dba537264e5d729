"""What a conversion says about itself while it runs, and the file that an operator sees."""

import json
import logging
import os
import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from tests import tiny
from vllm_requant.format.reader import Checkpoint
from vllm_requant.offline import pipeline, run_metrics
from vllm_requant.offline.models import load_causal_lm
from vllm_requant.offline.observer import RunObserver, current_observer, observing
from vllm_requant.offline.recipe import Recipe, RecipeError
from vllm_requant.offline.run_metrics import METRICS, RunMetrics, check_metrics_file, recording
from vllm_requant.offline.save import REPORT_NAME, TIMINGS_NAME, convert_and_save
from vllm_requant.offline.stages import Stages

SAMPLES, PATH_SAMPLES, SEQ_LEN, NODES, EPOCHS = 5, 2, 24, 3, 2
RECIPE = Recipe(
    bits=3,
    metric="pqi",
    outliers=0.01,
    significant=0.004,
    num_samples=SAMPLES,
    path_samples=PATH_SAMPLES,
    seq_len=SEQ_LEN,
    nodes=NODES,
    tune_epochs=EPOCHS,
)
OUTSIDE = {"calibration_text", "save"}  # stages before and after what the report tells of

Samples = dict[str, list[tuple[dict[str, str], float]]]


def read(path: Path) -> Samples:
    """All samples by name; every one has the labels that it should have and none has another."""
    found: Samples = {}
    for family in text_string_to_metric_families(path.read_text(encoding="utf-8")):
        for sample in family.samples:
            text, own = METRICS[sample.name]
            assert family.documentation == text
            assert family.type == ("counter" if sample.name.endswith("_total") else "gauge")
            assert set(sample.labels) == {"model", "output", *own}
            found.setdefault(sample.name, []).append((dict(sample.labels), sample.value))
    return found


def one(samples: Samples, name: str) -> float:
    ((_, value),) = samples["requant_convert_" + name]
    return value


def by(samples: Samples, name: str, label: str) -> dict[str, float]:
    return {labels[label]: value for labels, value in samples.get("requant_convert_" + name, [])}


class Watched(RunMetrics):
    """Reads what is on the disk whenever an item is done."""

    def __init__(self, *arguments: Any, **choices: Any) -> None:
        super().__init__(*arguments, **choices)
        self.seen: list[Samples] = []

    def advanced(self, done: int, total: int, tokens: int) -> None:
        super().advanced(done, total, tokens)
        self.seen.append(read(self.path))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("model"))


def metrics_of(
    folder: Path, recipe: Recipe = RECIPE, kind: type[RunMetrics] = RunMetrics, *, interval: float = 0.0
) -> Any:
    return kind(
        folder / "run.prom", model="some/model", output=folder / "out", recipe=recipe, device="cpu", interval=interval
    )


def convert(source: Path, metrics: RunMetrics, folder: Path, recipe: Recipe = RECIPE) -> None:
    with recording(metrics):
        convert_and_save(load_causal_lm(str(source)), folder / "out", recipe)


@pytest.fixture(scope="module")
def watched(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Watched:
    folder = tmp_path_factory.mktemp("run")
    metrics: Watched = metrics_of(folder, kind=Watched)
    convert(source, metrics, folder)
    return metrics


@pytest.fixture(scope="module")
def report(watched: Watched) -> dict[str, Any]:
    out = watched.path.parent / "out"
    content: dict[str, Any] = json.loads((out / REPORT_NAME).read_text())
    return content | {"stages": json.loads((out / TIMINGS_NAME).read_text())}


def test_the_file_tells_how_far_a_run_is(watched: Watched) -> None:
    stages = []
    for samples in watched.seen:
        assert one(samples, "completed") == one(samples, "success") == 0
        assert "requant_convert_end_timestamp_seconds" not in samples
        (running,) = (stage for stage, runs in by(samples, "stage_running", "stage").items() if runs)
        done, items = one(samples, "work_done_items"), one(samples, "work_items")
        stages.append((running, done, items))
        assert 0 <= done <= items
        assert by(samples, "stage_seconds", "stage")[running] > 0
    tuning = [(done, items) for stage, done, items in stages if stage == "tuning"]
    steps = EPOCHS * (SAMPLES - PATH_SAMPLES)
    assert [(done, steps) for done in range(steps + 1)] == tuning[PATH_SAMPLES + 1 : -(PATH_SAMPLES + 1)]
    updates = [one(samples, "last_update_timestamp_seconds") for samples in watched.seen]
    assert updates == sorted(updates)
    assert one(watched.seen[0], "start_timestamp_seconds") <= updates[0] <= updates[-1] <= time.time()
    # a finding is there as soon as it is made
    integrals = [len(by(samples, "actual_delta_loss_nats", "integral")) for samples in watched.seen]
    assert sorted(integrals) == integrals
    assert set(integrals) == {0, 1, 2, 3}


def test_the_end_is_what_the_report_says(watched: Watched, report: dict[str, Any]) -> None:
    samples = read(watched.path)
    assert one(samples, "completed") == one(samples, "success") == 1
    assert (
        one(samples, "start_timestamp_seconds")
        < one(samples, "end_timestamp_seconds")
        <= one(samples, "last_update_timestamp_seconds")
    )
    assert "requant_convert_failure_info" not in samples
    assert not any(by(samples, "stage_running", "stage").values())
    seconds = by(samples, "stage_seconds", "stage")
    assert seconds.keys() - OUTSIDE == report["stages"]["seconds"].keys()
    for stage, expected in report["stages"]["seconds"].items():
        assert round(seconds[stage], 1) == expected
    peaks = by(samples, "stage_peak_memory_bytes", "stage")
    assert peaks.keys() == seconds.keys()
    for stage, expected in report["stages"]["peak_mib"].items():
        assert round(peaks[stage] / 2**20, 1) == expected
    integrals = {integral["stage"]: integral for integral in report["integrals"]}
    assert list(integrals) == ["pre-quantized", "detach, round 1", "detach, round 2"]
    for kind in ("predicted", "actual"):
        expected = {stage: integral[kind] for stage, integral in integrals.items()}
        assert by(samples, f"{kind}_delta_loss_nats", "integral") == expected
    assert by(samples, "calibration_loss_nats", "weights") == {
        "original": report["calibration_loss_original"],
        "result": report["calibration_loss"],
    }
    config = Checkpoint(watched.path.parent / "out").config
    assert one(samples, "bits_per_weight") == config.bits_per_weight
    assert one(samples, "residual_nnz") == config.nnz
    assert one(samples, "quantized_bytes") == config.nbytes
    ((info, _),) = samples["requant_convert_info"]
    assert (info["base"], info["bits"], info["device"]) == ("squeezellm", "3", "cpu")
    assert (info["model"], info["output"]) == ("some/model", str(watched.path.parent / "out"))


def test_tokens_are_those_of_the_passes(watched: Watched) -> None:
    samples = read(watched.path)
    loss = PATH_SAMPLES * SEQ_LEN
    fitted = (SAMPLES - PATH_SAMPLES) * SEQ_LEN
    expected = {
        "original_loss": loss,
        "gradients": fitted,
        # an integral with its loss, and the loss of each of three ratios; then two rounds of the same integral
        "outlier_ratio": NODES * loss + loss + 3 * loss,
        "significant": 2 * (NODES * loss + loss),
        "tuning": EPOCHS * fitted + 2 * loss,
        "final_loss": loss,
    }
    assert by(samples, "tokens_total", "stage") == expected
    seconds, rates = by(samples, "stage_seconds", "stage"), by(samples, "tokens_per_second", "stage")
    assert rates.keys() == expected.keys()
    for stage, rate in rates.items():
        # the loops are a part of the stage, and most of one that does nothing else
        assert rate > expected[stage] / seconds[stage]
    assert rates["original_loss"] < 10 * loss / seconds["original_loss"]


def test_promtool_objects_to_the_unit_of_the_field_alone(watched: Watched) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed")
    names = set(read(watched.path)) | {"requant_convert_failure_info"}
    assert names == METRICS.keys(), "what is checked is everything"
    checked = subprocess.run([promtool, "check", "metrics"], input=watched.path.read_bytes(), capture_output=True)
    assert checked.stdout == b""
    # the server has bits per weight as well
    (objection,) = checked.stderr.decode().splitlines()
    assert objection == 'requant_convert_bits_per_weight use base unit "bytes" instead of "bits"'


def test_between_changes_of_the_stage_the_disk_is_left_alone(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes = []
    monkeypatch.setattr(run_metrics, "write_to_textfile", lambda path, registry: writes.append(path))
    metrics = metrics_of(tmp_path, interval=3600.0)
    before = len(writes)
    with observing(metrics):
        metrics.stage_began("one")
        for done in range(1000):
            metrics.advanced(done, 1000, 7)
        metrics.stage_ended("one", 1.0, {"host": 1})
    assert len(writes) == before + 2
    metrics.interval = 0.0
    metrics.advanced(1000, 1000, 7)
    assert len(writes) == before + 3


def test_memory_of_an_accelerator_is_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 12345)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    metrics = metrics_of(tmp_path)
    with observing(metrics), Stages().stage("one"):
        pass
    peaks = by(read(metrics.path), "stage_peak_memory_bytes", "memory")
    assert peaks["cuda"] == 12345
    assert peaks["host"] > 2**20


@pytest.mark.parametrize("failure", [ZeroDivisionError, KeyboardInterrupt])
def test_a_run_that_fails_says_so(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: type[BaseException]
) -> None:
    """In the place of what the run before had left."""
    plain = Recipe(base="rtn", outliers=0.0, significant=0.0)
    metrics = metrics_of(tmp_path, plain)
    convert(source, metrics, tmp_path, plain)
    samples = read(metrics.path)
    assert one(samples, "success") == 1
    assert not {"requant_convert_tokens_total", "requant_convert_calibration_loss_nats"} & samples.keys(), "no text"

    def broken(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setattr(pipeline, "tune", broken)
    again = tmp_path / "again"
    again.mkdir()
    metrics = RunMetrics(metrics.path, model="m", output=again / "out", recipe=RECIPE, device="cpu")
    assert one(read(metrics.path), "success") == 0, "from the start"
    with pytest.raises(failure):
        convert(source, metrics, again)
    samples = read(metrics.path)
    assert one(samples, "success") == 0
    assert one(samples, "completed") == 1
    assert one(samples, "end_timestamp_seconds") > one(samples, "start_timestamp_seconds")
    ((labels, value),) = samples["requant_convert_failure_info"]
    assert (labels["error"], labels["stage"], value) == (failure.__name__, "tuning", 1)
    assert "requant_convert_bits_per_weight" not in samples
    assert not any(by(samples, "stage_running", "stage").values())
    assert not (again / "out").exists()


def test_what_cannot_be_written_does_not_end_a_run(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "metrics").mkdir()
    path = tmp_path / "metrics" / "run.prom"
    metrics = RunMetrics(path, model="m", output=tmp_path / "out", recipe=RECIPE, device="cpu", interval=0.0)
    shutil.rmtree(path.parent)
    with caplog.at_level(logging.WARNING):
        convert(source, metrics, tmp_path)
    assert (tmp_path / "out" / "config.json").is_file()
    (warning,) = (record for record in caplog.records if record.levelno == logging.WARNING)
    assert str(path) in warning.getMessage()


def test_nobody_else_is_watched() -> None:
    idle, mine = current_observer(), RunObserver()
    there: list[RunObserver] = []
    with pytest.raises(ZeroDivisionError), observing(mine):
        assert current_observer() is mine
        other = threading.Thread(target=lambda: there.append(current_observer()))
        other.start()
        other.join()
        raise ZeroDivisionError
    assert current_observer() is idle
    assert there == [idle]


def test_names_that_are_no_text_do_not_hurt(tmp_path: Path) -> None:
    metrics = RunMetrics(
        tmp_path / "run.prom", model=os.fsdecode(b'a\xff"\n\\'), output=tmp_path, recipe=RECIPE, device="cpu"
    )
    ((labels, _),) = read(metrics.path)["requant_convert_info"]
    assert labels["model"] == 'a?"\n\\'


def test_under_a_target_bits_are_mixed(tmp_path: Path) -> None:
    metrics = metrics_of(tmp_path, Recipe(target_bpw=3.5))
    ((labels, _),) = read(metrics.path)["requant_convert_info"]
    assert labels["bits"] == "mixed"


def test_files_that_nobody_would_read_or_nobody_can_write_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"must end with \.prom"):
        check_metrics_file(tmp_path / "run.txt")
    with pytest.raises(NotADirectoryError, match="there is no folder"):
        check_metrics_file(tmp_path / "none" / "run.prom")
    (tmp_path / "folder.prom").mkdir()
    with pytest.raises(IsADirectoryError, match="is a folder"):
        check_metrics_file(tmp_path / "folder.prom")
    with pytest.raises(PermissionError, match="/proc cannot be written to"):  # not even by root
        check_metrics_file(Path("/proc/run.prom"))
    check_metrics_file(tmp_path / "run.prom")
    assert [path.name for path in tmp_path.iterdir()] == ["folder.prom"], "a check leaves nothing"
