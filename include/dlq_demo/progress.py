"""A live drain in the terminal: each stage as it ends, and a bar of entries read from the ledger."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.table import Column
from rich.text import Text
from sqlalchemy import func, select

from dlq.config import QueueConfig
from dlq.ledger import Ledger
from dlq.ledger.schema import entry, event
from dlq_demo.airflow import AirflowStandalone
from dlq_demo.process import ServiceError
from dlq_demo.terminal import printable

_POLL_S = 0.5
_OVER = ("success", "failed")
_MARKS = {"success": ("✓", "green"), "failed": ("✗", "red"), "upstream_failed": ("✗", "red")}


@dataclass(frozen=True)
class Figures:
    """A drain's entries now: taken into custody, settled with a known outcome, and filed as somebody's work."""

    taken: int
    confirmed: int
    returned: int
    settled: int
    filed: int


class DrainView:
    """One run of a drain as its ledger and Airflow tell it.

    :param depth: entries in the queue when the run was triggered.
    """

    def __init__(
        self,
        console: Console,
        airflow: AirflowStandalone,
        config: QueueConfig,
        run_id: str,
        drain: str,
        depth: int,
    ) -> None:
        self._console = console
        self._airflow = airflow
        self._dag_id = f"dlq_drain__{config.name}"
        self._run_id = run_id
        self._drain = drain
        self._queue = config.name
        self._depth = depth
        self._ledger = Ledger.open(config.ledger)
        self._shown: set[tuple[str, int, str]] = set()
        self._asked: set[str] = set()

    def follow(self, seconds: float) -> str:
        """Show the run until it has ended; returns its state.

        :raises ServiceError: when it has not ended within ``seconds``, or Airflow has.
        """
        deadline = time.monotonic() + seconds
        columns = (
            SpinnerColumn(),
            TextColumn("entries"),
            BarColumn(24),
            MofNCompleteColumn(),
            TextColumn(
                "{task.description}",
                style="dim",
                table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"),
            ),
        )
        with Progress(*columns, console=self._console, transient=True, expand=True) as progress:
            bar = progress.add_task("", total=self._depth)
            while True:
                state = self._airflow.api.run(self._dag_id, self._run_id)["state"]
                tasks = self._airflow.api.task_instances(self._dag_id, self._run_id)
                self._tell(progress, tasks)
                self._draw(progress, bar, tasks)
                self._ask()
                if state in _OVER:
                    return str(state)
                self._airflow.require_alive()
                if time.monotonic() > deadline:
                    raise ServiceError(
                        f"run {self._run_id} of {self._dag_id} was still {state} after {seconds:.0f} s"
                    )
                time.sleep(_POLL_S)

    def figures(self) -> Figures:
        """What the ledger says now."""
        with self._ledger.read() as tx:
            rows = tx.execute(
                select(entry.c.state, entry.c.work.is_not(None), func.count())
                .where(entry.c.queue == self._queue)
                .group_by(entry.c.state, entry.c.work.is_not(None))
            ).all()
        by_state: dict[str, int] = {}
        filed = 0
        for state, has_work, count in rows:
            by_state[state] = by_state.get(state, 0) + count
            if has_work and state in ("open", "ambiguous"):
                filed += count
        settled = sum(
            by_state.get(s, 0) for s in ("confirmed", "returned", "duplicate", "discarded", "handed_back")
        )
        return Figures(
            sum(by_state.values()), by_state.get("confirmed", 0), by_state.get("returned", 0), settled, filed
        )

    def close(self) -> None:
        self._ledger.close()

    def _tell(self, progress: Progress, tasks: list[dict[str, Any]]) -> None:
        """A line for each task that has ended since; those skipped at one moment share one."""
        skipped = []
        for one in sorted(tasks, key=lambda t: t["end_date"] or ""):
            key = (one["task_id"], one["map_index"], str(one["state"]))
            if one["state"] not in (*_MARKS, "skipped") or key in self._shown:
                continue
            self._shown.add(key)
            if one["state"] == "skipped":
                skipped.append(one["task_id"])
                continue
            if one["operator_name"] == "EmptyOperator":  # a bend in the road
                continue
            mark, style = _MARKS[one["state"]]
            line = Text.assemble(
                (f"  {mark} ", style), (f"{one['task_id']:<20}", "bold"), f"{_took(one):>8}  "
            )
            line.append(printable(self._said(one["task_id"])), style="" if style == "green" else style)
            progress.console.print(line, no_wrap=True, overflow="ellipsis")
        if skipped:
            progress.console.print(
                Text(f"  · not needed: {', '.join(skipped)}", style="dim"), no_wrap=True, overflow="ellipsis"
            )

    def _said(self, stage: str) -> str:
        with self._ledger.read() as tx:
            found = tx.execute(
                select(event.c.text)
                .where(
                    event.c.drain == self._drain, event.c.stage.in_((stage, _OTHER_NAMES.get(stage, stage)))
                )
                .order_by(event.c.id.desc())
                .limit(1)
            ).scalar()
        return found or ""

    def _draw(self, progress: Progress, bar: TaskID, tasks: list[dict[str, Any]]) -> None:
        now = self.figures()
        running = ", ".join(
            dict.fromkeys(t["task_id"] for t in tasks if t["state"] in ("running", "awaiting_input"))
        )
        progress.update(
            bar,
            total=max(self._depth, now.taken),
            completed=now.settled + now.filed,
            description=f"{now.confirmed:,} confirmed, {now.returned:,} returned, {now.filed:,} with people"
            f" · {running or 'between stages'}",
        )

    def _ask(self) -> None:
        """Where a person is to answer, say so once."""
        for question in self._airflow.api.questions(self._dag_id, self._run_id):
            task = question["task_instance"]
            key = f"{task['task_id']} {question.get('created_at', '')}"
            if key not in self._asked:
                self._asked.add(key)
                self._console.print(
                    Text.assemble(
                        ("  ? ", "yellow bold"), (printable(question["subject"]), "bold"), "  Answer it here:"
                    ),
                    Text(f"    {self.link(task['task_id'])}/required_actions", style="cyan"),
                    sep="\n",
                    soft_wrap=True,
                )

    def link(self, task_id: str | None = None) -> str:
        """The run's page in Airflow, or one of its tasks'."""
        run = f"{self._airflow.url}/dags/{self._dag_id}/runs/{self._run_id}"
        return run if task_id is None else f"{run}/tasks/{task_id}"


_OTHER_NAMES: Mapping[str, str] = {"open_drain": "opened"}
"""Stages whose first word stands in the ledger under another name than the task's."""


def _took(task: Mapping[str, Any]) -> str:
    if not task["start_date"] or not task["end_date"]:
        return "–"
    seconds = (
        datetime.fromisoformat(task["end_date"]) - datetime.fromisoformat(task["start_date"])
    ).total_seconds()
    return f"{seconds:.1f} s"


def failures(airflow: AirflowStandalone, dag_id: str, run_id: str) -> Iterator[tuple[str, str]]:
    """Each failed task of a run with the last line of its log that says why."""
    for one in airflow.api.task_instances(dag_id, run_id):
        if one["state"] == "failed":
            lines = airflow.api.log(
                dag_id, run_id, one["task_id"], one["try_number"], one["map_index"]
            ).splitlines()
            said = [line for line in lines if line.strip() and not line.startswith("::")]
            yield one["task_id"], printable(said[-1]) if said else "it left no log"
