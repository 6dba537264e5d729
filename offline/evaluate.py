"""How good a model is: perplexity, and against the original KL divergence and top-1 agreement."""

import hashlib
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .calibration import SELF, CalibrationError, check_dataset, read_text
from .progress import track

__all__ = [
    "BUILTIN_DATASET",
    "EvaluationText",
    "Windows",
    "check_evaluation_text",
    "compare",
    "evaluation_windows",
    "predictions",
]

log = logging.getLogger(__name__)
BUILTIN_DATASET = "python-docs"
_POSITIONS = 8  # held against each other at a time: as many as stay in a core's cache


@dataclass(frozen=True)
class _HubText:
    """What a usual name stands for.

    Attributes:
        dataset: on the Hub, ``NAME:CONFIG``.
        split: of it.
        rows: the first ones that are read.
        separator: between them.
    """

    dataset: str
    split: str
    rows: int
    separator: str


# as GPTQ's authors read them, and papers since
_USUAL = {
    "wikitext2": _HubText("Salesforce/wikitext:wikitext-2-raw-v1", "test", 20_000, "\n\n"),
    "c4": _HubText("allenai/c4:en", "validation", 1_100, " "),
}


def check_evaluation_text(dataset: str) -> None:
    """Refuse a text that cannot be had, before anything expensive.

    Args:
        dataset: a text or JSONL file, ``wikitext2``, ``c4``, another Hub data set (test split), or ``python-docs``.

    Raises:
        CalibrationError: the reason.
    """
    if dataset == SELF:
        raise CalibrationError("--dataset self: a model's own samples say nothing about other text; name a file")
    if dataset != BUILTIN_DATASET:
        check_dataset(_usual(dataset).dataset)


def _usual(dataset: str) -> _HubText:
    named = None if Path(dataset).is_file() else _USUAL.get(dataset)
    return named or _HubText(dataset, "test", 20_000, "\n\n")


class EvaluationText:
    """Text for an evaluation.

    Args:
        dataset: as for :func:`check_evaluation_text`.
        name: what it is called in results; by default as it is named in ``dataset``.

    Attributes:
        name, text: of it.

    Raises:
        CalibrationError: it cannot be read, or is empty.
    """

    def __init__(self, dataset: str, name: str | None = None) -> None:
        check_evaluation_text(dataset)
        self.name = name or dataset
        if dataset == BUILTIN_DATASET:
            self.text = _builtin_text()
        else:
            source = _usual(dataset)
            self.text = read_text(source.dataset, source.split, rows=source.rows, separator=source.separator)
        if not self.text.strip():
            raise CalibrationError(f"{dataset}: holds no text")


def _builtin_text() -> str:
    """Python's language reference as the standard library carries it: real prose on every machine, no network."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


@dataclass(frozen=True)
class Windows:
    """Sequences to score.

    Attributes:
        tokens: int64 ``[windows, seq_len]``.
        scored: how many of the last tokens of each window count; at most seq_len − 1, since nothing predicts the first.
    """

    tokens: Tensor
    scored: Sequence[int]

    def __len__(self) -> int:
        return len(self.scored)


def evaluation_windows(
    text: EvaluationText, tokenizer: Any, *, seq_len: int, max_tokens: int | None, stride: int | None = None
) -> tuple[Windows, dict[str, Any]]:
    """Cut the tokenized text into windows.

    Args:
        text: to cut.
        tokenizer: of the model. No beginning-of-text token is inserted unless it does so by itself.
        seq_len: tokens in a window.
        max_tokens: use at most that many tokens.
        stride: tokens from the beginning of a window to that of the next. With seq_len, the default, windows lie side
            by side, as GPTQ's authors have them: all their tokens but the first count, and a remainder shorter than a
            window is dropped. With less they overlap: of the first window all tokens but the first count, of each
            other the last ``stride``, of the last one, which ends with the text, those that no other has scored. Every
            token but the text's first is so scored once, with at least seq_len − stride tokens before it where there
            are that many.

    Returns:
        The windows, and what a reader must know to compare the figures.

    Raises:
        CalibrationError: the text is shorter than one window.
    """
    stride = stride or seq_len
    ids = torch.tensor(tokenizer(text.text).input_ids)
    if max_tokens is not None:
        ids = ids[: max(max_tokens, seq_len)]
    if ids.numel() < seq_len:
        raise CalibrationError(f"{text.name}: {ids.numel()} tokens are fewer than --seq-len {seq_len}")
    ends = list(range(seq_len, ids.numel() + 1, stride))
    if stride < seq_len and ends[-1] < ids.numel():
        ends.append(ids.numel())
    windows = Windows(
        torch.stack([ids[end - seq_len : end] for end in ends]),
        [min(end - before, seq_len - 1) for before, end in pairwise([0, *ends])],
    )
    bos = tokenizer.bos_token_id
    conditions = {
        "text_sha256": hashlib.sha256(text.text.encode()).hexdigest(),
        "seq_len": seq_len,
        "stride": stride,
        "windows": len(windows),
        "tokens": ends[-1],
        "scored_tokens": sum(windows.scored),
        "bos": "first window only, by the tokenizer" if bos is not None and int(ids[0]) == bos else "none",
    }
    return windows, conditions


@torch.no_grad()
def predictions(model: Any, windows: Windows, dtype: torch.dtype = torch.float32) -> Iterator[Tensor]:
    """What a model predicts, window by window.

    Args:
        model: a causal language model of transformers.
        windows: to predict.
        dtype: of the result.

    Returns:
        Log-probabilities ``[scored, vocabulary]`` of each window.
    """
    device = next(model.parameters()).device
    for row, scored in zip(windows.tokens, windows.scored, strict=True):
        # a token is predicted where the one before it stands
        logits = model(row[None].to(device), logits_to_keep=scored + 1).logits[0, :-1]
        yield torch.log_softmax(logits.float(), dim=-1).to(dtype)


def compare(
    windows: Windows, predicted: Iterable[Tensor], reference: Iterable[Tensor] | None = None
) -> dict[str, float]:
    """Score predictions, and hold them against those of a reference where there is one.

    Args:
        windows: that were predicted.
        predicted: of a model, as :func:`predictions` gives them.
        reference: of the original.

    Returns:
        ``perplexity``; with a reference also ``reference_perplexity``, ``kl_divergence`` (mean over tokens of
        KL(reference ‖ model), nats) and ``top1_agreement`` (share of positions with the same most likely token).
    """
    totals = {"nll": 0.0, "reference_nll": 0.0, "kl": 0.0, "agree": 0.0}
    references = repeat(None) if reference is None else reference
    rows = zip(windows.tokens, windows.scored, predicted, references, strict=False)
    for row, scored, logp, ref in track(rows, "evaluating", total=len(windows)):
        target = row[-scored:, None].to(logp.device)
        totals["nll"] -= float(logp.gather(1, target).double().sum())
        if ref is None:
            continue
        totals["reference_nll"] -= float(ref.gather(1, target).double().sum())
        for ours, theirs in zip(logp.split(_POSITIONS), ref.split(_POSITIONS), strict=True):
            theirs = theirs.float()
            totals["agree"] += float((theirs.argmax(-1) == ours.argmax(-1)).sum())
            totals["kl"] += float((theirs - ours).mul_(theirs.exp()).sum(-1).double().sum())
    tokens = sum(windows.scored)
    result = {"perplexity": math.exp(totals["nll"] / tokens)}
    if reference is not None:
        result |= {
            "reference_perplexity": math.exp(totals["reference_nll"] / tokens),
            "kl_divergence": totals["kl"] / tokens,
            "top1_agreement": totals["agree"] / tokens,
        }
    return result
