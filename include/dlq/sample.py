"""A look at the dead-letter queue itself, without a drain: nothing is taken, and a queue with a log is told nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from dlq.config import QueueConfig
from dlq.drain import connect, dry
from dlq.entry import Group, Record, Understood
from dlq.errors import ConfigError
from dlq.grouping.classify import Classifier
from dlq.ledger import Ledger, LedgerError
from dlq.ports import Connections, Source

MOST = 50
"""The runbook's sample is 10 to 50 entries."""
_DEADLINE_S = 30.0
_SHOWN = 4_000  # characters of a key or value that are shown


@dataclass(frozen=True)
class Looked:
    """One dead letter that still lies in the queue, and what it says."""

    record: Record
    understood: Understood
    group: Group


@contextmanager
def looking(config: QueueConfig, connections: Connections) -> Iterator[tuple[Source, Mapping[int, int]]]:
    """The queue, and the ledger's positions in it; where no ledger can be read, everything the queue holds."""
    try:
        Ledger.open(config.ledger).close()
    except (ConfigError, LedgerError):
        source = connect(config, connections)
        try:
            yield source, {}
        finally:
            source.close()
        return
    with dry(config, run_id="sample", connections=connections) as look:
        yield look.source, look.positions()


def sample(source: Source, config: QueueConfig, positions: Mapping[int, int], most: int) -> list[Looked]:
    """The oldest ``most`` entries beyond ``positions``, from every partition in turn.

    :raises dlq.errors.SourceError: when the queue can't be read.
    """
    classifier = Classifier.load(config)
    return [Looked(record, *classifier.classify(record)) for record in oldest(source, positions, most)]


def oldest(
    source: Source, positions: Mapping[int, int], most: int, deadline_s: float = _DEADLINE_S
) -> list[Record]:
    """The records that :func:`sample` shows; fewer where the time is up."""
    if not source.has_log:
        return source.peek(most, deadline_s)
    by_part = _shares(source.depth(positions).by_part, most)
    deadline = time.monotonic() + deadline_s
    columns = [list(_oldest(source, positions, part, share, deadline)) for part, share in by_part.items()]
    return [column[turn] for turn in range(most) for column in columns if turn < len(column)]


def _shares(depths: Mapping[int, int], most: int) -> dict[int, int]:
    """How many to read of each partition: even shares, where one has less the others give more."""
    left, shares = most, {}
    filled = sorted((depth, part) for part, depth in depths.items() if depth)
    for number, (depth, part) in enumerate(filled):
        share = min(depth, -(-left // (len(filled) - number)))
        if share:
            shares[part] = share
            left -= share
    return dict(sorted(shares.items()))


def _oldest(
    source: Source, positions: Mapping[int, int], part: int, most: int, deadline: float
) -> Iterator[Record]:
    """A pass whose batches nobody acknowledges: the queue hears nothing of it."""
    reading = source.open_pass(positions, [part])
    try:
        left = most
        while left > 0 and time.monotonic() < deadline:
            batch = reading.read(left, 8 << 20, 1.0)
            if batch is None:
                return
            yield from batch.records[:left]
            left -= len(batch.records)
    finally:
        reading.close()


def escaped(payload: bytes | None, most: int = _SHOWN) -> str:
    """Bytes as text that a terminal does not obey: what can't be printed is escaped. At most ``most`` characters."""
    if payload is None:
        return "null"
    text = payload[: 4 * most].decode("utf-8", "backslashreplace")
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:most])
    return shown if len(payload) <= most else f"{shown}… ({len(payload):,} bytes)"
