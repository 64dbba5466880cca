"""The core's ports: what it needs of a dead-letter queue, of a replay target and of the surroundings."""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, Self

import msgspec

from dlq.entry import Headers, Record


@dataclass(frozen=True)
class Connection:
    """Where a system is and how to get in; ``extra`` is the transport's own settings. Never logged."""

    id: str
    conn_type: str = ""
    host: str | None = None
    port: int | None = None
    schema: str | None = None
    login: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)
    extra: Mapping[str, Any] = field(default_factory=dict, repr=False)
    aws: Callable[[str, Any], Any] | None = field(default=None, repr=False)
    """Makes a client of an AWS service with a botocore ``Config``, where the surroundings know more of AWS than the
    fields here say (roles, federated sign-on)."""


Connections = Callable[[str], Connection]
"""Finds a Connection by id; raises :class:`dlq.errors.ConfigError` where there is none."""


class Range(msgspec.Struct, gc=False):
    """A half-open span of positions of one partition that a batch covers, gaps included."""

    part: int
    from_pos: int
    to_pos: int
    leader_epoch: int | None = None
    vanished: int = 0


class Batch(msgspec.Struct):
    """What one read gave: records in order, the ranges they cover (none where the queue has no log), the
    queue's receipts.
    """

    records: list[Record]
    ranges: list[Range]
    receipts: Any = None


@dataclass(frozen=True)
class Depth:
    """How much the queue still holds. ``exact`` is False where it is an upper bound (Kafka) or about (SQS)."""

    entries: int
    by_part: Mapping[int, int]
    oldest_ms: int | None = None


@dataclass(frozen=True)
class Echo:
    """What a queue remembers of a drain: the position it was told, and the ledger (None: not said) and epoch
    that told it.
    """

    position: int
    ledger: str | None
    epoch: int


class Pass(Protocol):
    """One reading of a source from the ledger's positions to a cut-off taken when it was opened."""

    @property
    def cutoffs(self) -> Mapping[int, int]: ...

    @property
    def starts(self) -> Mapping[int, int]: ...

    def read(self, max_entries: int, max_bytes: int, max_seconds: float) -> Batch | None:
        """The next batch, or None when every partition reached its cut-off.

        :raises dlq.errors.SourceError: when the queue can't be read; what was returned before stands.
        """

    def echo(self) -> None:
        """Tell the queue every position again, also where nothing is read: it may forget what nobody repeats."""

    def acknowledge(self, batch: Batch) -> None:
        """Tell the queue that a batch is in custody (Kafka: commit offsets; SQS: delete). Safe to repeat."""

    def close(self) -> None: ...


class Source(Protocol):
    """A dead-letter queue."""

    uri: str
    """What the queue is, for life: ``kafka:<cluster id>/<topic id>`` or the queue's ARN."""
    has_log: bool
    """Whether places can be read again, so that the log is a witness."""

    def depth(self, positions: Mapping[int, int]) -> Depth: ...

    def retention_ms(self) -> int | None:
        """How long after its timestamp an entry is kept at least; None where it is kept for good, or may not be asked.
        A bound on the queue's size can delete it earlier.
        """

    def check(self, positions: Mapping[int, int], ledger_id: str, epoch: int) -> list[str]:
        """Compare the queue's own memory of us (offset, metadata) with the ledger's; returns findings in words.

        :raises dlq.errors.Refused: the topic was recreated or truncated, or another or newer ledger was here (law 10).
        """

    def echoes(self) -> dict[int, Echo]:
        """By partition, what the queue remembers of us; nothing where it remembers nothing."""

    def remember(self, positions: Mapping[int, int], ledger_id: str, epoch: int) -> None:
        """Tell the queue positions and whose they are, whatever it remembers: for a ledger rebuilt, a source
        adopted anew.

        :raises dlq.errors.SourceError: when it can't be told.
        """

    def first(self) -> dict[int, tuple[int, int]]:
        """Where a first intake begins in each partition by the queue file's ``source.start``, and where the
        partition ends now.
        """

    def open_pass(
        self, positions: Mapping[int, int], parts: Sequence[int] | None = None, *, glance: bool = False
    ) -> Pass:
        """Begin to read; a partition without a position (added since) begins at its log start.

        :param glance: only see what has come: a queue without a log need not be shown to be empty, which takes it long.
        """

    def peek(self, most: int, seconds: float) -> list[Record]:
        """At most ``most`` records of a queue without a log, where a look is a touch: they are received, held together
        and given back.

        :raises dlq.errors.Refused: where that could push them on.
        :raises dlq.errors.SourceError: when the queue can't be read.
        """

    def originals(self, topic: str, places: Collection[tuple[int, int]]) -> Mapping[tuple[int, int], Record]:
        """The records of another topic beside the queue at these partitions and offsets; without those that are gone,
        or for which the time or the room did not last. A queue that has no such thing gives none. Never raises.
        """

    def reread(self, spans: Sequence[Range]) -> Any:
        """Iterate over batches of records in ``spans`` again, as a witness; tells the queue nothing."""

    def close(self) -> None: ...


class Output(msgspec.Struct, gc=False):
    """One record to send: ordinal in its job, bytes, headers (ours included), where it should go.

    ``types`` and ``system`` are an SQS message's (see :class:`dlq.entry.Record`); headers past the types are ours.
    """

    ordinal: int
    key: bytes | None
    value: bytes | None
    headers: Headers
    timestamp_ms: int | None
    origin_part: int | None = None
    types: tuple[str, ...] = ()
    system: tuple[tuple[str, str], ...] = ()
    correlation_id: str | None = None


class Delivered(msgspec.Struct, gc=False):
    """Where an ordinal went."""

    ordinal: int
    part: int | None
    pos: int | None
    ref: str | None = None


class Unproducible(Exception):
    """One output can never be sent: ``ordinal`` and a short ``reason`` code.

    ``certain``: it is this one; else it may be another of those it was sent with.
    """

    def __init__(self, ordinal: int, reason: str, *, certain: bool = False) -> None:
        super().__init__(f"ordinal {ordinal}: {reason}")
        self.ordinal = ordinal
        self.reason = reason
        self.certain = certain


class Writer(Protocol):
    """A job's one writer; opening it fences an older one. The cursor moves in the same step as its effect."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def cursor(self) -> int | None:
        """How many ordinals are done for good, or None where the target has no memory of this job.

        :raises dlq.errors.Refused: when a job of this name but of another ledger or plan was here.
        """

    def produce(self, outputs: Sequence[Output]) -> None:
        """Begin a transaction with ``outputs``. Raises as flush does."""

    def flush(self) -> list[Delivered]:
        """Wait until the target has the outputs, uncommitted; returns where they lie.

        :raises Unproducible: nothing was sent; leave that ordinal out, written down first, and send the rest.
        :raises dlq.errors.Fenced: another writer of this job took over.
        :raises dlq.errors.TargetError: not known; open the writer again and read the cursor.
        """

    def commit(self, cursor: int) -> None:
        """All that was flushed and the new ``cursor``, or nothing. May be called from another thread.

        :raises dlq.errors.Fenced: another writer of this job took over.
        :raises dlq.errors.TargetError: not known; open the writer again and read the cursor.
        """

    def send(self, outputs: Sequence[Output], cursor: int) -> list[Delivered]:
        """Produce, flush and commit in one."""


class Refusal(msgspec.Struct, frozen=True):
    """The target will certainly not have this output: ``reason`` is a short code."""

    ordinal: int
    reason: str


class Sender(Protocol):
    """Sends to a target without transactions: what a call did can stay unknown."""

    again_s: float
    """How long after an output was first sent the target passes it over when it is sent again; 0: not at all."""

    def waves(self, outputs: Sequence[Output]) -> list[list[Output]]:
        """``outputs`` in groups that may go side by side; a later one waits for those before, where order matters."""

    def lane(self, output: Output) -> str | None:
        """Whose order an output must keep; None: nobody's."""

    def send(self, outputs: Sequence[Output], deadline: float) -> list[Delivered | Refusal]:
        """Send them by the (monotonic) deadline. One that is in no answer is in doubt: it may have been sent.

        :raises dlq.errors.ConfigError: when the target lets nobody send; nothing of it was sent.
        """


class Target(Protocol):
    """Where replays go: by a job's :meth:`writer` where it is ``transactional``, else by a :meth:`sender`."""

    transactional: bool

    def preflight(self) -> list[str]:
        """What is wrong with the target before anything is sent, in words that name the field and the fix."""

    def findings(self, source: str) -> list[str]:
        """What a person should know before a replay: who else will see it, and whether failures come back into the
        queue with the uri ``source``.
        """

    def ends(self, topic: str) -> dict[int, int]:
        """The end offset of each partition (the last stable one)."""

    def writer(self, job: str, topic: str, metadata: str) -> Writer: ...

    def sender(self, topic: str) -> Sender: ...

    def delivered(self, topic: str, start: Mapping[int, int]) -> Any:
        """Iterate over ``(job, ordinal, part, pos)`` of our records from ``start`` to now, read committed. Not where
        the target isn't transactional: it can't be asked.
        """

    def digested(self, topic: str, source: str) -> float | None:
        """Epoch seconds before which whatever was sent has been consumed, or dead-lettered into the queue with the uri
        ``source``, by now; None where that is not known, or another way tells (:meth:`progress`).
        """

    def progress(self, topic: str) -> dict[int, int] | None:
        """The consuming group's position by partition, or None where nobody consumes the target or no group is
        configured.
        """

    def lag(self, topic: str) -> int | None:
        """How many records the consumers of the target are behind; None where nobody can tell."""

    def compacted(self, topic: str) -> bool:
        """Whether replays may go to ``topic`` although it keeps only the newest record of each key."""

    def newest(
        self, topic: str, since: Mapping[int, int], keys: Container[bytes]
    ) -> tuple[dict[tuple[int, bytes], int], dict[int, int]]:
        """By partition and key, of ``keys``, the position of the newest record from ``since`` on, and by partition up
        to where was read. Asked only of a topic that is :meth:`compacted`.

        :raises dlq.errors.TargetError: when the topic can't be read.
        """

    def grown(self, seconds: float) -> int:
        """How many records the targets grew by in the last ``seconds``, replays of ours included."""

    def close(self) -> None: ...
