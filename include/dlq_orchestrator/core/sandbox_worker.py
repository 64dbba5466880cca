"""What happens inside a sandbox process: one call at a time, under its limits, watched for what it reaches for."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import msgspec

from dlq_orchestrator.failures import (
    MemoryQuotaExceeded,
    PluginError,
    PluginTimeout,
    ScopeViolation,
    StepError,
)
from dlq_orchestrator.faults import Fault
from dlq_orchestrator.workflow import Call

OUTPUT_MAX = 1024 * 1024
"""An output is kept in the workflow's state: at most so many bytes of JSON."""

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_WRITES = frozenset(
    {"os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate", "os.link", "os.symlink"}
)
_PROCESSES = frozenset(
    {"os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.system", "subprocess.Popen"}
)
_NETWORK = frozenset({"socket.bind", "socket.connect", "socket.getaddrinfo", "socket.sendto"})


class _TimeUp(BaseException):
    """The call's time is up; no `Exception`, so that a plugin doesn't catch it by the way."""


@dataclass(slots=True)
class _Guard:
    """The call being run, and the first violation of its scopes: also seen where the plugin caught the error."""

    call: Call | None = None
    violation: ScopeViolation | None = None


_guard = _Guard()


def begin() -> None:
    """Make this process a sandbox: it ends with its parent, and its stdout is not the orchestrator's."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, _time_up)
    os.dup2(2, 1)
    sys.addaudithook(_audit)


def perform(
    run: Callable[[Any, Call], dict[str, Any]],
    args: Any,
    call: Call,
    fault: Fault | None,
    count: int,
    time_limit_s: float,
    memory_mb: int,
) -> bytes:
    """Run one call; returns its output as JSON.

    The time limit is an alarm: it stops what sleeps or runs Python; what ignores it is for whoever watches this
    process to kill. Memory is limited for the address space, beyond what the process had.

    :raises StepError: the call failed. Of an error nobody foresaw only the type is in the message: its text may hold
        a payload, and is in the traceback alone.
    """
    component = call.step.component
    try:
        with _limited(call, time_limit_s, memory_mb):
            if fault is not None:
                fault.strike(call, count)
            output = msgspec.json.encode(run(args, call))
    except _TimeUp:
        raise PluginTimeout(f"{component} did not answer in {time_limit_s * 1000:.0f} ms") from None
    except MemoryError:
        raise MemoryQuotaExceeded(
            f"{component} needs more memory than its quota, which is {memory_mb} MiB"
        ) from None
    except StepError:
        raise
    except Exception as error:
        raise _guard.violation or PluginError(f"{component} raised {type(error).__name__}") from error
    if _guard.violation is not None:
        raise _guard.violation
    if not output.startswith(b"{"):
        raise PluginError(f"{component} answered no object")
    if len(output) > OUTPUT_MAX:
        raise PluginError(f"{component} answered {len(output)} bytes; {OUTPUT_MAX} are allowed")
    return output


@contextmanager
def _limited(call: Call, time_limit_s: float, memory_mb: int) -> Iterator[None]:
    _guard.call, _guard.violation = call, None
    unlimited = resource.getrlimit(resource.RLIMIT_AS)
    try:
        if sys.platform == "linux":
            resource.setrlimit(resource.RLIMIT_AS, (_address_space() + (memory_mb << 20), unlimited[1]))
        signal.setitimer(signal.ITIMER_REAL, time_limit_s)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, unlimited)
        _guard.call = None


def _address_space() -> int:
    """Bytes of this process's address space (proc(5), statm: pages)."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _time_up(_: int, __: FrameType | None) -> NoReturn:
    raise _TimeUp


def _audit(event: str, args: tuple[Any, ...]) -> None:
    """Python tells of what it does (PEP 578); what needs a scope that isn't declared is refused.

    A guard against plugins that do more than they say, not against ones that attack: native code tells nothing, so
    loading some needs a scope too.
    """
    call = _guard.call
    if call is None:
        return
    scope = _scope(event, args)
    if scope is None:
        return
    try:
        call.require(scope)
    except ScopeViolation as violation:
        _guard.violation = _guard.violation or violation
        raise


def _scope(event: str, args: tuple[Any, ...]) -> str | None:
    if event == "open":
        _, mode, flags = args
        if isinstance(mode, str):
            return "files:write" if set(mode) & set("wax+") else None
        return "files:write" if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC) else None
    if event in _NETWORK:
        return "network"
    if event in _PROCESSES:
        return "processes"
    if event in _WRITES:
        return "files:write"
    return "native" if event == "ctypes.dlopen" else None
