"""Commands that only look: status, sample, find, explain."""

from __future__ import annotations

from functools import partial
from typing import IO, Any

import click

from dlq import clock, expiry
from dlq.cli import terminal
from dlq.cli.options import as_json, queue_argument, selection_options
from dlq.config import Owners, QueueConfig, load_queue, queue_names
from dlq.connections import from_environment
from dlq.dedupe import DedupeKeys
from dlq.envelopes import JsonPath
from dlq.errors import ConfigError, DlqError
from dlq.explain import BadLine, encoding, explained, history
from dlq.export import exported
from dlq.grouping.classify import Classifier
from dlq.grouping.taxonomy import load_taxonomy
from dlq.ledger import Ledger
from dlq.redact import redact
from dlq.selection import Selection


@click.command()
@click.argument("queue", required=False)
@as_json
def status(queue: str | None, as_json: bool) -> int:
    """Say how a queue stands, or every queue.

    Depth, outstanding, ratio; what is unsettled, why and whose; who holds it, and what they left unfinished.
    Reads only, and needs no lease.
    """
    from dlq.cli.exits import exit_code
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
    dying = found["first_to_expire"]
    if words := expiry.said(dying["in_queue"], dying["in_custody"]):
        terminal.say(words)
    for finding in found["findings"]:
        terminal.warn(finding)
    terminal.show(
        "unsettled",
        ("entries", "state", "reason", "owner"),
        [(row["entries"], row["state"], _words(row["reason"]), row["owner"]) for row in found["open"]],
    )
    terminal.show(
        "on hold",
        ("entries", "failure", "next look after", "why"),
        [
            (h["entries"], f"{h['error_type']} in {h['component']}", h["until"], h["why"])
            for h in found["on_hold"]
        ],
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
    Of SQS some are received, held and given back, which it counts. Messages are shown redacted.
    """
    from dlq.sample import escaped, looking
    from dlq.sample import sample as look

    if payload:
        terminal.warn(
            "Payloads follow as they are: they may hold secrets and personal data, and somebody else wrote them."
        )
    with looking(queue, from_environment) as (source, positions):
        if not source.has_log:
            terminal.warn(
                f"A look is a touch: up to {most} entries of {queue.name} are received, which SQS counts, held for "
                "up to 60 s, and given back; others can't receive them meanwhile."
            )
        found = look(source, queue, positions, most)
        kept_ms = source.retention_ms()
    if as_json:
        for one in found:
            terminal.put_json(_sampled(one, payload, kept_ms))
        return
    if not found:
        terminal.say(
            f"{queue.name}: nothing is in the queue beyond what is in custody; `dlq status {queue.name}` counts that"
        )
        return
    rows = [_sampled(one, False, kept_ms) for one in found]
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
    if words := expiry.said(min((r["expires_at"] for r in rows if r["expires_at"]), default=None), None):
        terminal.say(words)
    for one in found if payload else ():
        record = one.record
        terminal.say(f"{record.part}/{record.place} key: {escaped(record.key)}")
        terminal.say(f"{record.part}/{record.place} value: {escaped(record.value)}")


def _sampled(one: Any, payload: bool, kept_ms: int | None) -> dict[str, Any]:
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
        "expires_at": expiry.of(record, kept_ms),
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
@queue_argument
@click.argument("text")
@click.option("--at", "path", metavar="PATH", help="Only where the value has TEXT there: $.order.id")
@click.option(
    "-n", "most", type=click.IntRange(1, 500), default=20, show_default=True, help="How many to show."
)
@partial(selection_options, needed=False)
@as_json
def find(
    queue: QueueConfig, text: str, path: str | None, most: int, chosen: Selection, as_json: bool
) -> None:
    """Find entries in custody that carry TEXT.

    In key, headers or value, whatever state they are in; compressed values and those written with a schema are read.
    """
    from dataclasses import asdict

    from dlq.search import search

    try:
        at = JsonPath(path) if path else None
    except ValueError as error:
        raise click.UsageError(f"--at: {error}") from None
    with terminal.progress("searching") as progress:
        found = search(queue, chosen, text, at, from_environment, most, progress)
    rows = [asdict(one) for one in found.found]
    if as_json:
        for row in rows:
            terminal.put_json(row)
    elif rows:
        terminal.show(
            f"{len(rows)} entries of {queue.name}",
            [_words(k) for k in rows[0]],
            [[*r.values()] for r in rows],
        )
    else:
        terminal.say(
            f"{queue.name}: nothing in custody carries it; `dlq sample {queue.name}` looks into the queue"
        )
    if found.more:
        terminal.warn(f"there are more than {most}: narrow it, or raise -n")
    if found.unread:
        terminal.warn(
            f"{found.unread:,} values can't be read as what they are: of those only the bytes were searched"
        )


@click.command()
@click.argument("file", type=click.File("rb"), required=False)
@click.option("--queue", help="Read FILE as this queue does: its formats, its dedupe key.")
@click.option(
    "--entry", "entry", nargs=2, metavar="QUEUE ENTRY", help="An entry in custody instead of a file."
)
@as_json
def explain(
    file: IO[bytes] | None, queue: str | None, entry: tuple[str, str] | None, as_json: bool
) -> int | None:
    """Explain dead letters.

    What is understood of those in FILE, or all that the ledger knows of one in custody. FILE (- is standard
    input) has one dead letter a line, as `dlq restore --to file` writes it:

    \b
      {"transport": "kafka", "topic": …, "partition": …, "offset": …, "timestamp_ms": …,
       "key_b64": …, "value_b64": …, "headers": [[name, value_b64 or null], …]}
      {"transport": "sqs", "body": …, "attributes": …, "message_attributes": …}

    For each the answer is one JSON line, in order; what is not known is null. Use it to try a taxonomy. A line
    that is no dead letter is named on standard error and has no answer; the exit status is then 2.

    \b
    ENTRY is <partition>/<offset>, or <source>/<partition>/<offset>.
    """
    if (file is None) == (entry is None):
        raise click.UsageError("name either a FILE or --entry QUEUE ENTRY")
    if file is not None:
        return _explain_file(file, queue)
    assert entry is not None
    config = load_queue(entry[0])
    ledger = Ledger.open(config.ledger)
    try:
        found = history(ledger, config.name, entry[1])
    finally:
        ledger.close()
    found["encoding"] = encoding(config, found["archive"], from_environment)
    if as_json:
        terminal.put_json(found)
    else:
        _show_entry(found)
    return None


def _explain_file(file: IO[bytes], queue: str | None) -> int:
    from dlq.cli.exits import OK, WRONG

    config = load_queue(queue) if queue else None
    classifier = Classifier.load(config) if config else Classifier(load_taxonomy(), Owners())
    keys = DedupeKeys(config, from_environment) if config else None
    for finding in classifier.taxonomy.findings:
        terminal.warn(f"taxonomy.yaml: {finding}")
    status = OK
    for each in explained(file, classifier, keys):
        if isinstance(each, BadLine):
            terminal.complain(
                f"{getattr(file, 'name', 'standard input')}:{each.number}: {each.why}; "
                "`dlq explain --help` has the format"
            )
            status = WRONG
        else:
            terminal.put_json(each)
    if keys is not None:
        keys.close()
    return status


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
    rows.append(("encoding", found["encoding"]))
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
    if len(found["returns"]) > 1:
        terminal.show(
            "its returns, and what it is one of",
            ("entry", "failed at", "replays before", "sent at", "in job", "state", "why"),
            [
                (
                    f"{r['part']}/{r['place']}",
                    *(r[key] for key in ("failed_at", "attempts", "sent_at", "job", "state")),
                    _words(r["reason"]),
                )
                for r in found["returns"]
            ],
        )
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
        ("draft", "by", "at", "payload sum", "repair", "patch", "sent in job"),
        [
            (
                *(d[key] for key in ("id", "who", "at", "payload_sha", "repair")),
                d["patch_sha"] and d["patch_sha"][:12],
                d["job"],
            )
            for d in found["drafts"]
        ],
    )
    terminal.show(
        "repairs that failed",
        ("repair", "by", "at", "patch", "why"),
        [(r["id"], r["who"], r["at"], r["patch_sha"][:12], r["why"]) for r in found["repairs_failed"]],
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


COMMANDS = (status, sample, find, explain)
