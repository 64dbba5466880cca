"""The gate of every plugin call: is the plugin on, is there quota, is its circuit closed; then the sandbox."""

from __future__ import annotations

import sqlite3
from typing import Any

from dlq_orchestrator.core.circuit import Circuit, CircuitPolicy
from dlq_orchestrator.core.plugin_sandbox import PluginSandbox
from dlq_orchestrator.core.rate_limiter import RateLimiter
from dlq_orchestrator.core.registry import Registry
from dlq_orchestrator.failures import (
    CircuitOpen,
    PluginCrashed,
    PluginDisabled,
    PluginTimeout,
    ScopeViolation,
    StepError,
    TransientNetwork,
)
from dlq_orchestrator.injection import ERRORS, InjectedFaults
from dlq_orchestrator.workflow import Call, Step

# what a plugin that is down does; one that answers, with whatever error, is up
_DOWN = (TransientNetwork, PluginTimeout, PluginCrashed)


class PluginCalls:
    """Calls plugins for the runner.

    :param circuits: when a plugin's circuit opens.
    :param faults: to be injected, if it was started for that.
    """

    def __init__(
        self,
        registry: Registry,
        limiter: RateLimiter,
        sandbox: PluginSandbox,
        circuits: CircuitPolicy,
        faults: InjectedFaults | None = None,
    ) -> None:
        self._registry = registry
        self._limiter = limiter
        self._sandbox = sandbox
        self._faults = faults
        self._circuits = {plugin.name: Circuit(circuits) for plugin in registry.plugins()}

    def has_effect(self, step: Step) -> bool:
        """Whether the step's tool changes the world."""
        return self._sandbox.tool(step).effect

    def circuit(self, plugin: str) -> Circuit:
        return self._circuits[plugin]

    async def call(self, step: Step, effect_key: str, count: int, tenant: str | None) -> dict[str, Any]:
        """Run a step's call once.

        :param effect_key: the same for each try and each replay of this step; the plugin's idempotency key.
        :param count: which try this is, over all replays, from 1.
        :raises StepError: the call failed, or was not let through.
        """
        prepared = self._sandbox.prepare(step)
        plugin = self._registry.plugin(step.plugin)
        if plugin.disabled:
            raise PluginDisabled(f"{step.plugin} is disabled")
        memory_mb = self._limiter.grant_memory(step, prepared.needs.memory_mb)
        await self._limiter.take_turn(step, tenant)
        async with self._limiter.among(step):
            circuit = self._circuits[step.plugin]
            if (wait_s := circuit.admit()) is not None:
                raise CircuitOpen(
                    f"the circuit of {step.plugin} is open: retry after {wait_s * 1000:.0f} ms", wait_s
                )
            try:
                if self._faults is not None and (error := self._faults.pick(step.plugin, step.tool)):
                    raise ERRORS[error](f"injected into {step.component}: {error}")
                call = Call(step, effect_key, plugin.version, plugin.scopes)
                output = await self._sandbox.call(prepared, call, count, memory_mb)
            except _DOWN:
                circuit.failed()
                raise
            except StepError as error:
                circuit.passed()
                if isinstance(error, ScopeViolation) and error.scope:
                    self._registry.violated(step.plugin, error.scope)
                raise
            except BaseException:
                circuit.gave_up()
                raise
        circuit.passed()
        return output

    def save_counts(self, db: sqlite3.Connection) -> None:
        """Write what was counted since the last time, in the caller's transaction."""
        self._limiter.save_counts(db)
        self._registry.save_counts(db)
