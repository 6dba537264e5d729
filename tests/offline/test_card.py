"""The model card, and results that are added to a finished checkpoint."""

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from tests import tiny
from vllm_requant.cli import app
from vllm_requant.format.reader import Checkpoint
from vllm_requant.offline.card import CARD_NAME, inherited, model_card, recipe_rows
from vllm_requant.offline.models import load_causal_lm
from vllm_requant.offline.recipe import Recipe
from vllm_requant.offline.save import REPORT_NAME, convert_and_save, record_evaluation

ORIGINAL_CARD = "---\nlicense: apache-2.0\nlanguage:\n- en\n- de\ntags:\n- mine\n---\n# Original\n"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    source = tiny.save(tmp_path / "in")
    (source / CARD_NAME).write_text(ORIGINAL_CARD)
    convert_and_save(load_causal_lm(str(source)), tmp_path / "out", Recipe("rtn", 4, outliers=0.0, significant=0.0))
    return tmp_path / "out"


def result(perplexity: float, **conditions: Any) -> dict[str, Any]:
    return {"dataset": "a|text", "scores": {"perplexity": perplexity}, "conditions": {"seq_len": 64} | conditions}


def test_card_has_what_the_hub_reads(checkpoint: Path) -> None:
    data = ModelCard.load(checkpoint / CARD_NAME).data.to_dict()
    assert data["license"] == "apache-2.0"
    assert data["language"] == ["en", "de"]
    assert {"requant", "quantized", "4-bit", "rtn"} <= set(data["tags"])
    assert data["pipeline_tag"] == "text-generation"
    text = (checkpoint / CARD_NAME).read_text()
    config = Checkpoint(checkpoint).config
    assert f"{config.bits_per_weight:.3f} stored bits" in text
    assert "requant serve" in text
    assert "| base | rtn |" in text
    assert str(checkpoint) not in text
    assert CARD_NAME in (checkpoint / "SHA256SUMS").read_text()


def test_original_of_the_hub_is_named(checkpoint: Path) -> None:
    card = model_card(Checkpoint(checkpoint).config, 10, {}, inherited("someone/model"))
    data = ModelCard(card).data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("someone/model", "quantized")


def test_card_of_the_original_may_hold_anything(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / CARD_NAME).write_text("---\nlicense: [unclosed\n---\n")
    assert inherited(str(tmp_path)) == {}
    assert "takes over no licence" in caplog.text


def test_results_are_recorded_and_the_checkpoint_stays_whole(checkpoint: Path) -> None:
    for value in (31.0, 30.0):  # the second in the place of the first
        record_evaluation(checkpoint, result(value))
    record_evaluation(checkpoint, result(29.0, stride=8))
    entries = json.loads((checkpoint / REPORT_NAME).read_text())["evaluations"]
    assert [entry["scores"]["perplexity"] for entry in entries] == [30.0, 29.0]
    card = ModelCard.load(checkpoint / CARD_NAME)
    assert r"| a\|text | perplexity | 30 | seq len 64 |" in card.text
    assert card.data.license == "apache-2.0"
    assert [found.metric_value for found in card.data.eval_results] == [30.0, 29.0]
    assert card.data.eval_results[1].metric_args == {"seq_len": 64, "stride": 8}
    done = CliRunner().invoke(app, ["verify", str(checkpoint)])
    assert done.exit_code == 0, done.output


def test_a_card_that_somebody_wrote_stays(checkpoint: Path) -> None:
    (checkpoint / CARD_NAME).write_text("mine")
    record_evaluation(checkpoint, result(30.0))
    assert (checkpoint / CARD_NAME).read_text() == "mine"


def test_recording_blesses_no_damage(checkpoint: Path) -> None:
    with (checkpoint / "tokenizer.json").open("a") as file:
        file.write(" ")
    record_evaluation(checkpoint, result(30.0))
    done = CliRunner().invoke(app, ["verify", str(checkpoint)])
    assert done.exit_code == 1
    assert "tokenizer.json" in done.output


def test_choices_without_a_meaning_are_not_shown() -> None:
    recipe = {"base": "rtn", "bits": 4, "group_size": 64, "outlier_rule": "magnitude", "target_bpw": None}
    assert dict(recipe_rows(recipe)) == {"base": "rtn", "bits": "4", "group size": "64", "outlier rule": "magnitude"}
    recipe["target_bpw"] = 3.2500001
    assert dict(recipe_rows(recipe)) == {"base": "rtn", "outlier rule": "magnitude", "target bpw": "3.25"}
