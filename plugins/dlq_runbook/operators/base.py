"""What every stage's operator shares."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NoReturn

from airflow.sdk import BaseOperator

from dlq_runbook.drains import Stopped, airflow_errors, attach, seconds_left

if TYPE_CHECKING:
    from airflow.sdk import Context

    from dlq.drain import Drain

MARGIN_S = 20.0
"""Between a stage's deadline and its execution timeout: time to close what is open and say so."""
DEFAULT_TIMEOUT_S = 300.0
PROGRESS_EVERY_S = 5.0


class DlqOperator(BaseOperator):
    """One stage of the runbook: attaches to the run's drain, calls the core, returns its small result.

    A subclass says what to call in :meth:`stage`. What a retry can't heal fails at once; the rest is retried,
    and goes on where it stopped: every stage may be repeated.

    :param queue_name: The queue's name, the stem of its file.
    """

    ui_color = "#eef3f8"
    isolated = True
    """Whether the stage runs while routing is held, whose lease it then extends too."""

    def __init__(self, *, queue_name: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.queue_name = queue_name

    def stage(self, drain: Drain, context: Context) -> Any:
        """Call the core; the result is small, JSON, and without payloads."""
        raise NotImplementedError

    def execute(self, context: Context) -> Any:
        from dlq import telemetry

        with airflow_errors(), telemetry.stage(self.task_id) as span, self.attached(context) as drain:
            span.of(drain.queue, drain.id, dry_run=drain.dry_run)
            self.hold(drain)
            result = self.stage(drain, context)
            span.came_to(result)
            return result

    def attached(self, context: Context) -> Drain:
        return attach(self.queue_name, context)

    @property
    def timeout_s(self) -> float:
        return self.execution_timeout.total_seconds() if self.execution_timeout else DEFAULT_TIMEOUT_S

    def hold(self, drain: Drain) -> None:
        """Extend both leases to this stage's own deadline: nothing runs between tasks to renew them."""
        hold(drain, self.timeout_s, routing=self.isolated)

    def deadline_s(self, drain: Drain, context: Context) -> float:
        """Seconds the core may take: what is left of the run's budget, within the execution timeout."""
        return max(0.0, min(self.timeout_s - MARGIN_S, seconds_left(drain.config.limits.budget, context)))

    def progress(self, done: int, about: int) -> None:
        """Say every few seconds how far a long stage is."""
        now = time.monotonic()
        if now - getattr(self, "_said_at", 0.0) >= PROGRESS_EVERY_S:
            self._said_at = now
            share = f" ({min(100, 100 * done // about)} %)" if about else ""
            self.log.info("%s of about %s%s", f"{done:,}", f"{max(about, done):,}", share)

    def on_kill(self) -> NoReturn:
        """End where we are: transactions abort, clients close, and the next try goes on from the ledger."""
        raise Stopped("told to stop: what was committed stands, the rest is as it was")


def hold(drain: Drain, seconds: float, *, routing: bool = True) -> None:
    """Extend the queue's lease, and the routing's, to ``seconds`` from now."""
    from dlq.routing import extend_isolation

    drain.extend(seconds)
    if routing:
        extend_isolation(drain, seconds)
