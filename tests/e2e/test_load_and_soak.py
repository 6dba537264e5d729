"""``requant load`` and ``requant soak`` on two real servers of a tiny random model."""

import itertools
from pathlib import Path

import pytest

from tests import tiny
from vllm_requant.bench.contenders import Vllm, running
from vllm_requant.bench.load import Traffic, run_benchmark
from vllm_requant.bench.soak import soak
from vllm_requant.bench.traffic import ABANDONED, DECK, KINDS, Limits, stream
from vllm_requant.offline.models import load_causal_lm
from vllm_requant.offline.recipe import Recipe
from vllm_requant.offline.save import convert_and_save

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

LIMITS = Limits("m", tiny.VOCAB_SIZE, 256)
FLAGS = ("--enforce-eager", "--served-model-name", "m", "--num-gpu-blocks-override", "40")


def test_two_servers_bear_the_traffic_and_the_benchmark_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # what vLLM compiles even with enforce_eager takes longer than all else here
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    original = tiny.save(tmp_path / "original", hidden_size=128, head_dim=32)
    (original / "chat_template.jinja").write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    recipe = Recipe(base="rtn", bits=4, outliers=0, significant=0, num_samples=2, seq_len=24, path_samples=1)
    convert_and_save(load_causal_lm(str(original)), tmp_path / "checkpoint", recipe)
    ours, theirs = (
        Vllm(
            name,
            tmp_path / name,
            tmp_path / f"{name}.log",
            threads=None,
            max_model_len=256,
            max_num_seqs=4,
            flags=FLAGS,
        )
        for name in ("checkpoint", "original")
    )
    with running([ours, theirs]) as (_, left_out):
        assert not left_out
        # a deck is dealt between the clients, so that every kind comes
        deck = itertools.islice(stream(LIMITS, seed=0), DECK)
        records, problems = soak(ours, theirs, [deck] * 4, 300, LIMITS.max_model_len)
        traffic = Traffic((4,), input_len=32, output_len=8, requests_per_client=2)
        monkeypatch.setattr(ours, "name", "m")
        figures = run_benchmark(ours, traffic, 4, 8, 0, tmp_path)
    # the first seconds of a server say nothing about its memory, and this model is faster than a client leaves
    assert [problem for problem in problems if "memory" not in problem and "had left" not in problem] == []
    mine, other = (record.outcomes for record in records.values())
    assert mine.keys() == other.keys() == set(KINDS)
    for kind in KINDS:
        assert mine[kind].total() == other[kind].total()
        if kind in ABANDONED:
            assert set(mine[kind]) <= {"disconnected", "200"}, kind
        elif kind in KINDS[: KINDS.index("prompt too long")]:
            assert set(mine[kind]) == {"200"}, kind
    assert {"400", "404", "405"} <= {outcome for counts in mine.values() for outcome in counts}
    assert all(size > 2**26 for record in records.values() for _, size in record.memory)
    assert (figures["completed"], figures["failed"]) == (8, 0)
    assert figures["output_throughput"] == pytest.approx(8 * figures["request_throughput"])
    assert 0 < figures["p50_ttft_ms"] <= figures["p99_ttft_ms"] and figures["p50_itl_ms"] > 0
