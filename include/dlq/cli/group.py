"""``dlq group``: merge, split, keep."""

from __future__ import annotations

from contextlib import closing

import click

from dlq import regroup
from dlq.cli import terminal
from dlq.cli.options import as_json, queue_argument, who_option
from dlq.config import QueueConfig
from dlq.ledger import Ledger

_why = click.option("--why", required=True, help="Why; written down for good.")
_FOLLOWS = (
    "what is open in custody follows when the queue is categorized next (`dlq take`, or the next drain)"
)


@click.group()
def group() -> None:
    """Merge groups that are one failure, split one that is several.

    Each is a decision: written down with who and why, never erased, and honoured for every entry that comes. GROUP
    is a number that `dlq plan` shows.
    """


@group.command()
@queue_argument
@click.argument("number", type=int, metavar="GROUP")
@click.argument("into", type=int, metavar="INTO")
@who_option
@_why
@as_json
def merge(queue: QueueConfig, number: int, into: int, who: str, why: str, as_json: bool) -> None:
    """Say that GROUP is the failure that INTO is.

    Its entries go into INTO from now on, with the category, remedy and owner of that.
    """
    with closing(Ledger.open(queue.ledger)) as ledger:
        made = regroup.merge(ledger, queue.name, number, into, who=who, why=why)
    _say(as_json, made, who, f"group {number} goes into group {into}; {_FOLLOWS}")


@group.command()
@queue_argument
@click.argument("number", type=int, metavar="GROUP")
@click.argument("pattern")
@who_option
@_why
@as_json
def split(queue: QueueConfig, number: int, pattern: str, who: str, why: str, as_json: bool) -> None:
    """Split GROUP by what messages say.

    Its entries in whose message PATTERN is found get a group of their own. PATTERN is a regular expression, as in
    the taxonomy's message_matches.
    """
    with closing(Ledger.open(queue.ledger)) as ledger:
        made = regroup.split(ledger, queue.name, number, pattern, who=who, why=why)
    _say(as_json, made, who, f"group {number} is split by {pattern!r}; {_FOLLOWS}")


@group.command()
@queue_argument
@click.argument("number", type=int, metavar="GROUP")
@who_option
@_why
@as_json
def keep(queue: QueueConfig, number: int, who: str, why: str, as_json: bool) -> None:
    """Take back what was decided of GROUP.

    For entries that come from now on; those in custody stay where they are.
    """
    with closing(Ledger.open(queue.ledger)) as ledger:
        made = regroup.keep(ledger, queue.name, number, who=who, why=why)
    _say(as_json, made, who, f"group {number} is kept as it is, for entries that come from now on")


def _say(as_json: bool, made: int, who: str, said: str) -> None:
    if as_json:
        terminal.put_json({"decision": made, "who": who, "said": said})
    else:
        terminal.say(f"decision {made}, by {who}: {said}")
