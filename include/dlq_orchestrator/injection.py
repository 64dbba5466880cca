"""Faults for whatever passes, set at run time: for chaos tests, and only where it was started for them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Literal, get_args

from dlq_orchestrator import failures
from dlq_orchestrator.failures import StepError

Error = Literal[
    "TransientNetwork", "RateLimit", "PluginTimeout", "ScopeViolation", "PluginError", "MemoryQuotaExceeded"
]

ERRORS: dict[str, type[StepError]] = {name: getattr(failures, name) for name in get_args(Error)}


@dataclass(frozen=True, slots=True)
class InjectedFault:
    """A fault of a plugin's calls, or of one tool's. `share` of them fail; it ends by itself at `until` (epoch s)."""

    name: str
    plugin: str
    tool: str | None
    error: Error
    share: float
    until: float


class InjectedFaults:
    """The faults injected now. In memory: a restart ends them all, so that none outlives whoever set it."""

    def __init__(self, random: Random, now: Callable[[], float] = time.time) -> None:
        self._random = random
        self._now = now
        self._lock = threading.Lock()
        self._faults: dict[str, InjectedFault] = {}

    def put(
        self, name: str, plugin: str, tool: str | None, error: Error, share: float, seconds: float
    ) -> InjectedFault:
        """Set a fault, in place of one of the same name."""
        fault = InjectedFault(name, plugin, tool, error, share, self._now() + seconds)
        with self._lock:
            self._faults[name] = fault
        return fault

    def end(self, name: str) -> None:
        """End a fault; none of that name: nothing to do."""
        with self._lock:
            self._faults.pop(name, None)

    def faults(self) -> list[InjectedFault]:
        """Those that have not ended."""
        with self._lock:
            self._faults = {name: fault for name, fault in self._faults.items() if fault.until > self._now()}
            return list(self._faults.values())

    def pick(self, plugin: str, tool: str) -> str | None:
        """The error this call shall fail with; None: it is let through."""
        for fault in self.faults():
            hits = fault.plugin == plugin and fault.tool in (None, tool)
            if hits and self._random.random() < fault.share:
                return fault.error
        return None
