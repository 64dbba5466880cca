"""A queue to drain without a broker: the in-memory twins, a ledger and an archive of its own, ways to break things."""

from __future__ import annotations

import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from sqlalchemy import text

from dlq.config import QueueConfig
from dlq.drain import Drain, drain_id
from dlq.entry import Headers, Record
from dlq.intake import Intake, Taken
from dlq.ledger import Ledger, lease
from dlq.memory import MemoryLog, MemoryTopics, dead_letter
from dlq.opening import open_drain
from dlq.ports import Batch, Connection, Connections, Output
from dlq.sources.memory import MemoryDlq, MemoryPass
from dlq.targets.memory import MemoryWriter
from dlq.triage import assign

TOPIC = "orders"
"""The target's topic."""


class Killed(BaseException):
    """The process is dead: nothing it would still have done happens."""


class Tripwire:
    """Counts the steps a process takes and kills it at one of them; a dead process takes no further step."""

    def __init__(self, at: int | None = None) -> None:
        self.at = at
        self.steps = 0

    def __call__(self) -> None:
        self.steps += 1
        if self.at is not None and self.steps > self.at:
            raise Killed


class Sleeper:
    """Falls asleep at one of a process's steps; what happens meanwhile happens then."""

    def __init__(self, at: int, meanwhile: Callable[[], object]) -> None:
        self._at = at
        self._meanwhile = meanwhile
        self.steps = 0
        self.slept = False

    def __call__(self) -> None:
        self.steps += 1
        if self.steps == self._at:
            self.slept = True
            self._meanwhile()


def failure(
    number: int = 0,
    error_type: str = "TransientNetwork",
    *,
    topic: str = TOPIC,
    part: int = 0,
    offset: int | None = None,
    dedupe: str | None = None,
    **more: bytes,
) -> Headers:
    """The headers of a dead letter whose first record lay at ``topic``/``part``/``offset``."""
    offset = 1_000_000 + number if offset is None else offset
    first = Record(part, str(offset), offset, None, None, (("correlation-id", b"c-%d" % number),), None)
    dedupe_header = () if dedupe is None else (("dedupe-key", dedupe.encode()),)
    extra = tuple((name.replace("_", "-"), value) for name, value in more.items())
    return (*dead_letter(first, topic, error_type=error_type), *dedupe_header, *extra)


class MemoryRig:
    """One queue. Everything but the ledger's file and the archive lies in this process's memory.

    :param ledger: the URL of a ledger that exists; without it ``template`` is copied.
    :param settings: further keys of the queue's file: ``limits``, ``outcome`` ...
    """

    def __init__(
        self,
        folder: Path,
        *,
        ledger: str | None = None,
        partitions: int = 2,
        target_partitions: int = 2,
        start: str = "earliest",
        ordering: str = "none",
        compacted: bool = False,
        template: Path | None = None,
        **settings: Any,
    ) -> None:
        name = f"q{uuid.uuid4().hex[:12]}"
        self.folder = folder
        self.log = MemoryLog.shared(name, partitions)
        self.topics = MemoryTopics.shared(name)
        self.topics.create(TOPIC, target_partitions)
        url = ledger or f"sqlite:///{folder}/ledger.db"
        self.config = QueueConfig.model_validate(
            {
                "name": name,
                "source": {"kind": "memory", "connection": name, "start": start},
                "target": {
                    "kind": "memory",
                    "connection": name,
                    "allow": [TOPIC],
                    "ordering": ordering,
                    "allow_compacted": compacted,
                },
                "outcome": {"grace": 0, "deadline": "5s"},
                "ledger": url,
                "archive": str(folder / "archive"),
                "report": str(folder / "report"),
                **settings,
            }
        )
        if template is not None and ledger is None:
            shutil.copyfile(template, folder / "ledger.db")
        self.ledger = Ledger.open(url)
        self.connections: Connections = Connection
        self._drains: list[Drain] = []
        self._number = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for drain in self._drains:
            drain.close()
        self.ledger.close()

    # The queue

    def put(
        self,
        count: int = 1,
        error_type: str = "TransientNetwork",
        *,
        part: int | None = None,
        key: bytes | None = None,
        value: bytes | None = None,
        headers: Headers | None = None,
    ) -> list[tuple[int, int]]:
        """Dead-letter ``count`` more records, round the partitions unless ``part`` is given; returns their places."""
        places = []
        for _ in range(count):
            n = self._number
            self._number += 1
            where = n % self.log.partitions if part is None else part
            pos = self.log.append(
                where,
                b"k%d" % n if key is None else key,
                b"value %d" % n if value is None else value,
                failure(n, error_type) if headers is None else headers,
            )
            places.append((where, pos))
        return places

    def write_keyless(self, count: int) -> None:
        """Dead-letter ``count`` more records without a key, into the last partition."""
        for _ in range(count):
            n = self._number
            self._number += 1
            self.log.append(self.log.partitions - 1, None, b"value %d" % n, failure(n))

    # Drains

    def open(self, run: str = "r1", **how: Any) -> Drain:
        drain = open_drain(self.config, run_id=run, connections=self.connections, **how)
        self._drains.append(drain)
        return drain

    def attach(self, run: str = "r1") -> Drain:
        """A later task of the drain, as another process would have it."""
        drain = Drain.attach(
            drain_id(self.config.name, run), config=self.config, connections=self.connections
        )
        self._drains.append(drain)
        return drain

    def release(self, drain: Drain) -> None:
        lease.release(drain.ledger, drain.queue, drain.id, drain.epoch, "green")

    def expire_lease(self) -> None:
        """As if the holder's lease had ended long ago: the next drain takes over."""
        self.write(
            "UPDATE queue SET lease_until = '2020-01-01T00:00:00.000+00:00' WHERE name = :q",
            q=self.config.name,
        )

    def begin(self) -> None:
        """The queue's first intake, while it is empty: what comes later needs no decision of a person."""
        drain = self.open("set-up")
        Intake(drain).run(30)
        self.release(drain)

    def taken(self, count: int = 0, run: str = "r1", **how: Any) -> Drain:
        """A drain that has taken ``count`` more dead letters into custody and said why each is open."""
        if count:
            self.put(count, **how)
        drain = self.open(run)
        self.take(drain)
        assign(drain)
        return drain

    def take(self, drain: Drain, seconds: float = 30) -> Taken:
        return Intake(drain).run(seconds)

    # The target's consumer

    def consume(self, fails: Callable[[Record], bool] = lambda _record: False, **how: Any) -> int:
        return self.topics.consume(TOPIC, self.log, fails, **how)

    def consumer(self, fails: Callable[[Record], bool] = lambda _record: False, **how: Any) -> None:
        """A consumer that keeps up from now on."""
        self.topics.live = lambda: self.consume(fails, **how)

    def delivered(self) -> list[Record]:
        return self.topics.records(TOPIC)

    # The ledger

    def rows(self, sql: str, **values: Any) -> list[Any]:
        with self.ledger.read() as tx:
            return list(tx.execute(text(sql), values).all())

    def one(self, sql: str, **values: Any) -> Any:
        (row,) = self.rows(sql, **values)
        return row[0] if len(row) == 1 else row

    def write(self, sql: str, **values: Any) -> None:
        with self.ledger.write(self.config.name, None) as tx:
            tx.execute(text(sql), values)

    def states(self) -> dict[str, int]:
        return dict(self.rows("SELECT state, COUNT(*) FROM entry GROUP BY state"))

    def reasons(self) -> dict[str, int]:
        return dict(self.rows("SELECT reason, COUNT(*) FROM entry WHERE state = 'open' GROUP BY reason"))

    def entry(self, place: tuple[int, int]) -> Any:
        (row,) = self.rows("SELECT * FROM entry WHERE part = :p AND pos = :o", p=place[0], o=place[1])
        return row

    # What must hold whatever happened

    def check(self) -> None:
        """Hold queue, ledger and target against each other; nothing may be planned or under way."""
        self.check_custody()
        self._check_target()

    def check_custody(self) -> None:
        """Every record below the positions is one entry, the ranges are a chain, the accounts add up."""
        places = Counter(
            (part, int(pos)) for part, pos in self.rows("SELECT part, pos FROM entry WHERE pos IS NOT NULL")
        )
        positions = self.positions()
        begun = dict(self.rows("SELECT part, MIN(from_pos) FROM intake GROUP BY part"))
        for part in range(self.log.partitions):
            low, high = self.log.marks(part)
            first, end = max(low, begun.get(part, low)), min(high, positions.get(part, low))
            for record in self.log.read(part, first, end):
                times = places[(part, record.pos or 0)]
                assert times == 1, f"{part}/{record.pos} is {times} times in the ledger"
        self._check_chain()
        self._check_accounts()

    def positions(self) -> dict[int, int]:
        return {
            part: int(to)
            for part, to in self.rows(
                "SELECT i.part, i.to_pos FROM intake i WHERE i.round = "
                "(SELECT MAX(round) FROM intake WHERE source = i.source AND part = i.part) ORDER BY i.source"
            )
        }

    def _check_chain(self) -> None:
        at: dict[tuple[int, int], int] = {}
        for source, part, start, end in self.rows(
            "SELECT source, part, from_pos, to_pos FROM intake ORDER BY source, part, round"
        ):
            assert at.get((source, part), start) == start <= end, (
                f"range {start}..{end} of {part} does not follow {at}"
            )
            at[(source, part)] = end

    def _check_target(self) -> None:
        on_target: Counter[tuple[str, int]] = Counter()
        effects: Counter[str] = Counter()
        for record in self.delivered():
            headers = {
                name: (value or b"").decode() for name, value in record.headers if name.startswith("dlq-")
            }
            on_target[(headers["dlq-job"], int(headers["dlq-ordinal"]))] += 1
            effects[headers["dlq-entry"]] += 1
        settled = {
            (job, int(ordinal))
            for job, ordinal in self.rows(
                "SELECT je.job, je.ordinal FROM job_entry je JOIN entry e ON e.id = je.entry AND e.job = je.job "
                "WHERE e.state IN ('replayed', 'confirmed', 'returned', 'handed_back')"
            )
        }
        in_doubt = {
            (job, int(ordinal))
            for job, ordinal in self.rows(
                "SELECT je.job, je.ordinal FROM job_entry je JOIN entry e ON e.id = je.entry AND e.job = je.job "
                "WHERE e.state = 'ambiguous'"
            )
        }
        assert set(on_target) - in_doubt == settled, (
            f"on the target, not settled: {sorted(set(on_target) - in_doubt - settled)}; "
            f"settled, not on the target: {sorted(settled - set(on_target))}"
        )
        assert set(on_target.values()) <= {1}, (
            f"sent more than once: {[k for k, n in on_target.items() if n > 1]}"
        )
        assert set(effects.values()) <= {1}, (
            f"entries with more than one effect: {[k for k, n in effects.items() if n > 1]}"
        )

    def _check_accounts(self) -> None:
        unsettled = self.one("SELECT COUNT(*) FROM entry WHERE settled_drain IS NULL")
        newest = self.rows("SELECT id, open_before FROM drain ORDER BY epoch DESC LIMIT 1")
        for drain, before in newest:
            taken = self.one("SELECT COUNT(*) FROM entry WHERE taken_drain = :d", d=drain)
            settled = self.one("SELECT COUNT(*) FROM entry WHERE settled_drain = :d", d=drain)
            assert before + taken == settled + unsettled


class _WiredPass:
    def __init__(self, inner: MemoryPass, step: Callable[[], None]) -> None:
        self._inner = inner
        self._step = step
        self.cutoffs: Mapping[int, int] = inner.cutoffs
        self.starts: Mapping[int, int] = inner.starts

    def read(self, max_entries: int, max_bytes: int, max_seconds: float) -> Batch | None:
        self._step()
        return self._inner.read(max_entries, max_bytes, max_seconds)

    def echo(self) -> None:
        self._step()
        self._inner.echo()
        self._step()

    def acknowledge(self, batch: Batch) -> None:
        self._step()
        self._inner.acknowledge(batch)
        self._step()

    def close(self) -> None:
        self._inner.close()


class _WiredWriter:
    def __init__(self, inner: MemoryWriter, step: Callable[[], None]) -> None:
        self._inner = inner
        self._step = step

    def __enter__(self) -> Self:
        self._step()
        self._inner.__enter__()
        self._step()
        return self

    def __exit__(self, *how: object) -> None:
        self._inner.__exit__(*how)

    def cursor(self) -> int | None:
        self._step()
        return self._inner.cursor()

    def produce(self, outputs: Sequence[Output]) -> None:
        self._step()
        self._inner.produce(outputs)

    def flush(self) -> Any:
        self._step()
        return self._inner.flush()

    def commit(self, cursor: int) -> None:
        self._step()
        self._inner.commit(cursor)
        self._step()

    def send(self, outputs: Sequence[Output], cursor: int) -> Any:
        self.produce(outputs)
        delivered = self.flush()
        self.commit(cursor)
        return delivered


def wire(drain: Drain, step: Callable[[], None], *, within: bool = True) -> Drain:
    """Have ``step`` called before and after whatever ``drain`` does that outlives its process, and, where ``within``,
    at the end of its ledger transactions."""
    write, archive_write = drain.ledger.write, drain.archive.write
    source, target = drain.source, drain.target
    assert isinstance(source, MemoryDlq)
    open_pass, writer = source.open_pass, target.writer

    @contextmanager
    def wired_write(queue: str, epoch: int | None, **how: Any) -> Iterator[Any]:
        step()
        with write(queue, epoch, **how) as tx:
            yield tx
            if within:
                step()
        step()

    def wired_archive_write(*arguments: Any) -> Any:
        step()
        written = archive_write(*arguments)
        step()
        return written

    def wired_pass(*where: Any, **how: Any) -> Any:
        return _WiredPass(open_pass(*where, **how), step)

    def wired_writer(job: str, topic: str, metadata: str) -> Any:
        return _WiredWriter(writer(job, topic, metadata), step)  # type: ignore[arg-type]

    drain.ledger.write = wired_write  # type: ignore[method-assign]
    drain.archive.write = wired_archive_write  # type: ignore[method-assign]
    source.open_pass = wired_pass  # type: ignore[method-assign]
    target.writer = wired_writer  # type: ignore[method-assign]
    return drain
