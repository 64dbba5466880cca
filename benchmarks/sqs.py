"""SQS: intake and replay, beside a raw boto3 loop of receive, send and delete with as many threads and the same sizes.

The raw loop keeps nothing: a message goes from queue to queue and is forgotten. Ours takes all into custody first, and
marks each message before it sends it; so it moves every byte over the wire as often, and to the disk besides.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

from benchmarks.cost import PAIRS_HEAD, Cost, measured, paired, table
from benchmarks.letters import letter
from dlq import plan as planning
from dlq import sqs
from dlq.archive import Archive
from dlq.config import QueueConfig
from dlq.drain import Drain
from dlq.intake import Intake, take_custody
from dlq.ledger import Ledger, lease
from dlq.opening import open_drain
from dlq.outbox import Outbox
from dlq.ports import Connection
from dlq.sending import SendRun
from dlq.sources.sqs import SqsPass
from dlq.targets.sqs import SqsSender
from dlq.triage import assign
from dlq_demo.elasticmq import ACCESS_KEY, REGION, SECRET_KEY, ElasticMq

GOAL = 0.8
_THREADS = 8
_ATTRIBUTES = 9  # a message has ten at most, and one is ours

_STEPS: dict[str, tuple[type, str]] = {
    "intake: wait for messages": (SqsPass, "read"),
    "intake: understand": (Intake, "_prepare"),
    "intake: archive": (Archive, "write"),
    "intake: delete": (SqsPass, "acknowledge"),
    "intake: all of custody": (Intake, "_commit"),
    "replay: read plan and archive": (Outbox, "next"),
    "replay: send": (SqsSender, "send"),
    "replay: mark, send and settle": (SendRun, "_send"),
    "replay: settle": (SendRun, "_settle"),
}
"""What is timed. The two that hold others are shown as what is left of them."""
_REST = {
    "intake: all of custody": ("intake: ledger", ("intake: archive", "intake: delete")),
    "replay: mark, send and settle": ("replay: mark", ("replay: send", "replay: settle")),
}


def run(*, records: int, rounds: int) -> str:
    """The pairs, and which share of our time each step has."""
    with ElasticMq(long_lived=True) as server:
        folder = Path(tempfile.mkdtemp(prefix="dlq-bench-"))
        try:
            theirs = _Raw(server, records)
            ours = _Ours(server, records, folder)
            theirs(0), ours(0)  # the first of each warms everything up, and doesn't count
            ours.spent = dict.fromkeys(_STEPS, 0.0)
            found = paired(rounds, theirs, ours)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    seconds = sum(cost.seconds for cost in found.ours)
    shares = [[name, f"{share:.0%}"] for name, share in _shares(ours.spent, seconds).items()]
    pairs = table(PAIRS_HEAD, [found.row(f"SQS intake + replay of {records:,}", GOAL)])
    # steps of an intake run beside each other: together they may have more than all of the time
    return f"{pairs}\n\n{table(['step', 'of our time'], shares)}"


class _Raw:
    """Receive, send, delete: ten a call, in threads of one process."""

    def __init__(self, server: ElasticMq, records: int) -> None:
        self._server, self._records = server, records

    def __call__(self, _number: int) -> Cost:
        dlq, orders = _queues(self._server)
        fill(self._server, dlq, self._records)
        client = self._server.client()
        lock, left = threading.Lock(), self._records

        def work() -> None:
            nonlocal left
            while left > 0:
                got = client.receive_message(
                    QueueUrl=dlq,
                    MaxNumberOfMessages=sqs.BATCH,
                    VisibilityTimeout=120,
                    MessageAttributeNames=["All"],
                    MessageSystemAttributeNames=["All"],
                ).get("Messages", [])
                if not got:
                    continue
                client.send_message_batch(
                    QueueUrl=orders,
                    Entries=[
                        {
                            "Id": str(n),
                            "MessageBody": message["Body"],
                            "MessageAttributes": {
                                name: {k: v for k, v in each.items() if k in ("DataType", "StringValue")}
                                for name, each in message["MessageAttributes"].items()
                            },
                        }
                        for n, message in enumerate(got)
                    ],
                )
                client.delete_message_batch(
                    QueueUrl=dlq,
                    Entries=[
                        {"Id": str(n), "ReceiptHandle": message["ReceiptHandle"]}
                        for n, message in enumerate(got)
                    ],
                )
                with lock:
                    left -= len(got)

        with measured(self._records) as cost, ThreadPoolExecutor(_THREADS) as pool:
            for each in [pool.submit(work) for _ in range(_THREADS)]:
                each.result()
        _drop(self._server, dlq, orders)
        return cost


class _Ours:
    """Intake to the empty queue, then a job of all that is ready. Planning lies between, and isn't counted: raw has no
    choice.
    """

    def __init__(self, server: ElasticMq, records: int, folder: Path) -> None:
        self._server, self._records, self._folder = server, records, folder
        self.spent = dict.fromkeys(_STEPS, 0.0)

    def __call__(self, _number: int) -> Cost:
        dlq, orders = _queues(self._server)
        drain = self._open(dlq, orders)
        fill(self._server, dlq, self._records)
        with _timed(self.spent):
            with measured(self._records) as intake:
                done = take_custody(drain, 600)
            assert (done["taken"], done["reached"]) == (self._records, True), f"not all was taken: {done}"
            assign(drain)
            (job,) = planning.make(
                drain, "bench", planning.ready(drain), who="bench", saw="all there is", canary=False
            )
            with SendRun(drain, job.id) as run:
                with measured(self._records) as replay:
                    run.send(job.size, time.monotonic() + 600)
                run.close("done", "ready")
            assert (run.cursor, run.skipped) == (self._records, 0), f"{run.skipped} were left out"
        lease.release(drain.ledger, drain.queue, drain.id, drain.epoch, "green")
        drain.close()
        _drop(self._server, dlq, orders)
        return Cost(self._records, intake.seconds + replay.seconds, intake.cpu + replay.cpu)

    def _open(self, dlq: str, orders: str) -> Drain:
        """A drain whose first intake found the queue empty. A poll waits for a second, and emptiness is believed at
        once: the time for which counts must be zero is a setting, not a cost.
        """
        here = self._folder / uuid.uuid4().hex
        here.mkdir()
        config = QueueConfig.model_validate(
            {
                "name": "bench",
                "source": {
                    "kind": "sqs",
                    "connection": "aws",
                    "queue": dlq,
                    "start": "earliest",
                    "wait": 1,
                    "quiet": 0,
                },
                "target": {"kind": "sqs", "connection": "aws", "allow": [orders], "queue": orders},
                "limits": {"dr": 10**9},
                "ledger": f"sqlite:///{here}/ledger.db",
                "archive": str(here / "archive"),
                "report": str(here / "report"),
            }
        )
        Ledger.create(config.ledger).close()
        drain = open_drain(
            config, run_id="bench", connections=lambda _: _connection(self._server), lease_s=7200
        )
        take_custody(drain, 60)
        return drain


@contextmanager
def _timed(spent: dict[str, float]) -> Iterator[None]:
    """Add up what each step takes, while this lasts."""
    kept = {name: getattr(*at) for name, at in _STEPS.items()}

    def timing(name: str, function: Any) -> Any:
        @wraps(function)
        def timed(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                spent[name] += time.perf_counter() - began  # each step has one thread

        return timed

    for name, at in _STEPS.items():
        setattr(*at, timing(name, kept[name]))
    try:
        yield
    finally:
        for name, at in _STEPS.items():
            setattr(*at, kept[name])


def _shares(spent: dict[str, float], seconds: float) -> dict[str, float]:
    shares = {}
    for name, took in spent.items():
        shown, parts = _REST.get(name, (name, ()))
        shares[shown] = (took - sum(spent[part] for part in parts)) / seconds
    return shares


def _connection(server: ElasticMq) -> Connection:
    extra = {"region_name": REGION, "endpoint_url": server.endpoint}
    return Connection("aws", "aws", login=ACCESS_KEY, password=SECRET_KEY, extra=extra)


def _queues(server: ElasticMq) -> tuple[str, str]:
    """The URLs of a dead-letter queue and an origin, both empty."""
    unique = uuid.uuid4().hex[:8]
    return server.create_queue(f"dlq-{unique}", visibility=120), server.create_queue(f"orders-{unique}")


def _drop(server: ElasticMq, *queues: str) -> None:
    for url in queues:
        server.client().delete_queue(QueueUrl=url)


def fill(server: ElasticMq, queue: str, count: int) -> None:
    """Send ``count`` dead letters: a body of 1 KiB, nine attributes."""
    client = server.client(max_pool_connections=_THREADS)

    def send(first: int) -> None:
        entries = []
        for number in range(first, min(first + sqs.BATCH, count)):
            _, value, headers = letter(number, "orders")
            attributes = {
                name: {"DataType": "String", "StringValue": content.decode()}
                for name, content in headers[:_ATTRIBUTES]
            }
            entries.append(
                {"Id": str(number), "MessageBody": value.decode(), "MessageAttributes": attributes}
            )
        answer = client.send_message_batch(QueueUrl=queue, Entries=entries)
        assert len(answer["Successful"]) == len(entries), f"refused: {answer['Failed'][0]['Code']}"

    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(send, range(0, count, sqs.BATCH)))
