"""``make chaos``: break what a drain needs, and what its workflows need, one thing after the other; assert recovery."""

from __future__ import annotations

import argparse
import json
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dlq.chaos import report
from dlq_demo import breakage
from dlq_demo.breakage import Breakage
from dlq_demo.home import CHECKOUT
from dlq_demo.playground import NAME, Playground
from dlq_demo.terminal import ended, printable_lines, step

LETTERS = 60
"""Workflows of each round that fail, about."""
MIX = {"healthy": 1.0, "transient": 1.0, "rate_limit": 1.0}
LASTS_S = 6.0
"""How long each thing stays broken: less than a task's retries bear."""
_DRAINS = 3


def main() -> int:
    arguments = _arguments()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    logs = CHECKOUT / ".run" / "chaos"

    def run() -> int:
        with Playground(console, "chaos", arguments.queue) as playground:
            return _Chaos(console, playground).run(arguments.only)

    return ended(console, "chaos", run, logs)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dlq_demo.chaos",
        description="Breaks an embedded Kafka, orchestrator, ledger, archive and network under drains of a real"
        " Airflow, and asserts that every workflow is recovered. Exit status: 0 where all were, 1 where not, 2 where"
        " it could not be tried.",
    )
    parser.add_argument(
        "--queue", default=NAME, help="a queue marked as a chaos target (default: %(default)s)"
    )
    parser.add_argument("--only", nargs="+", metavar="FAULT", help="of those around the drain, only these")
    return parser.parse_args()


class _Chaos:
    def __init__(self, console: Console, playground: Playground) -> None:
        self._console = console
        self._playground = playground

    def run(self, only: Sequence[str] | None) -> int:
        rows: list[report.Row] = []
        if only is None:
            rows += self._workflows()
        for each in self._breakages():
            if only is None or each.name in only:
                rows.append(self._drain(each))
        return self._report(rows)

    def _breakages(self) -> list[Breakage]:
        at = self._playground
        found = [
            breakage.broker_restart(at.around.broker),
            breakage.orchestrator_restart(at.around.orchestrator),
            breakage.slow_network(at.around.links),
            breakage.ledger_away(at.ledger),
            breakage.archive_away(at.disk / "archive"),
        ]
        if at.no_disk is None:
            found.append(breakage.full_disk(at.disk))
        else:
            self._console.print(Text(f"· full_disk is left out: {at.no_disk}", style="yellow"))
        return found

    def _workflows(self) -> list[report.Row]:
        """What the workflows need, by the Dag: it injects, drains and asserts."""
        at, dag_id = self._playground, f"dlq_chaos__{self._playground.config.name}"
        run_id = f"chaos__{uuid.uuid4().hex[:8]}"
        with step(self._console, dag_id) as said:
            at.airflow.api.trigger(dag_id, run_id, {})
            state = at.finish(dag_id, run_id)
            key = "return_value" if state == "success" else "report"
            written = at.airflow.api.xcom(dag_id, run_id, "assert_recovery", key)
            said.append(f"{state}: {written['said']}")
        told = json.loads(Path(written["json"]).read_text())
        doubled = at.account().doubled
        rows = []
        for one in told["faults"]:  # its workflows' ids, and so their effects' keys, carry the fault's name
            twice = [each for each in doubled if f" chaos-{one['fault']}-" in each]
            one |= {"why": (*one["why"], *twice), "doubled": len(twice), "whole": one["whole"] and not twice}
            rows.append(report.Row(**one))
        return rows

    def _drain(self, each: Breakage) -> report.Row:
        """Fail some, start a drain, break, mend; drains until the queue is empty, at most three."""
        at = self._playground
        before = at.account()
        with step(self._console, each.name) as said:
            at.load(LETTERS * 3 // 2, MIX)
            at.let_run()
            failed = at.queued()
            run_id = at.start_drain(each.name)
            at.wait_for_phase(run_id, each.during)
            each.begin()
            try:
                time.sleep(LASTS_S)
            finally:
                each.end()
            states = [at.finish(at.drain_dag, run_id)]
            while len(states) < _DRAINS and (states[-1] != "success" or self._unrecovered()):
                states.append(at.finish(at.drain_dag, at.start_drain(f"{each.name}_again")))
            after = at.account()
            recovered = after.recovered - before.recovered
            waiting = after.waiting - before.waiting + after.queued
            why = (*after.lost, *after.doubled)
            if states[-1] != "success":
                why = (f"the last of {len(states)} drains ended {states[-1]}", *why)
            row = report.Row(
                each.name,
                f"{each.broke}, during {each.during.replace('_', ' ')}; drains: {', '.join(states)}",
                failed,
                recovered,
                waiting,
                len(after.lost),
                len(after.doubled),
                not why and waiting == 0 and recovered == failed,
                why,
            )
            said.append(
                f"during {each.during}: {row.failed} dead letters, {row.recovered} recovered, {row.lost} lost,"
                f" {row.doubled} doubled, drains: {', '.join(states)}"
            )
        return row

    def _unrecovered(self) -> bool:
        now = self._playground.account()
        return bool(now.queued or now.waiting)

    def _report(self, rows: Sequence[report.Row]) -> int:
        at = self._playground
        written = report.write(str(at.home.bundle / "report"), "chaos", at.config.name, "make chaos", rows)
        table = Table(
            "fault", "dead-lettered", "recovered", "waiting", "lost", "doubled", box=None, pad_edge=False
        )
        for row in rows:
            mark = Text.assemble(("✓ ", "green") if row.whole else ("✗ ", "red"), row.fault)
            counts = (
                row.failed,
                row.recovered,
                row.waiting,
                row.lost,
                "–" if row.doubled is None else row.doubled,
            )
            table.add_row(mark, *map(str, counts))
        self._console.print()
        self._console.print(table)
        self._console.print(Text(f"\n{at.account()}"), soft_wrap=True)
        self._console.print(Text(printable_lines(written["said"])), soft_wrap=True)
        self._console.print(Text(f"Report  {written['html']}"), soft_wrap=True)
        return 0 if written["whole"] else 1


if __name__ == "__main__":
    sys.exit(main())
