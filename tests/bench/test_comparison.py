"""What becomes of the times that contenders report, and of contenders that cannot run."""

import os
import signal

import pytest

from vllm_requant.bench import comparison, contenders
from vllm_requant.bench.comparison import compare, table
from vllm_requant.bench.contenders import Contender, Prompts
from vllm_requant.bench.measure import Load, Rates, measure_round
from vllm_requant.bench.servers import ServerError

LOAD = Load(vocab_size=100, prompt_tokens=40, new_tokens=5, requests=3)


@pytest.fixture(autouse=True)
def _no_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "REST_SECONDS", 0.0)


class Clockwork(Contender):
    """Spends so many seconds on a token of a prompt and on a generated one; all requests share the latter."""

    def __init__(self, name: str, prompt_second: float, token_second: float, *, broken: bool = False) -> None:
        super().__init__(name)
        self.prompt_second, self.token_second, self.broken = prompt_second, token_second, broken
        self.asked: list[tuple[Prompts, int]] = []
        self.running = False

    def start(self) -> None:
        self.running = True
        self.description = "clockwork"

    def generate(self, prompts: Prompts, new_tokens: int) -> list[list[float]]:
        if self.broken:
            raise ServerError("a spring broke\nand so on")
        assert self.running
        self.asked.append((prompts, new_tokens))
        first = self.prompt_second * sum(len(prompt) for prompt in prompts)
        return [[first + self.token_second * (1 + at) for at in range(new_tokens)] for _ in prompts]

    def stop(self) -> None:
        self.running = False


def test_rates() -> None:
    rates, contender = Rates(), Clockwork("a", 0.001, 0.1)
    contender.start()
    measure_round(contender, LOAD, 0, rates)
    assert rates.median("decode") == pytest.approx(10)
    assert rates.median("prefill") == pytest.approx(40 / (0.04 + 0.1))
    assert rates.median("batch") == pytest.approx(30)


def test_prompts_are_new_in_every_round_and_the_same_for_all() -> None:
    one, other = Clockwork("one", 0.001, 0.1), Clockwork("other", 0.002, 0.1)
    compare([one, other], LOAD, rounds=2)
    assert one.asked == other.asked
    prompts = [tuple(prompt) for asked, _ in one.asked for prompt in asked]
    assert len(set(prompts)) == len(prompts) == 3 * (1 + 1 + 3)  # a round that does not count comes first
    assert all(0 <= token < LOAD.vocab_size for prompt in prompts for token in prompt)


def test_only_what_all_requests_did_together_counts_as_batch() -> None:
    class Uneven(Clockwork):
        def generate(self, prompts: Prompts, new_tokens: int) -> list[list[float]]:
            return [[1.0, 2.0, 3.0, 4.0], [2.5, 3.0, 3.5, 9.0]][: len(prompts)]

    rates = Rates()
    measure_round(Uneven("a", 0, 0), Load(vocab_size=100, requests=2), 0, rates)
    assert rates.median("batch") == pytest.approx(4 / (4.0 - 2.5))  # at 3 and 4, at 3 and 3.5


def test_what_cannot_run_is_named_and_all_are_stopped() -> None:
    ours, slow = Clockwork("ours", 0.001, 0.1), Clockwork("slow", 0.001, 0.2)
    broken = Clockwork("broken", 0.001, 0.1, broken=True)
    results = compare([ours, broken, slow], LOAD, rounds=3)
    assert [row["name"] for row in results] == ["ours", "slow", "broken"]
    assert len(results[1]["rounds"]["decode"]) == 3 and results[1]["median"]["decode"] == pytest.approx(5)
    assert results[2]["error"].startswith("a spring broke")
    assert not (ours.running or slow.running or broken.running)
    text = table(results)
    assert "(2.00 ×)" in text.splitlines()[2]
    assert text.splitlines()[3].endswith("left out: a spring broke")


def test_what_memory_does_not_hold_beside_the_others_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Large(Clockwork):
        def start(self) -> None:
            super().start()
            free.append(free[-1] - (5 << 30))

    free = [13 << 30]
    monkeypatch.setattr(contenders, "free_memory", lambda: free[-1])
    third = Large("third", 0.001, 0.1)
    results = compare([Large("first", 0.001, 0.1), Large("second", 0.001, 0.1), third], LOAD, rounds=1)
    assert results[2] == {"name": "third", "error": "3.0 GiB of memory are free, one before it took 5.0 GiB"}
    assert not third.asked


def test_without_the_first_contender_there_is_nothing_to_compare() -> None:
    broken = Clockwork("ours", 0.001, 0.1, broken=True)
    with pytest.raises(ServerError, match="spring"):
        compare([broken, Clockwork("b", 0.001, 0.1)], LOAD, rounds=1)
    assert not broken.running


def test_a_signal_that_ends_the_comparison_ends_the_servers_too() -> None:
    class Ended(Clockwork):
        def generate(self, prompts: Prompts, new_tokens: int) -> list[list[float]]:
            os.kill(os.getpid(), signal.SIGTERM)
            return super().generate(prompts, new_tokens)

    before, contender = signal.getsignal(signal.SIGTERM), Ended("a", 0.001, 0.1)
    with pytest.raises(SystemExit) as ended:
        compare([contender], LOAD, rounds=1)
    assert ended.value.code == 128 + signal.SIGTERM
    assert not contender.running
    assert signal.getsignal(signal.SIGTERM) == before
