"""Repair: one JSON Patch for a whole group, through the payload's codec. It makes drafts, and review sends them."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

from sqlalchemy import ColumnElement, Connection, and_, case, func, insert, not_, select, update

from dlq import clock, drafts
from dlq.archive import Archive, Rows
from dlq.codecs import CodecError, decode, registry_of
from dlq.config import QueueConfig
from dlq.entry import FLAWS, payload_sha
from dlq.errors import ArchiveError, Refused
from dlq.ledger import Ledger, insert_rows, schema
from dlq.ledger import jobs as ledger_jobs
from dlq.ledger.schema import draft, entry, grp, repair_failure, segment
from dlq.patch import Change, Patch, changes
from dlq.ports import Connections
from dlq.selection import Selection

if TYPE_CHECKING:
    from dlq.codecs.registry import SchemaRegistry

Progress = Callable[[int, int], None]
"""Called with (done, of)."""

SAMPLE = 10
"""How many entries a preview shows, from the first to the last of them."""

_COPIES = ("conflict", "twin_not_sent", "twin_discarded", "twin_handed_back")
"""Reasons of entries that say they are another's copy: such a one is edited by itself, or not at all."""

_PERSONAL = ("open", "ambiguous")
_PAGE = 2_000
_REASONS = 100  # counted apart: any dead letter may name a schema of its own
_TOLD = 3  # entries of the sample in a form


@dataclass(frozen=True)
class Shown:
    """One entry of a preview: what changes in it, or why nothing can."""

    entry: str
    encoding: str
    changes: tuple[Change, ...] = field(repr=False)
    why: str | None = None


@dataclass
class Repair:
    """What a patch makes of the entries chosen. ``id`` and ``hash`` None: nothing was written (a dry run), or no entry
    took the patch."""

    patch: Patch = field(repr=False)
    chosen: str
    entries: int
    left_out: dict[str, int]
    id: int | None = None
    hash: str | None = None
    drafted: int = 0
    unchanged: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    sample: list[Shown] = field(default_factory=list)

    def redacted(self) -> list[dict[str, Any]]:
        """The sample without a value of any payload."""
        return [
            {
                "entry": each.entry,
                "encoding": each.encoding,
                "why": each.why,
                "changes": [change.redacted(self.patch.named) for change in each.changes],
            }
            for each in self.sample
        ]


def make(
    config: QueueConfig,
    chosen: Selection,
    patch: Patch,
    who: str,
    connections: Connections,
    *,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Repair:
    """Draft the patched value of each chosen entry that waits for a person. An entry that can't be patched, or whose
    schema refuses the result, is written down with the reason, and stops nothing.

    Needs no lease, for nothing of an entry changes. A dry run does it all but write.

    :raises ConfigError: when the selection names what the ledger doesn't have.
    :raises Refused: when none of the chosen entries waits for a person.
    :raises RegistryError: when the schema registry did not answer; nothing of the repair counts then.
    """
    ledger, archive = Ledger.open(config.ledger), Archive(config.archive, config.name)
    try:
        with ledger.read() as tx:
            ours = chosen.condition(tx, config.name)
            found = _found(tx, ours, patch, _named(chosen))
        if not dry_run:
            archive.put(uri := f"drafts/{patch.sha}.patch.json", patch.text)
            with ledger.write(config.name, None) as tx:
                row = insert(schema.repair).values(
                    queue=config.name,
                    who=who,
                    at=clock.now(),
                    chosen=found.chosen,
                    patch_sha=patch.sha,
                    patch_uri=uri,
                )
                found.id = int(tx.execute(row.returning(schema.repair.c.id)).scalar_one())
        with registry_of(config, connections) as registry, ledger.read() as tx:
            _Pass(ledger, archive, config.name, found, registry, who, progress).run(tx, ours)
        if found.id is not None:
            _finish(ledger, config.name, found, found.id, who)
    finally:
        ledger.close()
    return found


def waits() -> ColumnElement[bool]:
    """Entries that a repair may take: open, nobody else's to send, and sendable once they are mended."""
    return and_(
        entry.c.state == "open",
        entry.c.reason.not_in((*drafts.NOT_YET, *_COPIES, *FLAWS)),
        entry.c.duplicate_of.is_(None),
        entry.c.target.is_not(None),
    )


def mark_failed(tx: Connection, queue: str) -> int:
    """Say of entries that wait for a person why they still do: a repair was tried on them and failed, and no draft of
    theirs waits. Returns of how many."""
    whole = select(schema.repair.c.id).where(schema.repair.c.drafted.is_not(None))
    failed = select(repair_failure.c.entry).where(repair_failure.c.repair.in_(whole))
    drafted = select(draft.c.entry).where(drafts.counts(draft))
    ours = and_(entry.c.queue == queue, entry.c.state == "open", entry.c.reason == "waiting_for_person")
    marked = update(entry).where(ours, entry.c.id.in_(failed), entry.c.id.not_in(drafted))
    return int(tx.execute(marked.values(reason="repair_failed")).rowcount)


def _named(chosen: Selection) -> str:
    kinds = (("group", chosen.groups), ("entry", chosen.entries))
    return ", ".join(f"{kind} {', '.join(map(str, some))}" for kind, some in kinds if some)


def _found(tx: Connection, ours: ColumnElement[bool], patch: Patch, chosen: str) -> Repair:
    count = int(tx.execute(select(func.count()).select_from(entry).where(ours, waits())).scalar_one())
    why = case((entry.c.state == "open", entry.c.reason), else_=entry.c.state)
    others = tx.execute(
        select(why, func.count()).where(ours, not_(waits())).group_by(why).order_by(why)
    ).all()
    left_out = {str(reason): int(n) for reason, n in others}
    if not count:
        known = (
            ", ".join(f"{n:,} {reason.replace('_', ' ')}" for reason, n in left_out.items())
            or "none is there"
        )
        raise Refused(f"{chosen}: no entry waits for a person ({known}); nothing was written")
    return Repair(patch, chosen, count, left_out)


class _Pass:
    """One reading of the chosen entries, segment by segment: what it holds is one segment and its drafts."""

    def __init__(
        self,
        ledger: Ledger,
        archive: Archive,
        queue: str,
        repair: Repair,
        registry: SchemaRegistry | None,
        who: str,
        progress: Progress | None,
    ) -> None:
        self._ledger = ledger
        self._archive = archive
        self._queue = queue
        self._repair = repair
        self._registry = registry
        self._who = who
        self._progress = progress
        self._done = 0
        self._apart = max(1, -(-repair.entries // SAMPLE))  # of the entries shown

    def run(self, tx: Connection, ours: ColumnElement[bool]) -> None:
        rows = tx.execute(
            select(
                entry.c.id,
                entry.c.part,
                entry.c.place,
                entry.c.payload_sha,
                entry.c.row_no,
                segment.c.uri,
                segment.c.sha256,
            )
            .join(segment, segment.c.id == entry.c.segment)
            .where(ours, waits())
            .order_by(entry.c.segment, entry.c.row_no)
            .execution_options(yield_per=_PAGE)
        )
        for (uri, sha256), group in groupby(rows, lambda row: (row.uri, row.sha256)):
            self._segment(uri, sha256, list(group))
            if self._progress is not None:
                self._progress(self._done, self._repair.entries)

    def _segment(self, uri: str, sha256: str, entries: Sequence[Any]) -> None:
        repair = self._repair
        failures: list[tuple[int, str]] = []
        revisions: list[tuple[int, int, bytes | None, str]] = []
        try:
            table, about = self._archive.verified(uri, sha256)
        except ArchiveError as error:
            failures = [(row.id, str(error)) for row in entries]
            self._done += len(entries)
        else:
            rows = Rows(table, [row.row_no for row in entries])
            for number, row in enumerate(entries):
                try:
                    value = self._patched(rows, number, row)
                except CodecError as error:
                    failures.append((row.id, str(error)))
                    self._show(row, "not patched", (), str(error))
                    continue
                if value == rows[number].value:
                    repair.unchanged += 1
                else:
                    revisions.append((row.id, row.row_no, value, payload_sha(rows[number].key, value)))
        for _, why in failures:
            repair.failed[
                why if why in repair.failed or len(repair.failed) < _REASONS else "other reasons"
            ] += 1
        repair.drafted += len(revisions)
        if repair.id is None:
            return
        if revisions:
            said = {
                "source": about["source"],
                "draft_of": uri,
                "repair": repair.id,
                "patch": repair.patch.sha,
            }
            drafts.store(
                self._ledger, self._archive, self._queue, table, revisions, said, self._who, repair.id
            )
        with self._ledger.write(self._queue, None) as tx:
            lines = [(repair.id, number, why) for number, why in failures]
            insert_rows(tx, repair_failure, ("repair", "entry", "why"), lines)

    def _patched(self, rows: Rows, number: int, row: Any) -> bytes | None:
        """
        :raises CodecError: when there is no patched value.
        """
        if rows.payload_sha(number) != row.payload_sha:
            raise CodecError("the archive's bytes are not those taken; restore it from a backup")
        stored = rows[number]
        decoded = decode(stored.value, stored.headers, self._registry)
        document = self._repair.patch.apply(decoded.document)
        value = decoded.encode(document)
        self._show(row, str(decoded.encoding), changes(decoded.document, document), None)
        return value

    def _show(self, row: Any, encoding: str, differs: Iterable[Change], why: str | None) -> None:
        """Put it into the sample where its turn has come."""
        if self._done % self._apart == 0:
            self._repair.sample.append(Shown(f"{row.part}/{row.place}", encoding, tuple(differs), why))
        self._done += 1


def _finish(ledger: Ledger, queue: str, made: Repair, number: int, who: str) -> None:
    """From here on its drafts count; what the person saw and chose is on record."""
    failed = made.failed.total()
    with ledger.write(queue, None) as tx:
        tx.execute(
            update(schema.repair)
            .where(schema.repair.c.id == number)
            .values(
                drafted=made.drafted,
                unchanged=made.unchanged,
                failed=failed,
                sample=json.dumps(made.redacted()),
            )
        )
        saw = f"{made.entries} entries of {made.chosen}, left out {sum(made.left_out.values())}"
        choice = (
            f"patch {made.patch.sha}: {made.drafted} drafted, {made.unchanged} unchanged, {failed} failed"
        )
        ledger_jobs.record_decision(tx, queue, who, "repair", f"repair {number}", saw, choice)
    with ledger.read() as tx:
        made.hash = digest(tx, number) if made.drafted else None


def proposals(tx: Connection, queue: str) -> list[dict[str, Any]]:
    """Each repair with drafts that wait for a person's word, as :func:`dlq.review.proposals` has them."""
    rows = tx.execute(
        select(
            *(schema.repair.c[name] for name in ("id", "who", "chosen", "patch_sha", "failed", "sample")),
            func.count().label("count"),
            *(func.min(grp.c[name]).label(name) for name in ("error_type", "component", "owner")),
        )
        .join(draft, draft.c.repair == schema.repair.c.id)
        .join(entry, entry.c.id == draft.c.entry)
        .join(grp, grp.c.id == entry.c.grp)
        .where(schema.repair.c.queue == queue, drafts.newest(), entry.c.state.in_(_PERSONAL))
        .group_by(schema.repair.c.id)
        .order_by(schema.repair.c.id)
    ).mappings()
    return [
        {
            "subject": f"repair {r['id']}",
            "count": r["count"],
            "reason": f"repair of {r['chosen']} by {r['who']}",
            **{name: r[name] for name in ("error_type", "component", "owner")},
            "hash": digest(tx, r["id"]),
            "summary": f"{r['count']} x {r['error_type']} in {r['component']}: repair of {r['chosen']} by {r['who']}, "
            f"patch {r['patch_sha'][:12]}; it failed on {r['failed']} more. {_in_words(json.loads(r['sample']))}",
        }
        for r in rows.all()
    ]


def _in_words(sample: Sequence[dict[str, Any]]) -> str:
    told = [
        f"{each['entry']}: {', '.join(f'{where} {before} → {after}' for where, before, after in each['changes'])}"
        for each in sample
        if each["changes"]
    ]
    return "; ".join(told[:_TOLD])


def digest(tx: Connection, number: int) -> str:
    """The hash of what a repair would send now: its patch, and its drafts that are their entries' newest and wait for
    a person's word."""
    sha = tx.execute(select(schema.repair.c.patch_sha).where(schema.repair.c.id == number)).scalar_one()
    found = hashlib.sha256(f"repair {number} {sha}\n".encode())
    rows = tx.execute(
        select(draft.c.id, draft.c.entry, draft.c.payload_sha)
        .join(entry, entry.c.id == draft.c.entry)
        .where(draft.c.repair == number, drafts.newest(), entry.c.state.in_(_PERSONAL))
        .order_by(draft.c.entry)
        .execution_options(yield_per=_PAGE)
    )
    for row in rows:
        found.update(f"{row.id} {row.entry} {row.payload_sha}\n".encode())
    return found.hexdigest()
