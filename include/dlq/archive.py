"""The archive: every dead letter's bytes in Parquet segments, written once, checksummed, read back as proof.

Beside them lie ``epochs/<n>.json`` (the ledger's id and epoch) and ``plans/<epoch>.<plan>.json`` (a plan's hash):
written outside the ledger before use, so that a lost, restored or second ledger is noticed. The archive is any folder
or object store ``UPath`` can reach.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from upath import UPath

from dlq.entry import Group, Headers, Record, Understood, payload_sha
from dlq.errors import ArchiveError, Refused

FORMAT_VERSION = 1

_HEADER = pa.struct([("name", pa.string()), ("value", pa.binary()), ("type", pa.string())])
_SYSTEM = pa.list_(pa.struct([("name", pa.string()), ("value", pa.string())]))
_DICT = pa.dictionary(pa.int32(), pa.string())
SCHEMA = pa.schema(
    [
        ("part", pa.int32()),
        ("place", pa.string()),
        ("pos", pa.int64()),
        ("key", pa.binary()),
        ("value", pa.binary()),
        ("headers", pa.list_(_HEADER)),
        ("system", _SYSTEM),
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
        ("origin_queue", pa.string()),
        ("pointer", pa.string()),
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

    def put(self, uri: str, data: bytes) -> None:
        """Keep a file of another kind beside the segments, durable when this returns.

        :raises ArchiveError: when it can't be written.
        """
        self._write(uri, data)

    def _write(self, uri: str, data: Any) -> None:
        path = self.root / uri
        part = f"{path}.part"
        try:
            if not self.is_local:
                path.write_bytes(bytes(data))
                return
            folder = path.parent
            if str(folder) not in self._made:
                folder.mkdir(parents=True, exist_ok=True)
                self._made.add(str(folder))
            with Path(part).open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            Path(part).rename(str(path))
            _sync_folder(str(folder))
        except OSError as error:
            if self.is_local:
                with suppress(OSError):  # on a full disk half a segment is room that others need
                    Path(part).unlink()
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

    def verified(
        self, uri: str, sha256: str, columns: Sequence[str] | None = None
    ) -> tuple[pa.Table, dict[str, Any]]:
        """A segment's table (of ``columns``, default: all) and what it says about itself, its sum checked first.

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
        table = _table(data, columns)
        return table, _about(table)

    def about(self, uri: str) -> tuple[dict[str, Any], str, int]:
        """What a segment says of itself, its file's sum and its rows; for adopting one that has no row in the ledger.

        :raises ArchiveError: when it is not a segment.
        """
        try:
            data = (self.root / uri).read_bytes()
            table = _table(data, ["place"])
            about = _about(table)
            if not {"source", "epoch", "ranges"} <= about.keys():
                raise ValueError("it is no segment of an intake")
        except (OSError, ValueError, pa.ArrowException) as error:
            raise ArchiveError(
                f"archive: segment {uri} can't be read: {error}; restore it from a backup of the archive"
            ) from error
        return about, hashlib.sha256(data).hexdigest(), table.num_rows

    def there(self) -> bool:
        """Whether the archive was ever used, as far as can be seen now: one that isn't mounted was not."""
        try:
            return bool((self.root / "epochs").exists())
        except OSError:
            return False

    def segments(self) -> Iterator[str]:
        """The uri of every segment file, in order of name."""
        folder = self.root / "segments"
        if folder.exists():
            yield from sorted(p.relative_to(self.root).as_posix() for p in folder.rglob("*.parquet"))

    def newest_epoch(self) -> tuple[int, str] | None:
        """The highest epoch written here and the ledger that wrote it."""
        folder = self.root / "epochs"
        names = (
            sorted((int(p.stem), p) for p in folder.glob("*.json") if p.stem.isdigit())
            if self.there()
            else []
        )
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
        if not self._mark(path, {"ledger": ledger_id, "epoch": epoch, "holder": holder}):
            other = "a copy of this" if self._ledger_of(path) == ledger_id else "another"
            raise Refused(
                f"archive {self.root}: epoch {epoch} was written by {other} ledger. Two ledgers on one queue would "
                "replay twice: point both at one ledger, or run `dlq ledger rebuild` on the one that stays"
            )

    def newest_plans(self) -> dict[str, str]:
        """The hash of each plan marked under the newest epoch that has any."""
        folder = self.root / "plans"
        names = sorted(p.name for p in folder.glob("*.json")) if folder.exists() else []
        newest = [folder / name for name in names if name.partition(".")[0] == names[-1].partition(".")[0]]
        return {plan: digest for plan, digest in map(self._plan_of, newest) if digest}

    def _plan_of(self, path: UPath) -> tuple[str, str]:
        try:
            found = json.loads(path.read_text())
            return str(found["plan"]), str(found["hash"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArchiveError(
                f"archive: {path} does not say which plan it marks: {error}; restore it from a backup of the archive"
            ) from error

    def claim_plan(self, epoch: int, plan: str, digest: str) -> None:
        """Mark a plan before its first output, durable when this returns; marked before, it is as it was.

        A rebuilt ledger marks "nothing" (an empty ``digest``): what was marked before it is known to be in doubt.

        :raises Refused: when another plan of this name was marked: the ledger forgot that one.
        :raises ArchiveError: when it can't be written.
        """
        path = self.root / "plans" / f"{epoch:09d}.{plan}.json"
        if not self._mark(path, {"plan": plan, "hash": digest}) and self._plan_of(path)[1] != digest:
            raise Refused(
                f"archive {self.root}: another plan {plan} was carried out: the ledger was restored from an older "
                "backup. Run `dlq ledger rebuild`: it adopts what the archive has, as in doubt"
            )

    def _mark(self, path: UPath, says: Mapping[str, Any]) -> bool:
        """A small file, create-only, durable when this returns; False where it is there."""
        body = json.dumps(says)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if self.is_local:
                _create(Path(str(path)), body)
            else:
                with path.open("x") as file:
                    file.write(body)
        except FileExistsError:
            return False
        except OSError as error:
            raise ArchiveError(f"archive: {path} can't be written: {error}; nothing was changed") from error
        return True


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
    typed = [kind for record in records for kind in record.types]
    headers = pa.ListArray.from_arrays(
        pa.array(offsets, pa.int32()),
        pa.StructArray.from_arrays(
            [
                pa.array(names, pa.string()),
                pa.array(values, pa.binary()),
                pa.array(typed, pa.string()) if typed else pa.nulls(len(names), pa.string()),
            ],
            fields=list(_HEADER),
        ),
    )
    system = [
        [{"name": name, "value": value} for name, value in r.system] if r.system else None for r in records
    ]
    columns = [
        pa.array([r.part for r in records], pa.int32()),
        pa.array([r.place for r in records], pa.string()),
        pa.array([r.pos for r in records], pa.int64()),
        pa.array([r.key for r in records], pa.binary()),
        pa.array([r.value for r in records], pa.binary()),
        headers,
        pa.array(system, _SYSTEM),
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
        pa.array([u.origin_queue for u in understood], pa.string()),
        pa.array([u.pointer for u in understood], pa.string()),
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
    types: tuple[str, ...] = ()
    system: tuple[tuple[str, str], ...] = ()


STORED = ("part", "pos", "key", "value", "headers", "system", "timestamp_ms")
"""The columns that :class:`Rows` reads."""


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
            table = _chosen(table, wanted)
        self._part = table["part"].to_pylist()
        self._pos = table["pos"].to_pylist()
        self._key = table["key"].to_pylist()
        self._value = table["value"].to_pylist()
        self._timestamp = table["timestamp_ms"].to_pylist()
        headers = table["headers"].combine_chunks()
        if isinstance(headers, pa.ChunkedArray):
            headers = headers.chunk(0)
        # Of a slice, ``values`` and its fields are the whole array's: the offsets say which are ours.
        first, last = headers.offsets[0].as_py(), headers.offsets[-1].as_py()
        pairs = headers.values.slice(first, last - first)
        names, values, types = pairs.field(0).dictionary_encode(), pairs.field(1), pairs.field(2)
        offsets = pc.subtract(headers.offsets, first)
        known = names.dictionary.to_pylist()  # few: the names of one producer's headers
        which = names.indices
        if keep is not None:
            kept = np.array([keep(name) for name in known], dtype=bool)[which.to_numpy()]
            where = _indices(np.flatnonzero(kept))
            which, values, types = which.take(where), values.take(where), types.take(where)
            self._offsets = np.concatenate(([0], np.cumsum(kept)))[offsets.to_numpy()].tolist()
        else:
            self._offsets = offsets.to_pylist()
        self._headers = list(zip([known[n] for n in which.to_pylist()], values.to_pylist(), strict=True))
        self._types = types.to_pylist() if types.null_count < len(types) else None  # none: of Kafka
        system = table["system"]
        self._system = system.to_pylist() if system.null_count < len(table) else None

    def __getitem__(self, row: int) -> Stored:
        start, end = self._offsets[row], self._offsets[row + 1]
        return Stored(
            self._part[row],
            self._pos[row],
            self._key[row],
            self._value[row],
            tuple(self._headers[start:end]),
            self._timestamp[row],
            () if self._types is None else tuple(self._types[start:end]),
            () if self._system is None else tuple((s["name"], s["value"]) for s in self._system[row] or ()),
        )

    def __len__(self) -> int:
        return len(self._part)

    def payload_sha(self, row: int) -> str:
        return payload_sha(self._key[row], self._value[row])


def _chosen(table: pa.Table, rows: Sequence[int]) -> pa.Table:
    """These rows of it; where they are neighbours, without a copy."""
    if rows and rows[-1] - rows[0] == len(rows) - 1 and all(map(int.__lt__, rows, rows[1:])):
        return table.slice(rows[0], len(rows))
    return table.take(_indices(array("q", rows)))


def _indices(numbers: Any) -> pa.Array:
    """Row numbers (64 bits each) for ``take``; ``pa.array`` would import pandas for it."""
    return pa.Array.from_buffers(pa.int64(), len(numbers), [None, pa.py_buffer(numbers)])
