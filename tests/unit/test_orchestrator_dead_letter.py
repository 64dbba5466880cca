"""The dead letter's headers, and the routing lease that holds dead letters back."""

from __future__ import annotations

import pytest

from dlq_orchestrator.dead_letter import DeadLetter, KafkaRecord, dead_letter
from dlq_orchestrator.failures import Failure
from dlq_orchestrator.kafka_consumer import record_of
from dlq_orchestrator.routing import LeaseHeld, Routing
from dlq_orchestrator.store import Store
from dlq_orchestrator.workflow import Headers, Run

FAILURE = Failure("RateLimit", "429", "payments.charge", "charge", 3, 1_700_000_000_123, "trace")


def letter_of(headers: Headers, *, workflow: str | None = "order", group: str = "g") -> DeadLetter:
    record = KafkaRecord(
        "orders/2/41",
        b"\x00\xff",
        headers,
        topic="orders",
        partition=2,
        offset=41,
        timestamp=1_699_000_000_000,
        key=None,
    )
    run = Run(record, "c1", workflow, "c1", "failed", failure=FAILURE)
    return dead_letter(record, run, FAILURE, group)


def test_a_dead_letter_says_everything_about_its_failure():
    letter = letter_of([], group="orders-workers")
    assert (letter.key, letter.value) == (None, b"\x00\xff")
    assert letter.headers == [
        ("correlation-id", b"c1"),
        ("retry-count", b"0"),
        ("wf-error-type", b"RateLimit"),
        ("wf-error-message", b"429"),
        ("wf-component", b"payments.charge"),
        ("wf-stage", b"charge"),
        ("wf-attempts", b"3"),
        ("wf-failed-at", b"1700000000123"),
        ("wf-origin-topic", b"orders"),
        ("wf-origin-partition", b"2"),
        ("wf-origin-offset", b"41"),
        ("wf-origin-timestamp", b"1699000000000"),
        ("wf-consumer-group", b"orders-workers"),
        ("wf-stack-trace", b"trace"),
    ]


def test_the_records_own_headers_stay_as_they_are_and_an_earlier_failure_is_replaced():
    own: Headers = [
        ("x", b"1"),
        ("correlation-id", b"c1"),
        ("x", b"\xff"),
        ("dlq-key", b"k"),
        ("empty", None),
        ("retry-count", b"0"),
        ("dlq-retry-count", b"2"),
    ]
    letter = letter_of([*own[:2], ("wf-error-type", b"Old"), *own[2:]])
    assert letter.headers[: len(own)] == own
    names = [name for name, _ in letter.headers]
    assert names.count("wf-error-type") == 1
    assert names.count("correlation-id") == 1
    assert names.count("retry-count") == 1


def test_a_record_that_could_not_be_read_is_given_no_correlation_id():
    names = [name for name, _ in letter_of([], workflow=None).headers]
    assert "correlation-id" not in names


class BrokenHeaders:
    """A message as the client gives it when a header's name is not UTF-8."""

    def headers(self) -> Headers:
        raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")

    def topic(self) -> str:
        return "orders"

    def partition(self) -> int:
        return 0

    def offset(self) -> int:
        return 9

    def timestamp(self) -> tuple[int, int]:
        return 1, 2

    def key(self) -> bytes:
        return b"k"

    def value(self) -> bytes:
        return b"{}"


def test_a_record_whose_headers_cannot_be_read_is_still_a_record():
    record = record_of(BrokenHeaders())  # type: ignore[arg-type]
    assert (record.headers_broken, record.headers, record.place) == (True, [], "orders/0/9")


class Clock:
    now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def routing(tmp_path, clock):
    store = Store(tmp_path, clock)
    yield Routing(store)
    store.close()


def test_a_lease_ends_by_itself(routing, clock):
    routing.pause("drain-1", 60)
    assert (routing.state().holder, routing.state().until) == ("drain-1", 1_700_000_060_000)
    clock.now += 59.9
    assert routing.paused()
    clock.now += 0.2
    assert not routing.paused()
    assert routing.state().holder is None


def test_its_holder_extends_a_lease_and_never_shortens_it(routing):
    routing.pause("drain-1", 60)
    routing.pause("drain-1", 90)
    routing.pause("drain-1", 5)
    assert routing.state().until == 1_700_000_090_000


def test_another_holder_is_refused_while_the_lease_lives_and_welcome_after(routing, clock):
    routing.pause("drain-1", 60)
    with pytest.raises(LeaseHeld, match="drain-1"):
        routing.pause("drain-2", 600)
    with pytest.raises(LeaseHeld, match="drain-1"):
        routing.resume("drain-2")
    clock.now += 61
    routing.pause("drain-2", 10)
    assert (routing.state().holder, routing.state().until) == ("drain-2", 1_700_000_071_000)
    routing.resume("drain-2")
    routing.resume("drain-2")
    assert not routing.paused()


def test_what_is_held_is_durable_to_the_byte(tmp_path, clock):
    letter = DeadLetter("orders/0/1", b"\x00", None, [("a", b"\xff"), ("a", None), ("b", b"")])
    store = Store(tmp_path, clock)
    first = Routing(store)
    first.pause("drain-1", 60)
    with store.transaction() as db:
        first.hold(db, [letter])
    store.close()
    store = Store(tmp_path, clock)
    again = Routing(store)
    assert again.paused()
    assert (again.state().held, again.state().undeliverable) == (1, 0)
    store.close()
