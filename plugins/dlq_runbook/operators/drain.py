"""A drain's beginning and end: the lease, the verdict, the report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from airflow.sdk.configuration import conf as airflow_conf
from airflow.sdk.exceptions import AirflowFailException, AirflowSkipException

from dlq.errors import ConfigError, Refused
from dlq_runbook.connections import connection
from dlq_runbook.drains import conf, configuration, is_dry, look, rehearse, run_key
from dlq_runbook.forms import one_line
from dlq_runbook.links import ReportLink
from dlq_runbook.operators.base import DlqOperator

if TYPE_CHECKING:
    from airflow.sdk import Context

    from dlq.config import QueueConfig
    from dlq.drain import Drain

LOCAL_EXECUTORS = {"LocalExecutor", "SequentialExecutor"}


class OpenDrain(DlqOperator):
    """Take the queue's lease, freeze its configuration, look before anything is touched.

    :param kind: What the lease is taken for: ``drain``, ``review``, or ``cli`` for what is neither.
    """

    isolated = False

    def __init__(self, *, kind: Literal["drain", "review", "cli"] = "drain", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.kind = kind

    def attached(self, context: Context) -> Drain:
        from dlq.opening import open_drain

        if is_dry(context):
            self.log.info("Dry run: every stage says what it would do, and changes nothing")
            return rehearse(self.queue_name, context)
        config = configuration(self.queue_name, context)
        check_reach(config, airflow_conf.get("core", "executor"))
        run_id = run_key(context["dag_run"].dag_id, context["dag_run"].run_id)
        return open_drain(
            config, run_id=run_id, kind=self.kind, connections=connection, lease_s=self.timeout_s
        )

    def stage(self, drain: Drain, context: Context) -> dict[str, Any]:
        from dlq.flows import baseline
        from dlq.ledger import lease

        if note := conf(context).get("incident"):
            drain.note("open_drain", f"incident: {note}")
        try:
            golden = baseline(drain) if self.kind == "drain" else None
        except BaseException:
            # No teardown runs behind a setup that failed: nobody else would free the queue.
            lease.release(drain.ledger, drain.queue, drain.id, drain.epoch, "refused")
            raise
        return {"drain": drain.id, "queue": drain.queue, "dry_run": drain.dry_run, "golden": golden}


class CloseDrain(DlqOperator):
    """Give the verdict: green where the run did its duty, provably. Red fails the Dag run."""

    isolated = False

    def attached(self, context: Context) -> Drain:
        return look(self.queue_name, context)

    def hold(self, drain: Drain) -> None:
        """Hold the lease, unless an earlier try gave the verdict: the queue is free then, or another's."""
        from dlq.verdict import earlier

        if earlier(drain) is None:
            super().hold(drain)

    def stage(self, drain: Drain, context: Context) -> dict[str, Any]:
        from dlq.verdict import close_drain

        run = context["dag_run"]
        states = context["ti"].get_task_states(dag_id=run.dag_id, run_ids=[run.run_id])
        verdict = close_drain(drain, states.get(run.run_id, {}))
        context["ti"].xcom_push(key="verdict", value=verdict)
        for left in verdict["open"]:
            what, why = one_line(left["group"]), left["reason"].replace("_", " ")
            self.log.info(
                "Open: %s of %s, %s: work %s of %s", left["count"], what, why, left["work"], left["owner"]
            )
        if verdict["verdict"] == "red":
            raise AirflowFailException("Verdict red: " + "; ".join(verdict["reasons"]))
        return verdict


class WriteReport(DlqOperator):
    """Write what the run did, for people (HTML) and programs (JSON)."""

    operator_extra_links = (ReportLink(),)

    def attached(self, context: Context) -> Drain:
        """The drain to read: it is closed, and another may hold the queue by now."""
        try:
            return look(self.queue_name, context)
        except Refused as error:
            self.log.info("Nothing to report: no drain was opened")
            raise AirflowSkipException("No drain was opened") from error

    def hold(self, drain: Drain) -> None:
        """A report needs no lease."""

    def stage(self, drain: Drain, context: Context) -> dict[str, Any]:
        from dlq.report.write import write_report

        report = write_report(drain)
        self.log.info("%s", report["summary"])
        return report


def check_reach(config: QueueConfig, executor: str) -> None:
    """See that every worker reaches the same ledger, archive and report.

    :param executor: Airflow's ``[core] executor``, a comma-separated list.
    :raises ConfigError: for a file on one machine where tasks run on several.
    """
    names = {name.strip().rsplit(":", 1)[-1].rsplit(".", 1)[-1] for name in executor.split(",")}
    if names <= LOCAL_EXECUTORS:
        return
    local = [field for field in ("archive", "report") if is_local(getattr(config, field))]
    if config.ledger.startswith("sqlite"):
        local.insert(0, "ledger")
    if local:
        raise ConfigError(
            f"queue {config.name}: {', '.join(local)}: on one machine, but {executor} runs tasks on several. "
            "Use postgresql:// for the ledger, an object store (s3://…) for archive and report"
        )


def is_local(uri: str) -> bool:
    return "://" not in uri or uri.startswith(("file://", "local://"))
