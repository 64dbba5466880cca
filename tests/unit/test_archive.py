"""The archive keeps every byte, notices a changed one, and remembers whose epoch it is."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlq.archive import Archive, Rows, Segment, segment_table
from dlq.entry import Group, Headers, Record, Understood, payload_sha
from dlq.errors import ArchiveError, Refused

GROUP = Group(
    "v1:0123456789abcdef", "T: m @ c", "c", "T", "transient", "retry", "network", "orchestrator", "me"
)


def record(
    pos: int, key: bytes | None, value: bytes | None, headers: Headers = (), **how: int | str | None
) -> Record:
    flaw = how.get("flaw")
    return Record(
        0,
        str(pos),
        pos,
        key,
        value,
        headers,
        how.get("timestamp_ms", 1),
        None if flaw is None else str(flaw),  # type: ignore[arg-type]
    )


def write(archive: Archive, *records: Record, understood: Understood | None = None) -> Segment:
    said = understood or Understood()
    about = {"drain": "d", "source": "s", "epoch": 1, "ranges": []}
    return archive.write(
        "segments/d", segment_table(records, [said] * len(records), [GROUP] * len(records)), about
    )


@pytest.fixture
def archive(tmp_path: Path) -> Archive:
    return Archive(str(tmp_path), "orders")


AWKWARD = [
    record(0, b"k", b"v", (("a", b"1"), ("b", b""), ("a", b"2"), ("n", None), ("", b"no name"))),
    record(1, None, None),
    record(2, b"", b""),
    record(3, b"\xff\xfe\x00", b"\x80\x00\x81", (("bin", b"\xff\x00"), ("schön", "ü".encode()))),
    record(4, b"k", b"x" * 1_000_000, timestamp_ms=None),
    record(5, b"k", b"v", flaw="unrepresentable_headers"),
]


# Bytes


def test_every_byte_comes_back(archive: Archive) -> None:
    segment = write(archive, *AWKWARD)
    assert segment.rows == len(AWKWARD)
    rows = Rows(archive.read(segment.uri))
    assert len(rows) == len(AWKWARD)
    for number, wanted in enumerate(AWKWARD):
        got = rows[number]
        assert (got.part, got.pos, got.key, got.value, got.headers, got.timestamp_ms) == (
            wanted.part,
            wanted.pos,
            wanted.key,
            wanted.value,
            wanted.headers,
            wanted.timestamp_ms,
        )
        assert rows.payload_sha(number) == payload_sha(wanted.key, wanted.value)


_BYTES = st.none() | st.binary(max_size=40)
_HEADERS = st.lists(st.tuples(st.text(max_size=8), _BYTES), max_size=5).map(tuple)


@given(st.lists(st.tuples(_BYTES, _BYTES, _HEADERS), min_size=1, max_size=12))
def test_any_bytes_come_back(
    tmp_path_factory: pytest.TempPathFactory, letters: list[tuple[bytes | None, bytes | None, Headers]]
) -> None:
    archive = Archive(str(tmp_path_factory.getbasetemp()), "any")
    records = [record(n, key, value, headers) for n, (key, value, headers) in enumerate(letters)]
    rows = Rows(archive.read(write(archive, *records).uri))
    assert [(rows[n].key, rows[n].value, rows[n].headers) for n in range(len(rows))] == letters


def test_what_was_understood_is_a_query_away(archive: Archive) -> None:
    said = Understood(
        "orchestrator", error_type="T", message="m", component="c", correlation_id="c-1", retry_count=2
    )
    segment = write(archive, record(0, None, None), understood=said)
    (row,) = pq.read_table(str(archive.root / segment.uri)).to_pylist()
    assert (row["error_type"], row["message"], row["correlation_id"], row["retry_count"]) == (
        "T",
        "m",
        "c-1",
        2,
    )
    assert (row["category"], row["remedy"], row["fingerprint"]) == ("transient", "retry", GROUP.fingerprint)


@given(st.lists(st.tuples(_BYTES, _BYTES), min_size=2, max_size=2, unique=True))
def test_different_payloads_have_different_sums(two: list[tuple[bytes | None, bytes | None]]) -> None:
    assert payload_sha(*two[0]) != payload_sha(*two[1])


def test_null_and_empty_and_where_key_ends_make_a_difference() -> None:
    payloads = [
        (None, None),
        (None, b""),
        (b"", None),
        (b"", b""),
        (b"a", b"b"),
        (b"ab", b""),
        (b"", b"ab"),
        (b"a", None),
    ]
    assert len({payload_sha(*p) for p in payloads}) == len(payloads)


# Sums


def test_the_sum_is_the_files(archive: Archive) -> None:
    segment = write(archive, *AWKWARD)
    assert hashlib.sha256((archive.root / segment.uri).read_bytes()).hexdigest() == segment.sha256
    table, about = archive.verified(segment.uri, segment.sha256)
    assert table.num_rows == len(AWKWARD)
    assert about["drain"] == "d"
    assert archive.about(segment.uri) == (about, segment.sha256, len(AWKWARD))


@pytest.mark.parametrize("where", [0.0, 0.3, 0.6, 0.999])
def test_a_flipped_bit_is_found_wherever_it_is(archive: Archive, where: float) -> None:
    segment = write(archive, *AWKWARD)
    path = archive.root / segment.uri
    data = bytearray(path.read_bytes())
    data[int(where * len(data))] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(ArchiveError, match="other bytes than were written"):
        archive.verified(segment.uri, segment.sha256)


def test_a_cut_file_is_found(archive: Archive) -> None:
    segment = write(archive, *AWKWARD)
    path = archive.root / segment.uri
    path.write_bytes(path.read_bytes()[:-20])
    for read in (
        lambda: archive.verified(segment.uri, segment.sha256),
        lambda: archive.read(segment.uri),
        lambda: archive.about(segment.uri),
    ):
        with pytest.raises(ArchiveError, match=segment.uri):
            read()


def test_a_missing_segment_says_what_to_do(archive: Archive) -> None:
    for read in (
        lambda: archive.verified("segments/x.parquet", "0"),
        lambda: archive.read("segments/x.parquet"),
        lambda: archive.about("segments/x.parquet"),
    ):
        with pytest.raises(ArchiveError, match="restore it from a backup"):
            read()


# Files


def test_segments_are_listed_and_what_is_half_written_is_none(archive: Archive) -> None:
    assert list(archive.segments()) == []
    uris = sorted(write(archive, record(n, None, None)).uri for n in range(3))
    (archive.root / "segments/d/left.parquet.part").write_bytes(b"half")
    archive.write("drafts", segment_table([record(9, None, None)], [Understood()], [GROUP]), {})
    assert list(archive.segments()) == uris


def test_a_segment_is_whole_or_not_there(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process dies while the file is written: the next one finds no segment."""
    monkeypatch.setattr(os, "fsync", lambda _fd: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        write(archive, record(0, None, None))
    assert list(archive.segments()) == []


def test_an_archive_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "orders").write_text("a file where the folder should be")
    archive = Archive(str(tmp_path), "orders")
    with pytest.raises(ArchiveError, match="nothing was taken"):
        write(archive, record(0, None, None))
    with pytest.raises(ArchiveError, match="nothing was changed"):
        archive.claim_epoch(1, "ledger", "d")


def test_queues_do_not_share_segments(tmp_path: Path) -> None:
    one, two = Archive(str(tmp_path), "one"), Archive(str(tmp_path), "two")
    write(one, record(0, None, None))
    one.claim_epoch(1, "ledger", "d")
    assert list(two.segments()) == []
    assert two.newest_epoch() is None


# Epochs


def test_epochs_are_remembered_with_the_ledger_that_wrote_them(archive: Archive) -> None:
    assert archive.newest_epoch() is None
    for epoch in (1, 2, 10):
        archive.claim_epoch(epoch, "ledger", f"d{epoch}")
    assert archive.newest_epoch() == (10, "ledger")
    said = json.loads((archive.root / "epochs/000000010.json").read_text())
    assert said == {"ledger": "ledger", "epoch": 10, "holder": "d10"}
    assert sorted(p.name for p in (archive.root / "epochs").iterdir()) == [
        f"{n:09d}.json" for n in (1, 2, 10)
    ]


@pytest.mark.parametrize(
    ("ledger", "said"), [("another", "another ledger"), ("ledger", "a copy of this ledger")]
)
def test_an_epoch_is_written_once(archive: Archive, ledger: str, said: str) -> None:
    """Another ledger's, or that of a copy of this one: no ledger gives an epoch twice."""
    archive.claim_epoch(1, "ledger", "one")
    before = (archive.root / "epochs/000000001.json").read_text()
    with pytest.raises(Refused, match=said):
        archive.claim_epoch(1, ledger, "two")
    assert (archive.root / "epochs/000000001.json").read_text() == before


def test_of_two_ledgers_that_claim_an_epoch_together_one_gets_it(archive: Archive) -> None:
    outcomes: list[str] = []
    barrier = threading.Barrier(4)

    def claim(ledger: str) -> None:
        barrier.wait(30)
        try:
            archive.claim_epoch(7, ledger, "d")
            outcomes.append("got")
        except Refused:
            outcomes.append("refused")

    threads = [threading.Thread(target=claim, args=(f"ledger {n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(outcomes) == ["got", "refused", "refused", "refused"]


def test_an_epoch_is_whole_or_not_there(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _fd: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            archive.claim_epoch(1, "ledger", "d")
    assert archive.newest_epoch() is None
    archive.claim_epoch(1, "ledger", "d")
    assert archive.newest_epoch() == (1, "ledger")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_an_epoch_that_says_nothing_is_not_guessed(archive: Archive, text: str) -> None:
    archive.claim_epoch(1, "ledger", "d")
    (archive.root / "epochs/000000001.json").write_text(text)
    with pytest.raises(ArchiveError, match="does not say whose epoch it is"):
        archive.newest_epoch()
