"""README's figures against the numbers that are committed."""

from pathlib import Path

import pytest

from vllm_requant.offline.studies.readme import TABLES, ReadmeError, with_tables

README = Path(__file__).parents[2] / "README.md"


def test_tables_are_those_of_the_committed_numbers() -> None:
    text = README.read_text(encoding="utf-8")
    assert with_tables(text) == text, "run make figures"
    assert all(f"<!-- figures: {name} -->" in text for name in TABLES)


def test_a_number_that_somebody_changed_is_put_right() -> None:
    text = README.read_text(encoding="utf-8")
    changed = text.replace("| 30.69 → 29.88 |", "| 30.69 → 25.00 |")
    assert changed != text
    assert with_tables(changed) == text


def test_a_table_that_nobody_makes_is_named() -> None:
    with pytest.raises(ReadmeError, match="figures: rates is none of methods"):
        with_tables("<!-- figures: rates -->\n\n| |\n\n<!-- end -->\n")
