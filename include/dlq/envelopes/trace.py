"""The exception classes in a stack trace: often the only place that tells two faults apart."""

from __future__ import annotations

import re

from dlq.memo import Memo

_MOST = 32
_CLASS = re.compile(rb"[A-Za-z_$][\w$.+`]{0,199}")

# Wrappers, and what sockets throw below the telling one: by their last dotted part, or whole.
_SILENT = frozenset(
    {
        "AggregateException",
        "ClosedChannelException",
        "CompletionException",
        "Error",
        "Exception",
        "ExecutionException",
        "InvocationTargetException",
        "KafkaException",
        "ListenerExecutionFailedException",
        "NestedRuntimeException",
        "RuntimeException",
        "StreamsException",
        "TargetInvocationException",
        "Throwable",
        "TimestampedException",
        "UncheckedIOException",
        "UndeclaredThrowableException",
        "org.apache.kafka.connect.errors.ConnectException",
    }
)


def _chain(trace: bytes, mark: bytes) -> tuple[str, ...]:
    found: list[str] = []
    at = trace.find(mark)
    while at >= 0 and len(found) < _MOST:
        at += len(mark)
        if (named := _CLASS.match(trace, at)) is not None:
            found.append(named[0].decode())
        at = trace.find(mark, at)
    return tuple(found)


def _short(trace: bytes) -> bool:
    return len(trace) <= 16_384


_java: Memo[bytes, tuple[str, ...]] = Memo(lambda trace: _chain(trace, b"\nCaused by: "), 512, _short)
_dotnet: Memo[bytes, tuple[str, ...]] = Memo(lambda trace: _chain(trace, b" ---> "), 512, _short)


def causes(trace: bytes | None) -> tuple[str, ...]:
    """The classes behind the exception whose stack trace it is, outermost first; of more than 32 the first ones.

    As Java's ``Throwable.printStackTrace`` writes them, at the start of a line: ``Caused by: <class>: <message>``. (An
    indented one belongs to a suppressed exception.)
    """
    return () if trace is None else _java[trace]


def inner(trace: bytes | None) -> tuple[str, ...]:
    """The same as .NET's ``Exception.ToString`` writes them: ``---> <class>: <message>``."""
    return () if trace is None else _dotnet[trace]


def telling(chain: tuple[str, ...]) -> str | None:
    """The deepest of a cause chain that says something: not a wrapper, where there is another."""
    for name in reversed(chain):
        if says(name):
            return name
    return chain[-1] if chain else None


def _says(name: str) -> bool:
    return name not in _SILENT and name.rpartition(".")[2] not in _SILENT


_telling: Memo[str, bool] = Memo(_says, 4096)


def says(name: str) -> bool:
    """Whether an exception's class says more than that something failed."""
    return _telling[name]
