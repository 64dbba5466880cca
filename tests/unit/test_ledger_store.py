"""Opening and creating a ledger, writing under the lease's epoch, inserting many rows."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from sqlalchemy import Connection, create_engine, select
from sqlalchemy.exc import IntegrityError
from tests.ledger_rig import QUEUE, LedgerRig

from dlq.errors import ConfigError, Fenced
from dlq.ledger import Ledger, LedgerError, insert_rows
from dlq.ledger.schema import decision, delivery
from dlq.ledger.schema import queue as queues

COLUMNS = ("job", "ordinal", "part", "pos", "ref", "sent_at")


def test_a_ledger_that_was_never_created_says_how_to_make_one(tmp_path: Path) -> None:
    for name in ("absent.db", "nowhere/absent.db"):
        with pytest.raises(ConfigError, match="dlq ledger create"):
            Ledger.open(f"sqlite:///{tmp_path}/{name}")
    assert list(tmp_path.iterdir()) == [], "looking for a ledger makes none"


def test_a_database_without_our_tables_is_no_ledger(postgres_url: str) -> None:
    with pytest.raises(ConfigError, match="dlq ledger create"):
        Ledger.open(postgres_url)


@pytest.mark.parametrize("url", ["sqlite:///ledger.db", "sqlite://", "sqlite:///:memory:"])
def test_a_ledger_must_be_the_same_from_every_folder(url: str) -> None:
    with pytest.raises(ConfigError, match=r"sqlite:////absolute/path\.db"):
        Ledger.create(url)


def test_creating_twice_keeps_the_first_ledgers_id(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/ledger.db"
    first = Ledger.create(url)
    again = Ledger.create(url)
    assert first.id == again.id
    assert Ledger.create(f"sqlite:///{tmp_path}/other.db").id != first.id


def test_postgres_keeps_its_id_too(postgres_url: str) -> None:
    first, again = Ledger.create(postgres_url), Ledger.create(postgres_url)
    assert first.id == again.id
    assert first.dialect == "postgresql"
    first.close()
    again.close()


def test_a_ledger_of_another_version_is_not_opened(ledger_rig: LedgerRig) -> None:
    ledger_rig.execute("UPDATE ledger SET version = version + 1")
    try:
        with pytest.raises(ConfigError, match="version"):
            Ledger.open(ledger_rig.url)
    finally:
        ledger_rig.execute("UPDATE ledger SET version = version - 1")


@pytest.mark.parametrize(
    ("url", "said"), [("what is this", "not a database URL"), ("mysql://h/d", "mysql is not supported")]
)
def test_a_wrong_url_says_what_to_write(url: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Ledger.open(url)


def test_an_unreachable_database_is_no_configuration_error_and_its_password_is_not_shown() -> None:
    with pytest.raises(LedgerError) as caught:
        Ledger.open("postgresql://dlq:hidden-word@127.0.0.1:1/ledger")
    assert "can't be reached" in str(caught.value)
    assert "hidden-word" not in str(caught.value)


def test_postgres_that_could_forget_a_commit_is_refused(postgres_url: str) -> None:
    Ledger.create(postgres_url).close()
    engine = create_engine(postgres_url)
    with engine.begin() as connection:
        name = connection.exec_driver_sql("SELECT current_database()").scalar_one()
        connection.exec_driver_sql(f'ALTER DATABASE "{name}" SET synchronous_commit = off')
    engine.dispose()
    with pytest.raises(ConfigError, match="synchronous_commit"):
        Ledger.open(postgres_url)


def test_sqlite_is_durable_and_readers_go_on_beside_the_writer(tmp_path: Path) -> None:
    ledger = Ledger.create(f"sqlite:///{tmp_path}/ledger.db")
    with ledger.read() as tx:
        assert tx.exec_driver_sql("PRAGMA synchronous").scalar_one() == 2  # FULL
        assert tx.exec_driver_sql("PRAGMA journal_mode").scalar_one() == "wal"
        assert tx.exec_driver_sql("PRAGMA foreign_keys").scalar_one() == 1


# Writing


def test_a_write_under_an_older_epoch_is_fenced_and_writes_nothing(ledger_rig: LedgerRig) -> None:
    old = ledger_rig.epoch
    ledger_rig.acquire()
    with pytest.raises(Fenced, match="another holder"), ledger_rig.ledger.write(QUEUE, old) as tx:
        tx.execute(queues.update().values(paused_by="a zombie"))
    assert ledger_rig.one("SELECT paused_by FROM queue") is None


def test_a_write_under_an_epoch_of_the_future_is_fenced(ledger_rig: LedgerRig) -> None:
    with pytest.raises(Fenced), ledger_rig.ledger.write(QUEUE, ledger_rig.epoch + 1):
        pass


def test_a_write_without_the_lease_needs_no_epoch(ledger_rig: LedgerRig) -> None:
    assert ledger_rig.decision() == 1


def test_a_write_that_raises_leaves_nothing(ledger_rig: LedgerRig) -> None:
    def die(tx: Connection) -> None:
        tx.execute(queues.update().values(paused_by="half"))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), ledger_rig.write() as tx:
        die(tx)
    assert ledger_rig.one("SELECT paused_by FROM queue") is None


def test_a_takeover_waits_for_a_write_that_began_under_the_old_epoch(ledger_rig: LedgerRig) -> None:
    """Or the old holder's write could be committed after the new one has read what it left."""
    inside, done = threading.Event(), threading.Event()
    order: list[str] = []

    def take_over() -> None:
        inside.wait(10)
        other = Ledger.open(ledger_rig.url)
        ledger_rig.acquire()
        order.append("taken over")
        other.close()
        done.set()

    thread = threading.Thread(target=take_over)
    thread.start()
    with ledger_rig.ledger.write(QUEUE, ledger_rig.epoch) as tx:
        inside.set()
        assert not done.wait(0.3), "the take-over did not wait"
        tx.execute(
            decision.insert().values(queue=QUEUE, at="t", who="w", kind="k", subject="s", saw="x", choice="c")
        )
        order.append("written")
    thread.join(30)
    assert order == ["written", "taken over"]


def test_two_writers_take_turns_and_lose_nothing(ledger_rig: LedgerRig) -> None:
    def write(who: str) -> None:
        ledger = Ledger.open(ledger_rig.url)
        for _ in range(20):
            with ledger.write(QUEUE, ledger_rig.epoch) as tx:
                tx.execute(select(queues))
                tx.execute(
                    decision.insert().values(
                        queue=QUEUE, at="t", who=who, kind="k", subject="s", saw="x", choice="c"
                    )
                )
        ledger.close()

    threads = [threading.Thread(target=write, args=(who,)) for who in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert ledger_rig.rows("SELECT who, COUNT(*) FROM decision GROUP BY who ORDER BY who") == [
        ("a", 20),
        ("b", 20),
    ]


# Many rows


def rows(*ordinals: int, at: str = "t") -> list[tuple[object, ...]]:
    return [("job", n, 0, n, None, at) for n in ordinals]


def test_a_row_that_is_there_is_passed_over_by_the_named_columns(ledger_rig: LedgerRig) -> None:
    with ledger_rig.write() as tx:
        assert insert_rows(tx, delivery, COLUMNS, rows(1, 2), skip_on=("job", "ordinal")) == 2
        assert insert_rows(tx, delivery, COLUMNS, rows(2, 3, at="later"), skip_on=("job", "ordinal")) == 1
    assert ledger_rig.rows("SELECT ordinal, sent_at FROM delivery ORDER BY ordinal") == [
        (1, "t"),
        (2, "t"),
        (3, "later"),
    ]


def test_a_repeat_within_one_statement_is_one_row(ledger_rig: LedgerRig) -> None:
    with ledger_rig.write() as tx:
        assert insert_rows(tx, delivery, COLUMNS, rows(1, 1, 1), skip_on=("job", "ordinal")) == 1


def test_without_columns_to_skip_on_a_repeat_is_refused(ledger_rig: LedgerRig) -> None:
    with pytest.raises(IntegrityError), ledger_rig.write() as tx:
        insert_rows(tx, delivery, COLUMNS, rows(1, 1))


def test_only_the_named_conflict_is_passed_over(ledger_rig: LedgerRig) -> None:
    """A missing value, an unknown parent, another unique column: each is a fault and nothing is written."""
    from dlq.ledger.schema import entry, plan

    with pytest.raises(IntegrityError), ledger_rig.write() as tx:
        insert_rows(tx, delivery, COLUMNS, [("job", 1, 0, 1, None, None)], skip_on=("job", "ordinal"))
    first = ledger_rig.entry(place="5", pos=5)
    row = ledger_rig.rows(
        "SELECT queue, source, part, place, taken_drain, segment, row_no, payload_sha, size, grp FROM entry "
        "WHERE id = :e",
        e=first,
    )[0]
    columns = (
        "queue",
        "source",
        "part",
        "place",
        "taken_drain",
        "segment",
        "row_no",
        "payload_sha",
        "size",
        "grp",
    )
    same = ("source", "part", "place")
    with ledger_rig.write() as tx:
        assert insert_rows(tx, entry, columns, [tuple(row)], skip_on=same) == 0
    stranger = (*row[:3], "6", "nobody", *row[5:])
    with pytest.raises(IntegrityError), ledger_rig.write() as tx:
        insert_rows(tx, entry, columns, [stranger], skip_on=same)
    ledger_rig.plan([first])
    taken = ledger_rig.one("SELECT hash FROM plan")
    values = ("another", QUEUE, ledger_rig.one("SELECT drain FROM plan"), "stage", taken, "t", "t")
    with pytest.raises(IntegrityError), ledger_rig.write() as tx:
        insert_rows(
            tx,
            plan,
            ("id", "queue", "drain", "stage", "hash", "proposed_at", "expires_at"),
            [values],
            skip_on=("id",),
        )
    assert ledger_rig.one("SELECT COUNT(*) FROM entry") == 1


def test_more_rows_than_one_statement_can_carry(ledger_rig: LedgerRig) -> None:
    with ledger_rig.write() as tx:
        assert insert_rows(tx, delivery, COLUMNS, rows(*range(25_000)), skip_on=("job", "ordinal")) == 25_000
        assert (
            insert_rows(tx, delivery, COLUMNS, rows(*range(24_000, 26_000)), skip_on=("job", "ordinal"))
            == 1_000
        )
    assert ledger_rig.one("SELECT COUNT(*) FROM delivery") == 26_000


def test_no_rows_is_no_statement(ledger_rig: LedgerRig) -> None:
    with ledger_rig.write() as tx:
        assert insert_rows(tx, delivery, COLUMNS, []) == 0
