"""Restore: archived bytes to a file, to a scratch topic, or, of entries still open, back to their queue."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, and_, func, select

from dlq import plan as planning
from dlq.archived import Archived, archived
from dlq.config import KafkaSource, KafkaTarget, MemoryEnd, QueueConfig
from dlq.drain import Drain
from dlq.entry import FLAWS
from dlq.errors import ConfigError
from dlq.export import exported
from dlq.ledger.jobs import HAND_BACK_UNFINISHED, Cut
from dlq.ledger.schema import entry
from dlq.ports import Connections, Output, Unproducible, Writer
from dlq.selection import Selection
from dlq.sending import running
from dlq.targets.kafka import KafkaReplay

Progress = Callable[[int, int], None]
"""Called with (done, of)."""

_RECORDS, _BYTES = 1_000, 8 << 20  # of a transaction


@dataclass(frozen=True)
class Restored:
    """``flawed`` entries are restored without the headers no client could read; ``left_out`` are (entry, why)."""

    entries: int
    where: str
    flawed: int = 0
    left_out: tuple[tuple[str, str], ...] = ()


def to_file(config: QueueConfig, chosen: Selection, path: Path, progress: Progress | None = None) -> Restored:
    """Write the chosen entries, whatever their state, in the export format; states don't change.

    The file appears when it is complete; one that is there is not overwritten.

    :raises ArchiveError: when the archive's bytes are not those taken.
    """
    if path.exists():
        raise ConfigError(f"{path} exists: name another file, nothing is overwritten")
    part = path.with_name(f"{path.name}.part")
    done = flawed = 0
    try:
        with part.open("wb") as file:
            for row, total in archived(config, chosen):
                file.write(exported(row.stored, row.topic, row.reference.rpartition("/")[2]))
                done, flawed = done + 1, flawed + row.flawed
                if progress is not None:
                    progress(done, total)
            file.flush()
            os.fsync(file.fileno())
        part.rename(path)
    except OSError as error:
        raise ConfigError(f"{path} can't be written: {error.strerror}") from error
    finally:
        part.unlink(missing_ok=True)
    return Restored(done, str(path), flawed)


def to_topic(
    config: QueueConfig,
    chosen: Selection,
    topic: str,
    connections: Connections,
    progress: Progress | None = None,
) -> Restored:
    """Send the chosen entries, whatever their state, to a scratch topic: key, value, headers and timestamp as taken.

    States don't change, and nothing remembers it: done twice, the topic has everything twice.

    :raises ConfigError: when the topic doesn't exist, or is none to play with.
    """
    target = _scratch(config, topic)
    replay = KafkaReplay(target, connections)
    if problems := replay.preflight():
        raise ConfigError(f"topic {topic}: " + "; ".join(problems))
    sending = _Sending(replay, f"scratch-{uuid.uuid4().hex[:12]}", topic)
    done = flawed = 0
    try:
        for rows, total in _chunks(archived(config, chosen)):
            sending.send(rows, done)
            done += len(rows)
            flawed += sum(row.flawed for row in rows)
            if progress is not None:
                progress(done, total)
    finally:
        sending.close()
        replay.close()
    return Restored(done - len(sending.left_out), topic, flawed, tuple(sending.left_out))


def hand_back(
    drain: Drain, chosen: Selection, *, who: str, deadline_s: float, progress: Progress | None = None
) -> Restored:
    """Send the chosen entries that are still open back to the dead-letter queue, byte for byte, with our headers added.

    They are settled ``handed_back``; when a drain takes them again they are linked, and wait for a person.

    :raises ConfigError: when the source is none that can be written.
    """
    source_ = drain.config.source
    if isinstance(source_, MemoryEnd):
        raise ConfigError(f"queue {drain.queue}: entries can't be handed back to this kind of source")
    topic = source_.topic if isinstance(source_, KafkaSource) else source_.queue
    with drain.ledger.read() as tx:
        wanted = and_(
            chosen.condition(tx, drain.queue),
            entry.c.state == "open",
            entry.c.reason.not_in(FLAWS),
        )
        flawed = _count(
            tx, and_(chosen.condition(tx, drain.queue), entry.c.state == "open", entry.c.reason.in_(FLAWS))
        )
    jobs = planning.make_of(
        drain,
        "restore",
        [Cut(topic, planning.by_id(drain, [wanted]), kind="hand_back")],
        who=who,
        saw="the entries of the plan, as the command selected them",
        kind="hand_back",
    )
    deadline = time.monotonic() + deadline_s
    sent, left = 0, []
    for one in jobs:
        with running(drain, one.id) as run:
            while run.cursor < one.size and time.monotonic() < deadline:
                before = run.cursor
                run.send(before + _RECORDS, deadline)
                if progress is not None:
                    progress(run.cursor, one.size)
                if run.cursor == before:
                    left.append((f"job {one.id}", "the queue is paused"))
                    break
            ended = "done" if run.cursor >= one.size else "stopped"
            freed = run.close(ended, HAND_BACK_UNFINISHED)
            sent += run.cursor - run.skipped
            if run.skipped:
                left.append((f"job {one.id}", f"{run.skipped} can't be produced; their reason says why"))
            if freed:
                left.append((f"job {one.id}", f"{freed} were not reached; they are open"))
    drain.note("restore", f"{sent} entries handed back to {topic}", handed_back=sent)
    return Restored(sent, topic, flawed, tuple(left))


def _scratch(config: QueueConfig, topic: str) -> KafkaTarget:
    """The scratch topic as a target; it lies on the target's cluster.

    :raises ConfigError: when it is none that may be played with.
    """
    if not isinstance(config.target, KafkaTarget) or not isinstance(config.source, KafkaSource):
        raise ConfigError(
            f"queue {config.name}: there is no Kafka target whose Connection could reach a scratch topic"
        )
    if topic == config.source.topic:
        raise ConfigError(
            f"topic {topic} is the dead-letter queue itself: use --to dlq, which keeps account of it"
        )
    if topic in config.target.allow:
        raise ConfigError(
            f"topic {topic} is a target of this queue (target.allow): its consumers would run the entries; "
            "create a scratch topic"
        )
    if topic.startswith("__") or topic.endswith(("-repartition", "-changelog")):
        raise ConfigError(f"topic {topic} is internal: create a scratch topic")
    return KafkaTarget(
        kind="kafka",
        connection=config.target.connection,
        allow=(topic,),
        partitioner=config.target.partitioner,
    )


def _count(tx: Connection, condition: Any) -> int:
    return int(tx.execute(select(func.count()).select_from(entry).where(condition)).scalar_one())


def _chunks(rows: Iterator[tuple[Archived, int]]) -> Iterator[tuple[list[Archived], int]]:
    chunk: list[Archived] = []
    size = total = 0
    for row, total in rows:
        chunk.append(row)
        size += len(row.stored.key or b"") + len(row.stored.value or b"")
        if len(chunk) >= _RECORDS or size >= _BYTES:
            yield chunk, total
            chunk, size = [], 0
    if chunk:
        yield chunk, total


class _Sending:
    """Transactions to a scratch topic; a record it never takes is left out, alone."""

    def __init__(self, target: KafkaReplay, job: str, topic: str) -> None:
        self._target, self._job, self._topic = target, job, topic
        self._writer: Writer | None = None
        self.left_out: list[tuple[str, str]] = []

    def send(self, rows: Sequence[Archived], first: int) -> None:
        try:
            self._open().send([self._output(first + n, row) for n, row in enumerate(rows)], first + len(rows))
        except Unproducible as fault:
            self.close()
            if len(rows) == 1:
                self.left_out.append((rows[0].reference, fault.reason.replace("_", " ")))
                return
            half = len(rows) // 2
            self.send(rows[:half], first)
            self.send(rows[half:], first + half)

    def _output(self, ordinal: int, row: Archived) -> Output:
        at = row.stored
        return Output(ordinal, at.key, at.value, at.headers, at.timestamp_ms, at.part)

    def _open(self) -> Writer:
        if self._writer is None:
            self._writer = self._target.writer(self._job, self._topic, "").__enter__()
        return self._writer

    def close(self) -> None:
        if self._writer is not None:
            self._writer.__exit__(None, None, None)
            self._writer = None
