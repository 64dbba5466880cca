"""What a report says of a drain, as data: the JSON file's layout."""

from __future__ import annotations

from typing import Any

import msgspec

LAYOUT = "dlq-report/1"
"""Names the JSON's layout; the number goes up when a field changes its meaning or goes."""


class Numbers(msgspec.Struct, frozen=True):
    """Entries, counted as the report is made. ``success`` is confirmed ÷ (confirmed + returned)."""

    open_before: int
    taken: int
    settled: int
    unsettled: int
    confirmed: int
    unconfirmed: int
    returned: int
    duplicate: int
    discarded: int
    handed_back: int
    success: float | None
    success_asked: float
    depth: int | None

    @property
    def replayed(self) -> int:
        return self.confirmed + self.unconfirmed + self.returned

    @property
    def balanced(self) -> bool:
        return self.open_before + self.taken == self.settled + self.unsettled


class Group(msgspec.Struct, frozen=True):
    """Entries of one group that this drain took or settled, or that are still open."""

    id: int
    fingerprint: str
    signature: str
    component: str
    error_type: str
    category: str
    remedy: str
    rule: str
    owner: str
    total: int
    taken: int
    confirmed: int
    unconfirmed: int
    returned: int
    aside: int
    open: int
    example: str | None


class Open(msgspec.Struct, frozen=True):
    """Entries of one group that are not settled, for one reason, with one owner."""

    count: int
    state: str
    reason: str
    owner: str
    work: int | None
    group: int
    signature: str
    oldest_failure: str | None
    first_expiry: str | None
    held_until: str | None
    held_for: str | None = None
    """What the newest look at a held group said."""


class Hop(msgspec.Struct, frozen=True):
    """An entry and its last replay, in the history of one that keeps failing."""

    part: int
    place: str
    failed_at: str | None
    job: str | None
    sent_at: str | None


class Poison(msgspec.Struct, frozen=True):
    """An unsettled entry that failed after as many replays as it may (``limits.returns``)."""

    part: int
    place: str
    replays: int
    owner: str
    signature: str
    history: list[Hop]


class Job(msgspec.Struct, frozen=True):
    id: str
    stage: str
    kind: str
    canary: bool
    target: str
    size: int
    cursor: int
    state: str
    ended: str | None
    confirmed: int
    unconfirmed: int
    returned: int
    plan_hash: str
    decision: int | None


class Repair(msgspec.Struct, frozen=True):
    """A repair whose drafts this drain sent: the patch (its file lies in the archive) and what it was made of."""

    id: int
    at: str
    who: str
    chosen: str
    patch_sha: str
    drafted: int
    unchanged: int
    failed: int
    sent: int


class Decided(msgspec.Struct, frozen=True):
    id: int
    at: str
    who: str
    kind: str
    subject: str
    saw: str
    choice: str


class Note(msgspec.Struct, frozen=True):
    at: str
    stage: str
    level: str
    text: str


class Stage(msgspec.Struct, frozen=True):
    """A stage by its last note; ``seconds`` is how long it took, where that can be told."""

    name: str
    level: str
    text: str
    seconds: float | None


class Intake(msgspec.Struct, frozen=True):
    """What was read of one partition, over all rounds of this drain."""

    source: str
    part: int
    rounds: int
    from_pos: int | None
    cutoff: int | None
    to_pos: int | None
    again: int
    vanished_max: int


class Proof(msgspec.Struct, frozen=True):
    """What ``verify_conservation`` wrote down, last. ``proven`` None: it did not run."""

    at: str | None
    proven: bool | None
    broken: list[dict[str, Any]]
    witnesses: dict[str, Any]
    expectations: list[Any]
    seen_once_by: str

    @property
    def laws(self) -> list[str]:
        """The broken laws, each once."""
        return sorted({str(b.get("law")) for b in self.broken})


class Point(msgspec.Struct, frozen=True):
    """Entries up to a moment."""

    at: str
    taken: int
    replayed: int
    confirmed: int
    returned: int


class ReportData(msgspec.Struct, frozen=True):
    """All a report says. Times are ISO 8601 UTC; no payload is in it, dead letters' text is redacted."""

    schema: str
    made_at: str
    drain: str
    queue: str
    kind: str
    run_id: str
    epoch: int
    opened_at: str
    closed_at: str | None
    seconds: float
    phase: str | None
    verdict: str | None
    reasons: list[str]
    incident: dict[str, Any] | None
    numbers: Numbers
    groups: list[Group]
    group_count: int
    suspects: list[dict[str, Any]]
    open: list[Open]
    open_by_owner: dict[str, int]
    dies_first: str | None
    poison: list[Poison]
    poison_count: int
    stages: list[Stage]
    decisions: list[Decided]
    jobs: list[Job]
    repairs: list[Repair]
    notes: list[Note]
    note_count: int
    timeline: list[Point]
    proof: Proof
    golden: dict[str, Any] | None
    intake: list[Intake]
    vanished_max: int
    policy: dict[str, Any]
