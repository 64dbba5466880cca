"""What people see in a terminal: results on standard output, progress, log and errors on standard error."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

_PIPED = 160  # columns where nobody's window says how many
_STYLES = {logging.WARNING: "yellow", logging.ERROR: "bold red"}


def _console(*, stderr: bool = False) -> Console:
    piped = not (sys.stderr if stderr else sys.stdout).isatty()
    return Console(stderr=stderr, highlight=False, emoji=False, markup=False, width=_PIPED if piped else None)


out = _console()
err = _console(stderr=True)


def safe(value: Any) -> str:
    """A value as one line that a terminal only shows: text of dead letters is somebody else's."""
    if value is None:
        return "-"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "".join(c if c.isprintable() else " " for c in str(value))


def say(text: str, style: str = "") -> None:
    """A line of the result."""
    out.print(Text(safe(text), style), soft_wrap=True)


def warn(text: str) -> None:
    """A line beside the result."""
    err.print(Text(safe(text), "yellow"), soft_wrap=True)


def complain(text: str) -> None:
    """An error, in one line."""
    err.print(Text(f"dlq: {safe(text)}", "bold red"), soft_wrap=True)


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table; numbers to the right. Nothing where there is no row."""
    if not rows:
        return
    table = Table(
        title=Text(safe(title), "bold"), title_justify="left", header_style="dim", pad_edge=False, box=None
    )
    for n, name in enumerate(columns):
        numeric = all(isinstance(row[n], (int, float)) or row[n] is None for row in rows)
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(safe(value)) for value in row))
    out.print()
    out.print(table)


def put_json(data: Any) -> None:
    """One JSON document a line, in ASCII."""
    sys.stdout.write(json.dumps(data, default=str) + "\n")
    sys.stdout.flush()


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar while something long runs, moved by calling (done, of about)."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=err, disable=not err.is_terminal) as bar:
        task = bar.add_task(what, total=None)

        def move(done: int, about: int) -> None:
            bar.update(task, completed=done, total=max(done, about))

        yield move


class _Lines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        err.print(Text(safe(record.getMessage()), _STYLES.get(record.levelno, "dim")), soft_wrap=True)


def log_to_terminal() -> None:
    """Show what the stages of a drain say, as they say it."""
    log = logging.getLogger("dlq")
    log.setLevel(logging.INFO)
    log.addHandler(_Lines())
    log.propagate = False
