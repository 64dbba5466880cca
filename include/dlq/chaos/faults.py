"""What can be broken, by the orchestrator's contract alone: each fault knows how it begins, and its way back."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any, Protocol

from dlq.config import Chaos, ChaosFault, QueueConfig
from dlq.errors import ConfigError, Refused
from dlq.orchestrator import Level, Orchestrator, Plugin, PluginPatch

WHO = "dlq chaos"


def require_target(config: QueueConfig) -> Chaos:
    """What the queue's file allows.

    :raises Refused: it is not marked as a chaos target.
    """
    if config.chaos is None:
        raise Refused(
            f"queue {config.name} is no chaos target: nothing was broken. Give its file a section `chaos` if it may "
            "be, or name another queue"
        )
    return config.chaos


class Fault(Protocol):
    """One way to break something. Calls may raise `dlq.orchestrator.OrchestratorError`."""

    level: Level | None
    """Of the contract, that it needs."""
    broke: str
    """What it breaks, in words."""

    def before(self) -> dict[str, Any]:
        """What is to be brought back, as JSON; asked before :meth:`begin`."""

    def begin(self) -> None: ...

    def stop(self) -> None:
        """Its workflows have failed. What is the drain's to mend stays broken."""

    def undo(self, before: Mapping[str, Any]) -> None:
        """Bring back what was, whatever the drain made of it; undone twice is fine."""


class FailingCalls:
    """All calls of a plugin fail with one error."""

    level: Level | None = "faults"

    def __init__(self, orchestrator: Orchestrator, plugin: str, error: str, seconds: float) -> None:
        self._orchestrator = orchestrator
        self._plugin = plugin
        self._error = error
        self._seconds = seconds
        self._name = f"chaos-{plugin}-{error}"
        self.broke = f"each call of {plugin} fails with {error}"

    def before(self) -> dict[str, Any]:
        return {}

    def begin(self) -> None:
        self._orchestrator.inject_fault(self._name, self._plugin, self._error, self._seconds)

    def stop(self) -> None:
        self._orchestrator.end_fault(self._name)

    def undo(self, before: Mapping[str, Any]) -> None:
        self.stop()


class LowQuota:
    """A plugin's memory quota is too small for its calls, until somebody raises it."""

    level: Level | None = "quotas"

    def __init__(self, orchestrator: Orchestrator, plugin: str, memory_mb: int) -> None:
        self._orchestrator = orchestrator
        self._plugin = plugin
        self._limit = memory_mb
        self.broke = f"{plugin}'s memory quota is {memory_mb} MiB"

    def before(self) -> dict[str, Any]:
        return {"limit": self._now()}

    def begin(self) -> None:
        self._set(self._limit)

    def stop(self) -> None:
        """The drain raises it."""

    def undo(self, before: Mapping[str, Any]) -> None:
        if self._now() != before["limit"]:
            self._set(before["limit"])

    def _now(self) -> int:
        for quota in self._orchestrator.quotas():
            if (quota.plugin, quota.resource) == (self._plugin, "memory_mb"):
                return quota.limit
        raise ConfigError(f"chaos: plugin {self._plugin} has no quota of memory_mb; name one that has")

    def _set(self, limit: int) -> None:
        self._orchestrator.set_quota(self._plugin, limit, _key(self._plugin), "memory_mb")


class LostScope:
    """A plugin may no longer reach for a scope it needs, until somebody lets it."""

    level: Level | None = "plugins"

    def __init__(self, orchestrator: Orchestrator, plugin: str, scope: str) -> None:
        self._orchestrator = orchestrator
        self._plugin = plugin
        self._scope = scope
        self.broke = f"{plugin} may not reach for {scope}"

    def before(self) -> dict[str, Any]:
        scopes = self._now().scopes
        if self._scope not in scopes:
            raise ConfigError(f"chaos: {self._plugin} doesn't declare {self._scope}, but {', '.join(scopes)}")
        return {"scopes": scopes}

    def begin(self) -> None:
        self._patch([scope for scope in self._now().scopes if scope != self._scope])

    def stop(self) -> None:
        """The drain gives it back."""

    def undo(self, before: Mapping[str, Any]) -> None:
        if set(self._now().scopes) != set(before["scopes"]):
            self._patch(before["scopes"])

    def _now(self) -> Plugin:
        found = next((plugin for plugin in self._orchestrator.plugins() if plugin.name == self._plugin), None)
        if found is None:
            raise ConfigError(f"chaos: the orchestrator has no plugin {self._plugin}; name one of its own")
        return found

    def _patch(self, scopes: list[str]) -> None:
        patch = PluginPatch(self._now().revision, WHO, "chaos run", scopes=tuple(scopes))
        self._orchestrator.patch_plugin(self._plugin, patch, _key(self._plugin))


class CorruptRecords:
    """The records are cut short; nothing else is broken."""

    level: Level | None = None
    broke = "records are cut short"

    def before(self) -> dict[str, Any]:
        return {}

    def begin(self) -> None: ...

    def stop(self) -> None: ...

    def undo(self, before: Mapping[str, Any]) -> None: ...


def made(fault: ChaosFault, orchestrator: Orchestrator, seconds: float) -> Fault:
    """The fault that a queue's file describes.

    :param seconds: after which it ends by itself, where it can.
    """
    if fault.plugin is None:
        return CorruptRecords()
    if fault.memory_mb is not None:
        return LowQuota(orchestrator, fault.plugin, fault.memory_mb)
    if fault.scope is not None:
        return LostScope(orchestrator, fault.plugin, fault.scope)
    assert fault.error is not None  # the configuration's own check
    return FailingCalls(orchestrator, fault.plugin, fault.error, seconds)


def _key(plugin: str) -> str:
    return f"chaos {plugin} {secrets.token_hex(8)}"
