"""The archive: every dead letter's bytes in Parquet segments, written once, checksummed, read back as proof.

Beside them lie ``epochs/<n>.json``: the ledger's id and epoch, written outside the ledger before use, so that a
lost, restored or second ledger is noticed. The archive is any folder or object store ``UPath`` can reach.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from upath import UPath

from dlq.entry import Group, Headers, Record, Understood, payload_sha
from dlq.errors import ArchiveError, Refused

FORMAT_VERSION = 1

_HEADER = pa.struct([("name", pa.string()), ("value", pa.binary())])
_DICT = pa.dictionary(pa.int32(), pa.string())
SCHEMA = pa.schema(
    [
        ("part", pa.int32()),
        ("place", pa.string()),
        ("pos", pa.int64()),
        ("key", pa.binary()),
        ("value", pa.binary()),
        ("headers", pa.list_(_HEADER)),
        ("timestamp_ms", pa.int64()),
        ("flaw", pa.string()),
        # what was understood, so that "what failed yesterday, and why" is one query over the files
        ("format", _DICT),
        ("error_type", _DICT),
        ("cause_type", _DICT),
        ("message", pa.string()),
        ("component", _DICT),
        ("stage", _DICT),
        ("attempts", pa.int32()),
        ("failed_at_ms", pa.int64()),
        ("origin", pa.string()),
        ("correlation_id", pa.string()),
        ("trace_id", pa.string()),
        ("dedupe_key", pa.string()),
        ("retry_count", pa.int32()),
        ("category", _DICT),
        ("remedy", _DICT),
        ("rule", _DICT),
        ("fingerprint", _DICT),
    ]
)


@dataclass(frozen=True)
class Segment:
    """A written segment: ``uri`` relative to the archive, sum of the file (hex sha256), rows."""

    uri: str
    sha256: str
    rows: int


class Archive:
    """The segments and epochs of one queue.

    :param root: the queue file's ``archive``; segments of a queue lie under ``<root>/<queue>/``.
    """

    def __init__(self, root: str, queue: str) -> None:
        self.root = UPath(root) / queue
        self._made: set[str] = set()

    @property
    def is_local(self) -> bool:
        return self.root.protocol in ("", "file")

    def write(self, folder: str, table: pa.Table, about: Mapping[str, Any]) -> Segment:
        """Write ``table`` as a new segment under ``folder``, durable when this returns; ``about`` goes into the file.

        :raises ArchiveError: when it can't be written; nothing of it counts then.
        """
        sink = pa.BufferOutputStream()
        meta = {b"dlq": json.dumps({"version": FORMAT_VERSION, **about}).encode()}
        pq.write_table(
            table.replace_schema_metadata(meta),
            sink,
            compression="zstd",
            compression_level=1,
            write_statistics=False,
        )
        data = sink.getvalue()
        uri = f"{folder}/{uuid.uuid4().hex}.parquet"
        self._write(uri, data)
        return Segment(uri, hashlib.sha256(data).hexdigest(), table.num_rows)

    def _write(self, uri: str, data: Any) -> None:
        path = self.root / uri
        try:
            if not self.is_local:
                path.write_bytes(bytes(data))
                return
            folder = path.parent
            if str(folder) not in self._made:
                folder.mkdir(parents=True, exist_ok=True)
                self._made.add(str(folder))
            part = f"{path}.part"
            with Path(part).open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            Path(part).rename(str(path))
            _sync_folder(str(folder))
        except OSError as error:
            raise ArchiveError(
                f"archive: {path} can't be written: {error}; nothing was taken with it"
            ) from error

    def read(self, uri: str, columns: Sequence[str] | None = None) -> pa.Table:
        """A segment's table.

        :raises ArchiveError: when it is missing or not a segment.
        """
        try:
            return _table((self.root / uri).read_bytes(), columns)
        except (OSError, pa.ArrowException) as error:
            raise ArchiveError(
                f"archive: segment {uri} can't be read: {error}; restore it from a backup of the archive"
            ) from error

    def verified(self, uri: str, sha256: str) -> tuple[pa.Table, dict[str, Any]]:
        """A segment's table and what it says about itself, its sum checked first.

        :raises ArchiveError: when it is missing or its bytes are not those written.
        """
        try:
            data = (self.root / uri).read_bytes()
        except OSError as error:
            raise ArchiveError(
                f"archive: segment {uri} is missing: {error}; restore it from a backup of the archive"
            ) from error
        if hashlib.sha256(data).hexdigest() != sha256:
            raise ArchiveError(
                f"archive: segment {uri} has other bytes than were written; restore it from a backup of the archive"
            )
        table = _table(data)
        return table, _about(table)

    def about(self, uri: str) -> tuple[dict[str, Any], str, int]:
        """What a segment says of itself, its file's sum and its rows; for adopting one that has no row in the ledger.

        :raises ArchiveError: when it is not a segment.
        """
        try:
            data = (self.root / uri).read_bytes()
            table = _table(data, ["place"])
        except (OSError, pa.ArrowException) as error:
            raise ArchiveError(
                f"archive: segment {uri} can't be read: {error}; restore it from a backup of the archive"
            ) from error
        return _about(table), hashlib.sha256(data).hexdigest(), table.num_rows

    def segments(self) -> Iterator[str]:
        """The uri of every segment file, in order of name."""
        folder = self.root / "segments"
        if folder.exists():
            yield from sorted(p.relative_to(self.root).as_posix() for p in folder.rglob("*.parquet"))

    def newest_epoch(self) -> tuple[int, str] | None:
        """The highest epoch written here and the ledger that wrote it."""
        folder = self.root / "epochs"
        names = sorted((int(p.stem), p) for p in folder.glob("*.json")) if folder.exists() else []
        if not names:
            return None
        epoch, path = names[-1]
        return epoch, self._ledger_of(path)

    def _ledger_of(self, path: UPath) -> str:
        try:
            return str(json.loads(path.read_text())["ledger"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArchiveError(
                f"archive: {path} does not say whose epoch it is: {error}; restore it from a backup of the archive"
            ) from error

    def claim_epoch(self, epoch: int, ledger_id: str, holder: str) -> None:
        """Write an epoch down, create-only, durable when this returns.

        :raises Refused: when it was written before: no ledger gives an epoch twice, so another one lives, or a copy.
        :raises ArchiveError: when it can't be written.
        """
        path = self.root / "epochs" / f"{epoch:09d}.json"
        body = json.dumps({"ledger": ledger_id, "epoch": epoch, "holder": holder})
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if self.is_local:
                _create(Path(str(path)), body)
            else:
                with path.open("x") as file:
                    file.write(body)
        except FileExistsError:
            other = "a copy of this" if self._ledger_of(path) == ledger_id else "another"
            raise Refused(
                f"archive {self.root}: epoch {epoch} was written by {other} ledger. Two ledgers on one queue would "
                "replay twice: point both at one ledger, or run `dlq ledger rebuild` on the one that stays"
            ) from None
        except OSError as error:
            raise ArchiveError(f"archive: {path} can't be written: {error}; nothing was changed") from error


def _create(path: Path, body: str) -> None:
    """A file that appears whole or not at all.

    :raises FileExistsError: when it is there.
    """
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        with part.open("x") as file:
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
        path.hardlink_to(part)
    finally:
        part.unlink(missing_ok=True)
    _sync_folder(str(path.parent))


def _sync_folder(folder: str) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _table(data: bytes, columns: Sequence[str] | None = None) -> pa.Table:
    """A segment's table. (Not by ``read_table``, which imports pandas: a second and 60 MB.)"""
    return pq.ParquetFile(pa.BufferReader(data)).read(columns=columns)


def _about(table: pa.Table) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((table.schema.metadata or {}).get(b"dlq", b"{}"))
    return found


def segment_table(
    records: Sequence[Record], understood: Sequence[Understood], groups: Sequence[Group]
) -> pa.Table:
    """The records of one batch as a segment's table, bytes exactly as they came."""
    names: list[str] = []
    values: list[bytes | None] = []
    offsets = [0]
    for record in records:
        for name, value in record.headers:
            names.append(name)
            values.append(value)
        offsets.append(len(names))
    headers = pa.ListArray.from_arrays(
        pa.array(offsets, pa.int32()),
        pa.StructArray.from_arrays(
            [pa.array(names, pa.string()), pa.array(values, pa.binary())], fields=list(_HEADER)
        ),
    )
    columns = [
        pa.array([r.part for r in records], pa.int32()),
        pa.array([r.place for r in records], pa.string()),
        pa.array([r.pos for r in records], pa.int64()),
        pa.array([r.key for r in records], pa.binary()),
        pa.array([r.value for r in records], pa.binary()),
        headers,
        pa.array([r.timestamp_ms for r in records], pa.int64()),
        pa.array([r.flaw for r in records], pa.string()),
        _labels([u.format for u in understood]),
        _labels([u.error_type for u in understood]),
        _labels([u.cause_type for u in understood]),
        pa.array([u.message for u in understood], pa.string()),
        _labels([u.component for u in understood]),
        _labels([u.stage for u in understood]),
        pa.array([u.attempts for u in understood], pa.int32()),
        pa.array([u.failed_at_ms for u in understood], pa.int64()),
        pa.array([u.origin for u in understood], pa.string()),
        pa.array([u.correlation_id for u in understood], pa.string()),
        pa.array([u.trace_id for u in understood], pa.string()),
        pa.array([u.dedupe_key for u in understood], pa.string()),
        pa.array([u.retry_count for u in understood], pa.int32()),
        _labels([g.category for g in groups]),
        _labels([g.remedy for g in groups]),
        _labels([g.rule for g in groups]),
        _labels([g.fingerprint for g in groups]),
    ]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def _labels(values: list[str | None]) -> pa.Array:
    return pa.array(values, pa.string()).dictionary_encode()


class Stored(msgspec.Struct, frozen=True, gc=False):
    """An archived record's bytes, as a job sends them."""

    part: int
    pos: int | None
    key: bytes | None
    value: bytes | None
    headers: Headers
    timestamp_ms: int | None


class Rows:
    """The stored records of a segment's table, by row number; cheap to take many of.

    :param wanted: only these rows of it, numbered anew from 0.
    :param keep: only headers whose name it accepts (default: all).
    """

    def __init__(
        self,
        table: pa.Table,
        wanted: Sequence[int] | None = None,
        keep: Callable[[str], bool] | None = None,
    ) -> None:
        if wanted is not None:
            table = table.take(_indices(array("q", wanted)))
        self._part = table["part"].to_pylist()
        self._pos = table["pos"].to_pylist()
        self._key = table["key"].to_pylist()
        self._value = table["value"].to_pylist()
        self._timestamp = table["timestamp_ms"].to_pylist()
        headers = table["headers"].combine_chunks()
        if isinstance(headers, pa.ChunkedArray):
            headers = headers.chunk(0)
        names, values, offsets = (
            headers.values.field(0).dictionary_encode(),
            headers.values.field(1),
            headers.offsets,
        )
        known = names.dictionary.to_pylist()  # few: the names of one producer's headers
        which = names.indices
        if keep is not None:
            kept = np.array([keep(name) for name in known], dtype=bool)[which.to_numpy()]
            where = _indices(np.flatnonzero(kept))
            which, values = which.take(where), values.take(where)
            self._offsets = np.concatenate(([0], np.cumsum(kept)))[offsets.to_numpy()].tolist()
        else:
            self._offsets = offsets.to_pylist()
        self._headers = list(zip([known[n] for n in which.to_pylist()], values.to_pylist(), strict=True))

    def __getitem__(self, row: int) -> Stored:
        start, end = self._offsets[row], self._offsets[row + 1]
        return Stored(
            self._part[row],
            self._pos[row],
            self._key[row],
            self._value[row],
            tuple(self._headers[start:end]),
            self._timestamp[row],
        )

    def __len__(self) -> int:
        return len(self._part)

    def payload_sha(self, row: int) -> str:
        return payload_sha(self._key[row], self._value[row])


def _indices(numbers: Any) -> pa.Array:
    """Row numbers (64 bits each) for ``take``; ``pa.array`` would import pandas for it."""
    return pa.Array.from_buffers(pa.int64(), len(numbers), [None, pa.py_buffer(numbers)])
