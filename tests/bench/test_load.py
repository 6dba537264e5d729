"""What becomes of the benchmark's figures, who is asked when, and one real run of the tool."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vllm_requant.bench.contenders import Vllm
from vllm_requant.bench.load import Traffic, compare_load, read_result, run_benchmark, table
from vllm_requant.bench.plots import plot_load
from vllm_requant.bench.servers import ServerError

TRAFFIC = Traffic(concurrency=(1, 4), input_len=16, output_len=8, requests_per_client=3)


class Still(Vllm):
    """A server that is only said to run."""

    def __init__(self, name: str, folder: Path, *, broken: bool = False) -> None:
        super().__init__(name, folder, folder / f"{name}.log", threads=None, max_model_len=64, max_num_seqs=4)
        self.broken, self.up = broken, False

    def start(self) -> None:
        if self.broken:
            raise ServerError("no such model\nand so on")
        self.up, self.description = True, f"still, {self.name}"

    def stop(self) -> None:
        self.up = False


def result(speed: float, clients: int, **changed: Any) -> dict[str, Any]:
    """A run of a server that decodes so many tokens a second for each client."""
    figures: dict[str, Any] = {
        "output_throughput": speed * clients,
        "request_throughput": speed * clients / TRAFFIC.output_len,
        "p50_ttft_ms": 1000 / speed,
        "p99_ttft_ms": 2000 / speed,
        "p50_itl_ms": 1000 / speed,
        "p99_itl_ms": 3000 / speed,
        "completed": clients * TRAFFIC.requests_per_client,
        "failed": 0,
    }
    return figures | changed


Asked = list[tuple[str, int, int, int]]


def runner(speeds: dict[str, float], asked: Asked, **changed: Any) -> Callable[..., dict[str, Any]]:
    def run(server: Vllm, traffic: Traffic, clients: int, requests: int, seed: int, work: Path) -> dict[str, Any]:
        assert isinstance(server, Still) and server.up
        asked.append((server.name, clients, requests, seed))
        return result(speeds[server.name], clients, **changed)

    return run


def test_contenders_take_turns_with_the_same_prompts_at_every_concurrency(tmp_path: Path) -> None:
    servers, asked = [Still("a", tmp_path), Still("b", tmp_path)], Asked()
    compare_load(servers, TRAFFIC, 2, tmp_path, runner({"a": 10, "b": 20}, asked))
    assert asked[:2] == [("a", 4, 4, 2), ("b", 4, 4, 2)], "what is compiled first does not count"
    assert asked[2:] == [
        (name, clients, 3 * clients, seed) for seed in (0, 1) for clients in (1, 4) for name in ("a", "b")
    ]
    assert not any(server.up for server in servers)


def test_medians_ratios_and_failures(tmp_path: Path) -> None:
    speeds = iter([1, 1, 10, 20, 10, 20, 30, 50, 30, 50, 11, 22, 11, 22])

    def run(server: Vllm, traffic: Traffic, clients: int, *_: Any) -> dict[str, Any]:
        return result(next(speeds), clients, failed=2)

    rows = compare_load([Still("a", tmp_path), Still("b", tmp_path)], TRAFFIC, 3, tmp_path, run)
    one, four = rows[1]["levels"]
    assert one["rounds"]["output_throughput"] == [20, 50, 22] and four["median"]["output_throughput"] == 4 * 22
    assert four["ratio_to_first"]["output_throughput"] == pytest.approx(2)
    assert four["ratio_to_first"]["p99_itl_ms"] == pytest.approx(0.5)
    assert all(ratio == 1 for ratio in rows[0]["levels"][0]["ratio_to_first"].values())
    assert (four["concurrency"], four["completed"], four["failed"]) == (4, 36, 6), "failures of all rounds"
    lines = table(rows).splitlines()
    assert [line.split()[:2] for line in lines[1:5]] == [["1", "a"], ["1", "b"], ["4", "a"], ["4", "b"]]
    assert "88.0  (2.00 ×)" in lines[4] and lines[4].split()[-1] == "6"


def test_what_cannot_run_is_named_and_all_are_stopped(tmp_path: Path) -> None:
    servers = [Still("a", tmp_path), Still("broken", tmp_path, broken=True), Still("b", tmp_path)]
    rows = compare_load(servers, TRAFFIC, 1, tmp_path, runner({"a": 10, "b": 20}, []))
    assert [row["name"] for row in rows] == ["a", "b", "broken"]
    assert "left out: no such model" in table(rows)
    plot_load(rows, tmp_path / "load.png")
    with pytest.raises(ServerError, match="no such model"):
        compare_load(servers[1:], TRAFFIC, 1, tmp_path, runner({"b": 20}, []))
    assert not any(server.up for server in servers)


def test_a_server_that_goes_away_later_ends_the_comparison(tmp_path: Path) -> None:
    server = Still("a", tmp_path)

    def run(server: Vllm, traffic: Traffic, clients: int, requests: int, seed: int, work: Path) -> dict[str, Any]:
        if seed == 1:
            raise ServerError("ended")
        return result(1, clients)

    with pytest.raises(ServerError, match="ended"):
        compare_load([server], TRAFFIC, 2, tmp_path, run)
    assert not server.up


def test_result_files(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    file.write_text(json.dumps(result(10, 4, failed=1, date="today")))
    assert read_result(file) == result(10, 4, failed=1)
    for content in ('{"completed": 1}', "", "[]", json.dumps(result(10, 4, p50_itl_ms=None))):
        file.write_text(content)
        with pytest.raises(ServerError, match="no result"):
            read_result(file)
    file.write_text(json.dumps(result(1, 4, completed=0, failed=12)))
    with pytest.raises(ServerError, match="none of 12 requests"):
        read_result(file)
    with pytest.raises(ServerError, match=r"gone\.json"):
        read_result(tmp_path / "gone.json")


def test_answers_of_one_token_have_no_ratio_of_time_between_tokens(tmp_path: Path) -> None:
    rows = compare_load([Still("a", tmp_path)], TRAFFIC, 1, tmp_path, runner({"a": 1}, [], p50_itl_ms=0, p99_itl_ms=0))
    assert rows[0]["levels"][0]["ratio_to_first"]["p50_itl_ms"] is None
    assert "0.00" in table(rows)


def test_the_picture_shows_every_figure_of_every_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (drawn.append(self), save(self, *args, **kw)))
    rows = compare_load(
        [Still("a", tmp_path), Still("b", tmp_path)], TRAFFIC, 1, tmp_path, runner({"a": 10, "b": 20}, [])
    )
    plot_load(rows, tmp_path / "load.png")
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")
    throughput, ttft, itl = drawn[0].axes
    lines = [list(line.get_ydata()) for line in throughput.lines if len(line.get_xdata())]
    assert lines == [[10, 40], [20, 80]]
    for panel, name in ((ttft, "ttft"), (itl, "itl")):
        lines = [list(line.get_ydata()) for line in panel.lines if len(line.get_xdata())]
        expected = [
            [level["median"][f"p{percent}_{name}_ms"] for level in row["levels"]]
            for row in rows
            for percent in (50, 99)
        ]
        assert lines == expected
    legend = throughput.get_legend()
    assert legend is not None and [text.get_text() for text in legend.get_texts()] == ["a", "b"]


def test_the_tool_says_why_it_failed(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    server = Still("a", tmp_path)
    server.address = "http://127.0.0.1:9"  # nobody listens there, and the folder holds no tokenizer
    with pytest.raises(ServerError, match="bench serve") as failed:
        run_benchmark(server, TRAFFIC, 1, 1, 0, tmp_path)
    assert len(str(failed.value).splitlines()) > 1
