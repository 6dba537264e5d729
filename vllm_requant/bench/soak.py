"""A checkpoint's server and a reference under the same mixed traffic for long: what breaks, and what grows.

Every client sends each request of its stream to both servers at once and goes on when both have answered, so both have
got the same requests at any time, and what differs in their answers is not the traffic.
"""

import asyncio
import contextlib
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import aiohttp
import psutil
from prometheus_client.parser import text_string_to_metric_families

from .contenders import Vllm
from .traffic import ABANDONED, KINDS, Request

__all__ = [
    "Growth",
    "Record",
    "Target",
    "anonymous_bytes",
    "drive",
    "judge",
    "memory_growth",
    "own_anonymous_bytes",
    "soak",
    "table",
]

log = logging.getLogger(__name__)

ANSWER_SECONDS = 300.0
DRAIN_SECONDS = 60.0
# vLLM's server closes a connection that has been idle for 5 s; a request sent at that moment would look like a reset
_KEEP_ALIVE_SECONDS = 2.0
_MIB = 2**20
ALLOWED_SHARE, ALLOWED_BYTES = 0.02, 20 * _MIB
_GAUGES = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
_GENERATED = "vllm:generation_tokens_total"
_PROMPT_TOKENS = 8
_DISCONNECTED = "disconnected"
_PROGRESS_SECONDS = 60.0
_EXAMPLE = 300


@dataclass(frozen=True)
class Target:
    """A running server.

    Attributes:
        name: in results.
        address: URL of its root.
        pid: of its main process.
        status: its exit status, None while it runs.
    """

    name: str
    address: str
    pid: int
    status: Callable[[], int | None]


@dataclass
class Record:
    """What one server did.

    Attributes:
        outcomes: for each kind of request how often each outcome came: a status code; that and what is wrong with
            the answer; "disconnected" for a client that went away; the class of what the client's library raised.
        examples: for each kind and outcome the first answer, shortened.
        memory: seconds since the start, and anonymous memory of its processes in bytes.
        gauges: the last values of its metrics for requests and cache after the traffic, by name.
        abandoned_share: of the tokens of a last long request, whose client left after two messages, those that it
            generated; None if it does not tell.
        exit_status: None if it lived to the end.
    """

    outcomes: dict[str, Counter[str]] = field(default_factory=dict)
    examples: dict[str, dict[str, str]] = field(default_factory=dict)
    memory: list[tuple[float, int]] = field(default_factory=list)
    gauges: dict[str, float] = field(default_factory=dict)
    abandoned_share: float | None = None
    exit_status: int | None = None

    def count(self, kind: str, outcome: str, example: str) -> None:
        self.outcomes.setdefault(kind, Counter())[outcome] += 1
        self.examples.setdefault(kind, {}).setdefault(outcome, example)


def soak(
    ours: Vllm, reference: Vllm, streams: Sequence[Iterator[Request]], seconds: float, max_model_len: int
) -> tuple[dict[str, Record], list[str]]:
    """Drive two running servers and judge the first.

    Args:
        ours, reference: both running.
        streams: of requests, one a client.
        seconds: how long requests are sent.
        max_model_len: tokens of the longest request of both.

    Returns:
        What each server did, by name, and what is wrong with it: nothing if the list is empty.
    """
    targets = [_target(server) for server in (ours, reference)]
    records = asyncio.run(drive(targets, streams, seconds, max_model_len - _PROMPT_TOKENS))
    return records, judge(records, ours.name, reference.name)


def _target(server: Vllm) -> Target:
    assert server.process is not None
    return Target(server.name, server.address, server.process.pid, server.process.poll)


async def drive(
    targets: Sequence[Target],
    streams: Sequence[Iterator[Request]],
    seconds: float,
    long_answer: int,
    drain_seconds: float = DRAIN_SECONDS,
) -> dict[str, Record]:
    """Send the same requests to all targets, sample their memory, then wait until nothing is left in them.

    It ends early if a target's process does, or if all streams do.

    Args:
        streams: of requests, one a client; those of a client go out one after the other.
        seconds: no request begins later; one that has begun is waited for.
        long_answer: tokens of a last request, which is abandoned at once; enough to take a second.
        drain_seconds: how long to wait afterwards for nothing to run, to wait or to hold blocks of the cache.

    Returns:
        What each target did, by name.
    """
    records = {target.name: Record() for target in targets}
    start = time.monotonic()
    over = asyncio.Event()

    async def client(requests: Iterator[Request]) -> None:
        for request in requests:
            if over.is_set():
                return
            answers = await asyncio.gather(*(_ask(session, target.address, request) for target in targets))
            for target, (outcome, example) in zip(targets, answers, strict=True):
                records[target.name].count(request.kind, outcome, example)

    async def clients() -> None:
        await asyncio.gather(*(client(requests) for requests in streams))
        over.set()

    async def watch() -> None:
        every = min(max(seconds / 100, 0.2), 5.0)
        told = 0.0
        while (now := time.monotonic() - start) < seconds and not over.is_set():
            for target in targets:
                records[target.name].memory.append((now, anonymous_bytes(target.pid)))
            if any(target.status() is not None for target in targets):
                break
            if now - told >= _PROGRESS_SECONDS:
                told = now
                done = sum(record.total() for record in records[targets[0].name].outcomes.values())
                log.info("%.0f of %.0f minutes, %d requests each", now / 60, seconds / 60, done)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(over.wait(), min(every, max(seconds - now, 0)))
        over.set()

    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_SECONDS)
    timeout = aiohttp.ClientTimeout(total=ANSWER_SECONDS)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        await asyncio.gather(watch(), clients())
        ends = (_finish(session, target, records[target.name], long_answer, drain_seconds) for target in targets)
        await asyncio.gather(*ends)
    return records


async def _ask(session: aiohttp.ClientSession, address: str, request: Request) -> tuple[str, str]:
    """Outcome and, of what is no good answer, its beginning."""
    try:
        if request.leave_seconds is None:
            return await _answer(session, address, request)
        try:
            # what is given up on is closed, which is how a server learns that the client went away
            return await asyncio.wait_for(_answer(session, address, request), request.leave_seconds)
        except TimeoutError:
            return _DISCONNECTED, ""
    except (aiohttp.ClientError, OSError, ValueError) as error:
        # also what is over after ANSWER_SECONDS; ValueError is a line of a stream that never ends
        return type(error).__name__, str(error)[:_EXAMPLE]


async def _answer(session: aiohttp.ClientSession, address: str, request: Request) -> tuple[str, str]:
    headers = {"Content-Type": "application/json"}
    url = address + request.path
    async with session.request(request.method, url, data=request.body, headers=headers) as response:
        if response.status != 200:
            return str(response.status), (await response.text(errors="replace"))[:_EXAMPLE]
        if response.content_type != "text/event-stream":
            text = await response.text(errors="replace")
            fault = _fault(text, request.choices)
            return f"200{fault}", text[:_EXAMPLE] if fault else ""
        events = 0
        last = b""
        async for line in response.content:
            if not line.startswith(b"data: "):
                continue
            events += 1
            last = line
            if line.startswith(b'data: {"error"'):
                return "200, error in the stream", line[:_EXAMPLE].decode(errors="replace")
            if request.leave_after is not None and events >= request.leave_after:
                response.close()
                return _DISCONNECTED, ""
        whole = last.startswith(b"data: [DONE]")
        return ("200", "") if whole else ("200, stream cut short", last[:_EXAMPLE].decode(errors="replace"))


def _fault(text: str, choices: int) -> str:
    """What is wrong with a good answer, to be put after its status."""
    try:
        found = json.loads(text)["choices"]
        reasons = [choice["finish_reason"] for choice in found]
    except (ValueError, KeyError, TypeError):
        return ", no completion"
    if len(found) != choices:
        return ", choices missing"
    return "" if all(reason in ("stop", "length") for reason in reasons) else ", unfinished"


async def _finish(
    session: aiohttp.ClientSession, target: Target, record: Record, long_answer: int, seconds: float
) -> None:
    """Wait until nothing is left, abandon one more request, and wait again."""
    before = await _drained(session, target, seconds)
    fields = {"prompt": "a", "max_tokens": long_answer, "ignore_eos": True, "stream": True}
    await _ask(session, target.address, _completion(fields, leave_after=2))
    after = await _drained(session, target, seconds)
    if _GENERATED in before and _GENERATED in after:
        record.abandoned_share = (after[_GENERATED] - before[_GENERATED]) / long_answer
    # what the traffic has left, or what the last request has
    record.gauges = {name: max(before[name], after.get(name, 0.0)) for name in _GAUGES if name in before}
    record.exit_status = target.status()


async def _drained(session: aiohttp.ClientSession, target: Target, seconds: float) -> dict[str, float]:
    """Metrics once all gauges are 0, or after so many seconds; empty if they cannot be read."""
    metrics: dict[str, float] = {}
    end = time.monotonic() + seconds
    while target.status() is None:
        try:
            async with session.get(f"{target.address}/metrics") as response:
                metrics = _metrics(await response.text())
        except (aiohttp.ClientError, OSError):
            pass
        if (metrics and not any(metrics.get(name) for name in _GAUGES)) or time.monotonic() >= end:
            break
        # gauges are set after a step of the engine, and what a client has abandoned may have been the last one
        await _ask(session, target.address, _completion({"prompt": "a", "max_tokens": 1}))
        await asyncio.sleep(0.5)
    return metrics


def _completion(fields: dict[str, object], leave_after: int | None = None) -> Request:
    return Request("", "POST", "/v1/completions", json.dumps(fields).encode(), leave_after=leave_after)


def _metrics(text: str) -> dict[str, float]:
    """The metrics that say whether something is left, and what was generated, summed over engines."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name in (*_GAUGES, _GENERATED):
                found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found


def anonymous_bytes(pid: int) -> int:
    """Resident memory of a process and its descendants, mapped files apart; those that are gone have none."""
    try:
        root = psutil.Process(pid)
        processes = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    return sum(own_anonymous_bytes(process.pid) for process in processes)


def own_anonymous_bytes(pid: int) -> int:
    """Resident memory of a process, mapped files apart; one that is gone has none."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    # a process that has ended and has not been waited for has no such line
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


@dataclass(frozen=True)
class Growth:
    """Memory at the end of a run beside that in its middle, bytes."""

    middle: int
    end: int

    @property
    def allowed(self) -> int:
        return max(int(ALLOWED_SHARE * self.middle), ALLOWED_BYTES)

    @property
    def excessive(self) -> bool:
        return self.end - self.middle > self.allowed


def memory_growth(memory: Sequence[tuple[float, int]]) -> Growth | None:
    """Whether memory still grows in the second half of a run.

    The median of the last tenth of the time is compared to that of the tenth around the middle: what is allocated
    with the first requests of a kind, compiled code, caches that fill once, is there by then, and a single sample
    counts for nothing. More than 2 % of the middle and more than 20 MiB is growth. A worker also keeps memory for every
    size of batch and prompt that it meets for the first time, tens of MiB in all, so a run of a few minutes fails.

    Args:
        memory: seconds and bytes, by time.

    Returns:
        None if there are too few samples for both.
    """
    if not memory:
        return None
    start, end = memory[0][0], memory[-1][0]

    def around(low: float, high: float) -> list[int]:
        return [size for at, size in memory if low <= (at - start) / max(end - start, 1e-9) <= high]

    middle, last = around(0.45, 0.55), around(0.9, 1.0)
    if len(middle) < 3 or len(last) < 3:
        return None
    return Growth(int(median(middle)), int(median(last)))


def judge(records: Mapping[str, Record], ours: str, reference: str) -> list[str]:
    """What a soak found wrong, a line each.

    * A server ended before the run did.
    * Ours gave a kind of request an outcome that the reference never gave it: a 5xx, a reset, or any other. A client
      that goes away may be too late on either, so with those kinds a complete answer is no difference.
    * Ours grows (see :func:`memory_growth`), or has requests or blocks of the cache left after the traffic. What the
      reference does there is vLLM's own affair: the table and the picture show it.
    * Ours goes on with an answer whose client has left, and the reference does not. vLLM learns that a client has left
      when it waits for its engine, so that neither stops where a model is faster than what sends its tokens.
    """
    problems = [
        f"{name}: the server ended with status {record.exit_status}"
        for name, record in records.items()
        if record.exit_status is not None
    ]
    for kind, outcomes in records[ours].outcomes.items():
        known = set(records[reference].outcomes.get(kind, ()))
        if kind in ABANDONED:
            known |= {"200", _DISCONNECTED}
        for outcome in sorted(set(outcomes) - known):
            example = records[ours].examples.get(kind, {}).get(outcome, "")
            problems.append(f"{ours}: {kind}: {outcomes[outcome]} × {outcome}, never with {reference}: {example}")
    record, growth = records[ours], memory_growth(records[ours].memory)
    if growth is None:
        problems.append(f"{ours}: too few samples of memory; let it run for longer")
    elif growth.excessive:
        problems.append(
            f"{ours}: memory grew from {growth.middle / _MIB:.1f} MiB in the middle of the run to "
            f"{growth.end / _MIB:.1f} MiB at its end; {growth.allowed / _MIB:.1f} MiB are allowed"
        )
    missing = [gauge for gauge in _GAUGES if gauge not in record.gauges]
    left = [f"{gauge} {value:g}" for gauge, value in record.gauges.items() if value]
    if record.exit_status is None and (missing or left):
        problems.append(f"{ours}: left after the traffic: {', '.join(left + [f'{gauge} ?' for gauge in missing])}")
    share, theirs = records[ours].abandoned_share, records[reference].abandoned_share
    if share is not None and theirs is not None and theirs <= 0.5 < share:
        problems.append(f"{ours}: generated {share:.0%} of an answer whose client had left, {reference} {theirs:.0%}")
    return problems


def table(records: Mapping[str, Record]) -> str:
    """Outcomes of every kind side by side, memory, and what was left."""
    names = list(records)
    columns = [[name, *(_listed(records[name].outcomes.get(kind, {})) for kind in KINDS)] for name in names]
    first = ["", *KINDS]
    widths = [max(map(len, column)) for column in (first, *columns)]
    rows: Iterable[tuple[str, ...]] = zip(first, *columns, strict=True)
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for name, record in records.items():
        total = sum(outcomes.total() for outcomes in record.outcomes.values())
        line = f"{name}: {total} requests"
        if growth := memory_growth(record.memory):
            line += (
                f"; anonymous memory {growth.middle / _MIB:.1f} MiB in the middle, {growth.end / _MIB:.1f} at the end"
            )
        left = ", ".join(f"{gauge.removeprefix('vllm:')} {value:g}" for gauge, value in record.gauges.items())
        share = "unknown" if record.abandoned_share is None else f"{record.abandoned_share:.0%}"
        lines.append(f"{line}; left: {left or 'unknown'}; generated for a client that left: {share}")
    return "\n".join(lines)


def _listed(outcomes: Mapping[str, int]) -> str:
    return ", ".join(f"{outcome}: {count}" for outcome, count in sorted(outcomes.items())) or "–"
