"""What a soak asks of a server: a seeded, endless stream of good, abandoned and bad requests, as pure data."""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ["ABANDONED", "KINDS", "Limits", "Request", "stream"]

_TEXT = "the river town light of a quiet stone and under every cold morning we walk home with no map to find it"
_WORDS = _TEXT.split()


@dataclass(frozen=True)
class Limits:
    """What the requests have to know about the server.

    Attributes:
        model: its name there.
        vocab_size: ids of tokens are below it.
        max_model_len: tokens of a request, prompt and answer together; 128 or more.
    """

    model: str
    vocab_size: int
    max_model_len: int


@dataclass(frozen=True)
class Request:
    """One request.

    Attributes:
        kind: of :data:`KINDS`.
        method, path, body: as they are sent; the body's type is always said to be JSON.
        choices: answers that it gets if it is a good one.
        leave_after: the client goes away after so many messages of the stream.
        leave_seconds: the client goes away after so long, whatever it has by then.
    """

    kind: str
    method: str
    path: str
    body: bytes
    choices: int = 1
    leave_after: int | None = None
    leave_seconds: float | None = None


class _Draw:
    """Random requests that a server should answer; what is given replaces parts of them."""

    def __init__(self, limits: Limits, seed: str) -> None:
        self.limits = limits
        self.random = random.Random(seed)

    def text(self) -> str:
        # a word is up to eight tokens, where every byte is one: less than half of the longest request
        return " ".join(self.random.choices(_WORDS, k=self.random.randint(1, self.limits.max_model_len // 16)))

    def tokens(self) -> list[int]:
        count = self.random.randint(1, self.limits.max_model_len // 2)
        return [self.random.randrange(3, self.limits.vocab_size) for _ in range(count)]

    def new_tokens(self) -> int:
        return self.random.randint(1, self.limits.max_model_len // 8)

    def temperature(self) -> float:
        return self.random.choice((0.0, 0.7, 1.0))

    def completion(self, **fields: Any) -> dict[str, Any]:
        body = {
            "model": self.limits.model,
            "prompt": self.text(),
            "max_tokens": self.new_tokens(),
            "temperature": self.temperature(),
            "seed": self.random.randrange(2**31),
        }
        content = json.dumps(body | fields).encode()
        return {"method": "POST", "path": "/v1/completions", "body": content, "choices": 1}

    def chat(self, **fields: Any) -> dict[str, Any]:
        messages = [{"role": "user", "content": self.text()}]
        if self.random.random() < 0.3:
            messages.insert(0, {"role": "system", "content": "Answer briefly."})
        body = {
            "model": self.limits.model,
            "messages": messages,
            "max_tokens": self.new_tokens(),
            "temperature": self.temperature(),
            "seed": self.random.randrange(2**31),
        }
        content = json.dumps(body | fields).encode()
        return {"method": "POST", "path": "/v1/chat/completions", "body": content, "choices": 1}


def _several_choices(draw: _Draw) -> dict[str, Any]:
    count = draw.random.randint(2, 4)
    ask = draw.random.choice((draw.completion, draw.chat))
    return ask(n=count, temperature=1.0) | {"choices": count}


def _several_prompts(draw: _Draw) -> dict[str, Any]:
    count = draw.random.randint(2, 4)
    return draw.completion(prompt=[draw.text() for _ in range(count)]) | {"choices": count}


def _logprobs(draw: _Draw) -> dict[str, Any]:
    if draw.random.random() < 0.5:
        return draw.chat(logprobs=True, top_logprobs=draw.random.randint(1, 5), stream=draw.random.random() < 0.5)
    return draw.completion(logprobs=draw.random.randint(0, 5), stream=draw.random.random() < 0.5)


def _stop(draw: _Draw) -> dict[str, Any]:
    return draw.random.choice((draw.completion, draw.chat))(stop=draw.random.choice(("e", ["\n", "the"], [" a", "."])))


def _abandoned_stream(draw: _Draw) -> dict[str, Any]:
    # it goes on for longer than the client stays, also where a message carries several tokens
    ask = draw.random.choice((draw.completion, draw.chat))
    long = {"max_tokens": draw.limits.max_model_len // 4, "ignore_eos": True, "stream": True}
    return ask(**long) | {"leave_after": draw.random.randint(1, 8)}


def _abandoned_wait(draw: _Draw) -> dict[str, Any]:
    long = {"max_tokens": draw.limits.max_model_len // 4, "ignore_eos": True}
    return draw.completion(**long) | {"leave_seconds": draw.random.uniform(0.01, 0.2)}


def _too_long(draw: _Draw) -> dict[str, Any]:
    count = draw.limits.max_model_len + draw.random.randint(1, draw.limits.max_model_len)
    if draw.random.random() < 0.5:
        return draw.completion(prompt=draw.random.choices(range(3, draw.limits.vocab_size), k=count))
    return draw.completion(prompt=" ".join(draw.random.choices(_WORDS, k=2 * count)))


def _malformed(draw: _Draw) -> dict[str, Any]:
    request = draw.random.choice((draw.completion, draw.chat))()
    whole = request["body"]
    broken = (whole[: len(whole) // 2], whole[:-1], b"", b"{", b"\xff\xfe" + whole, whole + b"}")
    return request | {"body": draw.random.choice(broken)}


def _wrong_type(draw: _Draw) -> dict[str, Any]:
    fields = ({"max_tokens": "many"}, {"temperature": "hot"}, {"prompt": {"a": 1}}, {"stop": 5}, {"n": 1.5})
    if draw.random.random() < 0.3:
        return draw.chat(messages="Hello")
    return draw.completion(**draw.random.choice(fields))


def _outside_vocabulary(draw: _Draw) -> dict[str, Any]:
    ids = draw.tokens()
    vocab_size = draw.limits.vocab_size
    ids[draw.random.randrange(len(ids))] = draw.random.choice((-1, vocab_size, vocab_size + 1, 10**7, 2**31))
    return draw.completion(prompt=ids)


def _huge_logit_bias(draw: _Draw) -> dict[str, Any]:
    chosen = draw.random.sample(range(draw.limits.vocab_size), 100)
    return draw.completion(logit_bias={str(token): draw.random.choice((-1e30, 1e30)) for token in chosen})


def _unknown_route(draw: _Draw) -> dict[str, Any]:
    path = draw.random.choice(("/v1/complete", "/v2/completions", "/v1/completions/1", "/%00", "/" + "a" * 4000))
    return draw.completion() | {"path": path}


def _wrong_method(draw: _Draw) -> dict[str, Any]:
    return draw.completion() | {"method": draw.random.choice(("GET", "PUT", "DELETE"))}


# Of one kind all get the same status from a server that works. How often each comes is the number before it.
_BUILDERS: dict[str, tuple[int, Callable[[_Draw], dict[str, Any]]]] = {
    "completion": (5, lambda draw: draw.completion()),
    "completion, streamed": (5, lambda draw: draw.completion(stream=True)),
    "completion of token ids": (3, lambda draw: draw.completion(prompt=draw.tokens())),
    "several prompts": (2, _several_prompts),
    "chat": (5, lambda draw: draw.chat()),
    "chat, streamed": (5, lambda draw: draw.chat(stream=True, stream_options={"include_usage": True})),
    "several choices": (3, _several_choices),
    "logprobs": (3, _logprobs),
    "stop": (3, _stop),
    "abandoned in a stream": (5, _abandoned_stream),
    "abandoned while waiting": (3, _abandoned_wait),
    "prompt too long": (2, _too_long),
    "malformed JSON": (2, _malformed),
    "wrong type": (2, _wrong_type),
    "unknown model": (1, lambda draw: draw.completion(model="no-such-model")),
    "negative max_tokens": (1, lambda draw: draw.completion(max_tokens=-draw.new_tokens())),
    "temperature out of range": (1, lambda draw: draw.completion(temperature=-draw.random.uniform(0.1, 9))),
    "too many logprobs": (1, lambda draw: draw.completion(logprobs=10**6)),
    "empty prompt": (1, lambda draw: draw.completion(prompt="")),
    "no token ids": (1, lambda draw: draw.completion(prompt=[])),
    "no messages": (1, lambda draw: draw.chat(messages=[])),
    "token ids outside the vocabulary": (2, _outside_vocabulary),
    "huge logit_bias": (1, _huge_logit_bias),
    "logit_bias outside the vocabulary": (
        1,
        lambda draw: draw.completion(logit_bias={str(draw.limits.vocab_size + 5): 1}),
    ),
    "unknown route": (1, _unknown_route),
    "wrong method": (1, _wrong_method),
}
KINDS = tuple(_BUILDERS)
ABANDONED = tuple(kind for kind in KINDS if kind.startswith("abandoned"))
"""Those in which the client goes away before the answer is complete."""


def stream(limits: Limits, seed: int, client: int = 0) -> Iterator[Request]:
    """Requests of one client without an end; the same arguments give the same ones.

    Kinds are dealt like cards: within each :data:`DECK` requests every kind comes as often as it should.
    """
    draw = _Draw(limits, f"{seed}/{client}")
    cards = [kind for kind, (often, _) in _BUILDERS.items() for _ in range(often)]
    while True:
        draw.random.shuffle(cards)
        for kind in cards:
            yield Request(kind, **_BUILDERS[kind][1](draw))


DECK = sum(often for often, _ in _BUILDERS.values())
"""Requests after which every kind has come as often as it should."""
