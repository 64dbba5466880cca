"""``make demo``: an incident on an embedded Kafka or SQS, and the runbook that drains it in a real Airflow."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import uuid
from contextlib import ExitStack, suppress

import httpx
from rich.console import Console
from rich.text import Text

from dlq.config import QueueConfig, load_queue
from dlq.connections import from_environment
from dlq.drain import drain_id, dry
from dlq.slo import standing
from dlq_demo import loopback
from dlq_demo.airflow import USERNAME, AirflowStandalone
from dlq_demo.home import CHECKOUT, Home
from dlq_demo.progress import DrainView, failures
from dlq_demo.stream import stream
from dlq_demo.surroundings import surroundings
from dlq_demo.terminal import dlq, ended, printable_lines, step, uninterrupted

DEAD = 400
"""How many dead letters the stream is to leave, at least."""
SEED = 7
_ANSWER_S = 900.0


def main() -> int:
    arguments = _arguments()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    return ended(console, "demo", _Demo(console, arguments).run, Home().airflow)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dlq_demo",
        description="An incident on an embedded Kafka or SQS, and the runbook that drains it in a real Airflow."
        " Exit status: 0 where the drain was green, 1 where it was red, 2 where the demo itself failed.",
    )
    add = parser.add_argument
    add("--queue", default="orders", help="which of include/config/queues (default: %(default)s)")
    add("--approve", action="store_true", help="you answer what is asked, in the UI; else the policy does")
    add("--exit", action="store_true", help="end with the drain's verdict, instead of leaving the UI up")
    add("--port", type=int, help="of Airflow's UI (default: a free one)")
    return parser.parse_args()


class _Demo:
    def __init__(self, console: Console, arguments: argparse.Namespace) -> None:
        self._console = console
        self._queue: str = arguments.queue
        self._approve: bool = arguments.approve
        self._exit: bool = arguments.exit
        self._port: int | None = arguments.port
        self._home = Home()

    def run(self) -> int:
        home = self._home
        variables = {
            "DLQ_HOME": str(home.bundle),
            "DLQ_LEDGER": home.ledger,
            "DLQ_APPROVE_FIX": "person" if self._approve else "policy",
            # the embedded server's counts are exact, and nothing here is killed
            "DLQ_SQS_WAIT": "1s",
            "DLQ_SQS_QUIET": "2s",
        }
        os.environ.update(variables)
        if self._port is not None:
            loopback.require_free(self._port, "Airflow's UI")
        config = load_queue(self._queue)
        with ExitStack() as services:
            services.enter_context(home.taken())
            around = surroundings(config, home)
            os.environ.update(around.connections)
            airflow = AirflowStandalone(
                home.airflow,
                dags=CHECKOUT / "dags",
                plugins=CHECKOUT / "plugins",
                port=self._port,
                env={**variables, **around.connections},
                fresh=True,
            )
            try:
                with step(self._console, f"{around.transport} and the orchestrator") as said:
                    services.enter_context(around)
                    said.append(str(around))
                services.callback(airflow.stop)
                airflow.launch()
                with step(self._console, "Ledger") as said:
                    dlq("ledger", "create", config.name)
                    # The first intake, while the queue is empty: what comes later is then nobody's old letter.
                    taken = json.loads(dlq("take", config.name, "--json"))["taken"]
                    said.append(
                        f"dlq ledger create {config.name}; dlq take {config.name}: {taken} entries so far"
                    )
                with step(self._console, "Stream of workflows") as said:
                    streamed = stream(around, until=DEAD, seed=SEED)
                    said.append(f"{streamed.workflows:,} run, {streamed.dead:,} dead-lettered")
                with step(self._console, "Airflow") as said:
                    airflow.wait_until_up()
                    airflow.wait_for_dag(f"dlq_drain__{config.name}")
                    said.append(f"{airflow.url}  user {USERNAME}, password {airflow.password}")
                status = self._drain(config, airflow)
                if not self._exit:
                    self._stay(airflow)
                return status
            finally:
                uninterrupted()
                self._console.print(
                    f"Stopping Airflow, the orchestrator and {around.transport} …", style="dim"
                )

    def _drain(self, config: QueueConfig, airflow: AirflowStandalone) -> int:
        dag_id, run_id = f"dlq_drain__{config.name}", f"demo__{uuid.uuid4().hex[:8]}"
        with dry(config, run_id=run_id, connections=from_environment) as look:
            before = standing(look)
        self._console.print(f"\n[bold]{dag_id}[/]  {before}")
        view = DrainView(self._console, airflow, config, run_id, drain_id(config.name, run_id), before.depth)
        try:
            airflow.api.trigger(dag_id, run_id, {"incident": "make demo"})
            state = view.follow(config.limits.budget + _ANSWER_S)
            with dry(config, run_id=run_id, connections=from_environment) as look:
                after = standing(look)
        finally:
            view.close()
        self._console.print()
        with suppress(httpx.HTTPStatusError):  # no report, no summary: the failures below say why
            report = airflow.api.xcom(dag_id, run_id, "write_report")
            self._console.print(Text(printable_lines(report["summary"])), soft_wrap=True)
            self._console.print(f"now: {after}\n")
            self._console.print(Text(f"Report  {report['html']}"), soft_wrap=True)
        for task, why in failures(airflow, dag_id, run_id):
            self._console.print(Text.assemble((f"{task} failed: ", "red"), why), soft_wrap=True)
        if not self._exit:
            self._console.print(Text(f"Run     {view.link()}"), soft_wrap=True)
            self._console.print(Text(f"Login   user {USERNAME}, password {airflow.password}"))
        self._console.print(Text(f"Logs    {self._home.folder}"), soft_wrap=True)
        return 0 if state == "success" else 1

    def _stay(self, airflow: AirflowStandalone) -> None:
        self._console.print("\nThe UI stays up until Ctrl-C.")
        with suppress(KeyboardInterrupt):
            while True:
                airflow.require_alive()
                time.sleep(0.5)


if __name__ == "__main__":
    sys.exit(main())
