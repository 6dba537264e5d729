"""Perplexity, KL divergence and top-1 agreement in windows side by side and overlapping, against plain loops."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from vllm_requant.offline import evaluate
from vllm_requant.offline.calibration import CalibrationError
from vllm_requant.offline.evaluate import BUILTIN_DATASET, EvaluationText, compare, evaluation_windows, predictions

TOKENS = 150


@pytest.fixture
def text(tmp_path: Path) -> EvaluationText:
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog, and then sleeps. " * 3)
    return EvaluationText(str(tmp_path / "text.txt"), "fox")


def ids_of(text: EvaluationText, count: int = TOKENS) -> torch.Tensor:
    return torch.tensor(tiny.tokenizer()(text.text).input_ids)[:count]


def log_probabilities(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Of the token after each position."""
    with torch.no_grad():
        return torch.log_softmax(model(ids[None]).logits[0].double(), dim=-1)


@pytest.mark.parametrize(("seq_len", "stride"), [(40, 7), (40, 39), (40, 1), (64, 32), (150, 10)])
def test_overlapping_windows_score_every_token_once_with_enough_before_it(
    text: EvaluationText, seq_len: int, stride: int
) -> None:
    windows, conditions = evaluation_windows(text, tiny.tokenizer(), seq_len=seq_len, max_tokens=TOKENS, stride=stride)
    model, ids = tiny.model(), ids_of(text)
    nll = 0.0
    for position in range(1, TOKENS):
        # the first window that holds the token, of those that begin every `stride` tokens, the last one at the end
        end = min(max(seq_len, seq_len + stride * math.ceil((position + 1 - seq_len) / stride)), TOKENS)
        begin = end - seq_len
        assert position - begin >= min(position, seq_len - stride)
        nll -= float(log_probabilities(model, ids[begin:position])[-1, ids[position]])
    scores = compare(windows, predictions(model, windows))
    assert scores["perplexity"] == pytest.approx(math.exp(nll / (TOKENS - 1)), rel=1e-4)
    assert conditions["tokens"] == TOKENS
    assert conditions["scored_tokens"] == sum(windows.scored) == TOKENS - 1


def test_windows_side_by_side_leave_out_their_first_tokens_and_the_remainder(text: EvaluationText) -> None:
    windows, conditions = evaluation_windows(text, tiny.tokenizer(), seq_len=40, max_tokens=TOKENS)
    model, ids = tiny.model(), ids_of(text)
    nll = 0.0
    for row in ids[:120].view(3, 40):
        nll -= float(log_probabilities(model, row)[:-1].gather(1, row[1:, None]).sum())
    assert compare(windows, predictions(model, windows))["perplexity"] == pytest.approx(
        math.exp(nll / (3 * 39)), rel=1e-4
    )
    assert (conditions["windows"], conditions["tokens"], conditions["scored_tokens"]) == (3, 120, 117)
    same, told = evaluation_windows(text, tiny.tokenizer(), seq_len=40, max_tokens=TOKENS, stride=40)
    assert torch.equal(same.tokens, windows.tokens)
    assert (same.scored, told) == (windows.scored, conditions)


@pytest.mark.parametrize("stride", [None, 16])
def test_divergence_and_agreement_are_over_the_scored_tokens(text: EvaluationText, stride: int | None) -> None:
    windows, _ = evaluation_windows(text, tiny.tokenizer(), seq_len=48, max_tokens=TOKENS, stride=stride)
    model, original = tiny.model(seed=1), tiny.model()
    divergence = agree = nll = count = 0.0
    for row, scored in zip(windows.tokens, windows.scored, strict=True):
        ours = log_probabilities(model, row)[-scored - 1 : -1]
        theirs = log_probabilities(original, row)[-scored - 1 : -1]
        divergence += float((theirs.exp() * (theirs - ours)).sum())
        agree += float((ours.argmax(1) == theirs.argmax(1)).sum())
        nll -= float(theirs.gather(1, row[-scored:, None]).sum())
        count += scored
    scores = compare(windows, predictions(model, windows), predictions(original, windows))
    assert scores["kl_divergence"] == pytest.approx(divergence / count, rel=1e-4)
    assert scores["top1_agreement"] == pytest.approx(agree / count)
    assert scores["reference_perplexity"] == pytest.approx(math.exp(nll / count), rel=1e-4)
    assert compare(windows, predictions(original, windows), predictions(original, windows))["kl_divergence"] == 0


def test_usual_names_are_read_as_papers_read_them(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def rows(*arguments: Any) -> list[str]:
        asked.append(arguments)
        return ["one", "two"]

    monkeypatch.setattr("vllm_requant.offline.calibration._hub_rows", rows)
    monkeypatch.setattr("vllm_requant.offline.calibration.check_dataset", lambda _: None)
    monkeypatch.setattr(evaluate, "check_dataset", lambda _: None)
    assert EvaluationText("wikitext2").text == "one\n\ntwo"
    assert EvaluationText("c4").text == "one two"
    EvaluationText("someone/text")
    assert [arguments[:2] for arguments in asked] == [
        ("Salesforce/wikitext:wikitext-2-raw-v1", "test"),
        ("allenai/c4:en", "validation"),
        ("someone/text", "test"),
    ]


def test_texts_that_say_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="name a file"):
        EvaluationText("self")
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(CalibrationError, match="holds no text"):
        EvaluationText(str(tmp_path / "empty.txt"))
    with pytest.raises(CalibrationError, match="are fewer than --seq-len"):
        evaluation_windows(EvaluationText(BUILTIN_DATASET), tiny.tokenizer(), seq_len=10**8, max_tokens=None)
