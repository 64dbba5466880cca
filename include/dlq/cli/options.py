"""Arguments and options that several commands share."""

from __future__ import annotations

import getpass
import socket
from collections.abc import Callable
from datetime import UTC, datetime
from functools import wraps
from typing import Any, TypeVar

import click

from dlq.config import QueueConfig, load_queue, seconds
from dlq.selection import Selection

F = TypeVar("F", bound=Callable[..., Any])


class Duration(click.ParamType[float]):
    """Seconds, from ``30s``, ``5m``, ``1h``."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            found = seconds(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        return found


class Moment(click.ParamType[datetime]):
    """A time; UTC where it says no zone."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        if isinstance(value, datetime):
            return value
        try:
            found = datetime.fromisoformat(value)
        except ValueError:
            self.fail("not a time: write 2026-01-31, or 2026-01-31T06:00:00+00:00", param, ctx)
        return found if found.tzinfo else found.replace(tzinfo=UTC)


class Queue(click.ParamType[QueueConfig]):
    """A queue's name; becomes its configuration."""

    name = "queue"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> QueueConfig:
        return value if isinstance(value, QueueConfig) else load_queue(value)


def who_is_it() -> str:
    """Who a decision is recorded for where the command doesn't say."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = "unknown"
    return f"{user}@{socket.gethostname()}"


queue_argument = click.argument("queue", type=Queue(), metavar="QUEUE")
as_json = click.option("--json", "as_json", is_flag=True, help="One JSON document a line, for scripts.")
who_option = click.option(
    "--who", default=who_is_it, show_default="you@this host", help="Who decides; written down for good."
)
group_option = click.option(
    "--group", "groups", type=int, multiple=True, help="Only this group's entries; may be repeated."
)
deadline_option = click.option(
    "--deadline", type=Duration(), help="How long it may take (30s, 5m, 1h).  [default: limits.budget]"
)


def selection_options(function: F, *, needed: bool = True) -> F:
    """Options that choose entries, given to the command as one ``chosen``.

    :param needed: one must be given; else nothing chosen is everything.
    """

    @click.option(
        "--entry",
        "entries",
        multiple=True,
        metavar="ENTRY",
        help="This entry: <partition>/<offset>; may be repeated.",
    )
    @click.option(
        "--group", "groups", type=int, multiple=True, help="Entries of this group; may be repeated."
    )
    @click.option(
        "--drain", "drains", multiple=True, help="Entries this drain took or settled; may be repeated."
    )
    @click.option("--since", type=Moment(), help="Entries taken by drains opened at this time or later.")
    @click.option("--until", type=Moment(), help="Entries taken by drains opened before this time.")
    @click.option("--all", "everything", is_flag=True, help="Everything there is.")
    @wraps(function)
    def choosing(*arguments: Any, **options: Any) -> Any:
        chosen = Selection(
            (*options.pop("named", ()), *options.pop("entries")),
            options.pop("groups"),
            options.pop("drains"),
            options.pop("since"),
            options.pop("until"),
            options.pop("everything"),
        )
        if chosen.is_empty and needed:
            raise click.UsageError("say which entries: --entry, --group, --drain, --since, --until, or --all")
        return function(*arguments, chosen=chosen, **options)

    return choosing  # type: ignore[return-value]
