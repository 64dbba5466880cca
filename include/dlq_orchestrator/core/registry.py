"""The plugins as they run now: version, scopes, whether disabled; every change of them by whom and why."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import structlog

from dlq_orchestrator.plugins import Manifest
from dlq_orchestrator.store import Store

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Plugin:
    """A plugin as it runs. `revision` counts its changes."""

    name: str
    version: str
    scopes: frozenset[str]
    disabled: bool = False
    revision: int = 0


@dataclass(slots=True)
class Violation:
    """Calls of a plugin that reached for one scope it doesn't declare. `last_at` in epoch ms."""

    scope: str
    count: int
    last_at: int


@dataclass(frozen=True, slots=True)
class Change:
    """What a person (or policy) wants otherwise in a plugin, looked at when it was at `revision`; None: as it is."""

    revision: int
    person: str
    reason: str
    scopes: frozenset[str] | None = None
    version: str | None = None
    disabled: bool | None = None


class NoSuchPlugin(Exception):
    """No plugin has that name."""


class NotGrantable(Exception):
    """The manifest doesn't allow that version, or those scopes."""


class StaleRevision(Exception):
    """The plugin was changed since it was looked at."""


@dataclass(slots=True)
class _Kept:
    plugin: Plugin
    violations: dict[str, Violation] = field(default_factory=dict)


class Registry:
    """Knows the plugins; changes are durable and hold from the next call on.

    :param manifests: what each plugin declares. What a person set and a manifest no longer allows is dropped.
    """

    def __init__(self, store: Store, manifests: Mapping[str, Manifest]) -> None:
        self._store = store
        self.manifests = manifests
        self._lock = threading.Lock()
        self._unsaved: set[tuple[str, str]] = set()
        self._plugins: dict[str, _Kept] = {}
        with store.read() as db:
            set_by_hand = {row["name"]: row for row in db.execute("SELECT * FROM plugin")}
            violations = db.execute("SELECT * FROM violation").fetchall()
        for name, manifest in sorted(manifests.items()):
            plugin = Plugin(name, manifest.versions[0], manifest.scopes)
            if row := set_by_hand.get(name):
                scopes = frozenset(json.loads(row["scopes"])) & (manifest.scopes | manifest.grantable)
                version = row["version"] if row["version"] in manifest.versions else plugin.version
                plugin = Plugin(name, version, scopes, bool(row["disabled"]), row["revision"])
            self._plugins[name] = _Kept(plugin)
        for row in violations:
            if kept := self._plugins.get(row["plugin"]):
                kept.violations[row["scope"]] = Violation(row["scope"], row["count"], row["last_at"])

    def plugins(self) -> list[Plugin]:
        return [kept.plugin for kept in self._plugins.values()]

    def plugin(self, name: str) -> Plugin:
        """:raises NoSuchPlugin: see there."""
        try:
            return self._plugins[name].plugin
        except KeyError:
            raise NoSuchPlugin(f"no plugin {name!r}; there are: {', '.join(self._plugins)}") from None

    def violations(self, name: str) -> list[Violation]:
        with self._lock:
            return [replace(violation) for violation in self._plugins[name].violations.values()]

    def change(self, name: str, change: Change) -> Plugin:
        """Change a plugin, durably.

        :raises NoSuchPlugin, StaleRevision, NotGrantable: see there.
        """
        with self._lock:
            now = self.plugin(name)
            if change.revision != now.revision:
                raise StaleRevision(
                    f"{name} is at revision {now.revision}, not {change.revision}: look at it again"
                )
            manifest = self.manifests[name]
            if refused := (change.scopes or frozenset()) - manifest.scopes - manifest.grantable:
                raise NotGrantable(f"{name} can't be given {', '.join(sorted(refused))}")
            if change.version not in (None, *manifest.versions):
                raise NotGrantable(
                    f"{name} has no version {change.version}; it has {', '.join(manifest.versions)}"
                )
            changed = replace(
                now,
                version=now.version if change.version is None else change.version,
                scopes=now.scopes if change.scopes is None else change.scopes,
                disabled=now.disabled if change.disabled is None else change.disabled,
                revision=now.revision + 1,
            )
            scopes = json.dumps(sorted(changed.scopes))
            with self._store.transaction() as db:
                db.execute(
                    "INSERT INTO plugin VALUES (?, ?, ?, ?, ?) ON CONFLICT (name) DO UPDATE SET"
                    " version = excluded.version, scopes = excluded.scopes, disabled = excluded.disabled,"
                    " revision = excluded.revision",
                    [name, changed.version, scopes, changed.disabled, changed.revision],
                )
                db.execute(
                    "INSERT INTO plugin_change VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                    [
                        name,
                        changed.revision,
                        self._store.now_ms(),
                        change.person,
                        change.reason,
                        changed.version,
                        scopes,
                        changed.disabled,
                    ],
                )
            self._plugins[name].plugin = changed
        _log.info("plugin changed", plugin=name, revision=changed.revision, person=change.person)
        return changed

    def violated(self, name: str, scope: str) -> None:
        """A call reached for a scope its plugin doesn't declare."""
        with self._lock:
            found = self._plugins[name].violations.setdefault(scope, Violation(scope, 0, 0))
            found.count += 1
            found.last_at = self._store.now_ms()
            self._unsaved.add((name, scope))

    def save_counts(self, db: sqlite3.Connection) -> None:
        """Write the violations counted since the last time, in the caller's transaction."""
        with self._lock:
            unsaved, self._unsaved = self._unsaved, set()
            found = [(name, self._plugins[name].violations[scope]) for name, scope in unsaved]
            rows = [(name, v.scope, v.count, v.last_at) for name, v in found]
        db.executemany(
            "INSERT INTO violation VALUES (?, ?, ?, ?) ON CONFLICT (plugin, scope) DO UPDATE SET"
            " count = excluded.count, last_at = excluded.last_at",
            rows,
        )
