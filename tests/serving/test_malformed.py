"""Malformed checkpoints in vLLM: refused before a model is built, the reason last; no pickle, no code, no network."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from tests import tiny
from tests.format.checkpoints import write_checkpoint
from tests.format.faults import BASES, FAULTS, Fault
from tests.serving.engine import job, vllm_runs
from vllm_requant.format import parse_config
from vllm_requant.offline.models import load_causal_lm
from vllm_requant.offline.recipe import Recipe
from vllm_requant.offline.save import convert_and_save
from vllm_requant.serving.config import RefusedCheckpointError, RequantConfig

# a folder without safetensors files is what --load-format dummy serves; vLLM itself finds nothing to load there
NO_FILES = {"no-folder", "no-weights", "pickle"}
BY_NAME = {fault.name: fault for fault in FAULTS}
STARTED = [
    "config-duplicate-key",
    "vocabulary-huge",
    "consolidated-file",
    "file-truncated",
    "columns-repeated",
    "norm-nan",
]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("good")
    return {name: write_checkpoint(folder / name, **arguments) for name, arguments in BASES.items()}


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    recipe = Recipe(base="rtn", bits=4, group_size=32, outliers=0.0, significant=0.0, num_samples=2, seq_len=24)
    convert_and_save(load_causal_lm(str(tiny.save(folder / "in", head_dim=32))), folder / "out", recipe)
    return folder / "out"


def broken(good: dict[str, Path], folder: Path, fault: Fault) -> Path:
    shutil.copytree(good[fault.base], folder)
    fault.make(folder)
    return folder


@pytest.mark.parametrize(
    "fault",
    [fault for fault in FAULTS if fault.by == "all" and fault.name not in NO_FILES],
    ids=lambda fault: fault.name,
)
def test_refused_by_the_plugin(good: dict[str, Path], tmp_path: Path, fault: Fault) -> None:
    """vLLM calls this in the process that starts the server, with what its own parser made of ``config.json``."""
    entry = json.loads((good[fault.base] / "config.json").read_text())["quantization_config"]
    config = RequantConfig(parse_config(entry))
    with pytest.raises(RefusedCheckpointError, match=fault.says):
        config.maybe_update_config(str(broken(good, tmp_path / "checkpoint", fault)))


def test_the_engine_ends_with_the_reason(good: dict[str, Path], tmp_path: Path) -> None:
    folders = [broken(good, tmp_path / name, BY_NAME[name]) for name in STARTED]
    runs = vllm_runs(*(job(folder, [[1]]) for folder in folders))
    for name, run in zip(STARTED, runs, strict=True):
        last = run["error"].strip().splitlines()[-1]
        assert re.search(f"RefusedCheckpointError: .*{BY_NAME[name].says}", last), run["error"][-2000:]


def last_line(*command: str | Path, **environment: str) -> str:
    """The last line of what a command prints that fails."""
    done = subprocess.run(
        [sys.executable, "-m", *map(str, command)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=os.environ | environment,
    )
    assert done.returncode not in (0, None), done.stdout + done.stderr
    return (done.stdout + done.stderr).strip().splitlines()[-1]


def test_the_server_ends_with_the_reason(good: dict[str, Path], tmp_path: Path) -> None:
    """vLLM's own command, without ``requant serve``."""
    folder = broken(good, tmp_path / "checkpoint", BY_NAME["scale-nan"])
    last = last_line("vllm.entrypoints.openai.api_server", "--model", folder, "--enforce-eager")
    assert "RefusedCheckpointError: " in last and "q_proj.scales: a scale is not finite and positive" in last


def test_serve_ends_with_the_reason_alone(good: dict[str, Path], tmp_path: Path) -> None:
    folder = broken(good, tmp_path / "checkpoint", BY_NAME["sparse-infinite"])
    done = subprocess.run(
        [sys.executable, "-m", "vllm_requant.cli", "serve", str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("requant: error: ") and "sparse_values: a value is not finite" in line


class Payload:
    """Pickled, and loaded without care, it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def test_no_pickle_and_no_code_of_the_checkpoint_is_run(converted: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    pickled, code = tmp_path / "pickled", tmp_path / "code"
    shutil.copytree(converted, pickled, ignore=shutil.ignore_patterns("*.safetensors"))
    for name in ("pytorch_model.bin", "model.pt"):
        (pickled / name).write_bytes(pickle.dumps({"model.norm.weight": Payload(marker)}))
    shutil.copytree(converted, code)
    (code / "evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    config = json.loads((code / "config.json").read_text())
    names = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.T", "evil.T"]}
    (code / "config.json").write_text(json.dumps(config | {"auto_map": names}))
    found, told, named = vllm_runs(
        job(pickled, [[1]]), job(pickled, [[1]], load_format="pt"), job(code, [[1]], skip_tokenizer_init=False)
    )
    assert "Cannot find any model weights" in found["error"]
    assert "reads pickled files, which can run code" in told["error"].strip().splitlines()[-1]
    assert "auto_map names code to be run" in named["error"].strip().splitlines()[-1]
    assert not marker.exists()


def test_a_local_folder_needs_no_network(converted: Path) -> None:
    """A hub that counts is asked nothing, although it may be."""
    asked: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_POST = do_GET

    server = HTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    (run,) = vllm_runs(
        job(converted, [[1, 2, 3]], skip_tokenizer_init=False, new_tokens=2),
        HF_ENDPOINT=address,
        HTTPS_PROXY=address,
        HF_HUB_OFFLINE="0",
        TRANSFORMERS_OFFLINE=None,
    )
    server.shutdown()
    assert "error" not in run, run["error"]
    assert asked == []
