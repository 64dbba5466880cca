"""The shipped taxonomy against what an on-call engineer would say of real errors, one line each."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
from upath import UPath

from dlq.entry import Understood
from dlq.grouping.taxonomy import load_taxonomy

SHIPPED = load_taxonomy(UPath(Path(__file__).parents[2] / "include" / "config" / "taxonomy.yaml"))


class Line(NamedTuple):
    category: str
    remedy: str
    understood: Understood


def line(text: str) -> Line:
    verdict, error_type, causes, message, *more = (part.strip() for part in text.split(" |"))
    category, remedy = verdict.split()
    fields = dict(part.split("=") for part in more)
    chain = tuple(cause.strip() for cause in causes.split(" < ")) if causes else ()
    return Line(
        category,
        remedy,
        Understood(
            error_type=error_type or None,
            cause_type=chain[0] if chain else None,
            causes=chain,
            message=message or None,
            stage=fields.get("stage"),
            http_status=int(fields["status"]) if "status" in fields else None,
        ),
    )


TABLE = [
    (number, line(text))
    for number, text in enumerate((Path(__file__).parent / "taxonomy_table.txt").read_text().splitlines(), 1)
    if text and not text.startswith("#")
]


def test_the_table_is_large_enough_to_mean_something():
    assert len(TABLE) >= 150
    assert {(each.category, each.remedy) for _, each in TABLE} == {
        ("transient", "retry"),
        ("permanent", "raise_quota"),
        ("permanent", "patch_plugin"),
        ("permanent", "manual"),
        ("manual", "repair"),
        ("manual", "edit"),
        ("manual", "manual"),
        ("unknown", "manual"),
    }


@pytest.mark.parametrize(("number", "expected"), TABLE, ids=[f"line {number}" for number, _ in TABLE])
def test_the_shipped_rules_say_what_an_on_call_engineer_would(number: int, expected: Line):
    decision = SHIPPED.decide(expected.understood)
    assert (decision.category, decision.remedy) == (expected.category, expected.remedy), SHIPPED.why(
        expected.understood
    )
