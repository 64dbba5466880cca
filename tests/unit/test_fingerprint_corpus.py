"""The corpus that fingerprints are measured on, and the goal they keep on it."""

from __future__ import annotations

from random import Random

import pytest
from benchmarks.fingerprints import FAULTS, GOAL, MESSAGES, corpus, digits, loaded, score
from benchmarks.values import Fault

from dlq.grouping.fingerprint import normalise

LINES = [line for line in FAULTS.read_text().splitlines() if line and not line.startswith("#")]


def test_every_fault_is_named_once_and_every_kind_of_value_is_known():
    assert len(LINES) == len(set(LINES)) > 300
    for line in LINES:
        assert "«" not in Fault(line, Random(1)).message(Random(2))


def test_an_unknown_kind_of_value_is_named():
    with pytest.raises(KeyError, match="«nonsense»"):
        Fault("a «nonsense» value", Random(1))


def test_a_score_counts_pairs():
    labelled = [("a", ""), ("a", ""), ("b", ""), ("b", "")]
    assert score(labelled, ["1", "1", "2", "2"]) == (1, 1)
    assert score(labelled, ["1", "1", "1", "1"]) == (pytest.approx(2 / 6), 1)
    assert score(labelled, ["1", "2", "3", "4"]) == (1, 0)
    assert score(labelled, ["1", "1", "2", "3"]).f1 == pytest.approx(2 / 3)


@pytest.mark.parametrize("held_out", [False, True])
def test_messages_are_grouped_as_a_person_would(held_out: bool):
    labelled = corpus(17, held_out=held_out)
    ours = score(labelled, [normalise(message) for _, message in labelled])
    assert ours.f1 >= GOAL
    assert ours.precision >= 0.99
    assert score(labelled, [digits(message) for _, message in labelled]).f1 < 0.7


def test_hard_messages_are_never_thrown_together():
    labelled = loaded(MESSAGES)
    assert len(labelled) == 4 * len({fault for fault, _ in labelled}) == 232
    ours = score(labelled, [normalise(message) for _, message in labelled])
    assert ours.precision >= 0.99
    assert ours.recall >= 0.65
