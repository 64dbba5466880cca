"""Faults that travel with the traffic: a demo or a test can break any step, the same way each time."""

from __future__ import annotations

import asyncio
import zlib
from typing import Annotated, Literal

import msgspec

from dlq_orchestrator.failures import PluginError, RateLimit, ScopeViolation, TransientNetwork
from dlq_orchestrator.workflow import Step


class Fault(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`"fault": {"error": "TransientNetwork", "attempts": 4}` in a step's arguments: 4 tries fail so.

    Tries are counted over replays too: the count is retry count × tries a run + this run's try.
    """

    error: Literal["TransientNetwork", "RateLimit", "PluginTimeout", "ScopeViolation", "PluginError"]
    attempts: Annotated[int, msgspec.Meta(ge=1)]

    async def strike(self, step: Step, seed: str, count: int) -> None:
        """Fail if this try is one of those that fail; the messages vary as real ones do, by the seed."""
        if count > self.attempts:
            return
        number = zlib.crc32(seed.encode())
        match self.error:
            case "TransientNetwork":
                raise TransientNetwork(
                    f"connection to {step.plugin}.internal:8443 reset by peer after {100 + number % 900} ms"
                    f" (request {number:08x})"
                )
            case "RateLimit":
                raise RateLimit(f"429 Too Many Requests from {step.plugin}: retry after {1 + number % 30} s")
            case "ScopeViolation":
                raise ScopeViolation(
                    f"{step.component} asked for scope {step.plugin}:admin, which it doesn't declare"
                )
            case "PluginError":
                raise PluginError(f"{step.component} answered 500 (incident {number:08x})")
            case "PluginTimeout":
                await asyncio.Event().wait()
