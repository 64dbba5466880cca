"""``make soak MINUTES=…``: load and faults keep coming while drains run on schedule; then all entries are counted."""

from __future__ import annotations

import argparse
import sys
import threading
import time
from random import Random

from rich.console import Console
from rich.text import Text

from dlq.errors import DlqError
from dlq.orchestrator_http import HttpOrchestrator
from dlq_demo.account import Account
from dlq_demo.home import CHECKOUT
from dlq_demo.playground import NAME, Playground
from dlq_demo.terminal import ended, step

PER_SECOND = 20
"""Workflows sent, about."""
_SAY_S = 15.0
_FAULTS = (
    ("payments", "TransientNetwork"),
    ("payments", "PluginTimeout"),
    ("notify", "RateLimit"),
    ("search", "PluginError"),
    ("embedding", "TransientNetwork"),
)
_DRAINS = 5


def main() -> int:
    arguments = _arguments()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)

    def run() -> int:
        with Playground(console, "soak", NAME, schedule="* * * * *") as playground:
            return _Soak(console, playground, arguments.seed).run(arguments.minutes)

    return ended(console, "soak", run, CHECKOUT / ".run" / "soak")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dlq_demo.soak",
        description="Keeps load and faults coming while drains of a real Airflow run on schedule, each minute. Exit"
        " status: 0 where nothing was lost or doubled, 1 where something was, 2 where it could not be tried.",
    )
    parser.add_argument(
        "--minutes", type=float, default=3.0, help="how long load and faults come (default: 3)"
    )
    parser.add_argument(
        "--seed", type=int, default=7, help="of which fault comes when (default: %(default)s)"
    )
    arguments = parser.parse_args()
    if arguments.minutes <= 0:
        parser.error("--minutes must be more than 0")
    return arguments


class _Soak:
    def __init__(self, console: Console, playground: Playground, seed: int) -> None:
        self._console = console
        self._playground = playground
        self._random = Random(seed)
        self._over = threading.Event()
        self._faults = 0

    def run(self, minutes: float) -> int:
        at, until = self._playground, time.monotonic() + minutes * 60
        self._console.print(f"\nLoad, faults and drains for {minutes:g} minutes")
        breaking = threading.Thread(target=self._break, name="faults", daemon=True)
        breaking.start()
        said = time.monotonic()
        while time.monotonic() < until:
            began = time.monotonic()
            at.load(PER_SECOND)
            at.airflow.require_alive()
            if time.monotonic() - said >= _SAY_S:
                said = time.monotonic()
                left = max(0.0, until - said)
                self._console.print(
                    Text(f"  {left:4.0f} s left  {self._sofar()}", style="dim"), soft_wrap=True
                )
            time.sleep(max(0.0, began + 1 - time.monotonic()))
        self._over.set()
        breaking.join()
        return self._settle()

    def _break(self) -> None:
        """A plugin fails for some seconds, then another; now and then the orchestrator is killed in mid-work."""
        at = self._playground.around.orchestrator
        while not self._over.wait(self._random.uniform(4, 12)):
            self._faults += 1
            try:
                if self._random.random() < 0.2:
                    at.kill()
                    at.start()
                    continue
                plugin, error = self._random.choice(_FAULTS)
                with HttpOrchestrator(at.url, at.token) as orchestrator:
                    orchestrator.inject_fault("soak", plugin, error, self._random.uniform(1, 4))
            except DlqError as failed:
                self._console.print(
                    Text(f"  a fault could not be injected: {failed}", style="yellow"), soft_wrap=True
                )

    def _settle(self) -> int:
        """Load and faults are over: let all run, and drain until nothing is left that a drain can help."""
        at = self._playground
        with step(self._console, "The rest drains") as said:
            at.let_run()
            runs: list[str] = []
            while len(runs) < _DRAINS:
                before = at.account()
                runs.append(at.finish(at.drain_dag, at.start_drain("settle")))
                now = at.account()
                if not now.queued and now.waiting == before.waiting:
                    break
            said.append(f"{len(runs)} drains: {', '.join(runs)}")
        states = at.airflow.api.run_states(at.drain_dag)
        green = sum(state == "success" for state in states)
        self._console.print(
            f"\n{len(at.sent):,} workflows, {self._faults} faults, {len(states)} drains, {green} of them green"
        )
        self._console.print(Text(str(now)), soft_wrap=True)
        return 1 if now.lost or now.doubled or now.queued or runs[-1] != "success" else 0

    def _sofar(self) -> str:
        """What can be said while all is moving: what is on its way is not lost."""
        try:
            now: Account = self._playground.account()
        except DlqError as error:
            return f"not to be counted now: {error}"
        return (
            f"{len(self._playground.sent):,} workflows, {self._faults} faults; entries in {now.into:,},"
            f" out {now.out:,}, waiting {now.waiting:,}, not taken yet {now.queued:,}; doubled {len(now.doubled)}"
        )


if __name__ == "__main__":
    sys.exit(main())
