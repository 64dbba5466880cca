"""What went wrong in other tools for dead letters, by their users' reports: none of it goes wrong here.

Each test names the report it is about. A queue in memory, a consumer beside it, and the drain's own stages.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from tests.memory_rig import TOPIC, MemoryRig, failure

from dlq import drafts, review
from dlq import plan as planning
from dlq.config import KafkaTarget
from dlq.destination import Destination
from dlq.drain import Drain
from dlq.entry import Record, Understood
from dlq.explain import history
from dlq.jobs import JobRun
from dlq.ledger import jobs as ledger
from dlq.ledger.jobs import PlanStale
from dlq.memory import dead_letter
from dlq.ports import Connection
from dlq.replay import drain_remaining, replay_batches, replay_canary, run_job
from dlq.report.tally import build_report
from dlq.status import status
from dlq.triage import categorize

Make = Callable[..., MemoryRig]
STAGE = "retry_transient"
Choices = dict[str, dict[str, str]]


def bad(record: Record) -> bool:
    return b"bad" in (record.value or b"")


def filed(queue: MemoryRig, run: str = "r1") -> None:
    """A drain that took what is there and filed it as work."""
    drain = queue.open(run)
    queue.take(drain)
    categorize(drain)
    review.file_work(drain)
    queue.release(drain)


def reviewed(queue: MemoryRig, run: str, choice: str = "replay", what: str = "") -> tuple[Drain, Choices]:
    drain = queue.open(run, kind="review")
    offered = review.proposals(drain, drain.queue)
    return drain, {
        each["subject"]: {"choice": choice, "hash": each["hash"]}
        for each in offered
        if each["subject"].startswith(what)
    }


def edited(queue: MemoryRig, place: tuple[int, int], value: bytes, run: str) -> dict[str, Any]:
    """A person's edit of an entry, approved and sent."""
    drafts.edit(queue.config, f"{place[0]}/{place[1]}", value, "ann", Connection)
    drain, choices = reviewed(queue, run, what="draft")
    done = review.apply_review(drain, choices, "ann", 60)
    queue.release(drain)
    return done


def planned(drain: Drain, stage: str = STAGE) -> list[ledger.Job]:
    return planning.make(drain, stage, planning.ready(drain), who="w", saw="s", canary=False)


def values(queue: MemoryRig) -> list[bytes | None]:
    return sorted(r.value for r in queue.delivered())


# Edit and retry


def test_an_edit_is_sent_instead_of_the_original(queue: MemoryRig) -> None:
    """ServiceControl 4983: edit and retry sent both the edited and the original message."""
    queue.consumer()
    (place,) = queue.put(1, "DataCorruption")
    filed(queue)
    assert edited(queue, place, b"mended", "review")["confirmed"] == 1
    drain = queue.open("r2")
    drain_remaining(drain, 60)
    assert values(queue) == [b"mended"]
    assert queue.states() == {"confirmed": 1}


def test_a_second_edit_of_what_failed_again_is_sent_too(queue: MemoryRig) -> None:
    """ServiceControl 4841, 5122: the second edit of a message that failed again was ignored yet looked successful."""
    queue.consumer(
        lambda r: r.value != b"good", failure=lambda r, t: dead_letter(r, t, error_type="DataCorruption")
    )
    (place,) = queue.put(1, "DataCorruption")
    filed(queue)
    assert edited(queue, place, b"still bad", "review 1")["returned"] == 1
    filed(queue, "r2")
    part, pos = queue.one("SELECT part, pos FROM entry WHERE return_of IS NOT NULL")
    assert edited(queue, (part, pos), b"good", "review 2")["confirmed"] == 1
    assert values(queue) == [b"good", b"still bad"]
    assert queue.states() == {"returned": 1, "confirmed": 1}


# The same entry twice


def test_an_entry_is_part_of_one_approved_plan_only(queue: MemoryRig) -> None:
    """ServiceControl 4797: a message retried in a batch and singly at once was processed twice."""
    drain = queue.taken(3)
    both = [
        ledger.propose(
            queue.ledger,
            drain.queue,
            drain.epoch,
            drain.id,
            stage,
            [planning.Cut(TOPIC, planning.by_id(drain, [planning.ready(drain)]))],
            expires_s=60,
        )
        for stage in ("batch", "singly")
    ]
    for number, plan_id in enumerate(both):
        assert plan_id is not None
        with queue.ledger.write(drain.queue, drain.epoch) as tx:
            digest = ledger.plan_hash(tx, plan_id)
            decision = ledger.record_decision(tx, drain.queue, "w", "replay", plan_id, "s", "yes", drain.id)
        if number == 0:
            ledger.approve(queue.ledger, drain.queue, drain.epoch, plan_id, digest, decision)
        else:
            with pytest.raises(PlanStale):
                ledger.approve(queue.ledger, drain.queue, drain.epoch, plan_id, digest, decision)
    assert queue.states() == {"planned": 3}


def test_what_was_retried_successfully_is_not_retried_again(queue: MemoryRig) -> None:
    """ServiceControl 178: a message that had been retried successfully could be retried again."""
    queue.consumer()
    drain = queue.taken(3)
    drain_remaining(drain, 60)
    assert queue.states() == {"confirmed": 3}
    assert planned(drain, "again") == []
    with pytest.raises(Exception, match="transition not allowed"):
        queue.write("UPDATE entry SET state = 'open', settled_drain = NULL WHERE state = 'confirmed'")
    assert len(queue.delivered()) == 3


def test_a_double_click_is_one_replay(queue: MemoryRig) -> None:
    """ServiceControl: a button pressed twice retried twice."""
    queue.consumer()
    queue.put(4, "DataCorruption")
    filed(queue)
    drain, choices = reviewed(queue, "review")
    first = review.apply_review(drain, choices, "ann", 60)
    second = review.apply_review(drain, choices, "ann", 60)
    assert first["replayed"] == 4
    assert len(queue.delivered()) == 4
    assert second["confirmed"] in (0, 4), "said again at most, never done again"


# What joins after a person looked


def test_an_approval_is_for_what_was_seen(queue: MemoryRig) -> None:
    """ServiceControl 660: "retry group" took messages that joined after the person had looked."""
    queue.consumer()
    queue.put(2, "DataCorruption")
    filed(queue)
    drain, choices = reviewed(queue, "review")
    queue.release(drain)
    queue.put(1, "DataCorruption")
    filed(queue, "r2")
    later = queue.open("review 2", kind="review")
    done = review.apply_review(later, choices, "ann", 60)
    assert (done["replayed"], len(done["refused"])) == (0, 1)
    assert queue.delivered() == []


def test_an_approval_expires(queue: MemoryRig) -> None:
    """ServiceControl 660 again: an approval that starts nothing in its time starts nothing at all."""
    drain = queue.taken(2)
    (job,) = planned(drain)
    queue.write("UPDATE plan SET expires_at = '2020-01-01T00:00:00.000+00:00'")
    with pytest.raises(PlanStale):
        run_job(drain, job.id, time.monotonic() + 60)
    assert queue.reasons() == {"approval_expired": 2}
    assert queue.delivered() == []


def test_a_drain_does_not_chase_its_own_returns(queue: MemoryRig) -> None:
    """temporalio PR 8273: a merge of the dead-letter queue without an upper bound looped on its own returns."""
    queue.consumer(lambda _r: True)
    drain = queue.taken(1)
    said = drain_remaining(drain, 60)
    assert len(queue.delivered()) == 1
    assert (said["returned"], said["outstanding"]) == (1, 1)


# Half-way


@pytest.mark.parametrize("sent", [0, 7])
def test_cancelled_half_way_nothing_is_lost(queue: MemoryRig, sent: int) -> None:
    """CrossBusExplorer 64, ServiceBusExplorer 476: cancelling or failing half-way lost messages."""
    drain = queue.taken(20)
    (job,) = planned(drain)
    with JobRun(drain, job.id) as run:
        if sent:
            run.send(sent, time.monotonic() + 60)
        run.close("paused", "ready")
    assert len(queue.delivered()) == sent
    assert queue.states() == ({"replayed": sent, "open": 20 - sent} if sent else {"open": 20})
    queue.check()
    queue.consumer()
    drain_remaining(drain, 60)
    assert len(queue.delivered()) == 20
    queue.check()


def test_a_replay_is_the_original_to_the_byte(queue: MemoryRig) -> None:
    """ServiceBusExplorer 583, 339: properties were changed when a message was resubmitted."""
    queue.consumer()
    own = (("tenant", b"\xff\x00"), ("tenant", None), ("content-type", b"application/x"))
    queue.put(1, key=b"\x00k", value=b"\xfe\x00", headers=(*own, *failure(0)))
    drain_remaining(queue.taken(), 60)
    (record,) = queue.delivered()
    theirs = tuple(h for h in record.headers if not h[0].startswith("dlq-") and h[0] != "correlation-id")
    assert (record.key, record.value, theirs) == (b"\x00k", b"\xfe\x00", own)
    assert record.timestamp_ms == queue.log.read(0, 0, 1)[0].timestamp_ms


# What is shown


def test_counters_add_up_while_some_fail(queue: MemoryRig) -> None:
    """camunda 41213: "0 total, 11 failed, 11 completed"."""
    queue.consumer(bad)
    queue.put(30)
    queue.put(1, value=b"bad")
    queue.put(3, "DataCorruption")
    drain = queue.taken()
    drain_remaining(drain, 60)
    n = build_report(drain).numbers
    assert n.balanced
    assert (n.taken, n.replayed, n.confirmed, n.returned, n.unsettled) == (35, 31, 30, 1, 4)
    for job in build_report(drain).jobs:
        assert job.size == job.cursor == job.confirmed + job.unconfirmed + job.returned


def test_a_replay_that_was_sent_elsewhere_and_failed_there_is_a_return(make_queue: Make) -> None:
    """ServicePulse 425: a retry that was redirected elsewhere and failed there stayed "pending" for ever."""
    queue = make_queue()
    queue.begin()
    elsewhere = failure(0, topic="orders.before-it-was-renamed")
    queue.put(1, headers=elsewhere)
    queue.consumer(lambda _r: True)
    drain_remaining(queue.taken(), 60)
    assert queue.states() == {"returned": 1, "open": 1}


def test_a_large_replay_is_seen_as_it_goes_and_goes_on_where_it_stopped(queue: MemoryRig) -> None:
    """ServiceControl 2936, 961: large retries timed out, or nobody could see how far they were."""
    queue.consumer()
    drain = queue.taken(300)
    (job,) = planned(drain)
    seen: list[tuple[int, int]] = []
    run_job(drain, job.id, time.monotonic() + 60, lambda done, of: seen.append((done, of)))
    assert seen == sorted(seen)
    assert seen[-1] == (300, 300)
    assert len(seen) > 1
    assert status(queue.config, Connection)["unfinished_jobs"] == []


# Where a replay goes


def of_group(group: str) -> Understood:
    return Understood(origin_topic="orders", consumer_group=group)


def test_a_group_that_failed_has_its_own_topic(queue: MemoryRig) -> None:
    """azure-service-bus 706, sda-dropwizard-commons PR 116: a replay reached every consumer group, also those that had
    succeeded. ServiceControl 3671: another destination for one group.
    """
    target = {"kind": "kafka", "connection": "c", "allow": ["orders", "orders.billing.retry"]}
    topics = {"billing": "orders.billing.retry"}
    config = queue.config.model_copy(
        update={"target": KafkaTarget.model_validate({**target, "topics": topics})}
    )
    destination = Destination(config)
    assert destination.of(of_group("billing")) == "orders.billing.retry"
    assert destination.of(of_group("shipping")) == "orders"
    with pytest.raises(ValueError, match="not in allow"):
        KafkaTarget.model_validate({**target, "topics": {"billing": "elsewhere"}})


def test_a_replay_says_which_group_it_is_meant_for(queue: MemoryRig) -> None:
    """azure-service-bus 706: the groups that had succeeded can pass it over."""
    queue.consumer()
    drain_remaining(queue.taken(1), 60)
    (record,) = queue.delivered()
    assert dict(record.headers)["dlq-group"] == b"workers"


@pytest.fixture
def compacted(make_queue: Make) -> MemoryRig:
    name = TOPIC
    queue = make_queue(target_partitions=1, compacted=True)
    queue.topics.compacted.add(name)
    queue.begin()
    return queue


def origin(queue: MemoryRig, key: bytes, value: bytes) -> int:
    return queue.topics.topic(TOPIC).append(0, key, value)


def test_what_a_newer_record_of_its_key_has_overtaken_is_held(compacted: MemoryRig) -> None:
    """Offered by nobody: a replay overwrote newer state."""
    queue = compacted
    queue.consumer()
    old, other = origin(queue, b"k", b"1"), origin(queue, b"other", b"1")
    new = origin(queue, b"k", b"2")
    for key, at, n in ((b"k", old, 0), (b"other", other, 1), (b"k", new, 2)):
        queue.put(1, key=key, value=b"v%d" % n, part=0, headers=failure(n, offset=at))
    queue.put(1, key=b"z", value=b"v3", part=0, headers=failure(3, topic="another"))
    drain = queue.taken()
    said = replay_canary(drain, STAGE, 60)
    assert said["passed"]
    assert queue.reasons() == {"newer_of_its_key": 1, "place_on_target_unknown": 1}
    assert queue.entry((0, 0)).reason == "newer_of_its_key"
    assert [r.value for r in queue.delivered()[3:]] == [b"v1", b"v2"]
    saw = queue.one("SELECT saw FROM decision WHERE kind = 'replay'")
    assert "1 of 4 entries held" in saw
    assert "checked to 0/3" in saw
    assert any("checked to 0/3" in note.text for note in build_report(drain).notes)


def test_a_person_may_send_a_stale_entry_all_the_same(compacted: MemoryRig) -> None:
    """The stale guard holds for a person; it does not decide for them."""
    queue = compacted
    queue.consumer()
    old = origin(queue, b"k", b"1")
    origin(queue, b"k", b"2")
    queue.put(1, key=b"k", value=b"v", part=0, headers=failure(0, offset=old))
    drain = queue.taken()
    drain_remaining(drain, 60)
    assert queue.reasons() == {"newer_of_its_key": 1}
    review.file_work(drain)
    queue.release(drain)
    drain, choices = reviewed(queue, "review")
    assert review.apply_review(drain, choices, "ann", 60)["confirmed"] == 1
    assert queue.delivered()[-1].value == b"v"


# Asked for


def test_a_tracer_goes_first_and_then_a_ramp(queue: MemoryRig) -> None:
    """ServiceControl 938: one entry first, then the rest. ServicePulse 2764: a ramp with a rate limit."""
    asked: list[int] = []

    def live() -> None:
        asked.append(len(queue.delivered()))
        queue.consume()

    queue.topics.live = live
    drain = queue.taken(60)
    said = replay_canary(drain, STAGE, 60)
    assert sorted(set(asked)) == [0, 1, 6, 26]
    for job in said["jobs"]:
        replay_batches(drain, job, 60)
    assert queue.states() == {"confirmed": 60}


def test_a_rate_limit_holds(make_queue: Make) -> None:
    """ServicePulse 2764, rocketmq-dashboard 4315: replays at a rate that the target bears."""
    queue = make_queue(limits={"rate": 20})
    queue.begin()
    drain = queue.taken(60)
    (job,) = planned(drain)
    queue.consumer()
    began = time.monotonic()
    run_job(drain, job.id, began + 60)
    assert time.monotonic() - began >= 1.0
    assert queue.states() == {"confirmed": 60}


def test_entries_go_back_by_the_origin_they_name(queue: MemoryRig) -> None:
    """kafbat 1920: redrive in bulk, each by its origin header; which never chooses what is not allowed."""
    target = KafkaTarget.model_validate({"kind": "kafka", "connection": "c", "allow": ["orders", "bills"]})
    destination = Destination(queue.config.model_copy(update={"target": target}))
    named = [
        destination.of(Understood(origin_topic=t)) for t in ("orders", "bills", "__consumer_offsets", None)
    ]
    assert named == ["orders", "bills", None, None]


def test_what_keeps_failing_is_parked_with_its_history(make_queue: Make) -> None:
    """spring-kafka 4523: a park queue for repeat failures."""
    queue = make_queue(limits={"returns": 2})
    queue.begin()
    queue.consumer(bad)
    queue.put(1, value=b"bad")
    for run in range(4):
        drain = queue.open(f"r{run}")
        drain_remaining(drain, 60)
        review.file_work(drain)
        queue.release(drain)
    assert queue.reasons() == {"returns_limit": 1}
    assert len(queue.delivered()) == 2
    report = build_report(drain)
    (poison,) = report.poison
    assert (poison.replays, report.poison_count) == (2, 1)
    assert [hop.sent_at is not None for hop in poison.history] == [True, True, False]
    assert poison.owner
    part, place = poison.part, poison.place
    told = history(queue.ledger, queue.config.name, f"{part}/{place}")["returns"]
    assert [hop["state"] for hop in told] == ["returned", "returned", "open"]
    first = history(queue.ledger, queue.config.name, f"{told[0]['part']}/{told[0]['place']}")["returns"]
    assert first == told, "the whole chain, wherever it is entered"
    (work,) = review.proposals(drain, drain.queue)
    assert "came back 2 times" in work["summary"]


def test_who_decided_what_is_written_down(queue: MemoryRig) -> None:
    """rocketmq-dashboard 4315: replay policies with an audit."""
    queue.consumer()
    drain = queue.taken(3)
    drain_remaining(drain, 60)
    who, kind, subject = queue.one("SELECT who, kind, subject FROM decision")
    assert who.startswith(f"policy:{queue.config.name}.yaml@")
    assert (kind, subject) == ("replay", queue.one("SELECT id FROM plan"))
    with pytest.raises(Exception, match="append-only"):
        queue.write("UPDATE decision SET who = 'nobody'")


# Returns


def test_a_replay_that_two_groups_dead_letter_comes_back_once(queue: MemoryRig) -> None:
    """Both returns are linked and counted; what is replayed again is one of them."""
    queue.consumer()
    queue.topics.live = lambda: None
    drain = queue.taken(1)
    (job,) = planned(drain)
    with JobRun(drain, job.id) as run:
        run.send(1, time.monotonic() + 60)
        run.close("done", "ready")
    (sent,) = queue.delivered()
    for group in ("workers", "shippers"):
        queue.log.append(0, sent.key, sent.value, dead_letter(sent, TOPIC, group=group))
    queue.take(drain)
    assert queue.one("SELECT COUNT(*) FROM entry WHERE return_of IS NOT NULL") == 2
    queue.release(drain)
    queue.consumer()
    again = queue.open("r2")
    drain_remaining(again, 60)
    assert len(queue.delivered()) == 2
    assert queue.states() == {"returned": 1, "confirmed": 1, "duplicate": 1}


def test_a_replay_that_something_else_claims_to_be_is_not_confirmed_by_silence(queue: MemoryRig) -> None:
    """A consumer may write a value anew before it gives up, or somebody copied our headers: nobody can tell."""
    drain = queue.taken(2)
    (job,) = planned(drain)
    with JobRun(drain, job.id) as run:
        run.send(2, time.monotonic() + 60)
        run.close("done", "ready")
    first, _ = queue.delivered()
    queue.log.append(0, first.key, b"written anew", dead_letter(first, TOPIC))
    queue.consumer()
    queue.release(drain)
    later = queue.open("r2")
    drain_remaining(later, 60)
    assert queue.states() == {"replayed": 1, "confirmed": 1, "open": 1}
    assert queue.reasons() == {"conflict": 1}
    assert "claims to be its replay" in queue.one("SELECT reason FROM entry WHERE state = 'replayed'")


# Retention


def test_every_entry_knows_when_retention_would_have_deleted_it(queue: MemoryRig) -> None:
    """Custody saves an entry; what is still in the queue is said to die first."""
    queue.log.retention_ms = 3_600_000
    queue.log.append(0, b"k", b"v", failure(0), timestamp_ms=1_700_000_000_000)
    waiting = status(queue.config, Connection)
    assert waiting["first_to_expire"] == {"in_queue": "2023-11-14T23:13:00.000+00:00", "in_custody": None}
    drain = queue.taken()
    assert queue.entry((0, 0)).expires_at == "2023-11-14T23:13:00.000+00:00"
    assert planning.summary(drain)[0]["first_to_expire"] == "2023-11-14T23:13:00.000+00:00"
    taken = status(queue.config, Connection)
    assert taken["first_to_expire"] == {"in_queue": None, "in_custody": "2023-11-14T23:13:00.000+00:00"}


@pytest.mark.parametrize("stamp", [None, 0, 1 << 62])
def test_a_timestamp_that_is_none_says_nothing(queue: MemoryRig, stamp: int | None) -> None:
    queue.log.retention_ms = 1_000
    queue.log.append(0, b"k", b"v", failure(0), timestamp_ms=stamp)
    queue.taken()
    expires = queue.entry((0, 0)).expires_at
    assert (expires is None) == (stamp is not None)


# Pointers


def pointing(part: int, offset: int, topic: str = TOPIC) -> Any:
    said = {
        "topic": topic,
        "partition": str(part),
        "offset": str(offset),
        "group": "share",
        "delivery.count": "5",
    }
    return tuple((f"__dlq.errors.{name}", value.encode()) for name, value in said.items())


def test_a_pointer_becomes_its_original_where_that_can_still_be_read(queue: MemoryRig) -> None:
    """KIP-1191: a share group's dead letter is a pointer without payload."""
    topic = queue.topics.topic(TOPIC)
    here = topic.append(0, b"k", b"the original", (("tenant", b"t"),))
    gone = topic.append(1, b"k", b"lost")
    topic.expire(1, gone + 1)
    for headers in (pointing(0, here), pointing(1, gone), pointing(9, 0), pointing(0, 0, "secrets")):
        queue.log.append(0, None, None, headers)
    drain = queue.taken()
    assert queue.one("SELECT COUNT(*) FROM entry WHERE reason = 'pointer'") == 3
    row = queue.entry((0, 0))
    stored = drain.archive.read(queue.one("SELECT uri FROM segment"), ["key", "value"]).to_pylist()
    assert stored[row.row_no] == {"key": b"k", "value": b"the original"}
    assert (row.reason == "pointer", row.origin) == (False, f"{TOPIC}/0/{here}@share")
    queue.write("UPDATE entry SET reason = 'ready' WHERE id = :e", e=row.id)
    queue.consumer()
    drain_remaining(drain, 60)
    sent = queue.delivered()[-1]
    assert (sent.key, sent.value, dict(sent.headers)["tenant"]) == (b"k", b"the original", b"t")
    assert not any(name.startswith("__dlq.errors.") for name, _ in sent.headers)
