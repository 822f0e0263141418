"""Tiered KV on every family: the stock cache's tokens, or a refusal by name."""

from __future__ import annotations

from pathlib import Path

import kv_families
import pytest

TABLE = Path(__file__).parent.parent / "docs" / "kv_families.md"


@pytest.mark.parametrize("name", kv_families.TESTED)
def test_tokens_are_those_of_the_stock_cache(name: str) -> None:
    outcome = kv_families.try_family(name)
    rows = TABLE.read_text().splitlines()
    if outcome.refusal:
        assert any(row.startswith(f"| {name} | ") and row.count("|") == 3 for row in rows)
        return
    assert outcome.same_tokens
    assert outcome.difference < kv_families.MOST_DIFFERENCE
    assert outcome.num_tiered > 0
    assert outcome.num_reads > 0
    way = "layers put together" if outcome.num_gathered else "blocks"
    assert any(row.startswith(f"| {name} | ") and f"| {way} |" in row for row in rows)


def test_there_are_at_least_forty() -> None:
    rows = [row for row in TABLE.read_text().splitlines() if row.endswith("| equal |")]
    assert len(rows) >= 40
