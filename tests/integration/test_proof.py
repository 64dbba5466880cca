"""The proof names what is wrong: each fault is injected into a copy of a drained queue's ledger, archive or target."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from tests.integration.rig import OTHERS, TRANSIENT, Rig

from dlq.conservation import prove, verify_conservation
from dlq.drain import Drain
from dlq_demo.broker import Broker

LETTERS = 240


@pytest.fixture(scope="module")
def drained(broker: Broker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Rig, Drain]]:
    """A queue that was drained for real: most entries replayed and confirmed, some returned, some open."""
    rig = Rig(broker.bootstrap, tmp_path_factory.mktemp("proof"), limits={"gate": 0.5})
    rig.begin()
    rig.letters(LETTERS, kinds=(*TRANSIENT, *TRANSIENT, OTHERS[0]))
    rig.consumer(fails=lambda seen: seen.key is not None and seen.key.endswith(b"7"))
    try:
        yield rig, rig.drain("r1")
    finally:
        rig.close()


class Copy:
    """A copy of the drained queue's ledger and archive, to be spoiled."""

    def __init__(self, drained: tuple[Rig, Drain], folder: Path) -> None:
        rig, drain = drained
        self.rig = rig
        self.archive = folder / "archive"
        self.database = folder / "ledger.db"
        shutil.copytree(rig.folder / "archive", self.archive)
        with (
            closing(sqlite3.connect(rig.folder / "ledger.db")) as there,
            closing(sqlite3.connect(self.database)) as here,
        ):
            there.backup(here)
        self.drain = drain

    def sql(self, *statements: str) -> None:
        """What only a broken disk or a person with the database's password can do: guards off."""
        with closing(sqlite3.connect(self.database)) as here:
            for (name,) in here.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
                here.execute(f"DROP TRIGGER {name}")
            here.execute("PRAGMA foreign_keys = OFF")
            here.execute("PRAGMA ignore_check_constraints = ON")
            for statement in statements:
                assert here.execute(statement).rowcount != 0, f"the fault changed nothing: {statement}"
            here.commit()

    def segment(self) -> Path:
        return max(self.archive.rglob("*.parquet"), key=lambda p: p.stat().st_size)

    def laws(self) -> set[str]:
        config = self.rig.config.model_copy(
            update={"ledger": f"sqlite:///{self.database}", "archive": str(self.archive)}
        )
        with Drain.look(self.drain.id, config=config, connections=self.rig.connections) as look:
            look.config = config
            look.archive = type(look.archive)(config.archive, config.name)
            return set(prove(look).laws)


@pytest.fixture
def copy(drained: tuple[Rig, Drain], tmp_path: Path) -> Copy:
    return Copy(drained, tmp_path)


def test_a_clean_drain_is_proven_by_every_witness(drained: tuple[Rig, Drain]) -> None:
    rig, drain = drained
    proof = verify_conservation(drain)
    print(proof["said"])
    assert proof["proven"], proof["broken"]
    assert all(check["success"] for check in proof["expectations"])
    assert proof["accounts"]["taken"] >= LETTERS
    assert rig.count("state = 'returned'") > 0
    assert rig.count("state = 'open'") > 0
    assert proof["accounts"]["taken"] == len(rig.log(rig.dlq))


ONE_OPEN = "(SELECT MIN(id) FROM entry WHERE settled_drain IS NULL)"
ONE_CONFIRMED = "(SELECT MIN(id) FROM entry WHERE state = 'confirmed')"

FAULTS: dict[str, tuple[str, ...]] = {
    "in the log, not in the ledger": (f"DELETE FROM entry WHERE id = {ONE_OPEN}",),
    "in the archive, not in the ledger": (f"DELETE FROM entry WHERE id = {ONE_OPEN}",),
    "before + taken <> settled + unsettled": (
        "UPDATE drain SET open_before = open_before + 1 WHERE closed_at IS NULL",
    ),
    "range gap or overlap": (
        "UPDATE intake SET from_pos = from_pos + 1 WHERE rowid = (SELECT MAX(rowid) FROM intake)",
    ),
    "cut-off not reached": (
        "UPDATE intake SET cutoff = to_pos + 5 WHERE rowid = (SELECT MAX(rowid) FROM intake)",
    ),
    "taken outside of any range": ("DELETE FROM intake WHERE part = 0",),
    "in the ledger, not in the archive": (f"UPDATE entry SET payload_sha = 'ff' WHERE id = {ONE_OPEN}",),
    "settled as sent, not once on the target": (
        "UPDATE entry SET state = 'confirmed', settled_drain = taken_drain, job = (SELECT MIN(job) FROM job_entry)"
        f" WHERE id = {ONE_OPEN}",
        "INSERT INTO job_entry SELECT MIN(job), 90000, (SELECT MAX(id) FROM entry WHERE state = 'confirmed' AND id"
        " NOT IN (SELECT entry FROM job_entry)), 1, 0, 'x', 'x' FROM job_entry",
    ),
    "on the target, not settled as sent": (
        f"UPDATE entry SET state = 'open', settled_drain = NULL, job = NULL WHERE id = {ONE_CONFIRMED}",
    ),
    "unfinished at close": (
        f"UPDATE entry SET state = 'planned', job = (SELECT MIN(id) FROM job) WHERE id = {ONE_OPEN}",
    ),
    "return without its new entry": ("UPDATE entry SET return_of = NULL WHERE return_of IS NOT NULL",),
    "duplicate of something never sent": (
        f"UPDATE entry SET state = 'duplicate', settled_drain = taken_drain WHERE id = {ONE_OPEN}",
    ),
    "open without a reason": (f"UPDATE entry SET reason = 'new' WHERE id = {ONE_OPEN}",),
}


def test_a_copy_is_proven_as_long_as_nobody_spoils_it(copy: Copy) -> None:
    assert copy.laws() == set()


@pytest.mark.parametrize("law", FAULTS)
def test_the_proof_names_a_spoiled_ledger(copy: Copy, law: str) -> None:
    copy.sql(*FAULTS[law])
    found = copy.laws()
    print(law, "->", sorted(found))
    assert law in found


def spoil_bit(copy: Copy) -> None:
    segment = copy.segment()
    data = bytearray(segment.read_bytes())
    data[len(data) // 3] ^= 0x10
    segment.write_bytes(data)


def remove_segment(copy: Copy) -> None:
    copy.segment().unlink()


def swap_segment(copy: Copy) -> None:
    """Another whole, valid segment in its place."""
    files = sorted(copy.archive.rglob("*.parquet"), key=lambda p: p.stat().st_size)
    files[-1].write_bytes(files[0].read_bytes())


@pytest.mark.parametrize("spoil", [spoil_bit, remove_segment, swap_segment])
def test_the_proof_names_a_spoiled_archive(copy: Copy, spoil: Callable[[Copy], None]) -> None:
    spoil(copy)
    assert {"archive segment broken", "in the ledger, not in the archive"} <= copy.laws()


def test_the_proof_names_an_output_sent_twice_by_hand(broker: Broker, tmp_path: Path) -> None:
    rig = Rig(broker.bootstrap, tmp_path)
    try:
        rig.begin()
        rig.letters(40)
        rig.consumer()
        drain = rig.drain("r1")
        assert prove(drain).broken == []
        sent = rig.log(rig.origin)[0]
        rig.produce(rig.origin, [(sent.key, sent.value, list(sent.headers or ()))])
        assert set(prove(drain).laws) == {"settled as sent, not once on the target"}
        stranger = [
            (n, b"%s-000000000000.1" % rig.queue.encode() if n == "dlq-job" else v)
            for n, v in sent.headers or ()
        ]
        rig.produce(rig.origin, [(sent.key, sent.value, stranger)])
        assert "on the target, not settled as sent" in prove(drain).laws, "a job this ledger never made"
    finally:
        rig.close()
