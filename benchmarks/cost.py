"""What a piece of work costs, and how two of them compare."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_STATUS = Path("/proc/self/status")


@dataclass
class Cost:
    """Of ``records`` entries: wall time, and the processor time of all threads of this process, both in seconds."""

    records: int
    seconds: float = 0.0
    cpu: float = 0.0

    @property
    def rate(self) -> float:
        """Entries a second."""
        return self.records / self.seconds if self.seconds else 0.0

    @property
    def cpu_us(self) -> float:
        """Processor time an entry, µs: what holds on a machine that does other work too."""
        return self.cpu / self.records * 1e6 if self.records else 0.0


@contextmanager
def measured(records: int) -> Iterator[Cost]:
    cost = Cost(records)
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        yield cost
    finally:
        cost.seconds, cost.cpu = time.perf_counter() - wall, time.process_time() - cpu


@dataclass(frozen=True)
class Pairs:
    """A raw loop and ours, one after the other, again and again: the machine's mood hits both of a pair."""

    raw: list[Cost]
    ours: list[Cost]

    @property
    def ratios(self) -> list[float]:
        """Ours ÷ raw in entries a second, pair by pair."""
        return [ours.rate / raw.rate for raw, ours in zip(self.raw, self.ours, strict=True)]

    def row(self, name: str, goal: float | None) -> list[str]:
        ratio = statistics.median(self.ratios)
        verdict = "" if goal is None else f"{goal:.2f} {'met' if ratio >= goal else 'MISSED'}"
        return [
            name,
            _spread([c.rate / 1000 for c in self.raw], ".1f"),
            _spread([c.rate / 1000 for c in self.ours], ".1f"),
            _spread(self.ratios, ".2f"),
            verdict,
            f"{statistics.median(c.cpu_us for c in self.raw):.1f}",
            f"{statistics.median(c.cpu_us for c in self.ours):.1f}",
        ]


PAIRS_HEAD = ["", "raw, k/s", "ours, k/s", "ours ÷ raw", "goal", "raw, CPU µs", "ours, CPU µs"]


def paired(rounds: int, raw: Callable[[int], Cost], ours: Callable[[int], Cost]) -> Pairs:
    """Run raw, ours, raw, ours …; each gets the round's number."""
    found = Pairs([], [])
    for number in range(rounds):
        found.raw.append(raw(number))
        found.ours.append(ours(number))
    return found


def _spread(values: Sequence[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}}–{max(values):{form}})"


def reset_peak() -> None:
    """Forget this process's peak memory, so that the next stage has its own (Linux)."""
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def peak_mib() -> float:
    """The most memory this process held since it began or was reset, MiB. (``ru_maxrss`` would count its
    parent's too.)
    """
    if sys.platform != "linux":
        return float("nan")
    found = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(found.split()[1]) / 1024


def load() -> str:
    """What else the machine does: the load averages of the last 1 and 5 minutes, and how many processors there are."""
    one, five, _ = os.getloadavg()
    return f"load {one:.1f} (1 min), {five:.1f} (5 min) on {os.cpu_count()} processors"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """As Markdown, in columns."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[n]) for line in lines) for n in range(len(head))]

    def shown(line: Sequence[str]) -> str:
        cells = [
            cell.ljust(width) if n == 0 else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        return f"| {' | '.join(cells)} |"

    rule = "|".join("-" * (width + 1) + ("-" if n == 0 else ":") for n, width in enumerate(widths))
    return "\n".join([shown(lines[0]), f"|{rule}|", *map(shown, lines[1:])])
