"""The table says of each run how much of its base's gap it closes; pictures show what the numbers say."""

from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes

from vllm_requant.offline.studies.memory import memory_table, thinned
from vllm_requant.offline.studies.plots import plot_memory, plot_nodes, plot_sweep
from vllm_requant.offline.studies.table import gap_closed, pair_table, stage_table, table


def _row(name: str, perplexity: float, divergence: float) -> dict[str, Any]:
    score = {"perplexity": perplexity, "kl_divergence": divergence, "reference_perplexity": 20.0}
    return {"name": name, "bits_per_weight": 3.3, "scores": {"c4": score}}


def test_gap() -> None:
    assert gap_closed(20.0, 40.0, 30.0) == 0.5
    assert gap_closed(20.0, 40.0, 45.0) == -0.25


def test_rows_are_held_against_their_base() -> None:
    rows = [_row("awq-3", 40.0, 0.4), _row("awq-3-requant", 35.0, 0.1), _row("rtn-3", 60.0, 0.9)]
    text = table(rows)
    assert "| awq-3-requant | 3.300 | 35.00 | 0.1000 | 25% (KL 75%) |" in text
    assert "| rtn-3 | 3.300 | 60.00 | 0.9000 |  |" in text
    assert text.endswith("Original: c4 20.00.\n")


def test_pairs_stand_side_by_side() -> None:
    rows = [_row("awq-3", 40.0, 0.4), _row("awq-3-random", 39.0, 0.3), _row("rtn-3", 60.0, 0.9)]
    rows += [_row("awq-3-requant", 35.0, 0.1)]
    assert pair_table(rows).splitlines()[2:] == ["| awq | 3.300 | 40.00 → 35.00 | 25% | 0.400 → 0.100 |"]


def test_stages_stand_under_their_names() -> None:
    rows = [
        {"name": "rtn-3", "report": {"stages": {"seconds": {"quantize": 2.4}, "peak_mib": {"quantize": 1536.0}}}},
        {"name": "awq-3", "report": {"stages": {"seconds": {"inputs": 9.0}, "peak_mib": {"inputs": 2048.0}}}},
    ]
    assert stage_table(rows).splitlines() == [
        "| run | quantize | inputs |",
        "| --- | --- | --- |",
        "| awq-3 |  | 9 s, 2.0 GiB |",
        "| rtn-3 | 2 s, 1.5 GiB |  |",
    ]


def _drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    calls: list[tuple[Any, ...]] = []
    plot = Axes.plot
    monkeypatch.setattr(
        Axes, "plot", lambda self, *args, **kwargs: (calls.append(args), plot(self, *args, **kwargs))[1]
    )
    return calls


def test_picture_of_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _drawn(monkeypatch)
    alone = _row("rtn-3", 60.0, 0.9)  # without ReQuant beside it there is nothing to show
    plot_sweep([_row("awq-3", 40.0, 0.4), _row("awq-3-requant", 35.0, 0.1), alone], tmp_path / "sweep.png")
    points = [call[:2] for call in calls if call[0] != []]
    assert points == [(3.3, 0.4), (3.3, 0.1)]
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_picture_of_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _drawn(monkeypatch)
    rows = [
        {"rule": rule, "nodes": nodes, "relative_error": 0.1 / nodes, "agreement": 0.5, "top_share": 0.005}
        for rule in ("gauss", "uniform")
        for nodes in (2, 4)
    ]
    plot_nodes(rows, tmp_path / "nodes.svg")
    assert [call[:2] for call in calls] == 2 * [([2, 4], [5.0, 2.5]), ([2, 4], [50.0, 50.0])]
    assert (tmp_path / "nodes.svg").read_text().startswith("<?xml")


def test_thinned_samples_keep_the_peak() -> None:
    samples = [(float(at), at * 37 % 101, 0, "") for at in range(1000)]
    kept = thinned(samples, 30)
    assert len(kept) <= 30
    assert max(own for _, own, _, _ in kept) == max(own for _, own, _, _ in samples)
    assert kept == sorted(kept)


def test_picture_and_table_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [[0.0, 2**20, 2**21, ""], [60.0, 2**22, 2**22, "quantize"], [120.0, 2**21, 2**20, "quantize"]]
    run = {"name": "gptq", "limited": True, "limit_bytes": 2**23, "model_bytes": 2**25, "seconds": 120.0}
    run |= {"peak_bytes": 2**22, "samples": samples}
    calls = _drawn(monkeypatch)
    plot_memory([run, run | {"name": "awq"}], tmp_path / "memory.png")
    assert (tmp_path / "memory.png").stat().st_size > 10_000
    assert [list(call[0]) for call in calls] == [[0.0, 1.0, 2.0]] * 2
    assert memory_table([run]).splitlines()[2:] == ["| gptq | 4 MiB | 8 MiB | 32 MiB | 2 |"]
