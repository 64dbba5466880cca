"""The routes of the level `plugins`."""

from __future__ import annotations

import time
from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query

from dlq_orchestrator.core.registry import Change, Plugin
from dlq_orchestrator.http import models
from dlq_orchestrator.http.idempotency import IdempotencyKey
from dlq_orchestrator.http.parts import Parts, WithParts, require_token
from dlq_orchestrator.http.problems import documented

plugins = APIRouter(dependencies=[Depends(require_token)], tags=["plugins"])

Name = Annotated[str, Path(min_length=1, max_length=200)]


@plugins.get("/v1/plugins", responses=documented(422))
def list_plugins(
    parts: WithParts,
    limit: Annotated[int, Query(ge=1, le=100)] = 100,
    cursor: Annotated[str | None, Query(max_length=200, description="`next` of the page before")] = None,
) -> models.Plugins:
    """The plugins as they run now, by name."""
    rest = [plugin for plugin in parts.registry.plugins() if cursor is None or plugin.name > cursor]
    return models.Plugins(
        plugins=[_plugin(parts, plugin) for plugin in rest[:limit]],
        next=rest[limit - 1].name if len(rest) > limit else None,
    )


@plugins.get("/v1/plugins/{name}", responses=documented(404, 422))
def plugin(name: Name, parts: WithParts) -> models.Plugin:
    """One plugin as it runs now."""
    return _plugin(parts, parts.registry.plugin(name))


@plugins.patch("/v1/plugins/{name}", responses=documented(404, 409, 422))
def patch_plugin(
    name: Name, patch: models.PluginPatch, parts: WithParts, key: IdempotencyKey = None
) -> models.Plugin:
    """Change a plugin's scopes or version, disable or enable it, for its next call on."""

    def change() -> models.Plugin:
        scopes = None if patch.scopes is None else frozenset(patch.scopes)
        wanted = Change(patch.revision, patch.person, patch.reason, scopes, patch.version, patch.disabled)
        return _plugin(parts, parts.registry.change(name, wanted))

    return parts.idempotency.once(
        key, f"patch_plugin {name} {patch.model_dump_json()}", models.Plugin, change
    )


def _plugin(parts: Parts, plugin: Plugin) -> models.Plugin:
    manifest = parts.registry.manifests[plugin.name]
    circuit = parts.calls.circuit(plugin.name)
    state = circuit.state
    return models.Plugin(
        name=plugin.name,
        version=plugin.version,
        versions=list(manifest.versions),
        scopes=sorted(plugin.scopes),
        grantable=sorted((manifest.scopes | manifest.grantable) - plugin.scopes),
        disabled=plugin.disabled,
        circuit=models.Circuit(
            state=state,
            until=int((time.time() + circuit.remaining_s()) * 1000) if state == "open" else None,
        ),
        violations=[
            models.Violation(scope=v.scope, count=v.count, last_at=v.last_at)
            for v in parts.registry.violations(plugin.name)
        ],
        revision=plugin.revision,
    )
