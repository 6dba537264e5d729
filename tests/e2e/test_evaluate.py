"""Tasks of lm-eval on a converted model: a running server and transformers score it alike."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.e2e.conftest import Converted, serve
from vllm_requant.cli import app

# the first test waits for the conversion
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(2400)]

KEY = "key-of-this-test"
DOCUMENTS = [
    ("The capital of France is", ["Paris", "Rome", "Berlin", "Madrid"]),
    ("The largest planet in the solar system is", ["Jupiter", "Mars", "Venus", "Mercury"]),
    ("The opposite of hot is", ["cold", "warm", "loud", "bright"]),
    ("The first month of the year is", ["January", "March", "July", "December"]),
    ("Ice is made of frozen", ["water", "oil", "sand", "milk"]),
    ("Two plus three equals", ["five", "four", "six", "seven"]),
]
TASK = """
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
doc_to_text: "{{question}}"
metadata: {version: 1.0}
"""
CHOOSE = """
task: facts_choose
output_type: multiple_choice
doc_to_choice: choices
doc_to_target: 0
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
GO_ON = """
task: facts_go_on
output_type: generate_until
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["."], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true}]
filter_list: [{name: first-word, filter: [{function: regex, regex_pattern: "^\\\\s*(\\\\w+)"}, {function: take_first}]}]
"""


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: extra 'eval', make test-eval")
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    data = tmp_path / "documents.jsonl"
    data.write_text("\n".join(json.dumps({"question": text, "choices": choices}) for text, choices in DOCUMENTS))
    for name, own in (("choose", CHOOSE), ("go_on", GO_ON)):
        (tmp_path / f"{name}.yaml").write_text(own + TASK.replace("DATA", str(data)))
    return tmp_path


def scores(folder: Path, tasks: Path, *flags: str) -> dict[str, Any]:
    command = ["eval", str(folder), "--tasks", "facts_*", "--include-path", str(tasks), "--no-record", "--json", *flags]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    return {entry["dataset"]: entry["scores"] for entry in json.loads(done.stdout)["evaluations"]}


def test_a_server_scores_as_transformers_does(
    converted: Converted, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = scores(converted.folder, tasks, "--model-args", "dtype=float32")
    assert expected["facts_choose"]["acc"] >= 0.5
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serve(converted.folder, tmp_path / "eval.log", "--dtype", "float32", "--api-key", KEY) as server:
        assert scores(converted.folder, tasks, "--backend", "endpoint", "--url", f"{server.address}/v1") == expected
