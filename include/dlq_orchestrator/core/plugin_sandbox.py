"""Where plugin calls run: in processes of their own, which a call may break and no call outlives."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import threading
from collections.abc import Mapping
from concurrent.futures import BrokenExecutor, CancelledError
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import msgspec
import structlog
from pebble import ProcessExpired, ProcessPool

from dlq_orchestrator.core.sandbox_worker import begin, perform
from dlq_orchestrator.failures import DataCorruption, PluginCrashed, PluginError, PluginTimeout
from dlq_orchestrator.faults import Fault
from dlq_orchestrator.plugins import Tool
from dlq_orchestrator.workflow import Call, Step

_log = structlog.get_logger()

# many more than cores: a call that hangs until its limit needs none
_PROCESSES = 12
# a process that leaks is replaced
_CALLS_EACH = 20_000
# what ignores the alarm is killed so much later: processes are looked at every 0.1 s
_GRACE_S = 0.5
# a call waits for so many others at most, since a plugin's are bounded; so much later it is lost
_TURNS = 4
_LOST_S = 20.0


_Struct = TypeVar("_Struct", bound=msgspec.Struct)


class Needs(msgspec.Struct, frozen=True):
    """What a call declares about itself in its arguments, beside what its tool reads."""

    memory_mb: int = 0
    fault: Fault | None = None


@dataclass(frozen=True, slots=True)
class Prepared:
    """A step's tool, and what its arguments say to the tool and about the call."""

    tool: Tool
    args: Any
    needs: Needs


class PluginSandbox:
    """Runs one call of one tool, and turns whatever it does into an output or a `StepError`.

    :param time_limit_s: how long a call may take, in seconds.
    """

    def __init__(self, tools: Mapping[tuple[str, str], Tool], time_limit_s: float) -> None:
        self._tools = tools
        self._time_limit_s = time_limit_s
        self._making = threading.Lock()
        self._pool = _pool()

    def __enter__(self) -> Self:
        """Wait for the first process: whoever consumes before would let what it received wait for it."""
        self._pool.schedule(os.getpid).result()
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.stop()  # type: ignore[no-untyped-call]
        self._pool.join()

    def tool(self, step: Step) -> Tool:
        """:raises PluginError: no plugin has that tool."""
        try:
            return self._tools[step.plugin, step.tool]
        except KeyError:
            raise PluginError(f"there is no tool {step.component}") from None

    def prepare(self, step: Step) -> Prepared:
        """
        :raises PluginError: no plugin has that tool.
        :raises DataCorruption: its arguments are wrong.
        """
        tool = self.tool(step)
        return Prepared(tool, _converted(step, tool.args), _converted(step, Needs))

    async def call(self, prepared: Prepared, call: Call, count: int, memory_mb: int) -> dict[str, Any]:
        """Run a call once, in a process with these limits.

        :param count: which try this is, over all replays, from 1.
        :param memory_mb: how much memory it may take, MiB.
        :raises StepError: the call failed.
        """
        step = call.step
        pool = self._pool
        try:
            called = asyncio.wrap_future(
                pool.schedule(
                    perform,
                    (
                        prepared.tool.run,
                        prepared.args,
                        call,
                        prepared.needs.fault,
                        count,
                        self._time_limit_s,
                        memory_mb,
                    ),
                    timeout=self._time_limit_s + _GRACE_S,
                )
            )
            # a pool that breaks as a call comes to it may never answer that one
            await asyncio.wait([called], timeout=_TURNS * (self._time_limit_s + _GRACE_S) + _LOST_S)
            if not called.done():
                raise BrokenExecutor
            output = called.result()
        except TimeoutError:
            raise PluginTimeout(
                f"{step.component} did not answer in {self._time_limit_s * 1000:.0f} ms, and was killed"
            ) from None
        except ProcessExpired as error:
            raise PluginCrashed(f"{step.component} ended its process (exit code {error.exitcode})") from None
        except (BrokenExecutor, RuntimeError, CancelledError):
            self._renew(pool)
            raise PluginCrashed(f"{step.component} lost its process") from None
        answer: dict[str, Any] = msgspec.json.decode(output)
        return answer

    def _renew(self, broken: ProcessPool) -> None:
        """A pool gives up when one of its processes dies between two calls: go on with another."""
        with self._making:
            if self._pool is broken:
                _log.warning("sandbox processes died between calls, others take over")
                self._pool = _pool()
                broken.stop()  # type: ignore[no-untyped-call]


def _pool() -> ProcessPool:
    context = multiprocessing.get_context("forkserver")
    # forked from a server that has imported it: a process more, or in place of a killed one, takes milliseconds
    context.set_forkserver_preload([perform.__module__])
    return ProcessPool(_PROCESSES, max_tasks=_CALLS_EACH, initializer=begin, context=context)


def _converted(step: Step, kind: type[_Struct]) -> _Struct:
    try:
        return msgspec.convert(step.args, kind)
    except msgspec.ValidationError as error:
        raise DataCorruption(f"the arguments of {step.component} are wrong: {error}") from None
