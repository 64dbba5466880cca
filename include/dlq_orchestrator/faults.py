"""Faults that travel with the traffic: a demo or a test can break any step, the same way each time."""

from __future__ import annotations

import os
import signal
import time
import zlib
from typing import Annotated, Literal

import msgspec

from dlq_orchestrator.failures import PluginError, RateLimit, TransientNetwork
from dlq_orchestrator.workflow import Call


class Fault(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`"fault": {"error": "TransientNetwork", "attempts": 4}` in a step's arguments: 4 tries fail so.

    Tries are counted over replays too: the count is retry count × tries a run + this run's try. It strikes in the
    call's own process, and is what it says: a time-out sleeps, a busy call computes, a crash kills its process, a
    scope violation asks for the scope `<plugin>:admin`, so it ends when that is granted.

    :param version: only calls of this version of the plugin fail.
    """

    error: Literal[
        "TransientNetwork",
        "RateLimit",
        "PluginTimeout",
        "PluginBusy",
        "PluginCrashed",
        "ScopeViolation",
        "PluginError",
    ]
    attempts: Annotated[int, msgspec.Meta(ge=1)]
    version: str | None = None

    def strike(self, call: Call, count: int) -> None:
        """Fail if this try is one of those that fail; the messages vary as real ones do, by the effect key."""
        if count > self.attempts or self.version not in (None, call.version):
            return
        plugin, number = call.step.plugin, zlib.crc32(call.effect_key.encode())
        match self.error:
            case "TransientNetwork":
                raise TransientNetwork(
                    f"connection to {plugin}.internal:8443 reset by peer after {100 + number % 900} ms"
                    f" (request {number:08x})"
                )
            case "RateLimit":
                after_ms = 5 + number % 40
                raise RateLimit(
                    f"429 Too Many Requests from {plugin}: retry after {after_ms} ms", after_ms / 1000
                )
            case "ScopeViolation":
                call.require(f"{plugin}:admin")
            case "PluginError":
                raise PluginError(f"{call.step.component} answered 500 (incident {number:08x})")
            case "PluginCrashed":
                os.kill(os.getpid(), signal.SIGKILL)
            case "PluginTimeout":
                time.sleep(3600)
            case "PluginBusy":
                while True:
                    pass
