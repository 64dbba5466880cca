"""What plugins, their tools and tenants may use: memory, calls a second, calls at once. Changed at run time."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Literal

from dlq_orchestrator.failures import MemoryQuotaExceeded, QuotaExceeded
from dlq_orchestrator.store import Store
from dlq_orchestrator.workflow import Step

Resource = Literal["memory_mb", "calls_per_s", "concurrency"]

PATIENCE_S = 1.0
"""A call waits so long for its turn before it is refused."""

# limit and ceiling
_PLUGIN_CALLS_PER_S = _TOOL_CALLS_PER_S = (5_000, 20_000)
_TENANT_CALLS_PER_S = (2_000, 20_000)
# less than the sandbox has processes: one plugin that hangs leaves some to the others
_CONCURRENCY = (8, 12)
# tenants are names in documents: whoever makes them up fills no memory with it
_TENANTS_MAX = 1_000
_OTHER_TENANTS = "tenant:others"


@dataclass(slots=True)
class Quota:
    """What one subject may use of one resource.

    `plugin` is the subject: a plugin, a tool (`payments.charge`), a tenant (`tenant:acme`). `resource` names the
    unit. `peak_need` is the most that was ever asked for, granted or not; `rejected` counts the calls refused.
    """

    plugin: str
    resource: Resource
    limit: int
    ceiling: int
    peak_need: int = 0
    rejected: int = 0


class UnknownPlugin(Exception):
    """No such quota is kept."""


class AboveCeiling(Exception):
    """A limit above the quota's ceiling was asked for."""

    def __init__(self, quota: Quota, limit: int) -> None:
        super().__init__(
            f"{limit} {quota.resource} is above the ceiling of {quota.plugin}, which is {quota.ceiling}"
        )
        self.ceiling = quota.ceiling


@dataclass(slots=True)
class _Bucket:
    """A token bucket that holds a second's worth, by its virtual clock: `full_at` is when it will be full again.

    `asked` counts the calls of the second `second`.
    """

    full_at: float = 0.0
    second: int = 0
    asked: int = 0

    def take(self, rate: int, now: float) -> float:
        """Take a token; seconds until there is one. Nothing is taken where that is longer than `PATIENCE_S`."""
        if int(now) != self.second:
            self.second, self.asked = int(now), 0
        self.asked += 1
        full_at = max(self.full_at, now) + 1 / rate
        wait = full_at - now - 1
        if wait <= PATIENCE_S:
            self.full_at = full_at
        return max(0.0, wait)


class RateLimiter:
    """Grants or refuses what calls ask for. Limits are durable, and so are the counts once saved.

    :param memory_mb: limit and ceiling of a plugin's calls, for plugins the store doesn't know yet.
    :param tools: the tools, each with its own calls a second.
    :param now: the clock of the buckets, seconds.
    """

    def __init__(
        self,
        store: Store,
        memory_mb: Mapping[str, tuple[int, int]],
        tools: Iterable[str],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._now = now
        self._lock = threading.Lock()
        self._buckets: dict[str, _Bucket] = {}
        self._at_work: dict[str, int] = {}
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        self._changed: set[tuple[str, str]] = set()
        known: list[tuple[str, Resource, tuple[int, int]]] = []
        for plugin, memory in memory_mb.items():
            known.append((plugin, "memory_mb", memory))
            known.append((plugin, "calls_per_s", _PLUGIN_CALLS_PER_S))
            known.append((plugin, "concurrency", _CONCURRENCY))
        known += [(tool, "calls_per_s", _TOOL_CALLS_PER_S) for tool in tools]
        with store.transaction() as db:
            db.executemany(
                'INSERT INTO quota (plugin, resource, "limit", ceiling) VALUES (?, ?, ?, ?)'
                " ON CONFLICT (plugin, resource) DO UPDATE SET ceiling = excluded.ceiling,"
                ' "limit" = min("limit", excluded.ceiling)',
                [(subject, resource, *limits) for subject, resource, limits in known],
            )
            rows = db.execute("SELECT * FROM quota ORDER BY plugin, resource").fetchall()
        self._quotas = {(row["plugin"], row["resource"]): Quota(**row) for row in rows}

    def grant_memory(self, step: Step, needed_mb: int) -> int:
        """How much memory the call may take, MiB.

        :raises MemoryQuotaExceeded: it declares to need more than the plugin's limit.
        """
        quota = self._quotas[step.plugin, "memory_mb"]
        with self._lock:
            limit = quota.limit
            if self._counted(quota, needed_mb, refused=needed_mb > limit):
                return limit
        raise MemoryQuotaExceeded(f"{step.plugin} needs {needed_mb} MiB, its memory quota is {limit} MiB")

    async def take_turn(self, step: Step, tenant: str | None) -> None:
        """Wait for the call's turn among those of its plugin, its tool and its tenant.

        :raises QuotaExceeded: that would take longer than `PATIENCE_S`; says when to come again.
        """
        subjects = [step.plugin, step.component, *([self._tenant(tenant)] if tenant else [])]
        wait = 0.0
        for subject in subjects:
            quota = self._quotas[subject, "calls_per_s"]
            with self._lock:
                bucket = self._buckets.setdefault(subject, _Bucket())
                own = bucket.take(quota.limit, self._now())
                if not self._counted(quota, bucket.asked, refused=own > PATIENCE_S):
                    raise QuotaExceeded(
                        f"{subject} is past its {quota.limit} calls a second: retry after {own * 1000:.0f} ms",
                        own,
                    )
            wait = max(wait, own)
        if wait:
            await asyncio.sleep(wait)

    @asynccontextmanager
    async def among(self, step: Step) -> AsyncIterator[None]:
        """One of the calls of its plugin that run at once; waits, first come, first served, while there are enough."""
        quota = self._quotas[step.plugin, "concurrency"]
        waiting = self._waiting.setdefault(step.plugin, deque())
        at_work = self._at_work.get(step.plugin, 0)
        with self._lock:
            self._counted(quota, at_work + len(waiting) + 1, refused=False)
        if at_work < quota.limit:
            self._at_work[step.plugin] = at_work + 1
        else:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            waiting.append(turn)
            await turn  # whoever ends hands its place on
        try:
            yield
        finally:
            self._at_work[step.plugin] -= 1
            while waiting and self._at_work[step.plugin] < quota.limit:
                if not (turn := waiting.popleft()).done():
                    self._at_work[step.plugin] += 1
                    turn.set_result(None)

    def quotas(self) -> list[Quota]:
        return list(self._quotas.values())

    def set_limit(self, plugin: str, limit: int, resource: Resource = "memory_mb") -> Quota:
        """Change a limit, durably, for the next call on.

        :raises UnknownPlugin: no such quota.
        :raises AboveCeiling: the limit is above the quota's ceiling.
        """
        quota = self._quotas.get((plugin, resource))
        if quota is None:
            known = ", ".join(subject for subject, kept in self._quotas if kept == resource)
            raise UnknownPlugin(f"no quota {resource} is kept for {plugin!r}; there are: {known}")
        if limit > quota.ceiling:
            raise AboveCeiling(quota, limit)
        with self._store.transaction() as db:
            db.execute(
                'UPDATE quota SET "limit" = ? WHERE plugin = ? AND resource = ?', [limit, plugin, resource]
            )
            quota.limit = limit
        return quota

    def save_counts(self, db: sqlite3.Connection) -> None:
        """Write what was counted since the last time, in the caller's transaction."""
        with self._lock:
            changed, self._changed = self._changed, set()
        db.executemany(
            "INSERT INTO quota VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (plugin, resource) DO UPDATE"
            " SET peak_need = excluded.peak_need, rejected = excluded.rejected",
            [
                (q.plugin, q.resource, q.limit, q.ceiling, q.peak_need, q.rejected)
                for q in map(self._quotas.__getitem__, changed)
            ],
        )

    def _counted(self, quota: Quota, need: int, *, refused: bool) -> bool:
        """Count what was asked for; returns whether it is granted."""
        if need > quota.peak_need or refused:
            self._changed.add((quota.plugin, quota.resource))
        quota.peak_need = max(quota.peak_need, need)
        quota.rejected += refused
        return not refused

    def _tenant(self, name: str) -> str:
        """The subject of a tenant's quota, which begins with its first call."""
        subject = f"tenant:{name}"
        with self._lock:
            if (subject, "calls_per_s") in self._quotas:
                return subject
            if sum(kept.startswith("tenant:") for kept, _ in self._quotas) >= _TENANTS_MAX:
                subject = _OTHER_TENANTS
            self._quotas.setdefault(
                (subject, "calls_per_s"), Quota(subject, "calls_per_s", *_TENANT_CALLS_PER_S)
            )
            self._changed.add((subject, "calls_per_s"))
        return subject
