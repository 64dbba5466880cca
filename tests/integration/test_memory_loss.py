"""A lost, older, second or doubtful memory is noticed: refused with what to do, or gone on from; nothing is
replayed twice.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from tests.integration.rig import Rig, rigs, wait_until

from dlq.errors import ConfigError, Refused
from dlq.intake import take_custody
from dlq.jobs import CursorLost
from dlq.ledger import Ledger
from dlq.opening import open_drain
from dlq.replay import drain_remaining
from dlq_demo.broker import Broker, create_topic


def whole_drain(rig: Rig, run: str, letters: int) -> None:
    rig.letters(letters)
    rig.release(rig.drain(run))


def refused_for_good(rig: Rig, match: str, tries: int = 4) -> None:
    """Refused each time, under new runs and old, however often it is tried; and each time the lease is left free."""
    for n in range(tries):
        for run in (f"later{n}", "r1"):
            with pytest.raises(Refused, match=match):
                rig.open(run)


@pytest.fixture
def used(make_rig: Callable[..., Rig]) -> Rig:
    """A queue that was set up, and its consumer."""
    rig = make_rig(parts=3)
    rig.begin()
    rig.consumer()
    return rig


# The drain group's offsets


def test_with_its_group_deleted_a_drain_goes_on_from_the_ledger(used: Rig) -> None:
    whole_drain(used, "r1", 100)
    used.delete_groups(f"dlq-drain.{used.queue}")
    used.letters(50)
    drain = used.drain("r2")
    assert "the group's offset is gone for 3 partition(s)" in used.notes(drain)
    assert used.sql("SELECT SUM(again) FROM intake")[0][0] == 0, "it read again what it had"
    used.check_custody()
    assert len(used.check_effects()) == 150
    # and what was gone is there again, for every partition
    assert used.committed(f"dlq-drain.{used.queue}", used.dlq) == {
        p: used.ends(used.dlq)[p] for p in range(3)
    }


def test_with_its_group_behind_a_drain_goes_on_from_the_ledger(used: Rig) -> None:
    whole_drain(used, "r1", 100)
    used.commit(f"dlq-drain.{used.queue}", used.dlq, dict.fromkeys(range(3), 0))
    used.letters(50)
    drain = used.drain("r2")
    assert "is behind the ledger's" in used.notes(drain)
    assert used.sql("SELECT SUM(again) FROM intake")[0][0] == 0, "it read again what it had"
    used.check_custody()
    assert len(used.check_effects()) == 150


def test_a_group_ahead_of_the_ledger_is_refused(used: Rig) -> None:
    whole_drain(used, "r1", 100)
    used.letters(50)
    used.commit(f"dlq-drain.{used.queue}", used.dlq, used.ends(used.dlq))
    refused_for_good(used, "dlq ledger rebuild")


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_after_its_offsets_expired_a_drain_goes_on_from_the_ledger(tmp_path: Path) -> None:
    """A week of silence, in a minute: the broker forgets the group that only ever assigns."""
    settings = {"offsets.retention.minutes": "1", "offsets.retention.check.interval.ms": "500"}
    with Broker(properties=settings) as broker:
        for make in rigs(broker.bootstrap, tmp_path):
            rig = make(parts=3)
            rig.begin()
            rig.consumer()
            whole_drain(rig, "r1", 100)
            group = f"dlq-drain.{rig.queue}"
            forgotten = partial(rig.committed, group, rig.dlq)
            wait_until(lambda ask=forgotten: ask() == {}, "the broker forgot the group", seconds=150)
            rig.letters(50)
            drain = rig.drain("r2")
            assert "the group's offset is gone for 3 partition(s)" in rig.notes(drain)
            rig.check_custody()
            assert len(rig.check_effects()) == 150
            assert sorted(rig.committed(group, rig.dlq)) == [0, 1, 2]


# A second ledger, a lost one


def test_a_second_ledger_on_the_same_archive_is_refused(used: Rig) -> None:
    whole_drain(used, "r1", 100)
    other = used.config.model_copy(update={"ledger": f"sqlite:///{used.folder}/other.db"})
    Ledger.create(other.ledger)
    for run in ("second", "r1"):
        with pytest.raises(Refused, match="dlq ledger rebuild"):
            open_drain(other, run_id=run, connections=used.connections)
    whole_drain(used, "r2", 10)
    assert len(used.check_effects()) == 110


def test_a_second_ledger_with_an_archive_of_its_own_is_refused_by_what_the_queue_was_told(used: Rig) -> None:
    whole_drain(used, "r1", 100)
    other = used.config.model_copy(
        update={"ledger": f"sqlite:///{used.folder}/other.db", "archive": str(used.folder / "other")}
    )
    Ledger.create(other.ledger)
    for run in ("second", "third", "r1"):
        with pytest.raises(Refused, match="another ledger"):
            open_drain(other, run_id=run, connections=used.connections)
    whole_drain(used, "r2", 10)
    assert len(used.check_effects()) == 110


def test_a_lost_ledger_is_not_made_anew_by_itself(used: Rig) -> None:
    whole_drain(used, "r1", 100)
    used.lose_ledger()
    with pytest.raises(ConfigError, match="dlq ledger create"):
        used.open("r2")
    Ledger.create(used.config.ledger)
    refused_for_good(used, "dlq ledger rebuild")


# An older ledger


def test_a_ledger_restored_from_before_the_last_drain_is_refused(used: Rig) -> None:
    whole_drain(used, "r1", 100)
    backup = used.back_up_ledger()
    whole_drain(used, "r2", 50)
    used.restore_ledger(backup)
    refused_for_good(used, "older backup")


@pytest.mark.parametrize("drains", [1, 3])
def test_a_ledger_restored_together_with_its_archive_is_refused_by_what_the_queue_was_told(
    used: Rig, drains: int
) -> None:
    """The later drains took nothing new: they only sent what was in custody. Only the queue's offsets tell of them."""
    used.letters(60)
    drain = used.open("r1")
    take_custody(drain, 30)
    used.release(drain)
    backup = used.back_up_ledger()
    shutil.copytree(used.folder / "archive", used.folder / "archive-backup")
    for n in range(drains):
        used.release(used.drain(f"r{n + 2}"))
    used.restore_ledger(backup)
    shutil.rmtree(used.folder / "archive")
    (used.folder / "archive-backup").rename(used.folder / "archive")
    refused_for_good(used, "dlq ledger rebuild")
    assert len(used.effects()) == 60


def test_a_ledger_restored_from_the_middle_of_the_last_drain_is_refused(used: Rig) -> None:
    """From after its intake and before its plan: no epoch and no position tell."""
    used.letters(60)
    drain = used.open("r1")
    take_custody(drain, 30)
    backup = used.back_up_ledger()
    used.replay(drain)
    drain_remaining(drain, 30)
    used.release(drain)
    used.restore_ledger(backup)
    used.expire_lease()
    refused_for_good(used, "dlq ledger rebuild")
    assert len(used.effects()) == 60


def test_a_drain_whose_ledger_was_restored_under_it_replays_nothing_again(used: Rig) -> None:
    """The same run goes on, without opening: its plan was made before, by the ledger that is lost."""
    used.letters(60)
    drain = used.open("r1")
    take_custody(drain, 30)
    backup = used.back_up_ledger()
    used.replay(drain)
    used.restore_ledger(backup)
    used.letters(7)  # so that the new plan is another one
    again = used.attach("r1")
    take_custody(again, 30)
    with pytest.raises(Refused):
        used.replay(again)
    assert len(used.effects()) == 60


def test_a_ledger_restored_from_the_middle_of_a_job_goes_on_by_the_targets_cursor(
    make_rig: Callable[..., Rig],
) -> None:
    rig = make_rig(tuning={"records": 20})
    rig.begin()
    rig.consumer()
    rig.letters(200)
    rig.worker("open:r1", "take", "categorize", "canary", "batches", die="committed:6").expect_killed()
    backup = rig.back_up_ledger()
    rig.worker("attach:r1", "canary", "batches", die="committed:3").expect_killed()
    rig.restore_ledger(backup)
    rig.expire_lease()
    drain = rig.open("r2")
    rig.replay(drain)
    drain_remaining(drain, 30)
    rig.check_custody()
    rig.check_nothing_pending()
    assert len(rig.check_effects()) == 200


def test_the_refusals_left_no_lease_behind(used: Rig) -> None:
    whole_drain(used, "r1", 10)
    kept = used.back_up_ledger()
    whole_drain(used, "r2", 10)
    newest = used.back_up_ledger()
    used.restore_ledger(kept)
    refused_for_good(used, "older backup")
    used.restore_ledger(newest)
    began = time.monotonic()
    whole_drain(used, "r3", 10)
    assert time.monotonic() - began < 60
    assert len(used.check_effects()) == 30


# The topic


def test_a_recreated_topic_is_refused_with_the_command_to_run(used: Rig) -> None:
    whole_drain(used, "r1", 100)
    used.delete_topic(used.dlq)
    create_topic(used.bootstrap, used.dlq, 3)
    used.letters(20)
    refused_for_good(used, f"dlq ledger adopt-source {used.queue}")
    assert len(used.effects()) == 100


def test_a_topic_that_ends_before_the_ledgers_position_is_refused_with_the_command_to_run(used: Rig) -> None:
    """As after an unclean leader election; the position is moved here, since a broker can't be told to lose records."""
    whole_drain(used, "r1", 100)
    used.write(
        "UPDATE intake SET to_pos = to_pos + 1000 WHERE part = 1 AND round = (SELECT MAX(round) FROM intake "
        "WHERE part = 1)"
    )
    refused_for_good(used, f"truncated.*dlq ledger adopt-source {used.queue}")


@pytest.mark.parametrize("all_of_it", [False, True])
def test_what_retention_took_before_it_could_be_read_is_counted_as_vanished(
    used: Rig, all_of_it: bool
) -> None:
    whole_drain(used, "r1", 30)
    before = used.ends(used.dlq)
    used.letters(90)
    after = used.ends(used.dlq)
    upto = {p: after[p] if all_of_it else (before[p] + after[p]) // 2 for p in range(3)}
    used.delete_records(used.dlq, upto)
    drain = used.drain("r2")
    lost = sum(upto[p] - before[p] for p in range(3))
    assert used.sql("SELECT SUM(vanished_max) FROM intake")[0][0] == lost
    assert "vanished by retention" in used.notes(drain)
    used.check_chain()
    used.check_nothing_pending()
    assert (used.count(), len(used.check_effects())) == (120 - lost, 120 - lost)
    assert drain.depth().entries == 0


# A job's cursor


@pytest.mark.parametrize("successor", ["the retry of its own drain", "a new drain"])
def test_a_job_whose_cursor_is_gone_is_in_doubt_and_sends_nothing_more(
    make_rig: Callable[..., Rig], successor: str
) -> None:
    rig = make_rig(tuning={"records": 20})
    rig.begin()
    rig.consumer()
    rig.letters(200)
    rig.worker("open:r1", "take", "categorize", "canary", "batches", die="committed:7").expect_killed()
    job = str(rig.sql("SELECT id FROM job WHERE state = 'running'")[0][0])
    sent = len(rig.effects())
    planned = rig.count("state = 'planned'")
    assert 200 > planned > 200 - sent, "the last batch should be sent and not settled"
    rig.delete_groups(f"dlq-drain.{job}")
    if successor == "a new drain":
        rig.expire_lease()
        after = rig.open("r2")
    else:
        after = rig.attach("r1")
        with pytest.raises(CursorLost):
            rig.replay(after)
    rig.replay(after)
    drain_remaining(after, 30)
    assert rig.count("state = 'ambiguous'") == planned
    assert len(rig.effects()) == sent, "something in doubt was sent"
    rig.check_nothing_pending()
