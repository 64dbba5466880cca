"""Take into custody, beside consume → Parquet."""

from __future__ import annotations

from benchmarks import raw
from benchmarks.bed import Bed, Queue, release
from benchmarks.cost import PAIRS_HEAD, Cost, measured, paired, table
from dlq.intake import take_custody

GOAL = 0.6


def run(bed: Bed, *, records: int, rounds: int) -> str:
    dlq = bed.topic("dlq")
    queues = [bed.queue(dlq) for _ in range(rounds + 1)]
    bed.fill(dlq, records)

    def theirs(number: int) -> Cost:
        return raw.intake(queues[number], bed.folder / f"raw-{queues[number].config.name}", records)

    def ours(number: int) -> Cost:
        return take(queues[number], records)

    theirs(rounds), ours(rounds)  # the first of each warms everything up, and doesn't count
    found = paired(rounds, theirs, ours)
    bed.drop(dlq, *(queue.origin for queue in queues))
    return table(PAIRS_HEAD, [found.row(f"intake of {records:,}", GOAL)])


def take(queue: Queue, records: int) -> Cost:
    """The stage as a drain runs it, from its opening to the cut-off."""
    drain = queue.open()
    with measured(records) as cost:
        done = take_custody(drain, 600)
    release(drain)
    assert (done["taken"], done["reached"]) == (records, True), f"not all was taken: {done}"
    return cost
