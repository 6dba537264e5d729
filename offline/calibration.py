"""Token sequences to measure sensitivities on: from the model itself, from a file, or from a Hub data set."""

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .cache import Snapshot, TensorCache, fingerprint, model_fingerprint
from .objections import ObjectionError
from .progress import track
from .stages import Stages

__all__ = ["Calibration", "CalibrationError", "check_calibration", "check_dataset", "load_calibration", "read_text"]

log = logging.getLogger(__name__)
SELF = "self"
GENERATION_BATCH = 16
"""Sequences that a model writes at a time."""
_CHARACTERS_AT_ONCE = 1 << 18


class CalibrationError(ObjectionError):
    """The calibration text cannot be read or is too short."""


@dataclass(frozen=True)
class Calibration:
    """Calibration sequences.

    Attributes:
        tokens: int64 ``[num_samples, seq_len]``.
        dataset: where they are from, as the user named it.
        fingerprint: sha256 of the tokens.
    """

    tokens: Tensor
    dataset: str

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.tokens.numpy().tobytes()).hexdigest()

    def describe(self) -> dict[str, Any]:
        samples, seq_len = self.tokens.shape
        return {
            # the last component of a path: where it lay is nobody else's business
            "dataset": Path(self.dataset).name if Path(self.dataset).is_file() else self.dataset,
            "num_samples": samples,
            "seq_len": seq_len,
            "sha256": self.fingerprint,
        }


def check_dataset(dataset: str) -> None:
    """Refuse a data set that cannot be had, before anything expensive.

    Raises:
        CalibrationError: a file that does not exist, or a Hub name without the ``datasets`` package.
    """
    if dataset == SELF:
        return
    path = Path(dataset)
    if path.is_file():
        return
    if path.suffix in (".txt", ".raw", ".md", ".jsonl", ".json") or dataset.startswith((".", "/", "~")):
        raise CalibrationError(f"{dataset}: no such file")
    try:
        import datasets  # noqa: F401
    except ImportError:
        raise CalibrationError(
            f"{dataset}: no such file; to read it as a Hub data set install the 'eval' extra (package datasets)"
        ) from None


def check_calibration(dataset: str, tokenizer: Any, *, num_samples: int, seq_len: int) -> None:
    """Refuse a data set that cannot be had, and a file that is malformed or too short; arguments as below.

    Raises:
        CalibrationError: the reason.
    """
    check_dataset(dataset)
    if not Path(dataset).is_file():
        return
    text, needed, found = read_text(dataset), num_samples * seq_len, 0
    # as much of it as it takes: there may be gigabytes
    for begin in range(0, len(text), _CHARACTERS_AT_ONCE):
        found += len(tokenizer(text[begin : begin + _CHARACTERS_AT_ONCE], add_special_tokens=False).input_ids)
        if found >= needed:
            return
    raise _too_short(dataset, found, num_samples, seq_len)


def load_calibration(
    dataset: str,
    model: Any,
    tokenizer: Any,
    *,
    num_samples: int,
    seq_len: int,
    seed: int,
    cache: TensorCache | None = None,
) -> Calibration:
    """Calibration sequences, the same for the same arguments.

    Args:
        dataset: "self" (text sampled from the model), a text or JSONL file, or a Hub data set (train split,
            ``NAME`` or ``NAME:CONFIG``).
        num_samples: sequences.
        seq_len: tokens in each.
        cache: where text that the model wrote is kept.

    Raises:
        CalibrationError: the text is missing or shorter than ``num_samples · seq_len`` tokens.
    """
    with Stages().stage("calibration_text"):
        if dataset == SELF:
            tokens = (cache or TensorCache()).resume(
                "calibration_text",
                lambda: fingerprint(
                    model=model_fingerprint(model), num_samples=num_samples, seq_len=seq_len, seed=seed
                ),
                torch.device("cpu"),
                lambda snapshot: {"tokens": _sample_from_model(model, tokenizer, num_samples, seq_len, seed, snapshot)},
            )["tokens"]
        else:
            tokens = _windows(dataset, tokenizer, num_samples, seq_len, seed)
    return Calibration(tokens, dataset)


def _windows(dataset: str, tokenizer: Any, num_samples: int, seq_len: int, seed: int) -> Tensor:
    text = read_text(dataset)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
    if ids.numel() < num_samples * seq_len:
        raise _too_short(dataset, ids.numel(), num_samples, seq_len)
    # one window from each of num_samples equal stretches: random, and never overlapping
    stretch = ids.numel() // num_samples
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.randint(0, stretch - seq_len + 1, (num_samples,), generator=generator)
    starts = torch.arange(num_samples) * stretch + offsets
    return torch.stack([ids[start : start + seq_len] for start in starts.tolist()])


def _too_short(dataset: str, tokens: int, num_samples: int, seq_len: int) -> CalibrationError:
    return CalibrationError(
        f"{dataset}: {tokens} tokens, but {num_samples} sequences of {seq_len} need {num_samples * seq_len}; "
        "lower --num-samples or --seq-len"
    )


def read_text(dataset: str, split: str = "train", *, rows: int = 20_000, separator: str = "\n\n") -> str:
    """All text of a file (JSONL: the ``text`` field of each line), or the first rows of a Hub data set.

    Args:
        dataset: as for :func:`load_calibration`, "self" apart.
        split, rows: of a Hub data set.
        separator: between rows or lines.

    Raises:
        CalibrationError: it cannot be read.
    """
    path = Path(dataset)
    if not path.is_file():
        check_dataset(dataset)
        return separator.join(_hub_rows(dataset, split, rows))
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{dataset}: is not UTF-8 text (byte {error.start}); give a text or JSONL file"
        ) from None
    if path.suffix != ".jsonl":
        return content
    texts = []
    for number, line in enumerate(filter(str.strip, content.splitlines()), start=1):
        try:
            texts.append(json.loads(line)["text"])
        except (ValueError, KeyError, TypeError):
            raise CalibrationError(f'{dataset}: line {number} is not a JSON object with a "text" field') from None
    return separator.join(texts)


def _hub_rows(dataset: str, split: str, rows: int) -> list[str]:
    import datasets

    name, _, config = dataset.partition(":")
    try:
        stream = datasets.load_dataset(name, config or None, split=split, streaming=True)
        return [row["text"] for row in stream.take(rows)]
    except Exception as error:  # the package raises many unrelated types
        raise CalibrationError(f"{dataset}: cannot be read from the Hub: {error}") from error


@torch.no_grad()
def _sample_from_model(
    model: Any, tokenizer: Any, num_samples: int, seq_len: int, seed: int, snapshot: Snapshot
) -> Tensor:
    """Ancestral sampling at temperature 1 from the beginning-of-text token.

    An end-of-text token does not stop a sequence: what follows it is another document, as in pre-training.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    generator = torch.Generator().manual_seed(seed)
    # a random first token after the start keeps instruction-tuned models from repeating one opening
    special = set(tokenizer.all_special_ids)
    vocabulary = torch.tensor([i for i in range(model.config.vocab_size) if i not in special])
    first = vocabulary[torch.randint(len(vocabulary), (num_samples, 1), generator=generator)]
    prompts = first if start is None else torch.cat([torch.full((num_samples, 1), start), first], dim=1)
    device = next(model.parameters()).device
    tokens = torch.zeros(num_samples, seq_len, dtype=torch.int64)
    state = {"tokens": tokens, "generator": generator.get_state()}
    begin = snapshot.restore(state)
    generator.set_state(state["generator"])
    batches = list(zip(prompts.split(GENERATION_BATCH), tokens.split(GENERATION_BATCH), strict=True))
    steps = (len(batches) - begin) * max(seq_len - prompts.shape[1], 0)
    ticks = iter(track(range(steps), "sampling calibration text", total=steps))
    for number, (batch, sampled) in enumerate(batches[begin:], start=begin):
        sampled.copy_(_sample_batch(model, batch.to(device), seq_len, generator, ticks))
        snapshot.offer(number + 1, state | {"generator": generator.get_state()})
    next(ticks, None)  # ends the bar
    return tokens


def _sample_batch(model: Any, tokens: Tensor, seq_len: int, generator: torch.Generator, ticks: Iterator[int]) -> Tensor:
    """Extend ``tokens`` to ``seq_len``; each new position takes one of ``ticks``."""
    step, cache = tokens, None
    while tokens.shape[1] < seq_len:
        next(ticks)
        output = model(step, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        # the draw is on the CPU in float64: the same on every device up to the logits themselves
        probability = torch.softmax(output.logits[:, -1].double().cpu(), dim=-1)
        # a model may overflow on what it wrote: the loss of that sequence will say so, and it will be left out
        probability[~probability.isfinite().all(1)] = 1.0
        step = torch.multinomial(probability, 1, generator=generator).to(tokens.device)
        tokens = torch.cat([tokens, step], dim=1)
    return tokens[:, :seq_len]
