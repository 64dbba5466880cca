"""Replay, beside a transactional produce of the same records."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import islice

from benchmarks import raw
from benchmarks.bed import Bed, Queue
from benchmarks.cost import PAIRS_HEAD, Cost, Pairs, measured, paired, table
from dlq import plan as planning
from dlq.drain import Drain
from dlq.intake import take_custody
from dlq.jobs import JobRun
from dlq.ledger import jobs as ledger
from dlq.ledger.jobs import Cut
from dlq.outbox import Outbox
from dlq.ports import Output
from dlq.triage import categorize

GOALS: dict[int, float | None] = {100: None, 1_000: 0.7, 10_000: None}
"""Records a transaction, and the share of the raw loop's speed to reach. (8 MiB bound a transaction too:
10,000 are about 7,000.)
"""


def run(bed: Bed, *, records: int, rounds: int) -> str:
    sizes = {100: records // 4, 1_000: records, 10_000: records}
    wanted = [size for size in sizes.values() for _ in range(rounds + 1)]
    dlq = bed.topic("dlq")
    queue = bed.queue(dlq)
    bed.fill(dlq, sum(wanted))
    with queue.open() as drain:
        take_custody(drain, 600)
        categorize(drain)
        jobs = iter(_plan(drain, queue.origin, wanted))
        rows = []
        for most, size in sizes.items():
            mine = [next(jobs) for _ in range(rounds + 1)]
            name = f"{size:,} at {most:,} a transaction"
            rows.append(_pairs(drain, queue, mine, most, rounds).row(name, GOALS[most]))
    bed.drop(dlq, queue.origin)
    return table(PAIRS_HEAD, rows)


def _plan(drain: Drain, target: str, sizes: Sequence[int]) -> list[ledger.Job]:
    entries = planning.by_id(drain, [planning.ready(drain)])
    cuts = (Cut(target, islice(entries, size)) for size in sizes)
    jobs = planning.make_of(drain, "bench", cuts, who="bench", saw="all there is")
    return sorted(jobs, key=lambda job: int(job.id.rpartition(".")[2]))


def _pairs(drain: Drain, queue: Queue, jobs: Sequence[ledger.Job], most: int, rounds: int) -> Pairs:
    def theirs(number: int) -> Cost:
        return raw.replay(queue, _transactions(drain, jobs[number], most), f"raw.{jobs[number].id}")

    def ours(number: int) -> Cost:
        return send(drain, jobs[number].id, most)

    theirs(rounds), ours(rounds)  # warms everything up, and doesn't count
    return paired(rounds, theirs, ours)


def _transactions(drain: Drain, job: ledger.Job, most: int) -> list[Sequence[Output]]:
    """The outputs of a job that has not run yet, cut as our own transactions are."""
    outbox, found, at = Outbox(drain, job), list[Sequence[Output]](), 0
    while at < job.size:
        outputs = outbox.next(at, job.size, most).outputs
        found.append(outputs)
        at = outputs[-1].ordinal + 1
    return found


def send(drain: Drain, job_id: str, most: int) -> Cost:
    """A job from the opening of its writer to its last commit and settlement."""
    with drain.ledger.read() as tx:
        size = ledger.get(tx, job_id).size
    with JobRun(drain, job_id, records=most) as run:
        with measured(size) as cost:
            sent = run.send(size, time.monotonic() + 600)
        run.close("done", "ready")
    assert (sent, run.skipped) == (size, 0), f"job {job_id}: {sent} of {size} sent, {run.skipped} left out"
    return cost
