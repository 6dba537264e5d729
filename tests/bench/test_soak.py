"""The stream of requests, the rules that judge a soak, and the driver against small servers that misbehave."""

import asyncio
import itertools
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from vllm_requant.bench.plots import plot_soak
from vllm_requant.bench.soak import Record, Target, anonymous_bytes, drive, judge, memory_growth, table
from vllm_requant.bench.traffic import ABANDONED, DECK, KINDS, Limits, Request, stream

LIMITS = Limits("m", vocab_size=320, max_model_len=256)
MIB = 2**20
STILL = {gauge: 0.0 for gauge in ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")}


def first(count: int, seed: int = 0, client: int = 0) -> list[Request]:
    return list(itertools.islice(stream(LIMITS, seed, client), count))


# --- the stream


def test_same_seed_same_stream_and_no_other() -> None:
    assert first(300) == first(300)
    assert first(50) != first(50, seed=1)
    assert first(50) != first(50, client=1)


def test_every_kind_comes_as_often_in_every_deck() -> None:
    kinds = [request.kind for request in first(3 * DECK)]
    decks = [Counter(kinds[start : start + DECK]) for start in range(0, 3 * DECK, DECK)]
    assert decks[0] == decks[1] == decks[2]
    assert set(decks[0]) == set(KINDS)
    assert kinds[:DECK] != kinds[DECK : 2 * DECK]


def by_kind() -> dict[str, list[Request]]:
    found: dict[str, list[Request]] = {kind: [] for kind in KINDS}
    for request in first(20 * DECK):
        found[request.kind].append(request)
    return found


def test_good_requests_fit_the_server() -> None:
    for kind, requests in by_kind().items():
        if kind in KINDS[: KINDS.index("prompt too long")]:
            for request in requests:
                body = json.loads(request.body)
                assert body["model"] == "m"
                assert body["max_tokens"] >= 1 and 0 <= body["temperature"] <= 2
                prompts = body.get("prompt") or [message["content"] for message in body["messages"]]
                texts = [prompts] if isinstance(prompts, str) else prompts
                # bytes are as many tokens as a text can be; what a chat template adds is not in here
                lengths = [len(prompts)] if isinstance(texts[0], int) else [len(text.encode()) for text in texts]
                assert max(lengths) + body["max_tokens"] <= LIMITS.max_model_len


def test_bad_requests_are_bad_in_the_way_of_their_kind() -> None:
    found = by_kind()
    for request in found["malformed JSON"]:
        with pytest.raises(ValueError):
            json.loads(request.body)
    for request in found["token ids outside the vocabulary"]:
        ids = json.loads(request.body)["prompt"]
        assert sum(not 0 <= token < LIMITS.vocab_size for token in ids) == 1
    for request in found["prompt too long"]:
        prompt = json.loads(request.body)["prompt"]
        assert len(prompt.split() if isinstance(prompt, str) else prompt) > LIMITS.max_model_len
    assert all(json.loads(request.body)["max_tokens"] < 0 for request in found["negative max_tokens"])
    assert all(json.loads(request.body)["temperature"] < 0 for request in found["temperature out of range"])
    assert all(json.loads(request.body)["model"] != "m" for request in found["unknown model"])
    assert all(request.path != "/v1/completions" for request in found["unknown route"])
    assert all(request.method != "POST" for request in found["wrong method"])


def test_clients_go_away_in_two_kinds_only_and_before_the_end() -> None:
    for kind, requests in by_kind().items():
        leaving = [request.leave_after is not None or request.leave_seconds is not None for request in requests]
        assert all(leaving) if kind in ABANDONED else not any(leaving)
    for request in by_kind()["abandoned in a stream"]:
        body = json.loads(request.body)
        assert request.leave_after is not None and body["stream"] and body["ignore_eos"]
        assert request.leave_after < body["max_tokens"]


# --- the rules


def samples(size: Callable[[float], float], count: int = 360) -> list[tuple[float, int]]:
    """Memory at so many points of a run, from the share of it that has passed."""
    return [(5.0 * number, int(size(number / count) * MIB)) for number in range(count)]


def jagged(share: float) -> float:
    """±30 MiB, and a peak of 500 MiB now and then."""
    number = round(share * 360)
    return 30 * (-1) ** number + (500 if number % 17 == 0 else 0)


@pytest.mark.parametrize(
    ("size", "grows"),
    [
        (lambda share: 2000, False),
        (lambda share: 2000 + jagged(share), False),
        (lambda share: 2000 + 800 * min(share, 0.4), False),  # caches that fill, compiled code
        (lambda share: 2000 - 300 * share, False),
        (lambda share: 2000 + 60 * share, False),  # 27 MiB in the second half: less than 2 %
        (lambda share: 2000 + 200 * share, True),
        (lambda share: 2000 + 200 * share + jagged(share), True),
        (lambda share: 2000 + 100 * (share > 0.7), True),
        (lambda share: 300 + 30 * share, False),  # more than 2 %, but less than 20 MiB
        (lambda share: 300 + 60 * share, True),
    ],
)
def test_growth_is_found_and_noise_is_none(size: Callable[[float], float], grows: bool) -> None:
    growth = memory_growth(samples(size))
    assert growth is not None
    assert growth.excessive is grows


def test_growth_needs_samples_in_both_windows() -> None:
    assert memory_growth([]) is None
    assert memory_growth(samples(lambda share: 100, 4)) is None
    assert memory_growth(samples(lambda share: 100, 60)) is not None


def record(outcomes: dict[str, dict[str, int]], **changed: Any) -> Record:
    made = Record(
        {kind: Counter(counts) for kind, counts in outcomes.items()}, {}, samples(lambda share: 1000), STILL, 0.03
    )
    for name, value in changed.items():
        setattr(made, name, value)
    return made


FINE = {"chat": {"200": 50}, "unknown model": {"404": 9}, ABANDONED[0]: {"disconnected": 5}}


def problems(ours: Record, reference: Record | None = None) -> list[str]:
    return judge({"ours": ours, "theirs": reference or record(FINE)}, "ours", "theirs")


def test_servers_that_do_alike_pass() -> None:
    assert problems(record(FINE)) == []
    # the reference may do worse; that is not ours
    assert problems(record(FINE), record(FINE | {"chat": {"200": 49, "500": 1}})) == []
    growing = record(
        FINE, memory=samples(lambda share: 1000 + 100 * share), gauges=STILL | {"vllm:num_requests_running": 2}
    )
    assert problems(record(FINE), growing) == []
    # whether a client goes away in time is chance
    assert problems(record(FINE | {ABANDONED[0]: {"200": 1, "disconnected": 4}})) == []


@pytest.mark.parametrize("outcome", ["500", "ServerDisconnectedError", "ClientOSError", "200, stream cut short", "400"])
@pytest.mark.parametrize("kind", ["chat", ABANDONED[0]])
def test_an_outcome_that_the_reference_never_gives_fails(kind: str, outcome: str) -> None:
    ours = record(FINE | {kind: FINE[kind] | {outcome: 1}})
    (problem,) = problems(ours)
    assert kind in problem and f"1 × {outcome}" in problem
    assert problems(ours, record(FINE | {kind: FINE[kind] | {outcome: 3}})) == []
    # with another kind of request it is no excuse
    assert len(problems(ours, record(FINE | {"unknown model": {outcome: 9, "404": 1}}))) == 1


def test_dead_servers_growing_ones_and_leftovers_fail() -> None:
    assert "ended with status 1" in problems(record(FINE, exit_status=1))[0]
    assert problems(record(FINE), record(FINE, exit_status=-9))[0].startswith("theirs")
    growing = record(FINE, memory=samples(lambda share: 1000 + 100 * share))
    (problem,) = problems(growing)
    assert problem.startswith("ours: memory grew from 1049.9 MiB in the middle of the run to 1094.9 MiB")
    assert "vllm:num_requests_running 2" in problems(record(FINE, gauges=STILL | {"vllm:num_requests_running": 2}))[0]
    assert "kv_cache_usage_perc ?" in problems(record(FINE, gauges={}))[0]
    assert "generated 90% of an answer whose client had left" in problems(record(FINE, abandoned_share=0.9))[0]
    assert problems(record(FINE, abandoned_share=0.9), record(FINE, abandoned_share=1.0)) == []
    assert "too few samples" in problems(record(FINE, memory=[]))[0]


def test_table_and_picture_name_every_kind_and_outcome(tmp_path: Path) -> None:
    records = {"ours": record(FINE | {"chat": {"200": 49, "500": 1}}), "theirs": record(FINE)}
    text = table(records)
    (line,) = (line for line in text.splitlines() if line.startswith("chat  "))
    assert line.split(maxsplit=1)[1].startswith("200: 49, 500: 1") and line.endswith("200: 50")
    assert all(f"\n{kind}  " in text for kind in KINDS)
    assert "anonymous memory 1000.0 MiB in the middle" in text
    plot_soak(records, tmp_path / "soak.png")
    assert (tmp_path / "soak.png").read_bytes().startswith(b"\x89PNG")


# --- the driver


class Handler(BaseHTTPRequestHandler):
    """A server of the API in miniature; ``faults`` says what it does wrong, and ``seen`` what it was asked."""

    faults: frozenset[str] = frozenset()
    seen: list[bytes]
    running: set[int]
    gone: list[int]
    generated: list[int]

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self, status: int, body: bytes, content_type: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        if self.path != "/metrics":
            return self.answer(405, b"{}")
        left = len(self.running) + ("leak" in self.faults)
        lines = [f'{gauge}{{engine="0"}} {left}' for gauge in STILL]
        lines += ["# TYPE vllm:generation_tokens counter", f"vllm:generation_tokens_total {len(self.generated)}", ""]
        self.answer(200, "\n".join(lines).encode(), "text/plain")

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        self.seen.append(raw)
        try:
            body = json.loads(raw)
        except ValueError:
            return self.answer(500 if "malformed" in self.faults else 400, b"what?")
        number = len(self.seen)
        self.running.add(number)
        try:
            if body.get("stream"):
                self.stream(body)
            elif body.get("max_tokens") == 999:
                time.sleep(0.4)
            else:
                choices = [{"finish_reason": None if "unfinished" in self.faults else "stop"}]
                self.answer(200, json.dumps({"choices": choices * body.get("n", 1)}).encode())
        except OSError:
            self.gone.append(number)
        finally:
            self.running.discard(number)

    def stream(self, body: dict[str, Any]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for _ in range(body["max_tokens"]):
            self.generated.append(1)
            with suppress(OSError) if "deaf" in self.faults else nullcontext():
                self.wfile.write(b'data: {"choices": []}\n\n')
            time.sleep(0.002)
        if "error" in self.faults:
            self.wfile.write(b'data: {"error": "numbers"}\n\n')
        if "cut" not in self.faults:
            self.wfile.write(b"data: [DONE]\n\n")


@contextmanager
def server(name: str, *faults: str) -> Iterator[tuple[Target, type[Handler]]]:
    handler = type(
        "Served", (Handler,), {"faults": frozenset(faults), "seen": [], "running": set(), "gone": [], "generated": []}
    )
    serving = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    try:
        yield Target(name, f"http://127.0.0.1:{serving.server_port}", os.getpid(), lambda: None), handler
    finally:
        serving.shutdown()
        serving.server_close()


def completion(kind: str = "completion", **fields: Any) -> Request:
    extra = {name: fields.pop(name) for name in ("leave_after", "leave_seconds", "choices") if name in fields}
    body = {"prompt": "a", "max_tokens": 4} | fields
    return Request(kind, "POST", "/v1/completions", json.dumps(body).encode(), **extra)


def drive_all(targets: list[Target], requests: list[Request], seconds: float = 1.5) -> dict[str, Record]:
    return asyncio.run(drive(targets, [iter(requests)], seconds, 200, drain_seconds=1.0))


def test_both_get_the_same_and_outcomes_are_told_apart() -> None:
    requests = [
        completion(),
        completion("several choices", n=3, choices=3),
        completion("streamed", stream=True),
        completion(ABANDONED[0], stream=True, max_tokens=100000, leave_after=2),
        completion(ABANDONED[1], max_tokens=999, leave_seconds=0.05),
        Request("malformed", "POST", "/v1/completions", b"{"),
        Request("wrong method", "GET", "/v1/completions", b"{}"),
    ]
    with server("ours", "malformed") as (ours, mine), server("theirs") as (theirs, other):
        records = drive_all([ours, theirs], requests)
        time.sleep(0.5)
        assert mine.seen[:6] == other.seen[:6]
        assert len(other.gone) >= 1 and not other.running, "a client that goes away closes its connection"
    expected = {
        "completion": {"200": 1},
        "several choices": {"200": 1},
        "streamed": {"200": 1},
        ABANDONED[0]: {"disconnected": 1},
        ABANDONED[1]: {"disconnected": 1},
        "malformed": {"400": 1},
        "wrong method": {"405": 1},
    }
    assert records["theirs"].outcomes == expected
    assert records["ours"].outcomes == expected | {"malformed": {"500": 1}}
    assert records["ours"].examples["malformed"] == {"500": "what?"}
    assert records["theirs"].gauges == STILL
    assert records["ours"].memory[0][1] > MIB


@pytest.mark.parametrize(
    ("fault", "outcome"),
    [
        ("unfinished", "200, unfinished"),
        ("error", "200, error in the stream"),
        ("cut", "200, stream cut short"),
    ],
)
def test_a_status_of_200_is_not_enough(fault: str, outcome: str) -> None:
    with server("ours", fault) as (ours, _), server("theirs") as (theirs, _):
        records = drive_all([ours, theirs], [completion("any", stream=fault != "unfinished")], 0.2)
    assert records["ours"].outcomes == {"any": {outcome: 1}}
    assert records["theirs"].outcomes == {"any": {"200": 1}}


def test_missing_choices_and_unreachable_servers_are_outcomes() -> None:
    nowhere = Target("ours", "http://127.0.0.1:9", os.getpid(), lambda: None)
    with server("theirs") as (theirs, _):
        records = drive_all([nowhere, theirs], [completion(choices=2)], 0.2)
    assert records["ours"].outcomes == {"completion": {"ClientConnectorError": 1}}
    assert records["ours"].gauges == {}
    assert records["theirs"].outcomes == {"completion": {"200, choices missing": 1}}


def test_what_is_left_is_seen() -> None:
    with server("ours", "leak") as (ours, _), server("theirs") as (theirs, _):
        records = drive_all([ours, theirs], [completion()], 0.2)
    assert set(records["ours"].gauges.values()) == {1.0}
    assert any("left after the traffic" in problem for problem in judge(records, "ours", "theirs"))


def test_a_server_that_goes_on_for_a_client_that_left_is_seen() -> None:
    with server("ours", "deaf") as (ours, _), server("theirs") as (theirs, _):
        records = drive_all([ours, theirs], [completion()], 0.2)
    assert records["ours"].abandoned_share == 1
    assert 0.01 <= (records["theirs"].abandoned_share or 0) < 0.3
    found = [problem for problem in judge(records, "ours", "theirs") if "whose client had left" in problem]
    assert len(found) == 1 and found[0].startswith("ours: generated 100%")


def test_a_server_that_ends_ends_the_run() -> None:
    with server("ours") as (ours, _), server("theirs") as (theirs, _):
        dead = Target("ours", ours.address, ours.pid, lambda: 1)
        started = time.monotonic()
        records = asyncio.run(drive([dead, theirs], [stream(LIMITS, 0)], 600, 200))
    assert time.monotonic() - started < 30
    assert records["ours"].exit_status == 1
    assert any("ended with status 1" in problem for problem in judge(records, "ours", "theirs"))


def test_memory_is_that_of_the_process_and_its_children() -> None:
    before = anonymous_bytes(os.getpid())
    held = bytearray(os.urandom(64 * MIB))
    assert 60 * MIB < anonymous_bytes(os.getpid()) - before < 80 * MIB
    del held
    assert anonymous_bytes(2**22 + 1) == 0
