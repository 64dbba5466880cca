"""What a program of this package says on the terminal, and the command line it calls on its user's behalf."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from rich.console import Console
from rich.text import Text

from dlq.errors import DlqError
from dlq_demo.process import ServiceError


@contextmanager
def step(console: Console, name: str) -> Iterator[list[str]]:
    """One line for a step of the program itself: how long it took, and what came of it."""
    began, said = time.monotonic(), list[str]()
    with console.status(f"{name} …"):
        yield said
    took = f"{time.monotonic() - began:.1f} s"
    line = Text.assemble(("✓ ", "green"), (f"{name:<28}", "bold"), f"{took:>8}  ", "; ".join(said))
    console.print(line, soft_wrap=True)


def dlq(*words: str) -> str:
    """Run the bundle's own command line, as its user would; returns what it printed.

    :raises ServiceError: when it fails, with what it said.
    """
    program = Path(sys.executable).with_name("dlq")
    done = subprocess.run([program, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ServiceError(f"`dlq {' '.join(words)}` ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout.strip()


def printable(text: str) -> str:
    """What a dead letter says reaches the terminal as letters only, never as control sequences."""
    return "".join(c if c.isprintable() else " " for c in text)


def printable_lines(text: str) -> str:
    return "\n".join(printable(line) for line in text.splitlines())


def ended(console: Console, name: str, run: Callable[[], int], logs: Path) -> int:
    """Run a program to its exit status; what ends it early is said in one line, and is 2 (by Ctrl-C: 130)."""
    # Ending the process and closing the terminal are Ctrl-C by other means, unless nohup had them ignored.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)
    try:
        return run()
    except KeyboardInterrupt:
        console.print("Ended by you, with everything it had started.")
        return 130
    except DlqError as error:
        console.print(Text.assemble((f"{name}: ", "bold red"), printable_lines(str(error))), soft_wrap=True)
    except httpx.HTTPError as error:
        said = f"Airflow did not answer: {error}. Its logs are in {logs}"
        console.print(Text.assemble((f"{name}: ", "bold red"), said), soft_wrap=True)
    return 2


def uninterrupted() -> None:
    """Nothing interrupts the clean-up that comes now."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
