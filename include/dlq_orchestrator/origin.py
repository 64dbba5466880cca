"""What the orchestrator needs of the queue its workflows come from, whatever its kind."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self

from dlq_orchestrator.routing import Routing

if TYPE_CHECKING:
    from dlq_orchestrator.replays import Replays


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


class Inlet(Protocol):
    """The way in, for workflows that are submitted by HTTP."""

    def put(self, document: bytes, correlation_id: str, traceparent: str | None) -> Place:
        """
        :raises NotSubmitted: no acknowledgement.
        :raises DataCorruption: the origin takes no such text.
        """


@dataclass(frozen=True, slots=True)
class Origin:
    """The parts that differ by kind. `routing`, `replays`: None where records are the queue's to hold and hand out."""

    consumer: Consumer
    inlet: Inlet
    routing: Routing | None = None
    replays: Replays | None = None
