"""``dlq ledger``: create, rebuild, adopt-source, resolve."""

from __future__ import annotations

import click
from sqlalchemy.engine import make_url

from dlq.cli import terminal
from dlq.cli.options import as_json, queue_argument, selection_options, who_option
from dlq.config import QueueConfig, load_queue, queue_names
from dlq.connections import from_environment
from dlq.errors import ConfigError
from dlq.hold import hold, new_run
from dlq.ledger import Ledger
from dlq.recovery.doubts import Fate
from dlq.selection import Selection


@click.group()
def ledger() -> None:
    """Create the ledger, and repair its memory."""


@ledger.command()
@click.argument("queues", metavar="[QUEUE]…", nargs=-1)
@as_json
def create(queues: tuple[str, ...], as_json: bool) -> None:
    """Create ledgers, once.

    Those of these queues, or of every queue that is configured. One that is there stays as it is. Nothing else
    is done, no queue is touched.
    """
    names = queues or tuple(queue_names())
    if not names:
        raise ConfigError("no queue is configured: set DLQ_CONFIG to the folder that has queues/<name>.yaml")
    configs = [load_queue(name) for name in names]
    for url in dict.fromkeys(config.ledger for config in configs):
        try:
            Ledger.open(url).close()
            was_there = True
        except ConfigError:
            was_there = False
        made = Ledger.create(url)
        made.close()
        serves = [config.name for config in configs if config.ledger == url]
        shown = make_url(url).render_as_string(hide_password=True)
        if as_json:
            terminal.put_json({"ledger": made.id, "url": shown, "created": not was_there, "queues": serves})
        else:
            what = "is there already" if was_there else "was created"
            terminal.say(f"ledger {made.id} {what} at {shown}, for {', '.join(serves)}")


@ledger.command()
@queue_argument
@who_option
@as_json
def rebuild(queue: QueueConfig, who: str, as_json: bool) -> None:
    """Take up again what the archive has.

    In a ledger that was lost, or restored from an older backup. For a lost one: `dlq ledger create` first,
    then this. Make sure that nothing uses the other ledger any more.

    What the archive has and the ledger lacks becomes entries in doubt (ambiguous), and so does what an older
    ledger believes open: it may have been sent since. Nothing is sent before a person decides, in review or
    with `dlq ledger resolve`. Then the ledger becomes the queue's own. Interrupted, run it again.
    """
    from dlq.recovery.rebuild import rebuild as build

    with terminal.progress("segments") as progress:
        done = build(
            queue, who=who, run_id=new_run("rebuild"), connections=from_environment, progress=progress
        )
    if as_json:
        terminal.put_json(
            {
                "queue": queue.name,
                "behind": done.behind,
                "segments": done.segments,
                "adopted": done.adopted,
                "doubted": done.doubted,
                "positions": {str(part): position for part, position in done.positions.items()},
                "findings": done.findings,
            }
        )
        return
    if done.behind:
        terminal.say(f"{queue.name}: {done.behind}")
    terminal.say(f"{queue.name}: {done}", "bold")
    for part, position in sorted(done.positions.items()):
        terminal.say(f"  partition {part} goes on at {position}")


@ledger.command("adopt-source")
@queue_argument
@who_option
@as_json
def adopt_source(queue: QueueConfig, who: str, as_json: bool) -> None:
    """Start anew with another topic.

    For a queue whose topic was recreated or truncated, or is another one now.

    Positions in the old topic mean nothing in the new one: it begins by source.start, and what it holds now
    waits for `dlq plan --approve`, like any first intake. Entries in custody stay as they are. Refused where
    nothing changed.
    """
    from dlq.recovery.adopt import adopt_source as adopt

    done = adopt(queue, who=who, run_id=new_run("adopt-source"), connections=from_environment)
    if as_json:
        positions = {str(part): position for part, position in done.positions.items()}
        terminal.put_json({"queue": queue.name, "was": done.was, "now": done.now, "positions": positions})
        return
    terminal.say(f"{queue.name} was {done.was} and is {done.now} now, by {who}", "bold")
    for part, position in sorted(done.positions.items()):
        terminal.say(f"  partition {part} begins at {position}")


@ledger.command()
@queue_argument
@click.argument("named", metavar="[ENTRY]…", nargs=-1)
@click.option(
    "--as",
    "fate",
    type=click.Choice(["open", "replayed", "discarded"]),
    required=True,
    help="What became of them.",
)
@click.option("--why", required=True, help="How you know; written down for good.")
@who_option
@selection_options
@as_json
def resolve(queue: QueueConfig, fate: Fate, why: str, who: str, chosen: Selection, as_json: bool) -> None:
    """Say what became of entries in doubt.

    \b
      open        they were not sent: the next drain looks at them as at new ones, and may replay them
      replayed    they were sent: settled; their outcome stays unknown
      discarded   nobody needs them any more: settled

    Of the entries you choose only those in doubt are touched. ENTRY is <partition>/<offset>.
    """
    from dlq.recovery.doubts import resolve as settle

    with hold(queue, "resolve", connections=from_environment) as held:
        n = settle(held.drain, chosen, fate, who=who, why=why)
        if fate == "open":
            from dlq.triage import assign

            assign(held.drain)
    if as_json:
        terminal.put_json({"queue": queue.name, "resolved": n, "as": fate, "who": who})
    else:
        terminal.say(
            f"{n:,} entries of {queue.name} in doubt are {fate} now, by {who}; nothing was sent", "bold"
        )
