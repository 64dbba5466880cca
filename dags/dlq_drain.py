"""The DLQ drain runbook, one Dag a queue, top to bottom: each task's notes say what a person should know.

The graph is the same for every queue and configuration; a stage whose system isn't configured says so.
"""

from __future__ import annotations

from datetime import timedelta

from airflow.providers.standard.operators.empty import EmptyOperator
from airflow.sdk import DAG, TaskGroup

from dlq.config import QueueConfig, load_queue, queue_names
from dlq_runbook.operators.alerts import AcknowledgeAlert, Escalate
from dlq_runbook.operators.broken import broken_dag
from dlq_runbook.operators.custody import TakeCustody
from dlq_runbook.operators.drain import CloseDrain, OpenDrain, WriteReport
from dlq_runbook.operators.fixes import ApplyFix, ApproveFix, CanaryFix, ProposeFix
from dlq_runbook.operators.isolation import Isolate, RestoreRouting
from dlq_runbook.operators.limits import ApproveDr, GuardDataLoss, InvokeDrPlan
from dlq_runbook.operators.replay import DrainRemaining, ReplayBatches, ReplayCanary
from dlq_runbook.operators.review import OpenReview
from dlq_runbook.operators.triage import Categorize, ChooseRemedies, FindRootCause, InspectSample
from dlq_runbook.operators.verification import VerifyConservation, VerifyGoldenFlows
from dlq_runbook.params import dag_settings, schedule, trigger_form
from dlq_runbook.sensors.threshold import WaitThreshold

RUNBOOK = """
# Drain the dead-letter queue `{queue}`

Takes every dead letter into custody (archive and ledger), sends back what a retry or a fix can heal, files
the rest with its reason and owner, and **proves** that no entry was lost or run twice. Nobody needs to watch:
a person is asked only to approve what policy may not; no answer in 15 minutes leaves those entries open.

- **Trigger it** at any time. *Dry run* shows the plan and changes nothing. Fields can only tighten policy.
- **Stop it** at any time. To go on, clear the failed task **with its downstream**: it resumes there.
- **Red**: something broke or is not proven. Read `close_drain`'s log, and the report (on `write_report`).
- **Green**: the run did its duty. What is still open, and whose it is, is in the report.
"""


def drain_dag(queue: QueueConfig) -> DAG:
    minutes = queue.limits.budget / 60
    hour = timedelta(seconds=queue.limits.budget) + timedelta(minutes=2)
    with DAG(
        dag_id=f"dlq_drain__{queue.name}",
        description=f"Drain the dead-letter queue {queue.name}, and prove that nothing was lost or run twice",
        doc_md=RUNBOOK.format(queue=queue.name),
        schedule=schedule(queue),
        params=trigger_form(queue),
        max_active_runs=1,
        **dag_settings(queue),
    ) as dag:
        open_drain = OpenDrain(
            task_id="open_drain",
            execution_timeout=timedelta(minutes=10),
            doc_md=(
                "**Begin.** Takes the queue's lease, freezes its configuration, and looks at rights, "
                "target and topic before anything is touched.\n\nIf it fails, nothing was changed. "
                "*Refused* means the queue or the ledger is not what it was: do what the message says, "
                "never work around it."
            ),
        )

        # Immediate actions
        acknowledge_alert = AcknowledgeAlert(
            task_id="acknowledge_alert",
            doc_md=(
                "**Acknowledge the alert.** Silences exactly this queue's alerts until the drain "
                "ends.\n\nNever fails: without an Alertmanager, or if it doesn't answer, the log says so. "
                "Acknowledge by hand then."
            ),
        )
        isolate = Isolate(
            task_id="isolate",
            doc_md=(
                "**Isolate the DLQ.** Asks the orchestrator to hold new failures, durably, under a lease "
                "that ends by itself.\n\nAlways succeeds. `isolation: none` is no danger: custody needs "
                "none, the queue only keeps filling."
            ),
        )
        take_custody = TakeCustody(
            task_id="take_custody",
            execution_timeout=hour,
            doc_md=(
                "**Back up.** Moves every entry up to now from the queue into custody: bytes to the "
                "archive, a row each to the ledger, and only then is the queue told.\n\nMay be killed and "
                "retried at any moment."
            ),
        )
        inspect_sample = InspectSample(
            task_id="inspect_sample",
            doc_md=(
                "**Inspect 10 to 50 entries.** The first and the oldest of each group, redacted, as a "
                "table in the log."
            ),
        )
        guard_data_loss = GuardDataLoss(
            task_id="guard_data_loss",
            trigger_rule="none_failed",
            doc_md=(
                f"**Data loss risk?** With more than {queue.limits.dr:,} entries outstanding at the "
                "opening, the archive is read back in full before anything is replayed."
            ),
        )
        invoke_dr_plan = InvokeDrPlan(
            task_id="invoke_dr_plan",
            execution_timeout=hour,
            doc_md=(
                "**Invoke the DR plan.** Reads the archive of everything outstanding back, sum by sum: a "
                "restore is then known to work. `dlq restore` does it, if it must be."
            ),
        )
        approve_dr = ApproveDr(
            task_id="approve_dr",
            doc_md=(
                f"**Go on?** Decided by {queue.approval.dr}. A person finds the form under *Required "
                "Actions*.\n\nReject, or no answer: nothing is replayed, and everything stays in custody."
            ),
        )
        within_limits = EmptyOperator(
            task_id="within_limits",
            doc_md="The queue is no deeper than usual: no disaster recovery is needed.",
        )
        categorize = Categorize(
            task_id="categorize",
            trigger_rule="none_failed_min_one_success",
            doc_md=(
                "**Categorize failures** by error type and component: transient, permanent, manual, "
                "unknown. Each group comes with correlation ids to look up."
            ),
        )

        # Root cause analysis
        find_root_cause = FindRootCause(
            task_id="find_root_cause",
            doc_md=(
                "**Find the root cause.** Components that fail more often than their share, by what the "
                "entries and the orchestrator tell.\n\nIts suspects are hints. Finding none stops nothing."
            ),
        )
        choose_remedies = ChooseRemedies(
            task_id="choose_remedies",
            doc_md=(
                "**Branch on the category**: any mix of retry, fix and manual review, or nothing to do. "
                "The log says why."
            ),
        )

        # Resolution
        with TaskGroup(
            "retry_transient", tooltip="Retry non-permanent failures", prefix_group_id=False
        ) as retry_transient:
            replay_canary = ReplayCanary(
                task_id="replay_canary",
                execution_timeout=hour,
                doc_md=(
                    "**Retry, carefully.** One entry, five, twenty: and the outcome of each before the "
                    "next. Below the gate nothing more is sent, and the rest stays open."
                ),
            )
            replay_batches = ReplayBatches.partial(
                task_id="replay_batches",
                execution_timeout=hour,
                map_index_template="{{ task.job }}",
                doc_md=(
                    f"**Retry in batches of {queue.limits.batch}**, growing while outcomes are good, "
                    "halving when they aren't.\n\nOne task a job. A killed one goes on from the job's "
                    "cursor: nothing is sent twice."
                ),
            ).expand(job=replay_canary.output)
            replay_canary >> replay_batches

        with TaskGroup(
            "fix_permanent", tooltip="Fix permanent errors", prefix_group_id=False
        ) as fix_permanent:
            propose_fix = ProposeFix(
                task_id="propose_fix",
                doc_md="**Propose a fix**: which plugin's quota to raise, how far, and why. Changes nothing.",
            )
            approve_fix = ApproveFix(
                task_id="approve_fix",
                doc_md=(
                    f"**Approve the fix.** Decided by {queue.approval.fix}; beyond the bounds of the "
                    "queue's file always by a person, under *Required Actions*.\n\nReject, or no answer: "
                    "nothing changes, the entries stay open. If you are asked twice, answer twice: "
                    "Airflow can lose an answer given within seconds."
                ),
            )
            apply_fix = ApplyFix(
                task_id="apply_fix", doc_md="**Apply the fix** that was approved, and no other."
            )
            canary_fix = CanaryFix(
                task_id="canary_fix",
                execution_timeout=timedelta(minutes=20),
                doc_md=(
                    "**Try the fix** on a few entries. If they fail again it is rolled back; else what "
                    "waited for it is freed for `drain_remaining`."
                ),
            )
            propose_fix >> approve_fix >> apply_fix >> canary_fix

        with TaskGroup("manual_review", tooltip="Unique cases", prefix_group_id=False) as manual_review:
            OpenReview(
                task_id="open_review",
                doc_md=(
                    "**File the unique cases** as work with an owner. Decide them with "
                    f"`dlq_review__{queue.name}`, at any later time; repair one with `dlq edit`."
                ),
            )

        nothing_to_do = EmptyOperator(
            task_id="nothing_to_do", doc_md="No entry in custody is waiting for a remedy."
        )

        drain_remaining = DrainRemaining(
            task_id="drain_remaining",
            trigger_rule="none_failed",
            execution_timeout=hour,
            doc_md=(
                "**Drain the rest.** Replays what waited for a fix, then takes and replays in rounds "
                f"until the queue is empty or {minutes:g} minutes are up."
            ),
        )
        restore_routing = RestoreRouting(
            task_id="restore_routing",
            doc_md=(
                "**Bring routing back**, whatever happened before. If the orchestrator can't be reached, "
                "its lease brings it back by itself."
            ),
        ).as_teardown(setups=isolate)

        # Escalation
        wait_threshold = WaitThreshold(
            task_id="wait_threshold",
            doc_md=(
                f"**After {queue.slo.escalate_after / 60:g} minutes, more than {queue.slo.escalate:.2%}?** "
                "Waits beside the drain from the incident's start, without a worker, and ends with it. "
                "Skipped: nobody had to be told."
            ),
        )
        escalate = Escalate(
            task_id="escalate",
            doc_md=(
                "**Escalate to the engineering lead.** Never fails: if the message isn't delivered the "
                "log says so in red. Call then."
            ),
        )

        # Verify
        verify_conservation = VerifyConservation(
            task_id="verify_conservation",
            trigger_rule="all_done",
            execution_timeout=timedelta(hours=1),
            doc_md=(
                "**Prove it**: what the queue's log, the archive and the target saw, against the ledger. "
                "Fails on any broken law and names it.\n\nNever skip it: without a proof there is no "
                "green."
            ),
        )
        verify_golden_flows = VerifyGoldenFlows(
            task_id="verify_golden_flows",
            trigger_rule="all_done",
            execution_timeout=timedelta(minutes=15),
            doc_md=(
                "**Run the golden flows** end to end: workflows whose result is known, now that routing "
                "is back."
            ),
        )
        close_drain = CloseDrain(
            task_id="close_drain",
            doc_md=(
                "**Verdict.** Green: the run did its duty, provably. Red: the log says what is not "
                "so.\n\nFrees the queue's lease. An incident stays open while the SLO is broken, also "
                "after a green run."
            ),
        ).as_teardown(setups=open_drain, on_failure_fail_dagrun=True)
        write_report = WriteReport(
            task_id="write_report",
            doc_md=(
                "**Report**: timeline, groups, what was replayed, confirmed, returned, what is open and "
                "whose, the proof. The *Report* button under *Details* opens it."
            ),
        ).as_teardown()

        open_drain >> [acknowledge_alert, isolate, wait_threshold]
        wait_threshold >> escalate
        isolate >> take_custody >> inspect_sample >> guard_data_loss
        guard_data_loss >> invoke_dr_plan >> approve_dr >> categorize
        guard_data_loss >> within_limits >> categorize
        categorize >> find_root_cause >> choose_remedies
        choose_remedies >> [retry_transient, fix_permanent, manual_review, nothing_to_do] >> drain_remaining
        drain_remaining >> restore_routing
        [drain_remaining, restore_routing] >> verify_conservation
        restore_routing >> verify_golden_flows
        [verify_conservation, verify_golden_flows, acknowledge_alert] >> close_drain >> write_report
    return dag


for name in queue_names():
    try:
        found = drain_dag(load_queue(name))
    except Exception as error:  # noqa: BLE001 (whatever is wrong with one file must not take the other queues' Dags)
        found = broken_dag("drain", name, error)
    globals()[found.dag_id] = found
