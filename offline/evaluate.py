"""How good a model is: perplexity, and against the original KL divergence and top-1 agreement."""

import hashlib
import logging
import math
from collections.abc import Iterable, Iterator
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from .calibration import SELF, CalibrationError, read_text
from .progress import track

__all__ = ["BUILTIN_DATASET", "EvaluationText", "compare", "evaluation_windows", "predictions"]

log = logging.getLogger(__name__)
BUILTIN_DATASET = "python-docs"
_POSITIONS = 8  # held against each other at a time: as many as stay in a core's cache


class EvaluationText:
    """Text for an evaluation.

    Attributes:
        name: as the user named it.
        text: the text.
    """

    def __init__(self, dataset: str) -> None:
        self.name = dataset
        if dataset == SELF:
            raise CalibrationError("--dataset self: a model's own samples say nothing about other text; name a file")
        self.text = _builtin_text() if dataset == BUILTIN_DATASET else read_text(dataset, split="test")
        if not self.text.strip():
            raise CalibrationError(f"{dataset}: holds no text")


def _builtin_text() -> str:
    """Python's language reference as the standard library carries it: real prose on every machine, no network."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def evaluation_windows(
    text: EvaluationText, tokenizer: Any, *, seq_len: int, max_tokens: int | None
) -> tuple[Tensor, dict[str, Any]]:
    """Cut the tokenized text into windows side by side, as GPTQ's authors do.

    Returns:
        int64 ``[windows, seq_len]`` and what a reader must know to compare the figures. The remainder shorter than
        a window is dropped. No beginning-of-text token is inserted unless the tokenizer does so by itself.

    Raises:
        CalibrationError: the text is shorter than one window.
    """
    ids = torch.tensor(tokenizer(text.text).input_ids)
    if max_tokens is not None:
        ids = ids[: max(max_tokens, seq_len)]
    windows = ids.numel() // seq_len
    if windows == 0:
        raise CalibrationError(f"{text.name}: {ids.numel()} tokens are fewer than --seq-len {seq_len}")
    used = ids[: windows * seq_len].view(windows, seq_len)
    bos = tokenizer.bos_token_id
    conditions = {
        "dataset": text.name,
        "text_sha256": hashlib.sha256(text.text.encode()).hexdigest(),
        "seq_len": seq_len,
        "windows": windows,
        "tokens": used.numel(),
        "scored_tokens": windows * (seq_len - 1),
        "bos": "first window only, by the tokenizer" if bos is not None and int(ids[0]) == bos else "none",
    }
    return used, conditions


@torch.no_grad()
def predictions(model: Any, windows: Tensor, dtype: torch.dtype = torch.float32) -> Iterator[Tensor]:
    """What a model predicts, window by window.

    Args:
        model: a causal language model of transformers.
        windows: int64 ``[windows, seq_len]``.
        dtype: of the result.

    Returns:
        Log-probabilities ``[seq_len − 1, vocabulary]`` of each window.
    """
    device = next(model.parameters()).device
    for row in windows:
        yield torch.log_softmax(model(row[None].to(device)).logits[0, :-1].float(), dim=-1).to(dtype)


def compare(
    windows: Tensor, predicted: Iterable[Tensor], reference: Iterable[Tensor] | None = None
) -> dict[str, float]:
    """Score predictions, and hold them against those of a reference where there is one.

    Args:
        windows: int64 ``[windows, seq_len]``.
        predicted: of a model, as :func:`predictions` gives them.
        reference: of the original.

    Returns:
        ``perplexity``; with a reference also ``reference_perplexity``, ``kl_divergence`` (mean over tokens of
        KL(reference ‖ model), nats) and ``top1_agreement`` (share of positions with the same most likely token).
    """
    totals = {"nll": 0.0, "reference_nll": 0.0, "kl": 0.0, "agree": 0.0}
    references = repeat(None) if reference is None else reference
    pairs = zip(windows, predicted, references, strict=False)
    for row, logp, ref in track(pairs, "evaluating", total=len(windows)):
        target = row[1:, None].to(logp.device)
        totals["nll"] -= float(logp.gather(1, target).double().sum())
        if ref is None:
            continue
        totals["reference_nll"] -= float(ref.gather(1, target).double().sum())
        for ours, theirs in zip(logp.split(_POSITIONS), ref.split(_POSITIONS), strict=True):
            theirs = theirs.float()
            totals["agree"] += float((theirs.argmax(-1) == ours.argmax(-1)).sum())
            totals["kl"] += float((theirs - ours).mul_(theirs.exp()).sum(-1).double().sum())
    scored = windows.shape[0] * (windows.shape[1] - 1)
    result = {"perplexity": math.exp(totals["nll"] / scored)}
    if reference is not None:
        result |= {
            "reference_perplexity": math.exp(totals["reference_nll"] / scored),
            "kl_divergence": totals["kl"] / scored,
            "top1_agreement": totals["agree"] / scored,
        }
    return result
