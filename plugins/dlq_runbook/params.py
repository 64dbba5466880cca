"""The trigger form: each field says what it does, starts at the queue's policy, and can only tighten it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from airflow.sdk import Param
from croniter import croniter

from dlq.errors import ConfigError

if TYPE_CHECKING:
    from dlq.config import QueueConfig

POOL = "dlq"
"""Of its own: in a platform incident the default pool is full of the very failures."""
MAX_ACTIVE_TASKS = 8
RUN_TYPES = ("scheduled", "manual", "operator_triggered", "asset_triggered", "asset_materialization")
"""No backfill: a queue has no past to drain again."""
DURATION = r"^\s*(\d+(\.\d+)?\s*(ms|s|m|h|d)\s*)+$"


def trigger_form(config: QueueConfig) -> dict[str, Param]:
    """The params of a queue's drain. The form keeps to the policy's bounds; the run checks them again."""
    limits, approval = config.limits, config.approval
    bound = {} if limits.rate is None else {"maximum": limits.rate}
    return {
        "dry_run": Param(
            False,
            type="boolean",
            title="Dry run",
            description="Show what would be done, stage by stage. Nothing is taken, sent or changed.",
        ),
        "incident": Param(
            None,
            type=["null", "string"],
            maxLength=500,
            title="Incident note",
            description="Why this run was started, or the incident's id: it is on the report's timeline.",
        ),
        "batch": Param(
            limits.batch,
            type="integer",
            minimum=1,
            maximum=limits.batch,
            title="Batch",
            description=f"Entries between two looks at the outcome. At most {limits.batch}.",
        ),
        "rate": Param(
            limits.rate,
            type=["null", "number"],
            exclusiveMinimum=0,
            **bound,
            title="Rate",
            description="Entries per second at most. Empty: as the queue's file says.",
        ),
        "budget": Param(
            None,
            type=["null", "string"],
            pattern=DURATION,
            title="Budget",
            description=f"How long the run may take, such as 45m. Empty: {limits.budget / 60:g} minutes.",
        ),
        "approve_fix": Param(
            approval.fix,
            type="string",
            enum=_tighter(approval.fix),
            title="Who approves fixes",
            description="policy: within the bounds of the queue's file, at once. person: in this UI, "
            f"within {approval.within / 60:g} minutes; no answer leaves the entries open.",
        ),
        "approve_dr": Param(
            approval.dr,
            type="string",
            enum=_tighter(approval.dr),
            title="Who approves going on with a very deep queue",
            description=f"With more than {limits.dr:,} entries outstanding, once the archive was read back.",
        ),
    }


def schedule(config: QueueConfig) -> str | None:
    """The queue's cron expression. Airflow would refuse a wrong one only later, with every Dag of the file.

    :raises ConfigError: when it is none.
    """
    if config.schedule is not None and not croniter.is_valid(config.schedule):
        raise ConfigError(
            f"queue {config.name}: schedule: {config.schedule!r} is no cron expression; "
            'write one such as "*/30 * * * *", or none'
        )
    return config.schedule


def _tighter(held: str) -> list[str]:
    return ["policy", "person"] if held == "policy" else ["person"]


def dag_settings(config: QueueConfig) -> dict[str, Any]:
    """What every Dag of a queue has. No time limit on a run, no fail-fast: both would skip the teardowns."""
    return {
        "catchup": False,
        "start_date": datetime(2026, 1, 1, tzinfo=UTC),
        "is_paused_upon_creation": False,
        "max_active_tasks": MAX_ACTIVE_TASKS,
        "allowed_run_types": RUN_TYPES,
        "auto_register": False,
        "tags": ["dlq", config.source.kind, config.name],
        "default_args": {
            "queue_name": config.name,
            "owner": config.owners.default,
            "pool": POOL,
            "priority_weight": 100,
            "weight_rule": "absolute",
            "retries": 2,
            "retry_delay": timedelta(seconds=5),
            "retry_exponential_backoff": 2,
            "max_retry_delay": timedelta(minutes=1),
            "execution_timeout": timedelta(minutes=5),
        },
    }
