"""Decoding, prefill and many requests at once: what is timed, and what is made of the times."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from .contenders import Contender

__all__ = ["FIGURES", "Load", "Rates", "measure_round"]

_SHORT_PROMPT = 32
FIGURES = {
    "decode": "one request, tokens/s",
    "prefill": "tokens/s of the prompt",
    "batch": "all requests, tokens/s",
}


@dataclass(frozen=True)
class Load:
    """What is asked.

    Attributes:
        vocab_size: token ids of prompts are drawn below it.
        prompt_tokens: of the prompt whose first token is waited for.
        new_tokens: of every request that decodes.
        requests: at once in the last figure.
    """

    vocab_size: int
    prompt_tokens: int = 512
    new_tokens: int = 128
    requests: int = 16

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest request."""
        return max(self.prompt_tokens, _SHORT_PROMPT + self.new_tokens) + 16


@dataclass
class Rates:
    """Tokens a second of one contender, a list entry a round; the keys are those of :data:`FIGURES`."""

    rounds: dict[str, list[float]] = field(default_factory=lambda: {figure: [] for figure in FIGURES})

    def median(self, figure: str) -> float:
        return median(self.rounds[figure])


def measure_round(contender: Contender, load: Load, seed: int, rates: Rates) -> None:
    """Time each figure once and append it to ``rates``; the same seed draws the same prompts."""
    draw = random.Random(seed)

    def prompts(count: int, length: int) -> list[list[int]]:
        # random tokens: no two prompts begin alike, and no text ends early
        return [[draw.randrange(3, load.vocab_size) for _ in range(length)] for _ in range(count)]

    (alone,) = contender.generate(prompts(1, _SHORT_PROMPT), load.new_tokens)
    rates.rounds["decode"].append(_steady([alone]))
    (first,) = contender.generate(prompts(1, load.prompt_tokens), 1)
    rates.rounds["prefill"].append(load.prompt_tokens / first[0])
    together = contender.generate(prompts(load.requests, _SHORT_PROMPT), load.new_tokens)
    rates.rounds["batch"].append(_steady(together))


def _steady(times: Sequence[Sequence[float]]) -> float:
    """Tokens a second while all requests were decoding: prompts are no part of it, nor is the tail of a late one."""
    start = max(request[0] for request in times)
    end = min(request[-1] for request in times)
    if end <= start:
        raise ValueError("the requests never decoded together; ask for more new tokens")
    return sum(start < at <= end for request in times for at in request) / (end - start)
