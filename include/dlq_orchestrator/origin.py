"""What the orchestrator needs of the queue its workflows come from, whatever its kind."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, Self

from dlq_orchestrator.failures import DataCorruption
from dlq_orchestrator.routing import Routing
from dlq_orchestrator.workflow import Headers


class CannotStart(Exception):
    """Something the orchestrator needs is not there; the message says what to do."""


class ConsumerFailed(Exception):
    """The consumer cannot go on; a restart loses and doubles nothing."""


class NotSubmitted(Exception):
    """The origin did not take the workflow in time; submitting it again is safe."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a submitted workflow lies: in a topic, or in a queue."""

    topic: str | None = None
    partition: int | None = None
    offset: int | None = None
    queue: str | None = None
    message_id: str | None = None


class Consumer(Protocol):
    """Runs what the origin holds, until told to stop. A context manager: leaving it frees what it holds."""

    @property
    def last_turn(self) -> float:
        """When it last looked for records, by the monotonic clock."""

    @property
    def dead_lettered_until(self) -> float:
        """Failures up to then (epoch ms) have their dead letters in the DLQ."""

    def run(self, stop: threading.Event, ready: Callable[[], None]) -> None:
        """Consume until `stop` is set; `ready` is called once, when it does.

        :raises ConsumerFailed: the origin is gone, or refuses.
        """

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A record to be put into the origin. `types`: of those headers that are no strings, where the origin tells."""

    key: bytes | None
    value: bytes | None
    headers: Headers
    types: Mapping[str, str] = field(default_factory=dict)


class Inlet(Protocol):
    """The way in, for what is submitted or replayed by HTTP. May be used by many threads."""

    def put(self, records: Sequence[Outgoing]) -> list[Place | NotSubmitted | DataCorruption]:
        """Put records in; for each where it lies, once that is acknowledged, or why it doesn't.

        `DataCorruption`: the origin will never take it.
        """


@dataclass(frozen=True, slots=True)
class Origin:
    """The parts that differ by kind. `routing`: None where failing records can't be held back."""

    consumer: Consumer
    inlet: Inlet
    routing: Routing | None
