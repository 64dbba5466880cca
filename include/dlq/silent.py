"""Entries whose dead letter tells of no error, as after SQS' own redrive: the orchestrator is asked why they failed."""

from __future__ import annotations

from sqlalchemy import ColumnElement, and_, select, update

from dlq.config import SqsSource
from dlq.drain import Drain
from dlq.entry import Group, Understood
from dlq.envelopes.sqs import REDRIVE
from dlq.grouping.classify import Classifier
from dlq.ledger import custody
from dlq.ledger.schema import entry, grp
from dlq.orchestrator import FailedWorkflow, OrchestratorError
from dlq.regroup import regrouping

_ASKED = 1_000  # ids a question


def silent(drain: Drain) -> ColumnElement[bool]:
    """New entries of which nothing says why they failed."""
    groups = select(grp.c.id).where(
        grp.c.queue == drain.queue, grp.c.format == REDRIVE, grp.c.error_type == "unknown"
    )
    return and_(
        entry.c.queue == drain.queue,
        entry.c.state == "open",
        entry.c.reason == "new",
        entry.c.grp.in_(groups),
    )


def ask(drain: Drain) -> int:
    """Put silent entries into the groups of the failures that the orchestrator knows of; returns how many."""
    orchestrator, last, found = drain.orchestrator, 0, 0
    classifier: Classifier | None = None
    while True:
        with drain.ledger.read() as tx:
            page = tx.execute(
                select(entry.c.id, entry.c.correlation_id)
                .where(silent(drain), entry.c.correlation_id.is_not(None), entry.c.id > last)
                .order_by(entry.c.id)
                .limit(_ASKED)
            ).all()
        if not page:
            return found
        last = page[-1].id
        try:
            if orchestrator is None or "failures" not in orchestrator.capabilities():
                return found
            failures = orchestrator.failures([row.correlation_id for row in page])
        except OrchestratorError as error:
            drain.note("categorize", f"why entries failed can't be asked: {error}", level="warning")
            return found
        classifier = classifier or Classifier.load(drain.config, regrouping(drain))
        found += _move(
            drain,
            classifier,
            {row.id: failures[row.correlation_id] for row in page if row.correlation_id in failures},
        )


def _move(drain: Drain, classifier: Classifier, failures: dict[int, FailedWorkflow]) -> int:
    groups = {number: classifier.group(_understood(failure)) for number, failure in failures.items()}
    known: dict[Group, int] = {}
    custody.group_ids(drain.ledger, drain.queue, drain.epoch, list(groups.values()), known)
    moved = 0
    with drain.ledger.write(drain.queue, drain.epoch) as tx:
        for group, row in known.items():
            ids = [number for number, of in groups.items() if of == group]
            for some in custody.batched(ids, 500):
                moved += tx.execute(
                    update(entry)
                    .where(entry.c.id.in_(some), entry.c.state == "open")
                    .values(grp=row, owner=group.owner)
                ).rowcount
    return moved


def _understood(failure: FailedWorkflow) -> Understood:
    return Understood(
        format=REDRIVE,
        error_type=failure.error_type,
        message=failure.message,
        component=failure.component,
        stage=failure.stage,
        attempts=failure.attempts,
    )


def tried(drain: Drain) -> bool:
    """Whether what stays silent goes to a canary, whose outcome decides (else to a person)."""
    source = drain.config.source
    return isinstance(source, SqsSource) and source.no_error == "canary"
