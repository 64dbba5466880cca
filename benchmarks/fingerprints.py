"""How well fingerprints group failure messages, and what they cost: ``python -m benchmarks.fingerprints``.

Every pair of messages is asked: same fault, same fingerprint? Precision is the share of the pairs grouped that
belong together, recall the share of the pairs that belong together that are grouped. The corpus is
``data/faults.txt`` (this project's own lines) with values drawn by a seed, its faults cut in two: the rules were
looked at on one half only. ``data/messages.csv`` has four whole messages each of 58 faults that the rules were not
written from, chosen to be hard. Beside them stands what masking runs of digits does. Other labelled messages can be
named: CSV files with the columns Content and EventId, as the structured logs of the Loghub project have them.
"""

from __future__ import annotations

import argparse
import csv
import re
import statistics
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

from benchmarks.cost import table
from benchmarks.values import Fault
from dlq.grouping.fingerprint import fingerprint, normalise

FAULTS = Path(__file__).parent / "data" / "faults.txt"
MESSAGES = FAULTS.with_name("messages.csv")
GOAL = 0.95
_DIGITS = re.compile(r"\d+")

Labelled = Sequence[tuple[str, str]]
"""(fault, message) pairs."""


class Score(NamedTuple):
    """Over pairs of messages, from 0 to 1."""

    precision: float
    recall: float

    @property
    def f1(self) -> float:
        both = self.precision + self.recall
        return 2 * self.precision * self.recall / both if both else 0.0


def score(labelled: Labelled, grouped: Sequence[str]) -> Score:
    """How the groups of the messages agree with their faults."""

    def pairs(keys: Iterable[object]) -> int:
        return sum(n * (n - 1) // 2 for n in Counter(keys).values())

    faults = [fault for fault, _ in labelled]
    together, found, true = pairs(zip(faults, grouped, strict=True)), pairs(grouped), pairs(faults)
    return Score(together / found if found else 1.0, together / true if true else 1.0)


def corpus(seed: int, *, held_out: bool | None = None) -> list[tuple[str, str]]:
    """The faults' messages, 5 to 40 of each.

    :param held_out: only the half the rules were never looked at on, or only the other (default: both).
    """
    found = []
    for line in FAULTS.read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        if held_out is not None and bool(zlib.crc32(line.encode()) & 1) is not held_out:
            continue
        rng = Random(f"{seed} {line}")
        fault = Fault(line, rng)
        found += [(line, fault.message(rng)) for _ in range(rng.randint(5, 40))]
    return found


def loaded(path: Path) -> list[tuple[str, str]]:
    """Labelled messages of a CSV file with the columns EventId and Content."""
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        return [(row["EventId"], row["Content"]) for row in csv.DictReader(file)]


def digits(message: str) -> str:
    """The baseline: runs of digits masked."""
    return _DIGITS.sub("<n>", message)


def splits(labelled: Labelled, by: Callable[[str], str] = normalise) -> dict[str, Counter[str]]:
    """The faults that fell into several groups, and the groups."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for fault, message in labelled:
        found[fault][by(message)] += 1
    return {fault: groups for fault, groups in found.items() if len(groups) > 1}


def merges(labelled: Labelled, by: Callable[[str], str] = normalise) -> dict[str, Counter[str]]:
    """The groups that hold several faults, and the faults."""
    return splits([(by(message), fault) for fault, message in labelled], str)


def cost_us(messages: Sequence[str]) -> float:
    """Processor time of a fingerprint, µs a message: each is another, so none is remembered."""
    began = time.process_time()
    for message in messages:
        fingerprint(normalise(message))
    return (time.process_time() - began) / len(messages) * 1e6


def run(seeds: Sequence[int], others: Sequence[Path]) -> str:
    rows = []
    for name, held_out in (("faults looked at", False), ("faults held out", True), ("all faults", None)):
        found = [corpus(seed, held_out=held_out) for seed in seeds]
        rows.append(_row(name, found))
    rows.append(_row("hard messages", [loaded(MESSAGES)]))
    rows += [_row(path.stem, [loaded(path)]) for path in others]
    head = ("", "messages", "faults", "precision", "recall", "F1", "goal", "digits only, F1", "µs a message")
    return table(head, rows)


def _row(name: str, found: Sequence[Labelled]) -> list[str]:
    ours = [score(each, [normalise(m) for _, m in each]) for each in found]
    base = [score(each, [digits(m) for _, m in each]) for each in found]
    f1 = statistics.mean(s.f1 for s in ours)
    return [
        name,
        f"{sum(map(len, found)):,}",
        f"{len({fault for fault, _ in found[0]})}",
        f"{statistics.mean(s.precision for s in ours):.3f}",
        f"{statistics.mean(s.recall for s in ours):.3f}",
        f"{f1:.3f}",
        f"{GOAL} {'met' if f1 >= GOAL else 'MISSED'}",
        f"{statistics.mean(s.f1 for s in base):.3f}",
        f"{cost_us([m for each in found for _, m in each]):.1f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fingerprints", description=__doc__)
    parser.add_argument("others", nargs="*", type=Path, metavar="CSV", help="more labelled messages")
    parser.add_argument(
        "--seeds", type=int, default=5, help="how often values are drawn (default: %(default)s)"
    )
    parser.add_argument(
        "--show", choices=("splits", "merges"), help="what was grouped wrongly, of the half looked at"
    )
    arguments = parser.parse_args()
    print(run(range(arguments.seeds), arguments.others), flush=True)
    if arguments.show:
        wrong = {"splits": splits, "merges": merges}[arguments.show](corpus(0, held_out=False))
        for what, parts in wrong.items():
            print(f"\n{what}")
            for part, count in parts.most_common(6):
                print(f"  {count:>5}  {part}")


if __name__ == "__main__":
    main()
