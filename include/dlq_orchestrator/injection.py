"""Faults for whatever passes, set at run time: for chaos tests, and only where it was started for them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Literal

from dlq_orchestrator.failures import (
    MemoryQuotaExceeded,
    PluginCrashed,
    PluginError,
    PluginTimeout,
    RateLimit,
    ScopeViolation,
    StepError,
    TransientNetwork,
)
from dlq_orchestrator.workflow import Step

Error = Literal[
    "TransientNetwork",
    "RateLimit",
    "PluginTimeout",
    "PluginCrashed",
    "PluginError",
    "MemoryQuotaExceeded",
    "ScopeViolation",
]

_ERRORS: dict[str, type[StepError]] = {
    kind.error_type: kind
    for kind in (
        TransientNetwork,
        RateLimit,
        PluginTimeout,
        PluginCrashed,
        PluginError,
        MemoryQuotaExceeded,
        ScopeViolation,
    )
}


@dataclass(frozen=True, slots=True)
class Injected:
    """A fault of a plugin's calls, or of one tool's. `share` of them fail; it ends by itself at `until` (epoch s)."""

    name: str
    plugin: str
    tool: str | None
    error: Error
    share: float
    until: float


class Injection:
    """The faults injected now. In memory: a restart ends them all."""

    def __init__(self, random: Random, now: Callable[[], float] = time.time) -> None:
        self._random = random
        self._now = now
        self._lock = threading.Lock()
        self._faults: dict[str, Injected] = {}

    def put(
        self, name: str, plugin: str, tool: str | None, error: Error, share: float, seconds: float
    ) -> Injected:
        """Set a fault, in place of one of the same name."""
        fault = Injected(name, plugin, tool, error, share, self._now() + seconds)
        with self._lock:
            self._faults[name] = fault
        return fault

    def end(self, name: str) -> None:
        """End a fault; none of that name: nothing to do."""
        with self._lock:
            self._faults.pop(name, None)

    def faults(self) -> list[Injected]:
        """Those that have not ended."""
        with self._lock:
            self._faults = {name: fault for name, fault in self._faults.items() if fault.until > self._now()}
            return list(self._faults.values())

    def strike(self, step: Step) -> None:
        """:raises StepError: a fault hit this call."""
        if not self._faults:
            return
        for fault in self.faults():
            mine = fault.plugin == step.plugin and fault.tool in (None, step.tool)
            if mine and self._random.random() < fault.share:
                raise _ERRORS[fault.error](f"injected into {step.component}: {fault.error}")
