"""Runs are checked before anything is loaded, and finished ones are not run again."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests import tiny
from vllm_requant.format.reader import read_model_config
from vllm_requant.hf import load_dequantized
from vllm_requant.offline.evaluate import BUILTIN_DATASET, EvaluationText, compare, evaluation_windows, predictions
from vllm_requant.offline.models import load_causal_lm
from vllm_requant.offline.recipe import RecipeError
from vllm_requant.offline.sweep import Sweep, read_runs

RUNS = """
[all]
num_samples = 3
seq_len = 24
nodes = 2
[runs.gptq-4]
base = "gptq"
bits = 4
outliers = 0
significant = 0
[runs.gptq-requant]
base = "gptq"
size_of = "gptq-4"
"""


def _sweep(tmp_path: Path, text: str = RUNS) -> Sweep:
    source = tmp_path / "in"
    if not source.exists():
        tiny.save(source)
    (tmp_path / "runs.toml").write_text(text)
    return Sweep(
        source=str(source),
        runs=read_runs(tmp_path / "runs.toml"),
        calibration="self",
        evaluation={"docs": BUILTIN_DATASET},
        output=tmp_path / "results.jsonl",
        seq_len=32,
        max_tokens=96,
    )


def test_runs_are_scored_and_kept(tmp_path: Path) -> None:
    sweep = _sweep(tmp_path)
    with pytest.raises(RecipeError, match="gptq-4, whose size it is to have, has not been run"):
        list(sweep.run("*-requant"))
    rows = {row["name"]: row for row in sweep.run()}
    assert list(rows) == ["gptq-4", "gptq-requant"]
    plain, ours = rows.values()
    assert plain["bits_per_weight"] - 0.2 < ours["bits_per_weight"] <= plain["bits_per_weight"]
    for row in rows.values():
        score = row["scores"]["docs"]
        assert score["perplexity"] != score["reference_perplexity"]
        assert 0 < score["kl_divergence"] < 1
        assert score["conditions"]["tokens"] == 96
    assert str(tmp_path) not in (tmp_path / "results.jsonl").read_text()
    # nothing is left to do, also for another process
    assert list(_sweep(tmp_path).run()) == []
    assert [json.loads(line)["name"] for line in (tmp_path / "results.jsonl").read_text().splitlines()] == list(rows)


@pytest.mark.parametrize("head_bits", [16, 4])
def test_checkpoints_are_what_was_scored(tmp_path: Path, head_bits: int) -> None:
    text = RUNS.replace("[runs.gptq-4]", f"lm_head_bits = {head_bits}\n[runs.gptq-4]")
    sweep = replace(_sweep(tmp_path, text), checkpoints=tmp_path / "checkpoints")
    row = next(sweep.run("gptq-4"))
    folder = tmp_path / "checkpoints" / "gptq-4"
    config = read_model_config(folder)[1]
    assert config.provenance["recipe"] == row["recipe"]
    blocks = [spec for name, spec in config.layers.items() if name != "lm_head"]
    assert len(config.layers) - len(blocks) == (head_bits < 16)
    bits = 8 * sum(spec.nbytes for spec in blocks) / sum(spec.numel for spec in blocks)
    assert row["bits_per_weight"] == pytest.approx(bits)
    windows, _ = evaluation_windows(
        EvaluationText(BUILTIN_DATASET), load_causal_lm(sweep.source).tokenizer, seq_len=32, max_tokens=96
    )
    measured = compare(windows, predictions(load_dequantized(folder), windows))
    assert measured["perplexity"] == pytest.approx(row["scores"]["docs"]["perplexity"], rel=1e-4)


def test_a_result_of_another_recipe_is_not_taken_for_the_run(tmp_path: Path) -> None:
    list(_sweep(tmp_path).run("gptq-4"))
    with pytest.raises(RecipeError, match="gptq-4 was run with"):
        list(_sweep(tmp_path, RUNS.replace("bits = 4", "bits = 3")).run())


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("bits = 4", "bit = 4", "run gptq-4: bit is not a choice"),
        ("bits = 4", "bits = 5", "run gptq-4: --bits 5"),
        ('"gptq-4"', '"gptq-9"', "size_of names gptq-9"),
        ("[runs.gptq-4]", "[gptq-4]", "gptq-4 beside"),
        ("[all]", "[all", "not valid TOML"),
        ("bits = 4", 'bits = "4"', "run gptq-4: bits: '4': Input should be a valid integer"),
        ("[runs.gptq-4]\n", "[runs]\ngptq-4 = 4\n[gptq]\n", "runs: gptq-4: 4: Input should be a valid dictionary"),
        ("[all]\n", "all = 3\n[rest]\n", "all: 3: Input should be a valid dictionary"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, before: str, after: str, message: str) -> None:
    path = tmp_path / "runs.toml"
    path.write_text(RUNS.replace(before, after))
    with pytest.raises(RecipeError, match=message):
        read_runs(path)


YAML = """
all: {num_samples: 3, seq_len: 24, nodes: 2}
runs:
  gptq-4: {base: gptq, bits: 4, outliers: 0, significant: 0}
  gptq-requant:
    base: gptq
    size_of: gptq-4
"""


def test_runs_in_yaml_are_those_in_toml(tmp_path: Path) -> None:
    for name, text in (("runs.toml", RUNS), ("runs.yaml", YAML)):
        (tmp_path / name).write_text(text)
    assert read_runs(tmp_path / "runs.yaml") == read_runs(tmp_path / "runs.toml")


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("bits: 4", "bits: four", "run gptq-4: bits: 'four': Input should be a valid integer"),
        ("outliers: 0", "outliers: 1e-3", "run gptq-4: outliers: '1e-3': Input should be a valid number"),
        ("gptq-requant:", "gptq-4:", "gptq-4 stands twice"),
        ("bits: 4", "bits: 4, bits: 3", "bits stands twice"),
        ("seq_len: 24", "seq_len: [24", "not valid YAML"),
        (YAML, "- gptq", r"\['gptq'\]: Input should be a valid dictionary"),
        (YAML, "", "None: Input should be a valid dictionary"),
    ],
)
def test_mistakes_in_yaml_are_named(tmp_path: Path, before: str, after: str, message: str) -> None:
    path = tmp_path / "runs.yaml"
    path.write_text(YAML.replace(before, after))
    with pytest.raises(RecipeError, match=message):
        read_runs(path)


def test_the_faster_precision_is_taken_and_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for native, expected in (({"avx512_bf16": True}, "bfloat16"), ({"avx2": True}, "float32")):
        monkeypatch.setattr("torch.cpu.get_capabilities", lambda native=native: native)
        sweep = _sweep(tmp_path, '[all]\nnum_samples = 2\nseq_len = 24\n[runs.rtn]\nbase = "rtn"\ncompute = "auto"')
        row = next(replace(sweep, output=tmp_path / f"{expected}.jsonl").run())
        assert row["choices"]["compute"] == "auto"
        assert row["recipe"]["compute"] == expected
