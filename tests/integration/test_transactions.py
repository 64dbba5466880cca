"""Dead letters written in transactions: what was committed is taken, nothing else, and the gaps hold nothing up."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from confluent_kafka import Producer
from tests.integration.rig import TRANSIENT, Rig, failure, finish

from dlq.conservation import prove
from dlq.intake import take_custody

POINTS = ("read:2", "segment:2", "rows:2", "untold:2", "told:2")


class Writer:
    """A failing program that dead-letters in transactions. ``written`` counts what was committed."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self._number = 100_000  # business keys of its own: a twin would not be sent
        self.written = 0
        self._producer = self._opened("ends")

    def _opened(self, name: str) -> Producer:
        producer = Producer(
            {
                "bootstrap.servers": self._rig.bootstrap,
                "transactional.id": f"{self._rig.queue}.{name}",
                "transaction.timeout.ms": 600_000,
            }
        )
        producer.init_transactions(30)
        return producer

    def _produce(self, producer: Producer, part: int, count: int, age_s: float = 0) -> None:
        producer.begin_transaction()
        for n in range(self._number, self._number + count):
            producer.produce(
                self._rig.dlq,
                key=b"t%d" % n,
                value=b"in a transaction %d" % n,
                headers=failure(n, TRANSIENT[0], topic=self._rig.origin),
                partition=part,
                **({"timestamp": int((time.time() - age_s) * 1000)} if age_s else {}),
            )
        self._number += count
        assert producer.flush(30) == 0

    def commit(self, part: int, count: int) -> None:
        self._produce(self._producer, part, count)
        self._producer.commit_transaction(30)
        self.written += count

    def abort(self, part: int, count: int) -> None:
        self._produce(self._producer, part, count)
        self._producer.abort_transaction(30)

    @contextmanager
    def left_open(self, part: int, count: int, *, age_s: float = 0, keep: bool = False) -> Iterator[None]:
        """A transaction that stays open in the body and is committed (``keep``) or aborted at its end.

        :param age_s: how long ago its records say that they were written.
        """
        producer = self._opened(f"open{self._number}")
        self._produce(producer, part, count, age_s)
        try:
            yield
        finally:
            if keep:
                producer.commit_transaction(30)
                self.written += count
            else:
                producer.abort_transaction(30)


def uneven(writer: Writer) -> None:
    """Commits and aborts in turn, the last things in a partition an abort, a commit, and nothing but aborts."""
    for _ in range(6):
        writer.commit(0, 30)
        writer.abort(0, 20)
        writer.abort(1, 5)
        writer.commit(1, 25)
        writer.abort(2, 10)


def test_committed_dead_letters_are_taken_and_aborted_ones_are_no_entries(
    make_rig: Callable[..., Rig],
) -> None:
    rig = make_rig(parts=4)
    rig.begin()
    rig.consumer()
    writer = Writer(rig)
    uneven(writer)
    rig.letters(100)
    drain = rig.open()
    there = 100 + writer.written
    depth, ends = drain.depth(), rig.ends(rig.dlq)
    # markers and aborted records count until they are passed: the depth is a bound, and says so by being one
    assert dict(depth.by_part) == ends
    assert depth.entries >= there + 6 * 35
    done = take_custody(drain, 30)
    assert (done["taken"], done["again"], done["reached"], done["vanished_max"]) == (there, 0, True, 0)
    assert drain.depth().entries == 0
    assert drain.positions() == ends == rig.committed(f"dlq-drain.{rig.queue}", rig.dlq)
    rig.check_custody()
    rig.replay(drain)
    rig.check_nothing_pending()
    assert len(rig.check_effects()) == there
    proof = prove(drain)
    assert proof.broken == []
    assert proof.witnesses["log"] == f"{there} records recounted in 4 range(s)"


def test_a_range_of_nothing_but_aborted_records_is_passed_and_proven(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(parts=1)
    rig.begin()
    Writer(rig).abort(0, 40)
    drain = rig.open()
    assert drain.depth().entries == 41
    done = take_custody(drain, 30)
    assert (done["taken"], done["reached"]) == (0, True)
    assert (drain.depth().entries, drain.positions()) == (0, {0: 41})
    rig.check_chain()
    proof = prove(drain)
    assert proof.broken == []
    assert proof.witnesses["log"] == "0 records recounted in 1 range(s)"


def test_an_intake_killed_among_transactions_takes_the_committed_once(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(parts=3, tuning={"lease_s": 0.2, "batch": 40})
    rig.begin()
    writer = Writer(rig)
    kills = [{"die": point} for point in POINTS]
    killed = finish(rig, ["take"], kills, new_drain=lambda n: n % 2 == 0, before=lambda: uneven(writer))
    assert killed == len(POINTS)
    rig.check_custody()
    assert rig.count() == writer.written
    assert rig.open("looks-afterwards").depth().entries == 0


def test_what_an_open_transaction_holds_back_is_no_depth_and_is_taken_when_it_ends(
    make_rig: Callable[..., Rig],
) -> None:
    rig = make_rig(parts=2)
    rig.begin()
    rig.consumer()
    writer = Writer(rig)
    writer.commit(0, 20)
    with writer.left_open(0, 10, keep=True), writer.left_open(1, 10):
        behind = 15
        writer.commit(0, behind)
        rig.letters(60)
        drain = rig.open("r1")
        ends = rig.ends(rig.dlq)
        assert ends == {0: 21, 1: 0}, "the transactions hold nothing back"
        assert drain.depth().entries == 21
        assert take_custody(drain, 30)["taken"] == 20
        assert (drain.depth().entries, drain.positions()) == (0, ends)
        rig.replay(drain)
        proof = prove(drain)
        assert (proof.broken, proof.witnesses["log"]) == ([], "20 records recounted in 1 range(s)")
        assert "open transaction" not in rig.notes(drain), "these are producers at work"
        rig.release(drain)
    drain = rig.drain("r2")
    assert rig.count() == 20 + 10 + behind + 60 == writer.written + 60
    rig.check_custody()
    rig.check_nothing_pending()
    assert len(rig.check_effects()) == 20 + 10 + behind + 60
    assert prove(drain).broken == []


def test_a_transaction_that_stays_open_is_a_finding_by_the_age_of_its_first_record(
    make_rig: Callable[..., Rig],
) -> None:
    rig = make_rig(parts=2)
    rig.begin()
    writer = Writer(rig)
    with writer.left_open(0, 10, age_s=90), writer.left_open(1, 10, age_s=20):
        rig.letters(40)
        drain = rig.open("r1")
        said = [line for line in rig.notes(drain).splitlines() if "open transaction" in line]
        held = rig.ends(rig.dlq, "read_uncommitted")[0]
        assert len(said) == 1, said
        assert said[0].startswith(
            f"{rig.dlq}/0: an open transaction holds at most {held} record(s) back, the first of them 9"
        )
        assert "transaction.max.timeout.ms" in said[0], "until when it can stand isn't said"
        assert drain.depth().entries == 0
        assert take_custody(drain, 30)["taken"] == 0
        rig.release(drain)
    drain = rig.open("r2")
    assert "open transaction" not in rig.notes(drain)
    assert take_custody(drain, 30)["taken"] == 40
    rig.check_custody()
