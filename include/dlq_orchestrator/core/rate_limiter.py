"""Quotas of the plugins, changed at run time within their ceilings."""

from __future__ import annotations

import sqlite3
import threading
from dataclasses import dataclass

from dlq_orchestrator.failures import MemoryQuotaExceeded
from dlq_orchestrator.store import Store


@dataclass(slots=True)
class Quota:
    """What one plugin may use of one resource.

    `resource` names the unit. `peak_need` is the most a call ever asked for, granted or not; `rejected`
    counts the calls that were refused.
    """

    plugin: str
    resource: str
    limit: int
    ceiling: int
    peak_need: int = 0
    rejected: int = 0


class UnknownPlugin(Exception):
    """No quota is kept for that plugin."""


class AboveCeiling(Exception):
    """A limit above the quota's ceiling was asked for."""

    def __init__(self, quota: Quota, limit: int) -> None:
        super().__init__(
            f"{limit} {quota.resource} is above the ceiling of {quota.plugin}, which is {quota.ceiling}"
        )
        self.ceiling = quota.ceiling


class RateLimiter:
    """Grants or refuses what plugin calls ask for. Limits are durable, and so are the counts once saved.

    :param memory_mb: limit and ceiling a plugin, for plugins the store doesn't know yet.
    """

    def __init__(self, store: Store, memory_mb: dict[str, tuple[int, int]]) -> None:
        self._store = store
        self._lock = threading.Lock()
        with store.transaction() as db:
            db.executemany(
                "INSERT INTO quota (plugin, resource, \"limit\", ceiling) VALUES (?, 'memory_mb', ?, ?)"
                " ON CONFLICT (plugin) DO UPDATE SET ceiling = excluded.ceiling,"
                ' "limit" = min("limit", excluded.ceiling)',
                [(plugin, limit, ceiling) for plugin, (limit, ceiling) in memory_mb.items()],
            )
            rows = db.execute("SELECT * FROM quota ORDER BY plugin").fetchall()
        self._quotas = {row["plugin"]: Quota(**row) for row in rows}
        self._changed: set[str] = set()

    def take_memory(self, plugin: str, needed_mb: int) -> None:
        """:raises MemoryQuotaExceeded: the call needs more than the plugin's limit."""
        quota = self._quotas.get(plugin)
        if quota is None:
            return
        with self._lock:
            self._changed.add(plugin)
            quota.peak_need = max(quota.peak_need, needed_mb)
            if needed_mb <= quota.limit:
                return
            quota.rejected += 1
            limit = quota.limit
        raise MemoryQuotaExceeded(f"{plugin} needs {needed_mb} MiB, its memory quota is {limit} MiB")

    def quotas(self) -> list[Quota]:
        return list(self._quotas.values())

    def set_limit(self, plugin: str, limit: int) -> Quota:
        """Change a limit, durably, for the next call on.

        :raises UnknownPlugin: no such quota.
        :raises AboveCeiling: the limit is above the quota's ceiling.
        """
        if plugin not in self._quotas:
            raise UnknownPlugin(f"no quota is kept for {plugin!r}; there are: {', '.join(self._quotas)}")
        quota = self._quotas[plugin]
        if limit > quota.ceiling:
            raise AboveCeiling(quota, limit)
        with self._store.transaction() as db:
            db.execute('UPDATE quota SET "limit" = ? WHERE plugin = ?', [limit, plugin])
            quota.limit = limit
        return quota

    def save_counts(self, db: sqlite3.Connection) -> None:
        """Write what was counted since the last time, in the caller's transaction."""
        with self._lock:
            changed, self._changed = self._changed, set()
        db.executemany(
            "UPDATE quota SET peak_need = ?, rejected = ? WHERE plugin = ?",
            [(q.peak_need, q.rejected, q.plugin) for q in map(self._quotas.__getitem__, changed)],
        )
