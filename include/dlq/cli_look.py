"""Commands that only look: status, sample, explain."""

from __future__ import annotations

from typing import IO, Any

import click

from dlq import clock, terminal
from dlq.cli_options import as_json, queue_argument
from dlq.config import QueueConfig, load_queue, queue_names
from dlq.connections import from_environment
from dlq.errors import ConfigError, DlqError
from dlq.explain import explained, history
from dlq.export import exported
from dlq.ledger import Ledger
from dlq.redact import redact


@click.command()
@click.argument("queue", required=False)
@as_json
def status(queue: str | None, as_json: bool) -> int:
    """Say how a queue stands, or every queue.

    Depth, outstanding, ratio; what is unsettled, why and whose; who holds it, and what they left unfinished.
    Reads only, and needs no lease.
    """
    from dlq.cli import exit_code
    from dlq.status import status as stand

    names = [queue] if queue else queue_names()
    if not names:
        raise ConfigError("no queue is configured: set DLQ_CONFIG to the folder that has queues/<name>.yaml")
    worst = 0
    for name in names:
        try:
            found = stand(load_queue(name), from_environment)
        except DlqError as error:
            if queue:
                raise
            terminal.complain(f"{name}: {error}")
            worst = max(worst, exit_code(error))
            continue
        if as_json:
            terminal.put_json(found)
        else:
            _show_status(found)
    return worst


def _show_status(found: dict[str, Any]) -> None:
    share = "not known"
    if found["ratio"] is not None:
        over = "over" if found["ratio"] > found["slo"] else "within"
        share = f"{found['ratio']:.3%} of {found['workflows']:,} workflows, {over} the objective of {found['slo']:.2%}"
    terminal.say(
        f"{found['queue']}: {terminal.safe(found['outstanding'])} outstanding "
        f"(at most {terminal.safe(found['depth'])} in the queue, {found['unsettled']:,} in custody); ratio {share}",
        "bold",
    )
    holder, last = found["holder"], found["last_drain"]
    if holder:
        terminal.say(
            f"held by {holder['drain']} ({holder['kind']}), in phase {holder['phase']}, until {holder['until']}"
        )
    elif last:
        terminal.say(
            f"free; last held by {last['id']} ({last['kind']}), closed {last['closed_at']}: {last['verdict']}"
        )
    if found["paused_by"]:
        terminal.say(f"paused by {found['paused_by']}: nothing is sent", "yellow")
    for finding in found["findings"]:
        terminal.warn(finding)
    terminal.show(
        "unsettled",
        ("entries", "state", "reason", "owner"),
        [(row["entries"], row["state"], _words(row["reason"]), row["owner"]) for row in found["open"]],
    )
    terminal.show(
        "unfinished jobs (the next drain settles them)",
        ("job", "kind", "target", "state", "sent", "of"),
        [
            (j["id"], j["kind"], j["target"], j["state"], j["cursor"], j["size"])
            for j in found["unfinished_jobs"]
        ],
    )


@click.command()
@queue_argument
@click.option(
    "-n",
    "most",
    type=click.IntRange(1, 50),
    default=10,
    show_default=True,
    help="How many entries, 50 at most.",
)
@click.option(
    "--payload", is_flag=True, help="Show keys and values as they are, escaped. They may hold secrets."
)
@as_json
def sample(queue: QueueConfig, most: int, payload: bool, as_json: bool) -> None:
    """Look at entries still in the queue.

    At the oldest of each partition, without a drain. Nothing is taken, and the queue is told nothing.
    Messages are shown redacted. Kafka only.
    """
    from dlq.sample import escaped, looking
    from dlq.sample import sample as look

    if payload:
        terminal.warn(
            "Payloads follow as they are: they may hold secrets and personal data, and somebody else wrote them."
        )
    with looking(queue, from_environment) as (source, positions):
        found = look(source, queue, positions, most)
    if as_json:
        for one in found:
            terminal.put_json(_sampled(one, payload))
        return
    if not found:
        terminal.say(
            f"{queue.name}: nothing is in the queue beyond what is in custody; `dlq status {queue.name}` counts that"
        )
        return
    rows = [_sampled(one, False) for one in found]
    keys = (
        "place",
        "error_type",
        "component",
        "category",
        "remedy",
        "correlation_id",
        "failed_at",
        "bytes",
        "retry_count",
        "message",
    )
    terminal.show(
        f"{len(rows)} entries of {queue.name}",
        [_words(k) for k in keys],
        [[row[k] for k in keys] for row in rows],
    )
    for one in found if payload else ():
        record = one.record
        terminal.say(f"{record.part}/{record.place} key: {escaped(record.key)}")
        terminal.say(f"{record.part}/{record.place} value: {escaped(record.value)}")


def _sampled(one: Any, payload: bool) -> dict[str, Any]:
    from dlq.archive import Stored

    record, what, group = one.record, one.understood, one.group
    row = {
        "place": f"{record.part}/{record.place}",
        "format": what.format,
        "error_type": group.error_type,
        "component": group.component,
        "category": group.category,
        "remedy": group.remedy,
        "rule": group.rule,
        "fingerprint": group.fingerprint,
        "correlation_id": what.correlation_id,
        "failed_at": clock.from_ms(what.failed_at_ms),
        "retry_count": what.retry_count,
        "bytes": len(record.key or b"") + len(record.value or b""),
        "flaw": record.flaw,
        "message": redact(what.message or "")[:200],
    }
    if payload:
        import msgspec

        stored = Stored(
            record.part, record.pos, record.key, record.value, record.headers, record.timestamp_ms
        )
        row["exported"] = msgspec.json.decode(exported(stored, None))
    return row


@click.command()
@click.argument("file", type=click.File("rb"), required=False)
@click.option(
    "--entry", "entry", nargs=2, metavar="QUEUE ENTRY", help="An entry in custody instead of a file."
)
@as_json
def explain(file: IO[bytes] | None, entry: tuple[str, str] | None, as_json: bool) -> None:
    """Explain dead letters.

    What is understood of those in FILE, or all that the ledger knows of one in custody. FILE (- is standard
    input) has one dead letter a line, as `dlq restore --to file` writes it:

    \b
      {"transport": "kafka", "topic": …, "partition": …, "offset": …, "timestamp_ms": …,
       "key_b64": …, "value_b64": …, "headers": [[name, value_b64 or null], …]}
      {"transport": "sqs", "body": …, "attributes": …, "message_attributes": …}

    For each the answer is one JSON line, in order; what is not known is null. Use it to try a taxonomy.

    \b
    ENTRY is <partition>/<offset>, or <source>/<partition>/<offset>.
    """
    if (file is None) == (entry is None):
        raise click.UsageError("name either a FILE or --entry QUEUE ENTRY")
    if file is not None:
        for line in explained(file, getattr(file, "name", "standard input")):
            terminal.put_json(line)
        return
    assert entry is not None
    config = load_queue(entry[0])
    ledger = Ledger.open(config.ledger)
    try:
        found = history(ledger, config.name, entry[1])
    finally:
        ledger.close()
    if as_json:
        terminal.put_json(found)
    else:
        _show_entry(found)


_PLAIN = (
    "state",
    "reason",
    "owner",
    "target",
    "held_until",
    "attempts",
    "size",
    "payload_sha",
    "failed_at",
    "expires_at",
    "origin",
    "correlation_id",
    "trace_id",
    "dedupe_key",
)


def _show_entry(found: dict[str, Any]) -> None:
    terminal.say(found["entry"], "bold")
    group, archive = found["group"], found["archive"]
    rows: list[tuple[str, Any]] = [(_words(key), found[key]) for key in _PLAIN if found[key] is not None]
    rows.append(("group", f"{group['id']}: {group['signature']}"))
    rows.append(("category", f"{group['category']}, {group['remedy']}, by rule {group['rule']}"))
    rows.append(("fingerprint", f"{group['fingerprint']} ({group['format']})"))
    rows.append(("archive", f"{archive['segment']}, row {archive['row']}"))
    for what in ("taken", "settled"):
        if by := found[what]:
            rows.append((what, f"by {by['id']} ({by['kind']}), opened {by['opened_at']}"))
    for what in ("came_back_of", "came_back_as", "twin_of", "twins"):
        rows.extend(
            (_words(what), f"{o['part']}/{o['place']} ({o['state']}: {_words(o['reason'])})")
            for o in found[what]
        )
    for label, value in rows:
        terminal.say(f"  {label:<16} {terminal.safe(value)}")
    terminal.show(
        "jobs",
        ("job", "kind", "stage", "ordinal", "sent to", "at", "state", "ended"),
        [
            (j["id"], j["kind"], j["stage"], j["ordinal"], _sent_to(j), j["sent_at"], j["state"], j["ended"])
            for j in found["jobs"]
        ],
    )
    terminal.show(
        "drafts",
        ("draft", "by", "at", "payload sum"),
        [(d["id"], d["who"], d["at"], d["payload_sha"]) for d in found["drafts"]],
    )
    terminal.show(
        "decisions",
        ("at", "who", "kind", "subject", "choice"),
        [(d["at"], d["who"], d["kind"], d["subject"], d["choice"]) for d in found["decisions"]],
    )


def _sent_to(job: dict[str, Any]) -> str:
    if job["sent_to_part"] is not None:
        return f"{job['target']}/{job['sent_to_part']}/{job['sent_to_pos']}"
    return f"{job['target']}, place not known" if job["passed"] else "not sent"


def _words(code: str) -> str:
    return code.replace("_", " ")


COMMANDS = (status, sample, explain)
