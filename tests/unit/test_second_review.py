"""What a second review found: secrets that were kept, decisions that the core did not hear, memories that were lost."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.ledger_rig import DRAIN, LedgerRig
from tests.memory_rig import MemoryRig, failure
from tests.unit.test_review_findings import Quotas, apply, drained, with_fix

from dlq import clock, fixes, kafka, review, routing, verdict
from dlq import plan as planning
from dlq.archive import Archive
from dlq.config import QueueConfig
from dlq.conservation import verify_conservation
from dlq.decisions import record
from dlq.drain import dry
from dlq.errors import ArchiveError, ConfigError, Refused
from dlq.ledger import Ledger, LedgerError, jobs
from dlq.limits import guard_data_loss
from dlq.ports import Connection, Delivered
from dlq.recovery.rebuild import rebuild
from dlq.replay import drain_remaining, replay_canary
from dlq.returns import families
from dlq.sending import running

Make = Callable[..., MemoryRig]


# Secrets


def test_a_drain_keeps_no_password_of_its_ledger(queue: MemoryRig) -> None:
    secret = "postgresql+psycopg://dlq:hidden-word@db/ledger?sslpassword=hidden-word"
    config = queue.config.model_copy(update={"ledger": secret})
    frozen = config.frozen()
    assert "hidden-word" not in frozen
    assert "dlq:***@db/ledger" in QueueConfig.model_validate_json(frozen).ledger
    rotated = config.model_copy(update={"ledger": secret.replace("hidden", "rotated")})
    assert config.sha == rotated.sha, "a password that is rotated is no other policy"


def test_a_later_task_goes_by_the_files_ledger(queue: MemoryRig) -> None:
    queue.open("r1")
    queue.write("UPDATE drain SET config = replace(config, 'sqlite:', 'mysql:')")
    assert queue.attach("r1").config.ledger == queue.config.ledger


# Configuration


def test_a_file_that_is_no_ledger_or_a_damaged_one_is_said(queue: MemoryRig, tmp_path: Path) -> None:
    (tmp_path / "other.db").write_text("this is no database" * 100)
    for open_it in (Ledger.open, Ledger.create):
        with pytest.raises(LedgerError, match="not a database; look whether the ledger names the right file"):
            open_it(f"sqlite:///{tmp_path}/other.db")
    drain = queue.taken(300)
    drain.close()
    for path in queue.folder.glob("ledger.db-*"):
        path.unlink(missing_ok=True)
    ledger = queue.folder / "ledger.db"
    queue.ledger.close()
    data = ledger.read_bytes()
    ledger.write_bytes(data[:4096] + b"\xff" * (len(data) - 4096))
    with pytest.raises(LedgerError):
        queue.open("r2")


def test_a_setting_that_the_kafka_client_does_not_know_is_named() -> None:
    connection = Connection(
        "kafka", "kafka", extra={"bootstrap.servers": "b:9092", "sasl.mechansim": "PLAIN"}
    )
    with pytest.raises(ConfigError, match=r'Connection kafka: extra: .*"sasl\.mechansim"'):
        kafka.admin(connection)


# Opening


def test_a_taxonomy_that_cannot_be_used_is_noticed_before_anything_is_touched(
    queue: MemoryRig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    epoch = queue.one("SELECT epoch FROM queue")
    monkeypatch.setenv("DLQ_CONFIG", str(tmp_path / "elsewhere"))
    with pytest.raises(ConfigError, match=r"taxonomy.yaml does not exist; put taxonomy.yaml into"):
        queue.open("r1")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "taxonomy.yaml").write_text("rules:\n- {name: a, category: odd}\n")
    with pytest.raises(ConfigError, match=r"rule 'a': when: is missing; add it"):
        queue.open("r1")
    assert queue.one("SELECT epoch FROM queue") == epoch


# Routing


class Routing:
    """An orchestrator's routing; ``meanwhile`` happens once, before or after the next pause."""

    def __init__(self) -> None:
        self.paused = False
        self.before: Callable[[], object] = bool
        self.behind: Callable[[], object] = bool

    def capabilities(self) -> set[str]:
        return {"routing"}

    def pause_routing(self, _holder: str, _seconds: int) -> Any:
        before, self.before = self.before, bool
        before()
        self.paused = True
        behind, self.behind = self.behind, bool
        behind()
        return SimpleNamespace(until_ms=1, paused=True, mode="held")

    def resume_routing(self, _holder: str) -> Any:
        self.paused = False
        return SimpleNamespace(paused=False, mode="auto")


@pytest.mark.parametrize("when", ["before", "behind"])
def test_a_stage_that_begins_while_routing_is_given_back_pauses_nothing(queue: MemoryRig, when: str) -> None:
    drain = queue.open("r1")
    routing_of = drain.__dict__["orchestrator"] = Routing()
    routing.isolate(drain, 300)
    setattr(routing_of, when, lambda: routing.restore_routing(drain))
    routing.extend_isolation(drain, 3600)
    assert not routing_of.paused


# The verdict


@pytest.mark.parametrize("taken_over", [False, True])
def test_a_verdict_that_was_given_stands(queue: MemoryRig, taken_over: bool) -> None:
    queue.consumer()
    drain = queue.taken(3)
    drain_remaining(drain, 30)
    verify_conservation(drain)
    first = verdict.close_drain(drain, {})
    assert first["verdict"] == "green"
    if taken_over:
        queue.taken(2, "another")
    again = verdict.close_drain(drain, {"close_drain": "failed"})
    assert again == first
    assert queue.one("SELECT COUNT(*) FROM event WHERE stage = 'close_drain'") == 1


# The guard against data loss


@pytest.mark.parametrize("choice", ["Reject", None])
def test_past_the_guard_nothing_is_replayed_without_a_go_ahead(make_queue: Make, choice: str | None) -> None:
    queue = make_queue(limits={"dr": 2})
    queue.begin()
    queue.consumer()
    drain = queue.taken(5)
    assert guard_data_loss(drain)["next"] == "invoke_dr_plan"
    if choice is not None:
        drain.note("approve_dr", "said", choice=choice)
    with pytest.raises(Refused, match="nothing is replayed"):
        replay_canary(drain, "replay_canary", 30)
    assert drain_remaining(drain, 30)["replayed"] == 0
    assert queue.states() == {"open": 5}
    drain.note("approve_dr", "said", choice="Approve")
    assert drain_remaining(drain, 30)["replayed"] == 5


# A dry review


def test_a_dry_review_changes_nothing(queue: MemoryRig) -> None:
    held = queue.taken(3, error_type="DataCorruption")
    review.file_work(held)
    queue.release(held)
    with dry(queue.config, run_id="review", connections=Connection) as look:
        offered = review.proposals(look, look.queue)
        choices = {each["subject"]: {"choice": "discard", "hash": each["hash"]} for each in offered}
        said = review.apply_review(look, choices, "ann", 30)
    assert "work 1: would discard" in said["said"]
    assert queue.states() == {"open": 3}
    assert queue.one("SELECT COUNT(*) FROM decision") == 0


# The archive


def test_an_archive_that_is_away_is_no_broken_one(queue: MemoryRig) -> None:
    queue.consumer()
    drain = queue.taken(6)
    (job,) = planning.make(drain, "s", planning.ready(drain), who="w", saw="s", canary=False)
    root, away = Path(str(drain.archive.root)), queue.folder / "away"
    with running(drain, job.id) as run:
        root.rename(away)
        with pytest.raises(ArchiveError):
            run.send(6, time.monotonic() + 30)
    assert queue.states() == {"planned": 6}
    away.rename(root)
    with running(drain, job.id) as run:
        run.send(6, time.monotonic() + 30)
    assert queue.states() == {"replayed": 6}


def test_headers_that_changed_in_the_archive_are_not_sent(queue: MemoryRig) -> None:
    queue.consumer()
    drain = queue.taken(6)
    (uri,) = [uri for (uri,) in queue.rows("SELECT uri FROM segment")]
    table = drain.archive.read(uri)
    headers = [
        [{**h, "value": b"another" if h["name"] == "correlation-id" else h["value"]} for h in some]
        for some in table["headers"].to_pylist()
    ]
    place = table.schema.get_field_index("headers")
    spoiled = table.set_column(place, table.field(place), pa.array(headers, table.field(place).type))
    (drain.archive.root / uri).write_bytes(
        (drain.archive.root / drain.archive.write("other", spoiled, {}).uri).read_bytes()
    )
    replay_canary(drain, "replay_canary", 30)
    assert queue.delivered() == []
    assert queue.reasons() == {"archive_broken": 6}


def test_an_archive_that_is_not_the_ledgers_is_noticed(queue: MemoryRig) -> None:
    queue.release(queue.taken(3))
    Path(str(Archive(queue.config.archive, queue.config.name).root)).rename(queue.folder / "unmounted")
    epoch = queue.one("SELECT epoch FROM queue")
    with pytest.raises(Refused, match=r"is empty, the ledger knows 1 segment.*not mounted"):
        queue.open("r2")
    assert queue.one("SELECT epoch FROM queue") == epoch


def test_what_is_no_segment_of_ours_keeps_nobody_out(queue: MemoryRig) -> None:
    drain = queue.taken(3)
    archive = drain.archive
    pq.write_table(pa.table({"place": ["a"]}), str(archive.root / "segments" / "stranger.parquet"))
    (archive.root / "epochs" / "notes (copy).json").write_text("{}")
    with pytest.raises(ArchiveError, match="no segment of an intake"):
        archive.about("segments/stranger.parquet")
    queue.release(drain)
    queue.open("r2")
    assert rebuild(queue.config, who="ann", run_id="b", connections=Connection).findings


def test_a_full_disk_keeps_no_half_segment(queue: MemoryRig, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    queue.put(3)
    drain = queue.open("r1")
    with monkeypatch.context() as disk:
        disk.setattr(os, "fsync", full)
        with pytest.raises(ArchiveError, match="No space left"):
            queue.take(drain)
    assert not list(Path(str(drain.archive.root)).rglob("*.part"))
    assert queue.take(drain).taken == 3


# Forged origins


def test_forged_headers_make_no_ring_of_returns(queue: MemoryRig) -> None:
    with dry(queue.config, run_id="x", connections=Connection) as look:
        uri = look.source.uri
    for claimed in (1, 0):
        forged = failure(dlq_entry=f"{uri}/0/{claimed}".encode(), dlq_retry_count=b"9")
        queue.put(1, part=0, key=b"k", value=b"same", headers=forged)
    queue.release(queue.taken())
    queue.ledger.close()
    for path in queue.folder.glob("ledger.db*"):
        path.unlink()
    queue.ledger = Ledger.create(queue.config.ledger)
    rebuild(queue.config, who="ann", run_id="b", connections=Connection)
    assert queue.one("SELECT COUNT(*) FROM entry WHERE return_of IS NOT NULL") == 1
    queue.write("UPDATE entry SET return_of = 3 - id")  # one that was made before ends as well
    with queue.ledger.read() as tx:
        assert len(families(tx, [1])[1]) == 2


# Fixes


class Remembering(Quotas):
    """It knows idempotency keys, as the reference orchestrator does."""

    def __init__(self) -> None:
        super().__init__()
        self.limit_of: dict[str, float] = {}

    def set_quota(self, plugin: str, limit: float, key: str, resource: str) -> Any:
        if key in self.limit_of:
            return SimpleNamespace(limit=self.limit_of[key])
        self.limit_of[key] = limit
        return super().set_quota(plugin, limit, key, resource)


def test_a_drain_that_was_cleared_raises_and_takes_back_anew(queue: MemoryRig) -> None:
    orchestrator = Remembering()
    queue.put(3, "QuotaExceeded")
    for _ in range(2):
        drain = drained(queue)
        drain.__dict__["orchestrator"] = orchestrator
        apply(drain)
        assert orchestrator.quotas()[0].limit == 25
        fixes.take_back_untried(drain)
        assert orchestrator.quotas()[0].limit == 10


def test_what_a_person_set_since_is_not_taken_back(queue: MemoryRig) -> None:
    drain, orchestrator = with_fix(queue, 3)
    orchestrator.set_quota("payments", 50, "by hand", "m")
    (said,) = fixes.take_back_untried(drain)
    assert "left at 50" in said
    assert orchestrator.quotas()[0].limit == 50


@pytest.mark.parametrize("choice", ["reject", None])
def test_a_fix_that_nobody_approved_is_not_applied(queue: MemoryRig, choice: str | None) -> None:
    queue.put(3, "QuotaExceeded")
    drain, orchestrator = drained(queue), Quotas()
    drain.__dict__["orchestrator"] = orchestrator
    digest = fixes.propose_fix(drain)["hash"]
    decision = choice and record(
        drain, drain.queue, who="ann", kind="approve_fix", subject=digest, saw="", choice=choice
    )
    with pytest.raises(Refused, match="not approved"):
        fixes.apply_fix(drain, digest, decision)
    assert orchestrator.told == []


# Returns


@pytest.mark.parametrize("doubtful", [False, True])
def test_a_return_that_came_in_while_its_replay_was_being_sent_counts(
    ledger_rig: LedgerRig, doubtful: bool
) -> None:
    first = ledger_rig.entry()
    name = ledger_rig.job(first)
    with ledger_rig.write(ledger_rig.epoch) as tx:
        job = jobs.get(tx, name)
        assert jobs.mark_sending(tx, job, [0], clock.now()) == {0}
    ledger_rig.entry(return_of=first)  # taken by a sibling of this job
    with ledger_rig.write(ledger_rig.epoch) as tx:
        sent = [] if doubtful else [Delivered(0, None, None, "m-1")]
        jobs.settle_sent(tx, job, DRAIN, sent, {}, [0] if doubtful else [], 1)
        if doubtful:
            jobs.free_doubtful(tx, job, [0])
    assert ledger_rig.state(first) == "returned"
