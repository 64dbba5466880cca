"""What a fix can be: a quota raised, a plugin given the scopes it reached for. Each knows its evidence, its bounds and
its way back.

A fix is a mapping that the ledger keeps: ``remedy``, ``plugin``, ``change`` (what it makes of it, short), ``says`` (a
line for people), ``within_policy``, and what its remedy needs to apply and undo it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

from dlq.config import QueueConfig
from dlq.orchestrator import Level, Orchestrator, Plugin, PluginPatch, Quota

Fix = dict[str, Any]


class Remedy(Protocol):
    """One kind of fix. Its calls may raise `dlq.orchestrator.OrchestratorError`."""

    level: Level

    def evidence(self, orchestrator: Orchestrator) -> Mapping[str, Any]:
        """What the orchestrator knows, by plugin."""

    def propose(self, plugin: str, found: Any, config: QueueConfig) -> Fix | str:
        """The fix that the evidence calls for (None: there is none), or why there is none."""

    def apply(self, orchestrator: Orchestrator, fix: Fix, who: str, key: str) -> str:
        """Make the change; returns what is now."""

    def undo(self, orchestrator: Orchestrator, fix: Fix, key: str) -> str:
        """Take the change back, unless somebody changed it since; returns what was done."""


class RaiseQuota:
    """A plugin's quota, to the need that was seen and some headroom."""

    level: Level = "quotas"

    def evidence(self, orchestrator: Orchestrator) -> Mapping[str, Quota]:
        """Of a plugin's quotas the one that was exceeded; of several, or of none, its memory."""

        def telling(quota: Quota) -> tuple[bool, bool]:
            return quota.peak_need > quota.limit, quota.resource == "memory_mb"

        return {quota.plugin: quota for quota in sorted(orchestrator.quotas(), key=telling)}

    def propose(self, plugin: str, found: Quota | None, config: QueueConfig) -> Fix | str:
        if found is None or found.peak_need <= found.limit:
            return "no such quota" if found is None else "its quota was never exceeded"
        policy = config.quotas
        names = [name for name in (f"{plugin}.{found.resource}", plugin) if name in policy.ceilings]
        bound = min(found.ceiling, policy.ceilings[names[0]] if names else found.ceiling)
        proposed = min(bound, math.ceil(found.peak_need * policy.headroom))
        if proposed < found.peak_need:
            return f"needs {found.peak_need}, the ceiling is {bound:g}"
        return {
            "resource": found.resource,
            "current": found.limit,
            "proposed": int(proposed),
            "ceiling": found.ceiling,
            "peak_need": found.peak_need,
            "change": f"{int(proposed)} {found.resource}",
            "says": f"raise {plugin}.{found.resource} from {found.limit} to {int(proposed)} "
            f"(needed {found.peak_need}, ceiling {found.ceiling})",
            "within_policy": bool(names),
        }

    def apply(self, orchestrator: Orchestrator, fix: Fix, who: str, key: str) -> str:
        quota = orchestrator.set_quota(fix["plugin"], fix["proposed"], key, fix["resource"])
        return f"{fix['plugin']}.{fix['resource']} is {quota.limit} (was {fix['current']})"

    def undo(self, orchestrator: Orchestrator, fix: Fix, key: str) -> str:
        same = (fix["plugin"], fix["resource"])
        now = next((q.limit for q in orchestrator.quotas() if (q.plugin, q.resource) == same), None)
        if now != fix["proposed"]:
            return f"left at {now}, for that is not what the fix made of it"
        orchestrator.set_quota(fix["plugin"], fix["current"], key, fix["resource"])
        return f"rolled back to {fix['current']}"


class PatchPlugin:
    """The scopes that a plugin's calls reached for, declared from now on, if its orchestrator lets them be."""

    level: Level = "plugins"

    def evidence(self, orchestrator: Orchestrator) -> Mapping[str, Plugin]:
        return {plugin.name: plugin for plugin in orchestrator.plugins()}

    def propose(self, plugin: str, found: Plugin | None, config: QueueConfig) -> Fix | str:
        if found is None:
            return "the orchestrator has no such plugin"
        if found.disabled:
            return "it is disabled"
        reached = {violation.scope: violation.count for violation in found.violations}
        missing = sorted(reached.keys() - set(found.scopes))
        if not missing:
            return (
                "no call of it is known to have reached for a scope it doesn't declare: its owner has to look"
            )
        if refused := sorted(set(missing) - set(found.grantable)):
            return f"it reached for {', '.join(refused)}, which its orchestrator doesn't let it have"
        seen = ", ".join(f"{scope} ({reached[scope]} calls)" for scope in missing)
        return {
            "revision": found.revision,
            "scopes": sorted({*found.scopes, *missing}),
            "before": sorted(found.scopes),
            "change": f"scopes {', '.join(missing)}",
            "says": f"let {plugin} {found.version} reach for {seen}; declared by now: {', '.join(found.scopes)}",
            "within_policy": set(missing) <= set(config.plugins.scopes.get(plugin, ())),
        }

    def apply(self, orchestrator: Orchestrator, fix: Fix, who: str, key: str) -> str:
        reason = f"approved by {who}: {fix['says']}"
        patch = PluginPatch(fix["revision"], who, reason, scopes=tuple(fix["scopes"]))
        plugin = orchestrator.patch_plugin(fix["plugin"], patch, key)
        return f"{fix['plugin']} declares {', '.join(plugin.scopes)}"

    def undo(self, orchestrator: Orchestrator, fix: Fix, key: str) -> str:
        now = next((p for p in orchestrator.plugins() if p.name == fix["plugin"]), None)
        if now is None or now.revision != fix["revision"] + 1:
            return "left as it is, for it is not what the fix made of it"
        reason = "the canary of the patch failed, or was never tried"
        patch = PluginPatch(now.revision, "dlq", reason, scopes=tuple(fix["before"]))
        orchestrator.patch_plugin(fix["plugin"], patch, key)
        return f"rolled back to {', '.join(fix['before'])}"


REMEDIES: Mapping[str, Remedy] = {"raise_quota": RaiseQuota(), "patch_plugin": PatchPlugin()}
