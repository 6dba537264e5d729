"""Work folders of conversions: what is refused, and that nothing is lost by it. The commands as a user gives them."""

import json
import multiprocessing
import os
import subprocess
from collections.abc import Callable, Iterator
from multiprocessing.synchronize import Event
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from typer.testing import CliRunner, Result

from tests import tiny
from vllm_requant.cli import app
from vllm_requant.offline import save
from vllm_requant.offline.cache import Snapshot, TensorCache
from vllm_requant.offline.observer import RunObserver, observing
from vllm_requant.offline.work import WorkFolder, default_folder

FLAGS = ["--num-samples", "4", "--seq-len", "24", "--nodes", "2", "--tune-epochs", "0"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny.save(tmp_path / "model")


class Stopped(RunObserver):
    """Ends a conversion in a stage like a crash would, or does something then."""

    def __init__(self, stage: str, act: Callable[[], None] | None = None) -> None:
        self.stage, self.act = stage, act

    def stage_began(self, stage: str) -> None:
        if stage == self.stage:
            if self.act is None:
                raise KeyboardInterrupt
            self.act()


def convert(model: Path, output: Path, *flags: str, observer: RunObserver | None = None) -> Result:
    # what a command sets for its own process, vLLM's bars do not survive
    with patch.dict(os.environ), observing(observer or RunObserver()):
        return CliRunner().invoke(app, ["convert", str(model), "-o", str(output), *FLAGS, *flags])


@pytest.fixture
def stopped(model: Path, tmp_path: Path) -> Path:
    """An output folder of which the conversion has not come to its end."""
    output = tmp_path / "out"
    assert convert(model, output, observer=Stopped("significant")).exit_code == 130
    assert not output.exists()
    assert (default_folder(output) / "arguments.json").exists()
    return output


def test_an_interrupted_conversion_says_how_to_go_on_and_does(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    result = convert(model, output, observer=Stopped("significant"))
    assert result.exit_code == 130
    assert f"kept in {default_folder(output)}; the same command with --resume goes on" in result.stderr
    assert convert(model, output, "--resume").exit_code == 0
    assert convert(model, tmp_path / "straight").exit_code == 0
    files = [(path / "model.safetensors").read_bytes() for path in (output, tmp_path / "straight")]
    assert files[0] == files[1]
    assert not default_folder(output).exists()


def test_nothing_is_computed_twice(model: Path, stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("sampled again")

    monkeypatch.setattr("vllm_requant.offline.calibration._sample_batch", refuse)
    assert convert(model, stopped, "--resume").exit_code == 0


def test_unfinished_work_is_not_overwritten_by_chance(model: Path, stopped: Path) -> None:
    result = convert(model, stopped)
    assert result.exit_code == 1
    assert "--resume" in result.stderr and "--overwrite" in result.stderr
    assert (default_folder(stopped) / "results").exists()
    assert convert(model, stopped, "--overwrite").exit_code == 0


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--bits", "3"], "--bits is 3 now, the conversion was begun with 4"),
        (["--base", "gptq"], "--base is gptq now"),
        (["--seed", "1"], "--seed is 1 now"),
        (["--dtype", "float16"], "--dtype is float16 now, the conversion was begun with auto"),
        (["--max-shard-size", "1MB"], "--max-shard-size is 1MB now"),
    ],
)
def test_other_arguments_are_refused_by_name(flags: list[str], named: str, model: Path, stopped: Path) -> None:
    result = convert(model, stopped, "--resume", *flags)
    assert result.exit_code == 1
    assert named in result.stderr
    assert not stopped.exists()


def test_another_version_is_refused(model: Path, stopped: Path) -> None:
    begun = default_folder(stopped) / "arguments.json"
    begun.write_text(json.dumps(json.loads(begun.read_text()) | {"version": "0.0.1"}))
    result = convert(model, stopped, "--resume")
    assert result.exit_code == 1
    assert "begun by version 0.0.1" in result.stderr


def test_another_model_under_the_same_name_is_refused(model: Path, stopped: Path) -> None:
    tiny.save(model, seed=1)
    result = convert(model, stopped, "--resume")
    assert result.exit_code == 1
    assert "the model is not the one that the conversion was begun with" in result.stderr
    assert not stopped.exists()


def test_another_text_under_the_same_name_is_refused(model: Path, tmp_path: Path) -> None:
    text, output = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("some words of calibration " * 50)
    flags = ["--calibration-dataset", str(text)]
    assert convert(model, output, *flags, observer=Stopped("significant")).exit_code == 130
    text.write_text("other words of calibration " * 50)
    result = convert(model, output, "--resume", *flags)
    assert result.exit_code == 1
    assert "the calibration text is not the one" in result.stderr


def test_nothing_to_resume(model: Path, tmp_path: Path) -> None:
    result = convert(model, tmp_path / "out", "--resume")
    assert result.exit_code == 1
    assert "no conversion to resume" in result.stderr
    assert not default_folder(tmp_path / "out").exists()


def test_a_model_that_changes_under_way_is_noticed(model: Path, tmp_path: Path) -> None:
    def change() -> None:
        (model / "model.safetensors").touch()

    result = convert(model, tmp_path / "out", observer=Stopped("residual", change))
    assert result.exit_code == 1
    assert f"{model / 'model.safetensors'} was changed while it was being converted" in result.stderr
    assert not (tmp_path / "out").exists()


def _hold(path: Path, held: Event, done: Event) -> None:
    with WorkFolder.open(path, {}, resume=False, cache=TensorCache()):
        held.set()
        done.wait(60)


def test_two_processes_in_one_folder(model: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    spawn = multiprocessing.get_context("forkserver")
    held, done = spawn.Event(), spawn.Event()
    other = spawn.Process(target=_hold, args=(work, held, done))
    other.start()
    assert held.wait(60)
    result = convert(model, tmp_path / "out", "--work-dir", str(work), "--overwrite")
    done.set()
    other.join()
    assert result.exit_code == 1
    assert f"{work} is in use by process {other.pid}" in result.stderr


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def fills_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is room when a conversion begins."""
    monkeypatch.setattr("vllm_requant.offline.checks.check_disk", lambda places: None)


def test_too_little_room_is_refused_at_once(model: Path, tmp_path: Path, small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(bytes(900 << 10))
    result = convert(model, small_disk / "out", "--work-dir", str(small_disk / "work"))
    assert result.exit_code == 1
    assert f"{small_disk / 'work'} takes" in result.stderr and "-o or --work-dir" in result.stderr
    assert sorted(path.name for path in small_disk.iterdir()) == ["ballast"]


@pytest.mark.usefixtures("fills_later")
def test_a_full_disk_under_the_work(model: Path, tmp_path: Path, small_disk: Path) -> None:
    flags = ["--work-dir", str(small_disk / "work")]
    result = convert(model, tmp_path / "out", *flags)
    assert result.exit_code == 1
    assert "No space left on device" in result.stderr
    assert str(small_disk) in result.stderr and "--resume goes on" in result.stderr
    assert not (tmp_path / "out").exists()
    assert not list(small_disk.rglob("*.partial"))
    # there is room again
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert convert(model, tmp_path / "out", "--resume", *flags).exit_code == 0


@pytest.mark.usefixtures("fills_later")
def test_a_full_disk_under_the_checkpoint(model: Path, tmp_path: Path, small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(bytes(900 << 10))
    flags = ["--work-dir", str(tmp_path / "work")]
    result = convert(model, small_disk / "out", *flags)
    assert result.exit_code == 1
    assert "No space left on device" in result.stderr
    assert sorted(path.name for path in small_disk.iterdir()) == ["ballast"]
    (small_disk / "ballast").unlink()
    assert convert(model, small_disk / "out", "--resume", *flags).exit_code == 0


def test_a_folder_that_cannot_be_written(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "readonly"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "none", str(folder)]
    if os.geteuid() != 0:
        folder.chmod(0o500)
    elif subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("root writes anywhere, and may not mount here")
    try:
        for output, flags in (
            (folder / "out", []),
            (tmp_path / "out", ["--work-dir", str(folder / "work")]),
        ):
            result = convert(model, output, *flags)
            assert result.exit_code == 1
            assert str(folder) in result.stderr
            assert not output.exists()
    finally:
        if os.geteuid() == 0:
            subprocess.run(["umount", str(folder)], check=True)


def test_a_snapshot_goes_on_where_it_was(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path, snapshot_every=0)
    seen: list[int] = []

    def add_up(stop_at: int) -> Callable[[Snapshot], dict[str, torch.Tensor]]:
        def compute(snapshot: Snapshot) -> dict[str, torch.Tensor]:
            state = {"sum": torch.zeros(3)}
            for step in range(snapshot.restore(state), 6):
                if step == stop_at:
                    raise InterruptedError
                seen.append(step)
                state["sum"] += step
                snapshot.offer(step + 1, state)
            return state

        return compute

    def run(stop_at: int, key: str = "key") -> dict[str, torch.Tensor]:
        return cache.resume("stage", lambda: key, torch.device("cpu"), add_up(stop_at))

    with pytest.raises(InterruptedError):
        run(4)
    assert torch.equal(run(-1)["sum"], torch.full((3,), 15.0))
    assert seen == list(range(6)), "every step once"
    assert [path.suffix for path in (tmp_path / "stage").iterdir()] == [".safetensors"], "the snapshot is gone"
    assert torch.equal(run(0)["sum"], torch.full((3,), 15.0)), "and nothing is computed any more"
    with pytest.raises(InterruptedError):
        run(0, "other")


def test_only_timings_differ_between_runs(model: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert convert(model, tmp_path / name).exit_code == 0
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert {name for name in one if one[name] != two[name]} <= {save.TIMINGS_NAME}
