"""What a cluster answers while a leader or a coordinator moves, which one broker never does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from confluent_kafka import KafkaError, KafkaException, TopicPartition

from dlq import kafka
from dlq.errors import SourceError


class Moving:
    """A consumer whose first answers are errors."""

    def __init__(self, *codes: int) -> None:
        self._codes = list(codes)

    def _answer(self, found: Any) -> Any:
        if self._codes:
            raise KafkaException(KafkaError(self._codes.pop(0)))
        return found

    def get_watermark_offsets(self, _place: TopicPartition, *, timeout: float, cached: bool) -> Any:
        assert (timeout > 0, cached) == (True, False)
        return self._answer((3, 7))

    def offsets_for_times(self, places: list[TopicPartition], *, timeout: float) -> Any:
        assert timeout > 0
        return self._answer(
            [TopicPartition(p.topic, p.partition, 5 if p.partition == 0 else -1) for p in places]
        )

    def committed(self, places: list[TopicPartition], *, timeout: float) -> Any:
        assert timeout > 0
        return self._answer([TopicPartition(p.topic, p.partition, 4) for p in places])


ASKED: list[tuple[Callable[[Any], Any], Any]] = [
    (lambda client: kafka.watermarks(client, "orders", [0]), {0: (3, 7)}),
    (lambda client: kafka.offsets_at(client, "orders", [0, 1], 1_000), {0: 5}),
    (lambda client: kafka.committed(client, "orders", [0]), {0: (4, None)}),
]


@pytest.mark.parametrize(("ask", "found"), ASKED)
def test_what_only_moves_is_asked_again(ask: Callable[[Any], Any], found: Any) -> None:
    assert ask(Moving(KafkaError.NOT_LEADER_FOR_PARTITION, KafkaError.COORDINATOR_LOAD_IN_PROGRESS)) == found


@pytest.mark.parametrize(("ask", "_found"), ASKED)
def test_what_is_wrong_is_said_at_once(ask: Callable[[Any], Any], _found: Any) -> None:
    with pytest.raises(SourceError, match=r"orders.*can't be read: .*authorization"):
        ask(Moving(KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError.TOPIC_AUTHORIZATION_FAILED))


@pytest.mark.parametrize(("ask", "_found"), ASKED)
def test_what_moves_for_too_long_is_said(
    ask: Callable[[Any], Any], _found: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kafka, "TIMEOUT_S", 0.3)
    with pytest.raises(SourceError, match="can't be read"):
        ask(Moving(*[KafkaError.NOT_LEADER_FOR_PARTITION] * 10))
