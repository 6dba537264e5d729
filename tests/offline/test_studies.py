"""The table says of each run how much of its base's gap it closes."""

from typing import Any

from vllm_requant.offline.studies.table import gap_closed, table


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
