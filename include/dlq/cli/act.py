"""Commands that act on a queue: take, plan, replay, edit, verify, restore."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Literal

import click
from sqlalchemy import select

from dlq.cli import terminal
from dlq.cli.options import (
    as_json,
    deadline_option,
    group_option,
    queue_argument,
    selection_options,
    who_option,
)
from dlq.config import QueueConfig
from dlq.connections import from_environment
from dlq.drain import Drain, dry
from dlq.hold import hold
from dlq.selection import Selection


@click.command()
@queue_argument
@click.option(
    "--part", "parts", type=click.IntRange(0), multiple=True, help="Only this partition; may be repeated."
)
@deadline_option
@as_json
def take(queue: QueueConfig, parts: tuple[int, ...], deadline: float | None, as_json: bool) -> int:
    """Take what the queue holds into custody.

    Up to where the queue ends now: bytes to the archive, rows to the ledger, and only then is the queue told.
    Nothing is replayed. Safe to repeat, and to interrupt.
    """
    from dlq.intake import take_custody
    from dlq.triage import assign

    with hold(queue, "take", connections=from_environment) as held:
        with terminal.progress("taking into custody") as progress:
            taken = take_custody(held.drain, deadline or queue.limits.budget, progress, parts or None)
        # Every entry that stays has its reason, so that `dlq plan` and `dlq verify` can speak of it.
        taken |= assign(held.drain)
        taken |= {"drain": held.drain.id, "waiting_for_decision": _first_intake(held.drain)}
    if as_json:
        terminal.put_json(taken)
    else:
        terminal.say(f"{queue.name}: {taken['taken']:,} taken into custody in {taken['seconds']:.1f} s")
        _say_first_intake(queue, taken["waiting_for_decision"])
    if not taken["reached"]:
        terminal.warn("the time was up before the end of the queue: run it again, it goes on from there")
    return 0


@click.command()
@queue_argument
@group_option
@click.option("--first-intake", is_flag=True, help="Show what --approve would free, too.")
@click.option("--approve", is_flag=True, help="Free the entries of the first intake. Sends nothing.")
@click.option("--dry-run", is_flag=True, help="With --approve: say what would be freed, and change nothing.")
@who_option
@as_json
def plan(
    queue: QueueConfig,
    groups: tuple[int, ...],
    first_intake: bool,
    approve: bool,
    dry_run: bool,
    who: str,
    as_json: bool,
) -> None:
    """Show what a replay would send now.

    By group and target; and what it would not send, and why.

    What a queue's very first intake found waits until it is freed, for old letters may have been dealt with
    by hand: --approve frees it (of --group, if given) and writes down who did. It sends nothing: `dlq
    replay`, or the Dag, does.
    """
    from dlq import first_intake as old
    from dlq import plan as planning
    from dlq.status import waiting

    freed = None
    if approve and not dry_run:
        with hold(queue, "plan", connections=from_environment) as held:
            freed = old.free(held.drain, groups, who=who)
    with dry(queue, run_id="plan", connections=from_environment) as look:
        ready = [row for row in planning.summary(look) if not groups or row["group"] in groups]
        unsettled = waiting(look, groups)
        ordinary = [row for row in unsettled if row["state"] == "open" and row["reason"] in planning.READY]
        rest = [row for row in unsettled if row not in ordinary]
        with look.ledger.read() as tx:
            would = old.waiting(tx, queue.name, groups) if first_intake or approve else []
    if as_json:
        terminal.put_json(
            {"queue": queue.name, "replay": ready, "waiting": rest, "first_intake": would, "freed": freed}
        )
        return
    if freed is not None:
        n = sum(row["entries"] for row in freed)
        terminal.say(f"{n:,} entries of the first intake are free now, by {who}; nothing was sent", "bold")
        terminal.show(
            "freed",
            ("group", "error type", "component", "remedy", "entries"),
            _rows(freed, "group error_type component remedy entries"),
        )
    total = sum(row["entries"] for row in ready)
    terminal.say(
        f"{queue.name}: a replay would send {total:,} entries now; what is still in the queue is not among them",
        "bold",
    )
    terminal.show(
        "would be replayed",
        ("group", "error type", "component", "target", "entries"),
        _rows(ready, "group error_type component target entries"),
    )
    if held_up := sum(row["entries"] for row in ordinary) - sum(row["entries"] for row in ready):
        terminal.say(
            f"{held_up:,} more would be, but an earlier entry of their key, a time or their limit holds them up"
        )
    terminal.show(
        "stays open",
        ("group", "error type", "component", "state", "why", "owner", "entries"),
        [
            (*r[:4], str(r[4]).replace("_", " "), *r[5:])
            for r in _rows(rest, "group error_type component state reason owner entries")
        ],
    )
    if would:
        n = sum(row["entries"] for row in would)
        terminal.show(
            "would be freed by --approve" if not approve or dry_run else "still waits for --approve",
            ("group", "error type", "component", "category", "remedy", "entries"),
            _rows(would, "group error_type component category remedy entries"),
        )
        if dry_run:
            terminal.say(f"dry run: {n:,} entries would be freed; nothing was changed")
    elif dry_run:
        terminal.say("dry run: nothing would be freed; nothing was changed")


@click.command()
@queue_argument
@group_option
@deadline_option
@click.option(
    "--approve-dr",
    is_flag=True,
    help="Go on past limits.dr where approval.dr is: person. You are the person.",
)
@who_option
@as_json
def replay(
    queue: QueueConfig,
    groups: tuple[int, ...],
    deadline: float | None,
    approve_dr: bool,
    who: str,
    as_json: bool,
) -> int:
    """Drain the queue at the terminal.

    What one does when Airflow is down. Takes what the queue holds into custody, categorizes it, replays what
    a retry can help (a canary first, then batches that grow while all goes well), takes and replays what is
    left, proves that nothing was lost or run twice, and gives its verdict. What needs a fix or a person stays
    open. With --group only those groups are replayed.

    Exit status 0: green. 1: red, with the reasons.
    """
    from dlq.cli.replay import drain_at_terminal
    from dlq.report.write import write_report

    with hold(queue, "replay", kind="drain", connections=from_environment) as held:
        budget = deadline or queue.limits.budget
        verdict = drain_at_terminal(held, groups, budget, approve_dr=approve_dr, who=who)
        verdict["waiting_for_decision"] = _first_intake(held.drain)
        report = write_report(held.drain)
    if as_json:
        terminal.put_json({"queue": queue.name, "drain": held.drain.id, **verdict, "report": report["html"]})
    else:
        terminal.say("")
        terminal.show(
            "still open",
            ("entries", "group", "why", "owner", "work"),
            [
                (w["count"], w["group"], w["reason"].replace("_", " "), w["owner"], w["work"])
                for w in verdict["open"]
            ],
        )
        for line in report["summary"].splitlines():
            terminal.say(line)
        terminal.say(f"report: {report['html']}")
        terminal.say(
            f"verdict: {verdict['verdict']}", "bold green" if verdict["verdict"] == "green" else "bold red"
        )
        _say_first_intake(queue, verdict["waiting_for_decision"])
    return 0 if verdict["verdict"] == "green" else 1


@click.command()
@queue_argument
@click.argument("entry")
@click.option(
    "--value",
    type=click.File("rb"),
    required=True,
    help="The file that holds the whole new value; - is standard input.",
)
@who_option
@as_json
def edit(queue: QueueConfig, entry: str, value: IO[bytes], who: str, as_json: bool) -> None:
    """Draft a new value for one entry.

    The entry waits for a person. ENTRY is <partition>/<offset>, or <source>/<partition>/<offset>. Key and
    headers stay, and so does the original: nothing is sent before a review approves the draft.

    Where the entry's value is compressed, or framed for a schema registry, the file may hold its document as
    JSON instead: it is encoded as the value was, with the same schema, and checked against it.
    """
    from dlq import drafts

    made = drafts.edit(queue, entry, value.read(), who, from_environment)
    if as_json:
        terminal.put_json(
            {
                "draft": made.id,
                "entry": made.entry,
                "payload_sha": made.sha,
                "size": made.size,
                "size_before": made.size_before,
                "who": who,
            }
        )
        return
    terminal.say(
        f"draft {made.id} of {made.entry}: {made.size:,} bytes instead of {made.size_before:,}, by {who}",
        "bold",
    )
    terminal.say(f"payload sum {made.sha}")
    terminal.say(
        f"To send it instead: run the Dag dlq_review__{queue.name}, choose to replay draft {made.id} and "
        f"compare the sum ({made.sha[:12]}). Until then nothing is sent."
    )


@click.command()
@queue_argument
@as_json
def verify(queue: QueueConfig, as_json: bool) -> int:
    """Prove that nothing was lost or run twice.

    Reads the log, the archive and the target afresh and holds them against the ledger, for everything
    unsettled and for what the last run took and sent. Exit status 1 where a law is broken.
    """
    from dlq.conservation import verify_conservation
    from dlq.ledger.schema import drain as drains
    from dlq.ledger.schema import entry as entries
    from dlq.ledger.schema import intake, job

    with hold(queue, "verify", connections=from_environment) as held:
        drain = held.drain
        with drain.ledger.read() as tx:
            did = [
                select(intake.c.drain).where(intake.c.drain == drains.c.id).exists(),
                select(job.c.drain).where(job.c.drain == drains.c.id).exists(),
                select(entries.c.id).where(entries.c.settled_drain == drains.c.id).exists(),
            ]
            last = tx.execute(
                select(drains.c.id)
                .where(drains.c.queue == queue.name, did[0] | did[1] | did[2])
                .order_by(drains.c.epoch.desc())
                .limit(1)
            ).scalar()
        # The proof of the last run that did anything is repeated, under this hold.
        proven = Drain(
            str(last or drain.id), queue, drain.ledger, from_environment, epoch=drain.epoch, kind=drain.kind
        )
        with proven:
            proof = verify_conservation(proven)
            proven.phase("verify" if proven.id == drain.id else "closed")
    if as_json:
        terminal.put_json({"queue": queue.name, "drain": last or drain.id, **proof})
    else:
        terminal.say(
            f"{queue.name}, as of {last or drain.id}: {proof['said']}",
            "bold green" if proof["proven"] else "bold red",
        )
        terminal.show("witnesses", ("witness", "saw"), list(proof["witnesses"].items()))
        terminal.show(
            "broken", ("law", "what", "n"), [(b["law"], b["what"], b["n"]) for b in proof["broken"]]
        )
        failed = [c for c in proof["expectations"] if not c["success"]]
        terminal.show("expectations not met", ("expectation",), [(c["expectation"],) for c in failed])
    return 0 if proof["proven"] else 1


@click.command()
@queue_argument
@click.option("--to", type=click.Choice(["file", "topic", "dlq"]), required=True, help="Where to.")
@click.argument("where", required=False)
@selection_options
@deadline_option
@who_option
@as_json
def restore(
    queue: QueueConfig,
    to: Literal["file", "topic", "dlq"],
    where: str | None,
    chosen: Selection,
    deadline: float | None,
    who: str,
    as_json: bool,
) -> int:
    """Restore archived entries, byte for byte.

    \b
      dlq restore QUEUE --to file PATH …    any entries; one JSON line each (`dlq explain --help` has the format)
      dlq restore QUEUE --to topic TOPIC …  any entries, to a scratch topic you created, on the target's cluster
      dlq restore QUEUE --to dlq …          entries still open, back to the queue; they are settled as handed back

    Files and scratch topics change no entry's state. What is handed back carries our headers beside its own;
    taken again it is linked to what it was, and waits for a person.
    """
    from dlq import restore as restoring

    if (to == "dlq") == (where is not None):
        raise click.UsageError(
            "--to dlq takes no WHERE"
            if to == "dlq"
            else f"--to {to} needs {'a PATH' if to == 'file' else 'a TOPIC'}"
        )
    with terminal.progress("restoring") as progress:
        if to == "file":
            done = restoring.to_file(queue, chosen, Path(str(where)), progress)
        elif to == "topic":
            done = restoring.to_topic(queue, chosen, str(where), from_environment, progress)
        else:
            with hold(queue, "restore", kind="restore", connections=from_environment) as held:
                done = restoring.hand_back(
                    held.drain, chosen, who=who, deadline_s=deadline or queue.limits.budget, progress=progress
                )
    if as_json:
        terminal.put_json(
            {
                "queue": queue.name,
                "to": to,
                "where": done.where,
                "entries": done.entries,
                "flawed": done.flawed,
                "left_out": done.left_out,
            }
        )
    else:
        terminal.say(f"{done.entries:,} entries restored to {done.where}")
    if done.flawed:
        how = "were left out" if to == "dlq" else "are there without them"
        terminal.warn(f"{done.flawed:,} entries have headers no client could read: they {how}")
    for what, why in done.left_out:
        terminal.warn(f"left out: {what}: {why}")
    return 0


def _first_intake(drain: Drain) -> int:
    from dlq import first_intake

    with drain.ledger.read() as tx:
        return sum(row["entries"] for row in first_intake.waiting(tx, drain.queue))


def _say_first_intake(queue: QueueConfig, n: int) -> None:
    if n:
        terminal.warn(
            f"{n:,} entries are of the queue's first intake and wait for a decision: look with `dlq plan {queue.name} "
            f"--first-intake`, free them with `dlq plan {queue.name} --approve`"
        )


def _rows(found: Sequence[dict[str, Any]], names: str) -> list[tuple[Any, ...]]:
    return [tuple(row[name] for name in names.split()) for row in found]


COMMANDS = (take, plan, replay, edit, verify, restore)
