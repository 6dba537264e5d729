"""The command line: one clear line for a mistake, the right exit status, JSON alone on stdout."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import typer

import vllm_requant
from tests import tiny
from vllm_requant.bench.servers import ServerError
from vllm_requant.cli import output
from vllm_requant.cli.options import find_device
from vllm_requant.cli.output import byte_size, command_errors
from vllm_requant.cli.serve import server_arguments
from vllm_requant.offline.recipe import RecipeError

FAST = ["--num-samples", "2", "--seq-len", "24", "--nodes", "2"]


def requant(*arguments: str | Path, status: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vllm_requant.cli", *map(str, arguments)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)
    assert done.returncode == status, done.stderr
    return done


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def checkpoint(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "checkpoint"
    done = requant("convert", source, "-o", out, "--bits", "3", *FAST, "--json")
    result = json.loads(done.stdout)
    assert result["layers"] == 14
    assert [integral["stage"] for integral in result["integrals"]] == ["pre-quantized"]
    assert done.stderr.count("bits/weight") == 14, "a line a layer"
    return out


def test_inspect(checkpoint: Path) -> None:
    result = json.loads(requant("inspect", checkpoint, "--layers", "--json").stdout)
    assert result["kinds"] == {"lut 3 bit": 14}
    assert (
        result["bytes"]["total"]
        == result["bytes"]["dense"] + result["bytes"]["sparse"] + result["bytes"]["unquantized"]
    )
    size = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    # headers apart, every byte of the file is accounted for
    assert 0 < size - result["bytes"]["total"] < 20_000
    assert result["provenance"]["recipe"]["bits"] == 3
    assert len(result["per_layer"]) == 14
    text = requant("inspect", checkpoint, "--layers").stdout
    assert "bits per weight" in text
    assert text.count("\n  model.layers.") == 14


def test_dry_run_writes_nothing(source: Path, tmp_path: Path) -> None:
    done = requant("convert", source, "-o", tmp_path / "out", "--dry-run", "--json")
    result = json.loads(done.stdout)
    assert result["dry_run"] is True
    assert 4 < result["bits_per_weight"] < 9
    done = requant("convert", source, "-o", tmp_path / "out", "--dry-run", "--base", "qtip", "--target-bpw", "2.8")
    assert "will be chosen, up to the target" in done.stdout
    assert list(tmp_path.iterdir()) == []


def unboxed(done: subprocess.CompletedProcess[str]) -> str:
    """What is said on stderr, without a frame and its breaks of lines."""
    return " ".join(done.stderr.replace("│", " ").split())


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in done.stderr.splitlines() if line.startswith("requant: error:")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--base", "gptq9"], "--base gptq9"),
        (["--bits", "7"], "--bits 7"),
        (["--base", "rtn", "--group-size", "40"], "--group-size 40"),
        (["--outliers", "60%"], "--outliers 60"),
        (["--quadrature", "simpson"], "--quadrature simpson"),
        (["--dtype", "float8"], "--dtype float8"),
        (["--device", "tpu9"], "--device tpu9"),
    ],
)
def test_wrong_values_are_usage_errors(source: Path, tmp_path: Path, arguments: list[str], says: str) -> None:
    done = requant("convert", source, "-o", tmp_path / "out", *arguments, status=2)
    assert says in one_line(done)
    assert list(tmp_path.iterdir()) == []


def test_unparsable_share_is_a_usage_error(source: Path, tmp_path: Path) -> None:
    done = requant("convert", source, "-o", tmp_path / "out", "--outliers", "few", status=2)
    assert "0.45%" in done.stderr


def test_unknown_flag_is_a_usage_error(source: Path, tmp_path: Path) -> None:
    requant("convert", source, "-o", tmp_path / "out", "--bit", "3", status=2)


def test_missing_model(tmp_path: Path) -> None:
    assert "no such folder" in one_line(requant("convert", tmp_path / "no", "-o", tmp_path / "out", status=1))
    assert "cannot be loaded" in one_line(requant("convert", "no-such/model", "-o", tmp_path / "out", status=1))


def test_existing_output_is_kept(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("data")
    assert "--overwrite" in one_line(requant("convert", source, "-o", tmp_path / "out", status=1))
    assert (tmp_path / "out" / "precious").read_text() == "data"


def test_missing_calibration_file(source: Path, tmp_path: Path) -> None:
    done = requant("convert", source, "-o", tmp_path / "out", "--calibration-dataset", "gone.txt", status=1)
    assert "gone.txt: no such file" in one_line(done)


def metric(file: Path, name: str) -> str:
    (line,) = (line for line in file.read_text().splitlines() if line.startswith(f"requant_convert_{name}{{"))
    return line


def test_a_metrics_file_follows_the_run(source: Path, tmp_path: Path) -> None:
    """Also one that is refused, since what the run before has left would say that all is well."""
    file = tmp_path / "run.prom"
    arguments = ("convert", source, "-o", tmp_path / "out", "--bits", "3", *FAST, "--metrics-file", file)
    requant(*arguments, "--dry-run")
    assert list(tmp_path.iterdir()) == []
    result = json.loads(requant(*arguments, "--json").stdout)
    assert metric(file, "success").endswith(" 1.0")
    assert float(metric(file, "bits_per_weight").split()[-1]) == result["bits_per_weight"]
    assert f'model="{source}"' in metric(file, "info")
    for stage in ("load", "calibration_text", "tuning", "save"):
        assert f'stage="{stage}"' in file.read_text()
    assert "--overwrite" in one_line(requant(*arguments, status=1))
    assert metric(file, "success").endswith(" 0.0")
    assert 'error="FileExistsError"' in metric(file, "failure_info")


@pytest.mark.parametrize(
    ("file", "status", "says"),
    [
        ("run.txt", 2, "must end with .prom"),
        ("none/run.prom", 1, "there is no folder"),
        ("/proc/run.prom", 1, "/proc cannot be written to"),  # not even by root
    ],
)
def test_metrics_files_that_cannot_be_are_refused_at_once(
    source: Path, tmp_path: Path, file: str, status: int, says: str
) -> None:
    done = requant("convert", source, "-o", tmp_path / "out", "--metrics-file", tmp_path / file, status=status)
    assert says in one_line(done)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_run_says_so_in_its_metrics_file(source: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.prom"
    command = [sys.executable, "-m", "vllm_requant.cli", "convert", source, "-o", tmp_path / "out"]
    command += ["--metrics-file", file, "--num-samples", "64", "--seq-len", "2048"]  # minutes

    def listen() -> None:
        # a shell lets what it runs in the background ignore interrupts
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=listen
    ) as running:
        deadline = time.monotonic() + 120
        # not while packages are imported, some of which let no interrupt through
        running_stage = re.compile(r'stage_running\{.*stage="calibration_text".*\} 1')
        while not (file.exists() and running_stage.search(file.read_text())):
            assert time.monotonic() < deadline
            assert running.poll() is None
            time.sleep(0.1)
        running.send_signal(signal.SIGINT)
        _, errors = running.communicate(timeout=120)
    assert running.returncode != 0
    assert "Traceback" not in errors
    assert metric(file, "completed").endswith(" 1.0")
    assert metric(file, "success").endswith(" 0.0")
    assert 'error="KeyboardInterrupt"' in metric(file, "failure_info")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["inspect", "eval", "serve"])
def test_broken_checkpoints_are_refused_at_once(checkpoint: Path, tmp_path: Path, command: str) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in checkpoint.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "truncated" in one_line(requant(command, broken, status=1))
    config = json.loads((broken / "config.json").read_text())
    config["quantization_config"]["format_version"] = 99
    (broken / "config.json").write_text(json.dumps(config))
    assert "format version 99" in one_line(requant(command, broken, status=1))
    (broken / "config.json").unlink()
    assert "no config.json" in one_line(requant(command, broken, status=1))


def test_unquantized_model_is_no_checkpoint(source: Path) -> None:
    assert "requant convert" in one_line(requant("inspect", source, status=1))


def test_serve_hands_everything_to_vllm(checkpoint: Path) -> None:
    command = server_arguments(str(checkpoint), ["--port", "9", "--enforce-eager"])
    assert command[0] == sys.executable
    assert command[-3:] == ["--port", "9", "--enforce-eager"]
    assert command[1:4] == ["-m", "vllm_requant.serving.server", str(checkpoint)]
    short = server_arguments(str(checkpoint), ["--port", "9"], activation_bits="8")
    assert short[-4:] == ["--additional-config.requant.activation_bits", "8", "--port", "9"]
    assert "--activation-bits" in requant("serve", checkpoint, "--activation-bits", "9", status=2).stderr
    both = ("--activation-bits", "8", "--additional-config", "{}")
    assert "does not go with" in requant("serve", checkpoint, *both, status=2).stderr


def test_bench_names_what_is_wrong_before_a_server_starts(checkpoint: Path, tmp_path: Path) -> None:
    assert "write NAME=MODEL" in requant("bench", checkpoint, "--peer", "x", status=2).stderr
    assert "is taken" in unboxed(requant("bench", checkpoint, "--peer", f"ReQuant={checkpoint}", status=2))
    assert "does not exist" in one_line(requant("bench", checkpoint, "--peer", "x=y.gguf", status=1))
    (tmp_path / "y.gguf").touch()
    peer = ("--peer", f"x={tmp_path / 'y.gguf'}", "--node-folder", tmp_path)
    assert "npm install" in one_line(requant("bench", checkpoint, *peer, status=1))
    assert "no config.json" in one_line(requant("bench", tmp_path, status=1))


def test_load_and_soak_name_what_is_wrong_before_a_server_starts(
    checkpoint: Path, source: Path, tmp_path: Path
) -> None:
    assert "write NAME=MODEL" in requant("load", checkpoint, "--peer", "x", status=2).stderr
    assert "is taken" in unboxed(requant("load", checkpoint, "--peer", f"ReQuant={source}", status=2))
    (tmp_path / "y.gguf").touch()
    assert "GGUF" in requant("load", checkpoint, "--peer", f"x={tmp_path / 'y.gguf'}", status=2).stderr
    for wrong in ("1,two", "0,1"):
        assert "different" in requant("load", checkpoint, "--concurrency", wrong, status=2).stderr
    assert "requant convert" in one_line(requant("load", source, status=1))
    assert "--reference" in requant("soak", checkpoint, status=2).stderr
    gone = ("--reference", tmp_path / "gone")
    assert "does not exist" in one_line(requant("soak", checkpoint, *gone, status=1))
    assert "requant convert" in one_line(requant("soak", source, "--reference", source, status=1))


def test_a_server_that_does_not_come_up_is_no_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "_hide_bars", lambda: None)  # its variables would stay for all later tests
    with pytest.raises(typer.Exit) as exit_, command_errors():
        raise ServerError("the server ended with status 1")
    assert exit_.value.exit_code == 1
    assert capsys.readouterr().err == "requant: error: the server ended with status 1\n"


def test_a_sweep_prints_a_line_a_run_and_goes_on_where_it_stopped(source: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs.toml"
    runs.write_text('[all]\nbase = "rtn"\noutliers = 0\nsignificant = 0\n[runs.four]\nbits = 4\n[runs.two]\nbits = 2\n')
    arguments = ("sweep", source, "--runs", runs, "-o", tmp_path / "out.jsonl", "--seq-len", "32", "--max-tokens", "64")
    assert requant(*arguments, "--only", "f*").stdout.startswith("four ")
    assert requant(*arguments).stdout.startswith("two ")
    results = json.loads(requant(*arguments, "--json").stdout)["results"]
    assert [row["name"] for row in results] == ["four", "two"]
    assert results[0]["scores"]["python-docs"]["kl_divergence"] < results[1]["scores"]["python-docs"]["kl_divergence"]
    runs.write_text("[runs.a]\nbits = 5\n")
    assert "run a: --bits 5" in one_line(requant(*arguments, status=2))
    done = requant("sweep", source, "--runs", runs, "-o", tmp_path / "o", "--dataset", "=c4", status=2)
    assert "write NAME=TEXT" in one_line(done)


@pytest.mark.parametrize(
    ("text", "size"), [("90MB", 90_000_000), ("1.5GiB", 3 << 29), ("123456", 123456), ("2 KB", 2000)]
)
def test_sizes(text: str, size: int) -> None:
    assert byte_size(text) == size


@pytest.mark.parametrize("text", ["90mb", "big", "1.2.3MB", ""])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(typer.BadParameter, match=r"1\.5GiB"):
        byte_size(text)


def test_help_names_every_command() -> None:
    out = requant("--help").stdout
    for name in ("convert", "inspect", "eval", "sweep", "serve", "bench", "load", "soak"):
        assert name in out


def test_version() -> None:
    assert requant("--version").stdout == f"requant {vllm_requant.__version__}\n"


def test_importing_the_package_imports_neither_torch_nor_vllm() -> None:
    code = "import sys, vllm_requant; assert not {'torch', 'vllm', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    code = "import sys, vllm_requant.offline.pipeline, vllm_requant.hf; assert 'vllm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_devices_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert find_device("auto") == find_device("cpu") == torch.device("cpu")
    for name, reason in (("cuda", "sees 0 GPUs"), ("meta", "only cpu and cuda"), ("gpu", "choose auto")):
        with pytest.raises(RecipeError, match=f"--device {name}: .*{reason}"):
            find_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert find_device("auto") == torch.device("cuda")
    assert find_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(RecipeError, match="sees 2 GPUs"):
        find_device("cuda:2")
