"""The whole core on the in-memory twins: drains, kills, zombies, failing consumers, decisions, in any order.

After every step the queue, the ledger and the target are held against each other.
"""

from __future__ import annotations

import shutil
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from sqlalchemy import and_, update
from tests.memory_rig import TOPIC, Killed, MemoryRig, Tripwire, failure, wire

from dlq import intake, plan
from dlq.drain import Drain
from dlq.entry import Headers, Record
from dlq.errors import Fenced
from dlq.intake import take_custody
from dlq.jobs import JobRun
from dlq.ledger.jobs import record_decision
from dlq.ledger.schema import entry
from dlq.memory import dead_letter
from dlq.replay import drain_remaining, replay_batches, replay_canary, replay_now
from dlq.triage import assign, categorize

FOREVER = 1e12
STAGE = "retry_transient"
KINDS = ("TransientNetwork", "TransientNetwork", "RateLimit", "QuotaExceeded", "DataCorruption")
SENT = {"replayed", "confirmed", "returned", "handed_back"}


def without_ours(record: Record, topic: str) -> Headers:
    """What a consumer writes that knows nothing of us: our headers are gone, the place remains."""
    return tuple(h for h in dead_letter(record, topic) if not h[0].startswith("dlq-"))


def part_of(key: bytes | None, partitions: int) -> int:
    """Which partition of the queue the consumer writes a dead letter to."""
    return 0 if key is None else zlib.crc32(key) % partitions


def replays(drain: Drain) -> None:
    assign(drain)
    for job in replay_canary(drain, STAGE, 30)["jobs"]:
        replay_batches(drain, job, 30)


def runs(drain: Drain) -> None:
    """All of a run's tasks."""
    take_custody(drain, 30)
    categorize(drain)
    replays(drain)
    drain_remaining(drain, 5)


TASKS: dict[str, Callable[[Drain], object]] = {
    "runs": runs,
    "takes": lambda d: take_custody(d, 30),
    "categorizes": categorize,
    "plans": lambda d: plan.make(d, STAGE, plan.ready(d), who="policy", saw="s"),
    "replays": replays,
    "drains the rest": lambda d: drain_remaining(d, 5),
}


HOW = st.sampled_from(["attach", "attach", "again", "new"])


class Core(RuleBasedStateMachine):
    """One queue, at most one living process of its drain, and whatever older processes still sleep."""

    template: Path

    @initialize(
        ordering=st.sampled_from(["none", "per_key"]), jobs=st.sampled_from([1, 2]), first=st.booleans()
    )
    def begin(self, ordering: str, jobs: int, first: bool) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="dlq-machine-"))
        self.queue = MemoryRig(
            self.folder,
            template=self.template,
            ordering=ordering,
            limits={"batch": 4, "jobs": jobs, "returns": 2},
            outcome={"grace": 0, "deadline": "60ms"},
        )
        self.queue.topics.positions[TOPIC] = {0: 0, 1: 0}
        self.drain: Drain | None = None
        self.run = 0
        self.older: list[Drain] = []
        self.zombies: list[JobRun] = []
        self.returned: dict[tuple[int, int], str] = {}
        self.discarded: set[str] = set()
        if not first:
            self.queue.begin()
        self.queue.put(12)

    def teardown(self) -> None:
        if not hasattr(self, "queue"):
            return
        try:
            self.finish()
        finally:
            for zombie in self.zombies:
                zombie.__exit__(None, None, None)
            self.queue.__exit__()
            shutil.rmtree(self.folder, ignore_errors=True)

    # The world

    @rule(
        what=st.sampled_from(
            [
                "keyed letters",
                "twin",
                "liar",
                "claim",
                "aborts",
                "retention",
                "offsets lost",
                "unproducible",
                "producible",
            ]
        ),
        n=st.integers(0, 40),
    )
    def the_world_changes(self, what: str, n: int) -> None:
        part, log = n % 2, self.queue.log
        if what == "keyed letters":
            self.queue.put(5, KINDS[n % len(KINDS)], key=b"key %d" % (n % 2), part=0)
        elif what in ("twin", "liar"):
            headers = failure(n % 3, dedupe=None if n % 2 else f"d-{n % 3}")
            for _ in range(2):
                self.queue.put(
                    1, key=b"t", value=b"twin" if what == "twin" else b"liar %d" % n, part=0, headers=headers
                )
        elif what == "claim":
            jobs = self.queue.rows("SELECT id FROM job ORDER BY id")
            job = jobs[n % len(jobs)][0] if jobs else "none.1"
            forged = (("dlq-job", job.encode()), ("dlq-ordinal", b"%d" % (n % 7)))
            self.queue.put(1, part=part, headers=(*failure(9_000 + n), *forged))
        elif what == "aborts":
            number = log.begin()
            log.append(part, b"k", b"aborted", transaction=number)
            log.abort(number)
        elif what == "retention":
            log.expire(part, self.queue.positions().get(part, 0))
        elif what == "offsets lost":
            log.commits.clear()
        else:
            never = what == "unproducible"
            self.queue.topics.unproducible = lambda o: (
                "too_large" if never and (o.value or b"").endswith((b"5", b"8")) else None
            )

    def _consumer(self, mode: str, endings: set[int]) -> None:
        """It sleeps, or keeps up and fails every record whose value ends in one of ``endings``."""
        if mode == "asleep":
            self.queue.topics.live = lambda: None
            return
        digits = tuple(b"%d" % n for n in endings)
        write = dead_letter if mode == "keeps our headers" else without_ours

        def failed(record: Record, topic: str) -> Headers:
            said = dict(record.headers)
            part = part_of(record.key, self.queue.log.partitions)
            line = f"{(said['dlq-job'] or b'').decode()}/{(said['dlq-ordinal'] or b'').decode()}"
            self.returned[(part, self.queue.log.marks(part)[1])] = line
            return write(record, topic)

        self.queue.topics.live = lambda: self.queue.consume(
            lambda r: bool(digits) and (r.value or b"").endswith(digits), failure=failed
        )

    # A drain

    def _open(self, how: str) -> None:
        """A new run's drain, or the same run's opened once more, or the next task of the one that is open."""
        if how == "attach" and self.run:
            self.drain = self.queue.attach(f"r{self.run}")
            return
        if self.drain is not None:
            self.older.append(self.drain)
        if how != "again" or not self.run:
            self.run += 1
            if self.queue.rows("SELECT 1 FROM queue"):
                self.queue.expire_lease()
        self.drain = None
        self.drain = self.queue.open(f"r{self.run}")

    def _task(self, what: str, at: int | None, how: str) -> None:
        """In a process of its own, killed at step ``at`` if it gets there; ``how`` it begins if the last one died."""
        if self.drain is None or how != "attach":
            self._open(how)
        handle = self.queue.attach(f"r{self.run}")
        try:
            TASKS[what](handle if at is None else wire(handle, Tripwire(at)))
        except Killed:
            self.drain = None

    _modes = st.sampled_from(["keeps our headers", "keeps our headers", "drops our headers", "asleep"])
    _endings = st.sets(st.integers(0, 9), max_size=2)

    @rule(
        count=st.integers(0, 8),
        kind=st.sampled_from(KINDS),
        mode=_modes,
        endings=_endings,
        at=st.integers(0, 160),
    )
    def letters_come_and_a_new_run_is_killed(
        self, count: int, kind: str, mode: str, endings: set[int], at: int
    ) -> None:
        self.queue.put(count, kind)
        self._consumer(mode, endings)
        self._task("runs", at, "new")

    @rule(count=st.integers(0, 8), kind=st.sampled_from(KINDS), mode=_modes, endings=_endings, how=HOW)
    def letters_come_and_a_run_ends(
        self, count: int, kind: str, mode: str, endings: set[int], how: str
    ) -> None:
        self.queue.put(count, kind)
        self._consumer(mode, endings)
        self._task("runs", None, how)

    @rule(what=st.sampled_from(sorted(TASKS)), at=st.none() | st.integers(0, 60), how=HOW)
    def a_task_runs(self, what: str, at: int | None, how: str) -> None:
        self._task(what, at, how)

    @rule(until=st.integers(0, 9), n=st.integers(0, 9))
    def a_writer_falls_asleep_in_mid_job(self, until: int, n: int) -> None:
        if len(self.zombies) > 2:
            return
        if self.drain is None:
            self._open("attach")
        assert self.drain is not None
        self.queue.put(4)
        self.queue.take(self.drain)
        assign(self.drain)
        plan.make(self.drain, STAGE, plan.ready(self.drain), who="policy", saw="s")
        jobs = self.queue.rows(
            "SELECT id FROM job WHERE drain = :d AND state IN ('approved', 'running')", d=self.drain.id
        )
        if jobs:
            writer = JobRun(self.queue.attach(f"r{self.run}"), jobs[n % len(jobs)][0], records=2)
            self.zombies.append(writer.__enter__())
            writer.send(until, FOREVER)

    @precondition(lambda self: self.zombies)
    @rule(n=st.integers(0, 9), close=st.booleans())
    def a_sleeping_writer_wakes(self, n: int, close: bool) -> None:
        writer = self.zombies.pop(n % len(self.zombies))
        try:
            writer.send(writer.job.size, FOREVER)
            if close:
                writer.close("deadline", "ready")
        except Fenced:
            pass
        finally:
            writer.__exit__(None, None, None)

    @precondition(lambda self: self.older)
    @rule(n=st.integers(0, 9))
    def an_older_drain_wakes(self, n: int) -> None:
        """Its epoch is over: whatever it does changes nothing."""
        zombie = self.older.pop(n % len(self.older))
        before = self.queue.rows("SELECT * FROM entry"), self.queue.positions(), len(self.queue.delivered())
        for act in (
            lambda: self.queue.take(zombie),
            lambda: assign(zombie),
            lambda: drain_remaining(zombie, 5),
        ):
            with pytest.raises(Fenced):
                act()
        assert before == (
            self.queue.rows("SELECT * FROM entry"),
            self.queue.positions(),
            len(self.queue.delivered()),
        )

    # People

    @rule(what=st.sampled_from(["discards", "replays", "frees"]), n=st.integers(0, 99))
    def a_person_decides(self, what: str, n: int) -> None:
        if self.drain is None:
            return
        rows = self.queue.rows(
            "SELECT id, part, pos FROM entry WHERE state = 'open' "
            "AND reason NOT IN ('ready', 'returned', 'earlier_entry_of_key') ORDER BY id"
        )
        if not rows:
            return
        number, part, pos = rows[n % len(rows)]
        one = and_(entry.c.id == number, entry.c.state == "open")
        with self.drain.ledger.write(self.drain.queue, self.drain.epoch) as tx:
            record_decision(tx, self.drain.queue, "person", f"review:{what}", f"entry {number}", "s", what)
            if what == "discards":
                gone = {"state": "discarded", "settled_drain": self.drain.id, "reason": "discarded"}
                tx.execute(update(entry).where(one).values(**gone))
                self.discarded.add(f"{part}/{pos}")
            elif what == "frees":
                for reason, freed in (("waiting_for_fix", "fixed"), ("first_intake", "new")):
                    waiting = and_(entry.c.state == "open", entry.c.reason == reason)
                    tx.execute(update(entry).where(waiting).values(reason=freed))
        if what == "replays":
            condition = and_(one, entry.c.duplicate_of.is_(None))
            replay_now(self.drain, f"review:{number}", condition, who="person", saw="s", deadline=FOREVER)

    # What holds whatever happened

    @invariant()
    def every_record_is_in_the_ledger_once(self) -> None:
        if hasattr(self, "queue"):
            self.queue.check_custody()

    @invariant()
    def each_entry_has_its_effect_at_most_once_and_only_by_a_plan(self) -> None:
        if not hasattr(self, "queue"):
            return
        self.queue.topics.time_out()  # a killed writer's open transaction hides what others committed behind it
        effects: Counter[str] = Counter()
        lines = {
            (job, int(ordinal)): row
            for job, ordinal, *row in self.queue.rows(
                "SELECT je.job, je.ordinal, e.job, e.state, p.approved_at FROM job_entry je "
                "JOIN entry e ON e.id = je.entry JOIN job j ON j.id = je.job JOIN plan p ON p.id = j.plan"
            )
        }
        on_target = set()
        for record in self.queue.delivered():
            said = {
                name: (value or b"").decode() for name, value in record.headers if name.startswith("dlq-")
            }
            effects[said["dlq-entry"]] += 1
            line = (said["dlq-job"], int(said["dlq-ordinal"]))
            on_target.add(line)
            held_by, state, approved_at = lines[line]
            assert approved_at is not None, f"{line} was sent without an approval"
            assert held_by == line[0], f"{line} was sent, its entry is {state} and would be sent again"
            assert state in SENT | {"planned", "ambiguous"}, f"{line} was sent, its entry is {state}"
        assert max(effects.values(), default=1) == 1, (
            f"sent twice: {[e for e, n in effects.items() if n > 1]}"
        )
        settled = {
            line for line, (held_by, state, _) in lines.items() if held_by == line[0] and state in SENT
        }
        assert settled <= on_target, f"settled as sent, not on the target: {settled - on_target}"

    @invariant()
    def cursors_stay_behind_the_targets_and_within_their_jobs(self) -> None:
        if not hasattr(self, "queue"):
            return
        for job, cursor, size in self.queue.rows("SELECT id, cursor, size FROM job"):
            assert cursor <= size
            assert cursor <= self.queue.topics.cursors.get(job, (0,))[0]

    @invariant()
    def what_came_back_is_linked_to_what_was_sent(self) -> None:
        if not hasattr(self, "queue"):
            return
        links = {
            (part, int(pos)): (f"{job}/{ordinal}", state)
            for part, pos, job, ordinal, state in self.queue.rows(
                "SELECT r.part, r.pos, o.job, je.ordinal, o.state FROM entry r JOIN entry o ON o.id = r.return_of "
                "JOIN job_entry je ON je.entry = o.id AND je.job = o.job"
            )
        }
        taken = {(part, int(pos)) for part, pos in self.queue.rows("SELECT part, pos FROM entry")}
        for place, original in self.returned.items():
            if place in taken:
                assert place in links, f"the dead letter at {place} is no return of {original}"
                assert links[place][0] == original
                assert links[place][1] in ("returned", "planned", "ambiguous"), (
                    f"{original} came back and is {links[place][1]}"
                )
        orphans = self.queue.rows(
            "SELECT id FROM entry o WHERE state = 'returned' "
            "AND NOT EXISTS (SELECT 1 FROM entry r WHERE r.return_of = o.id)"
        )
        assert orphans == []

    @invariant()
    def nothing_is_dropped_but_by_a_decision_or_with_a_twin_that_was_sent(self) -> None:
        if not hasattr(self, "queue"):
            return
        gone = self.queue.rows("SELECT part, pos FROM entry WHERE state = 'discarded'")
        assert {f"{part}/{pos}" for part, pos in gone} <= self.discarded
        lonely = self.queue.rows(
            "SELECT d.id FROM entry d LEFT JOIN entry t ON t.id = d.duplicate_of WHERE d.state = 'duplicate' "
            "AND (t.id IS NULL OR t.payload_sha <> d.payload_sha "
            "OR t.state NOT IN ('replayed', 'confirmed', 'returned'))"
        )
        assert lonely == []

    def finish(self) -> None:
        """Whatever came before: one drain that nobody disturbs leaves nothing unfinished, unread or unaccounted for."""
        self.queue.topics.unproducible = lambda _o: None
        self.queue.topics.live = lambda: self.queue.consume()
        if self.queue.rows("SELECT 1 FROM queue"):
            self.queue.expire_lease()
        last = self.queue.open("the last")
        take_custody(last, 30)
        categorize(last)
        said = drain_remaining(last, 30)
        assert said["depth"] == 0
        self.every_record_is_in_the_ledger_once()
        self.each_entry_has_its_effect_at_most_once_and_only_by_a_plan()
        self.queue.check()
        states, reasons = self.queue.states(), self.queue.reasons()
        assert "planned" not in states
        assert not reasons.keys() & {"new", "ready", "fixed"}, "what was ready was not replayed"


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch, ledger_template: Path) -> None:
    monkeypatch.setattr(intake, "MAX_ENTRIES", 5)
    Core.template = ledger_template


_QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]


def campaign(examples: int, steps: int) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(
        Core,
        settings=settings(
            max_examples=examples, stateful_step_count=steps, deadline=None, suppress_health_check=_QUIET
        ),
    )


def test_whatever_happens_in_any_order_no_entry_is_lost_or_sent_twice() -> None:
    campaign(examples=6, steps=20)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_whatever_happens_for_a_long_time_no_entry_is_lost_or_sent_twice() -> None:
    campaign(examples=16, steps=25)
