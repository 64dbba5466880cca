"""From a task's context to the drain it belongs to, and from the core's errors to Airflow's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from airflow.sdk.exceptions import AirflowFailException

from dlq.config import QueueConfig, load_queue
from dlq.errors import ConfigError, Fenced, GateFailed, Refused
from dlq_runbook.connections import connection

if TYPE_CHECKING:
    from airflow.sdk import Context

    from dlq.drain import Drain

TIGHTENING = ("batch", "rate", "budget", "approve_fix", "approve_dr")
"""Params that may only tighten the queue's policy."""
KNOWN = (*TIGHTENING, "dry_run", "incident")


class Stopped(BaseException):
    """The task was told to end. No ``except Exception`` keeps it: clients close, and the next try goes on."""


@contextmanager
def airflow_errors() -> Iterator[None]:
    """Fail at once what a retry can't heal; the core's other errors pass, for Airflow to retry."""
    try:
        yield
    except (Fenced, Refused, ConfigError, GateFailed) as error:
        raise AirflowFailException(f"{type(error).__name__}: {error}") from None


def conf(context: Context) -> Mapping[str, Any]:
    """What the run was triggered with.

    :raises ConfigError: for a key no param of that name exists for: a typing error must not be ignored.
    """
    given = context["dag_run"].conf or {}
    if unknown := sorted(given.keys() - set(KNOWN)):
        raise ConfigError(
            f"conf: unknown key(s) {', '.join(unknown)}; trigger again without. Known: {', '.join(KNOWN)}"
        )
    return given


def is_dry(context: Context) -> bool:
    """Whether the run may change nothing. Read from conf: Airflow can be told to keep conf out of params.

    :raises ConfigError: when it is no boolean: ``"false"`` is true in Python.
    """
    dry = conf(context).get("dry_run", False)
    if not isinstance(dry, bool):
        raise ConfigError(f"conf: dry_run is {dry!r}; write true or false")
    return dry


def configuration(queue: str, context: Context) -> QueueConfig:
    """The queue's file as it is now, tightened by the run's conf. A drain goes by its frozen copy.

    :raises ConfigError: naming file, field and fix, or the param that would loosen the policy.
    """
    given = conf(context)
    return load_queue(queue).tighten({key: given[key] for key in TIGHTENING if key in given})


def run_key(dag_id: str, run_id: str) -> str:
    """What a drain's id is made from: a run id is unique within its Dag only, and a review is no drain."""
    for kind in ("review", "chaos"):
        if dag_id.startswith(f"dlq_{kind}__"):
            return f"{kind}:{run_id}"
    return run_id


def attach(queue: str, context: Context) -> Drain:
    """The drain of this Dag run, or one that changes nothing where the run is dry.

    :raises Fenced: when another holder has the queue's lease.
    """
    from dlq.drain import Drain

    if is_dry(context):
        return rehearse(queue, context)
    return Drain.attach(
        _identity(queue, context), config=configuration(queue, context), connections=connection
    )


def look(queue: str, context: Context) -> Drain:
    """The drain of this Dag run, to read: its lease may be another's by now.

    :raises Refused: when it was never opened.
    """
    from dlq.drain import Drain

    if is_dry(context):
        return rehearse(queue, context)
    return Drain.look(_identity(queue, context), config=configuration(queue, context), connections=connection)


def rehearse(queue: str, context: Context) -> Drain:
    """A drain that holds no lease and changes nothing."""
    from dlq.drain import dry

    run = context["dag_run"]
    key = run_key(run.dag_id, run.run_id)
    return dry(configuration(queue, context), run_id=key, connections=connection)


def _identity(queue: str, context: Context) -> str:
    from dlq.drain import drain_id

    return drain_id(queue, run_key(context["dag_run"].dag_id, context["dag_run"].run_id))


def seconds_left(budget_s: float, context: Context) -> float:
    """What is left of the run's hour; a cleared run begins it anew."""
    started = context["dag_run"].start_date or datetime.now(UTC)
    return max(0.0, budget_s - (datetime.now(UTC) - started).total_seconds())
