"""The whole core drain, stage by stage, each in processes of its own, so that each has its own peak of memory."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from confluent_kafka import Consumer, KafkaException, TopicPartition

from benchmarks.bed import PARTS, Bed, Queue
from benchmarks.cost import peak_mib, table
from dlq.conservation import prove
from dlq.intake import take_custody
from dlq.replay import replay_batches, replay_canary
from dlq.triage import categorize

HEAD = ["", "entries", "s", "entries/s", "peak MiB (largest process)"]
_SECONDS = 1800.0


def run(bed: Bed, sizes: Sequence[int], processes: Sequence[int]) -> str:
    """A table of each stage for every size, with one process and with several."""
    rows, peaks = [], dict[tuple[int, int], float]()
    for count in sizes:
        for several in processes:
            lines = _drain(bed, count, several)
            peaks[count, several] = max(float(line[4]) for line in lines)
            rows += lines
    text = table(HEAD, rows)
    for several in processes if len(sizes) > 1 else ():
        most, least = peaks[max(sizes), several], peaks[min(sizes), several]
        text += (
            f"\n{several} process(es): peak memory at {max(sizes):,} ÷ at {min(sizes):,}: {most / least:.2f}"
        )
    return text


def _drain(bed: Bed, count: int, several: int) -> list[list[str]]:
    dlq = bed.topic("dlq")
    queue = bed.queue(dlq, limits={"dr": 10**9, "jobs": several, "batch": 10_000})
    bed.fill(dlq, count)
    consumer = multiprocessing.get_context("spawn").Process(target=consume, args=(queue,), daemon=True)
    consumer.start()
    with queue.open() as drain:  # its lease holds: the stages attach to it
        while drain.target.progress(queue.origin) is None:
            time.sleep(0.1)
    shares = [list(range(PARTS))[n::several] for n in range(several)]
    began = time.perf_counter()
    found = [
        _timed("take into custody", count, [(_take, (queue, share)) for share in shares]),
        _timed("categorize", count, [(_categorize, (queue,))]),
        _timed("plan and canary", count, [(_canary, (queue,))]),
    ]
    jobs: list[str] = found[-1][1][0]
    found.append(_timed("replay, outcomes known", count, [(_replay, (queue, job)) for job in jobs]))
    found.append(_timed("proof", count, [(_prove, (queue,))]))
    whole = time.perf_counter() - began
    consumer.kill()
    bed.drop(dlq, queue.origin)
    rows = [line for line, _ in found]
    peak = max(float(line[4]) for line in rows)
    rows.append(["all of it", f"{count:,}", f"{whole:.1f}", f"{count / whole:,.0f}", f"{peak:.0f}"])
    return [[f"{line[0]}, {several} process(es)", *line[1:]] for line in rows]


def _timed(name: str, count: int, calls: Sequence[tuple[Callable[..., Any], tuple[Any, ...]]]) -> Any:
    """Run the calls side by side, each in a new process; their row, and what each returned."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(len(calls), maxtasksperchild=1) as pool:
        pool.map(_warm, range(len(calls)), chunksize=1)  # imports are not the stage's
    began = time.perf_counter()
    with context.Pool(len(calls)) as pool:
        done = [pool.apply_async(_measured, (function, arguments)) for function, arguments in calls]
        answers = [each.get(_SECONDS) for each in done]
    seconds = time.perf_counter() - began
    peak = max(peak for peak, _ in answers)
    row = [name, f"{count:,}", f"{seconds:.1f}", f"{count / seconds:,.0f}", f"{peak:.0f}"]
    return row, [answer for _, answer in answers]


def _warm(_number: int) -> None: ...


def _measured(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[float, Any]:
    answer = function(*arguments)
    return peak_mib(), answer


def _take(queue: Queue, parts: Sequence[int]) -> None:
    with queue.attach() as drain:
        assert take_custody(drain, _SECONDS, parts=parts)["reached"]


def _categorize(queue: Queue) -> None:
    with queue.attach() as drain:
        categorize(drain)


def _canary(queue: Queue) -> list[str]:
    with queue.attach() as drain:
        said = replay_canary(drain, "retry_transient", _SECONDS)
        assert said["passed"], said
        return list(said["jobs"])


def _replay(queue: Queue, job: str) -> None:
    with queue.attach() as drain:
        said = replay_batches(drain, job, _SECONDS)
        assert said["ended"] == "done", said


def _prove(queue: Queue) -> None:
    with queue.attach() as drain:
        proof = prove(drain)
        assert not proof.broken, proof.broken


def consume(queue: Queue) -> None:
    """The target's consumers: they read, and say at once that they did."""
    client = Consumer(
        {
            "bootstrap.servers": queue.bootstrap,
            "group.id": queue.group,
            "isolation.level": "read_committed",
            "enable.auto.commit": False,
            "auto.offset.reset": "earliest",
        }
    )

    def begin(member: Consumer, parts: list[TopicPartition]) -> None:
        """Have a position before anything was read: without one nobody consumes."""
        for part in parts:
            part.offset = 0
        member.commit(offsets=parts, asynchronous=False)
        member.assign(parts)

    client.subscribe([queue.origin], on_assign=begin)
    told = time.monotonic()
    while True:
        client.consume(5_000, timeout=0.05)
        if time.monotonic() - told > 0.05:
            with suppress(KafkaException):  # nothing new to commit, or not assigned yet
                client.commit(asynchronous=False)
            told = time.monotonic()
