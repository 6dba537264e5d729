"""``requant convert --dry-run``, and conversions refused for the same reasons: all at once, nothing written."""

import json
import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from typer.testing import CliRunner, Result

from tests import tiny
from tests.offline.test_work import Stopped
from vllm_requant.cli import app
from vllm_requant.offline.cache import TensorCache
from vllm_requant.offline.observer import observing
from vllm_requant.offline.work import WorkFolder, default_folder

FAST = ["--num-samples", "4", "--seq-len", "24", "--nodes", "2", "--tune-epochs", "0"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny.save(tmp_path / "model")


def convert(source: Path, output: Path, *flags: str) -> Result:
    # what a command sets for its own process, vLLM's bars do not survive
    with patch.dict(os.environ):
        return CliRunner().invoke(app, ["convert", str(source), "-o", str(output), *FAST, *flags])


def reasons(result: Result) -> list[str]:
    return [
        line.removeprefix("requant: error: ")
        for line in result.stderr.splitlines()
        if line.startswith("requant: error: ")
    ]


def dry_run(source: Path, output: Path, *flags: str) -> tuple[dict[str, Any], Result]:
    result = convert(source, output, "--dry-run", "--json", *flags)
    return json.loads(result.stdout), result


def test_what_is_said_of_a_good_conversion(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("weights are read")

    monkeypatch.setattr("vllm_requant.offline.models.load_causal_lm", refuse)
    said, result = dry_run(source, tmp_path / "out")
    assert (result.exit_code, said["objections"]) == (0, [])
    assert [size["tensor_parallel_size"] for size in said["serving"]["sizes"]] == [1, 2, 4, 8]
    stages = ["calibration_text", "original_loss", "gradients", "quantize", "outlier_ratio", "final_loss"]
    assert list(said["expected_seconds"]) == stages, "there is too little text to refit"
    assert said["checkpoint_bytes"] > said["quantized_bytes"]
    text = convert(source, tmp_path / "out", "--dry-run", "--target-bpw", "3.5").stdout
    for part in ("will be chosen, up to the target", "cache a token", "not possible: its 4 attention heads", "about "):
        assert part in text
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("dry", [True, False])
def test_everything_that_is_wrong_is_said_at_once(source: Path, tmp_path: Path, dry: bool) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    (tmp_path / "text.txt").write_text("too short")
    flags = ["--dtype", "float8", "--max-shard-size", "5XB", "--calibration-dataset", str(tmp_path / "text.txt")]
    flags += ["--metrics-file", str(tmp_path / "no" / "x.prom"), "--resume", *(["--dry-run"] if dry else [])]
    result = convert(source, tmp_path / "out", *flags)
    assert result.exit_code == 2, "wrong usage is among it"
    wanted = [
        "no folder",
        "--dtype float8",
        "--max-shard-size 5XB",
        "exists and is not empty",
        "no conversion to resume",
        "9 tokens, but 4 sequences of 24 need 96",
        f"{weights}: is not a whole safetensors file",
    ]
    found = reasons(result)
    assert len(found) == len(wanted)
    for part, reason in zip(wanted, found, strict=True):
        assert part in reason
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "text.txt"]


def test_wrong_flags_and_an_unknown_architecture_together(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "model", "qwen3_moe")
    config = json.loads((source / "config.json").read_text())
    config |= {"model_type": "olmoe", "architectures": ["OlmoeForCausalLM"]}
    (source / "config.json").write_text(json.dumps(config))
    said, result = dry_run(source, tmp_path / "out", "--device", "tpu", "--bits", "9", "--rounds", "0")
    assert result.exit_code == 2
    assert reasons(result) == said["objections"]
    flags = [reason.split()[0] for reason in said["objections"][:3]]
    assert flags == ["--device", "--bits", "--rounds"]
    assert all("is a weight but not an nn.Linear" in reason for reason in said["objections"][3:])
    assert "layers" not in said


def test_sizes_are_told_beside_objections(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    said, result = dry_run(source, tmp_path / "out", "--stream", "--tune-epochs", "1")
    assert result.exit_code == 2
    assert [reason.split(":")[0] for reason in said["objections"]] == [
        f"{tmp_path / 'out'} is a file; name a folder with -o",
        "--stream",
    ]
    assert said["layers"] == 14
    assert said["expected_seconds"] is None, "no time is foretold of what cannot be done"


def test_the_whole_model_in_several_processes_takes_several_and_has_to_be_in_memory(
    source: Path, tmp_path: Path
) -> None:
    said, result = dry_run(source, tmp_path / "out", "--stream", "--replicate")
    assert result.exit_code == 2
    both, alone = said["objections"]
    assert "--stream" in both and "torchrun" in alone


def test_a_resumed_conversion_is_refused_for_every_other_flag(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with observing(Stopped("significant")):
        assert convert(source, output).exit_code == 130
    flags = ["--resume", "--bits", "3", "--seed", "5", "--dtype", "float16"]
    said, result = dry_run(source, output, *flags)
    assert result.exit_code == 1
    assert [reason.split()[1] for reason in said["objections"]] == ["--bits", "--seed", "--dtype"]
    assert said["objections"] == reasons(convert(source, output, *flags))
    assert dry_run(source, output, "--resume")[1].exit_code == 0
    with WorkFolder.open(default_folder(output), {}, resume=False, overwrite=True, cache=TensorCache()):
        (reason,) = dry_run(source, output, "--overwrite")[0]["objections"]
    assert f"in use by process {os.getpid()}" in reason


@pytest.mark.parametrize(
    ("content", "name", "says"),
    [
        (b'{"text": "a"}\n{"txt": "b"}\n', "t.jsonl", "line 2 is not a JSON object"),
        (b"\xff\xfe\x00", "t.txt", "is not UTF-8 text"),
    ],
)
def test_malformed_text_is_refused_at_once(source: Path, tmp_path: Path, content: bytes, name: str, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    result = convert(source, tmp_path / "out", "--calibration-dataset", str(tmp_path / name))
    assert result.exit_code == 1
    (reason,) = reasons(result)
    assert says in reason
