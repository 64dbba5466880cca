"""The command that repairs: one change for a whole group, previewed, drafted, approved by its hash."""

from __future__ import annotations

from collections.abc import Sequence
from typing import IO, Any

import click

from dlq.cli import terminal
from dlq.cli.options import as_json, deadline_option, group_option, queue_argument, who_option
from dlq.config import QueueConfig
from dlq.connections import from_environment
from dlq.drain import Drain
from dlq.errors import Refused
from dlq.hold import hold
from dlq.selection import Selection


@click.command()
@queue_argument
@group_option
@click.option(
    "--entry",
    "entries",
    multiple=True,
    metavar="ENTRY",
    help="This entry: <partition>/<offset>; may be repeated.",
)
@click.option(
    "--patch",
    type=click.File("rb"),
    help="The file that holds the JSON Patch (RFC 6902); - is standard input.",
)
@click.option("--dry-run", is_flag=True, help="With --patch: try it on every entry, and write nothing.")
@click.option(
    "--payload", is_flag=True, help="With --patch: show the values that change. They may be secrets."
)
@click.option("--approve", metavar="HASH", help="Send the drafts of the repair that has this hash.")
@deadline_option
@who_option
@as_json
def repair(
    queue: QueueConfig,
    groups: tuple[int, ...],
    entries: tuple[str, ...],
    patch: IO[bytes] | None,
    dry_run: bool,
    payload: bool,
    approve: str | None,
    deadline: float | None,
    who: str,
    as_json: bool,
) -> int:
    """Repair a whole group with one change.

    \b
      dlq repair QUEUE --group 7 --patch FILE --dry-run    what would change, and where it can't
      dlq repair QUEUE --group 7 --patch FILE              the same, and each new value is drafted
      dlq repair QUEUE --approve HASH                      send these drafts, a canary first

    The patch is applied to the document in each entry's value (JSON, or Avro, Protobuf and JSON Schema framed for
    the registry that schema_registry names; gzip and zstd around any of them), and the result is encoded as the value
    was, with the same schema, and checked against it. An entry it can't be done to stays open, and stops nothing.
    Key, headers and the original stay. Nothing is sent before the drafts are approved: here, or by the Dag
    dlq_review__QUEUE.
    """
    if (approve is None) == (patch is None) or bool(approve) == bool(groups or entries):
        raise click.UsageError("name --group or --entry and a --patch, or --approve and a HASH")
    if approve is not None:
        return _send(queue, approve, deadline or queue.limits.budget, who, as_json)
    assert patch is not None
    _draft(queue, Selection(entries, groups), patch.read(), dry_run, payload, who, as_json)
    return 0


def _draft(
    queue: QueueConfig, chosen: Selection, text: bytes, dry_run: bool, payload: bool, who: str, as_json: bool
) -> None:
    from dlq import repair as repairs
    from dlq.patch import Patch

    patch = Patch(text)
    with terminal.progress("patching") as progress:
        made = repairs.make(queue, chosen, patch, who, from_environment, dry_run=dry_run, progress=progress)
    sample = [
        {**told, "changes": [change.plain() for change in shown.changes] if payload else told["changes"]}
        for told, shown in zip(made.redacted(), made.sample, strict=True)
    ]
    if as_json:
        terminal.put_json(
            {
                "queue": queue.name,
                "repair": made.id,
                "hash": made.hash,
                "patch_sha": patch.sha,
                "chosen": made.chosen,
                "entries": made.entries,
                "drafted": made.drafted,
                "unchanged": made.unchanged,
                "failed": dict(made.failed),
                "left_out": made.left_out,
                "sample": sample,
                "who": who,
            }
        )
        return
    terminal.show(
        f"what changes, in {len(sample)} of {made.entries:,} entries",
        ("entry", "encoding", "where", "before", "after"),
        [
            (each["entry"], each["encoding"], *change)
            for each in sample
            for change in (each["changes"] or [("-", "-", each["why"] or "nothing changes")])
        ],
    )
    terminal.show(
        "failed: stays open", ("entries", "why"), [(n, why) for why, n in made.failed.most_common(20)]
    )
    terminal.show(
        "left out: does not wait for a repair",
        ("entries", "why"),
        [(n, why.replace("_", " ")) for why, n in made.left_out.items()],
    )
    terminal.say("")
    would = "would be drafted" if dry_run else "drafted"
    terminal.say(
        f"{made.drafted:,} of {made.entries:,} entries of {made.chosen} {would}, {made.unchanged:,} unchanged, "
        f"{made.failed.total():,} failed; patch {patch.sha[:12]}",
        "bold",
    )
    if dry_run:
        terminal.say("dry run: nothing was written")
    elif made.hash is not None:
        terminal.say(
            f"To send them: `dlq repair {queue.name} --approve {made.hash[:12]}`, or run the Dag "
            f"dlq_review__{queue.name} and choose to replay repair {made.id} (#{made.hash[:12]}). Until then nothing "
            "is sent."
        )


def _send(queue: QueueConfig, digest: str, deadline_s: float, who: str, as_json: bool) -> int:
    from dlq import review
    from dlq.conservation import verify_conservation
    from dlq.report.write import write_report
    from dlq.verdict import close_drain

    with hold(queue, "repair", kind="review", connections=from_environment) as held:
        drain = held.drain
        subject, whole = _proposed(drain, digest)
        done = review.apply_review(drain, {subject: {"choice": "replay", "hash": whole}}, who, deadline_s)
        proof = verify_conservation(drain)
        said = close_drain(drain)
        held.verdict = None  # written down, and the queue is free
        report = write_report(drain)
    if as_json:
        terminal.put_json(
            {
                "queue": queue.name,
                "drain": drain.id,
                "subject": subject,
                **done,
                "proven": proof["proven"],
                "verdict": said["verdict"],
                "report": report["html"],
            }
        )
    else:
        terminal.say(f"{subject}: {done['said']}", "bold")
        for line in report["summary"].splitlines():
            terminal.say(line)
        terminal.say(f"report: {report['html']}")
    return 0 if said["verdict"] == "green" and not done["refused"] else 1


def _proposed(drain: Drain, digest: str) -> tuple[str, str]:
    """Subject and whole hash of the repair whose hash begins like this.

    :raises Refused: when there is none: it changed since, or was sent.
    """
    from dlq import repair as repairs

    with drain.ledger.read() as tx:
        waiting: Sequence[dict[str, Any]] = repairs.proposals(tx, drain.queue)
    found = [each for each in waiting if len(digest) >= 12 and each["hash"].startswith(digest)]
    if len(found) != 1:
        known = ", ".join(f"{each['subject']} has {each['hash'][:12]}" for each in waiting) or "none waits"
        raise Refused(
            f"no repair of queue {drain.queue} has the hash {digest} now ({known}): its entries changed since it was "
            "shown, or it was sent. Look again"
        )
    return found[0]["subject"], found[0]["hash"]
