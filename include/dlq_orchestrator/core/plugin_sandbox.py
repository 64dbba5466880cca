"""Where plugin calls run: under their memory quota and a time limit, in this process."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from dlq_orchestrator.core.rate_limiter import RateLimiter
from dlq_orchestrator.failures import DataCorruption, PluginError, PluginTimeout, StepError
from dlq_orchestrator.faults import Fault
from dlq_orchestrator.plugins import Call, Tool
from dlq_orchestrator.workflow import Step


class _Needs(msgspec.Struct, frozen=True):
    """What a call declares about itself in its arguments, beside what its tool reads."""

    memory_mb: int = 0
    fault: Fault | None = None


class PluginSandbox:
    """Runs one call of one tool, and turns whatever it does into an output or a `StepError`.

    The memory quota is checked against what the call declares; the time limit cancels a call where it waits:
    one that computes without ever waiting is not stopped.

    :param time_limit_s: how long a call may take, in seconds.
    """

    def __init__(self, limiter: RateLimiter, tools: dict[tuple[str, str], Tool], time_limit_s: float) -> None:
        self._limiter = limiter
        self._tools = tools
        self._time_limit_s = time_limit_s

    def tool(self, step: Step) -> Tool:
        """:raises PluginError: no plugin has that tool."""
        try:
            return self._tools[step.plugin, step.tool]
        except KeyError:
            raise PluginError(f"there is no tool {step.component}") from None

    async def call(self, step: Step, effect_key: str, count: int) -> dict[str, Any]:
        """Run a step's call once.

        :param effect_key: the same for each try and each replay of this step; the plugin's idempotency key.
        :param count: which try this is, over all replays, from 1.
        :raises StepError: the call failed.
        """
        tool = self.tool(step)
        try:
            needs = msgspec.convert(step.args, _Needs)
            args = msgspec.convert(step.args, tool.args)
        except msgspec.ValidationError as error:
            raise DataCorruption(f"the arguments of {step.component} are wrong: {error}") from None
        self._limiter.take_memory(step.plugin, needs.memory_mb)
        try:
            async with asyncio.timeout(self._time_limit_s):
                if needs.fault:
                    await needs.fault.strike(step, effect_key, count)
                return await tool.run(args, Call(step, effect_key))
        except TimeoutError:
            raise PluginTimeout(
                f"{step.component} did not answer in {self._time_limit_s * 1000:.0f} ms"
            ) from None
        except StepError:
            raise
        except Exception as error:
            # the exception's own message may hold a payload: it goes into the dead letter's trace only
            raise PluginError(f"{step.component} raised {type(error).__name__}") from error
