"""A drain of a real SQS queue (ElasticMQ) into another: custody, replay, doubt, returns."""

from __future__ import annotations

import json
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from dlq import intake, plan
from dlq.archive import Archive
from dlq.config import Owners, QueueConfig
from dlq.conservation import verify_conservation
from dlq.drain import Drain, drain_id, dry
from dlq.explain import explained
from dlq.grouping.classify import Classifier
from dlq.grouping.taxonomy import load_taxonomy
from dlq.intake import take_custody
from dlq.ledger import Ledger, lease
from dlq.opening import open_drain
from dlq.ports import Connection
from dlq.recovery.rebuild import rebuild
from dlq.replay import drain_remaining, replay_batches, replay_canary
from dlq.restore import to_file
from dlq.selection import Selection
from dlq.sending import SendRun
from dlq.triage import assign
from dlq_demo.elasticmq import ACCESS_KEY, REGION, SECRET_KEY, ElasticMq

FOREVER = 1e12


class Queues:
    """A source queue whose failures are dead-lettered, its DLQ, and a drain's ledger and archive."""

    def __init__(self, server: ElasticMq, folder: Path, *, fifo: bool = False, **settings: Any) -> None:
        suffix = ".fifo" if fifo else ""
        base = f"q{uuid.uuid4().hex[:10]}"
        self.server, self.dlq, self.orders = server, f"{base}-dlq{suffix}", f"{base}{suffix}"
        self.client = server.client()
        self.dlq_url = server.create_queue(self.dlq, visibility=5)
        self.url = server.create_queue(self.orders, dead_letters=self.dlq, receives=1, visibility=1)
        target = {"kind": "sqs", "connection": "aws", "allow": [self.orders], "queue": self.orders}
        self.config = QueueConfig.model_validate(
            {
                "name": base,
                "source": {
                    "kind": "sqs",
                    "connection": "aws",
                    "queue": self.dlq,
                    "start": "earliest",
                    "visibility": 5,
                    "wait": 1,
                    "quiet": "1s",
                },
                "target": target,
                "outcome": {"grace": 0, "deadline": "20s"},
                "ledger": f"sqlite:///{folder}/ledger.db",
                "archive": str(folder / "archive"),
                "report": str(folder / "report"),
                **settings,
            }
        )
        self.ledger = Ledger.create(self.config.ledger)

    def connections(self, name: str) -> Connection:
        extra = {"region_name": REGION, "endpoint_url": self.server.endpoint}
        return Connection(name, "aws", login=ACCESS_KEY, password=SECRET_KEY, extra=extra)

    def open(self, run: str = "r1") -> Drain:
        return open_drain(self.config, run_id=run, connections=self.connections)

    def attach(self, run: str = "r1") -> Drain:
        return Drain.attach(drain_id(self.config.name, run), config=self.config, connections=self.connections)

    def release(self, drain: Drain) -> None:
        lease.release(drain.ledger, drain.queue, drain.id, drain.epoch, "green")
        drain.close()

    def begin(self) -> None:
        """The first intake, of an empty queue."""
        drain = self.open("begin")
        assert take_custody(drain, 60)["reached"]
        self.release(drain)

    def letters(self, count: int, kind: str = "TransientNetwork", first: int = 0, **more: Any) -> None:
        for start in range(first, first + count, 10):
            entries = []
            for n in range(start, min(start + 10, first + count)):
                attributes = {
                    "wf-error-type": {"DataType": "String", "StringValue": kind},
                    "size": {"DataType": "Number.int", "StringValue": str(n)},
                    "blob": {"DataType": "Binary.gif", "BinaryValue": bytes([n % 256, 0, 255])},
                }
                entry = {"Id": str(n), "MessageBody": f"body {n} é\n", "MessageAttributes": attributes}
                if self.dlq.endswith(".fifo"):
                    entry |= {"MessageGroupId": f"g{n % 3}", "MessageDeduplicationId": f"d{n}"}
                entries.append({**entry, **more})
            answer = self.client.send_message_batch(QueueUrl=self.dlq_url, Entries=entries)
            assert len(answer["Successful"]) == len(entries)

    def received(self) -> list[Mapping[str, Any]]:
        """All that the source queue holds, taken out of it."""
        found: list[Mapping[str, Any]] = []
        while True:
            got = self.client.receive_message(
                QueueUrl=self.url,
                MaxNumberOfMessages=10,
                MessageAttributeNames=["All"],
                MessageSystemAttributeNames=["All"],
            ).get("Messages", [])
            if not got:
                return found
            found.extend(got)
            for message in got:
                self.client.delete_message(QueueUrl=self.url, ReceiptHandle=message["ReceiptHandle"])

    def states(self) -> dict[str, int]:
        return dict(self.rows("SELECT state, COUNT(*) FROM entry GROUP BY state"))

    def rows(self, sql: str) -> list[Any]:
        with self.ledger.read() as tx:
            return [tuple(row) for row in tx.execute(text(sql))]


@pytest.fixture
def queues(elasticmq: ElasticMq, tmp_path: Path) -> Iterator[Queues]:
    made = Queues(elasticmq, tmp_path)
    yield made
    made.ledger.close()


def replay(drain: Drain) -> None:
    assign(drain)
    for job in replay_canary(drain, "retry_transient", 60)["jobs"]:
        replay_batches(drain, job, 60)


def test_a_queue_is_drained_into_its_source_to_the_byte(queues: Queues) -> None:
    queues.begin()
    queues.letters(250)
    drain = queues.open()
    said = take_custody(drain, 60)
    assert (said["taken"], said["reached"], drain.depth().entries) == (250, True, 0)
    assign(drain)
    (job,) = plan.make(drain, "retry_transient", plan.ready(drain), who="p", saw="s", canary=False)
    with SendRun(drain, job.id) as run:
        assert run.send(job.size, time.monotonic() + 60) == 250
        run.close("done", "ready")
    got = queues.received()
    assert Counter(m["Body"] for m in got) == Counter(f"body {n} é\n" for n in range(250))
    for message in got:
        n = int(message["Body"].split()[1])
        theirs = {k: v for k, v in message["MessageAttributes"].items() if k != "dlq"}
        assert theirs == {
            "size": {"DataType": "Number.int", "StringValue": str(n)},
            "blob": {"DataType": "Binary.gif", "BinaryValue": bytes([n % 256, 0, 255])},
        }
        ours = json.loads(message["MessageAttributes"]["dlq"]["StringValue"])
        assert ours["job"] == job.id
        assert ours["retry"] == 1
    assert queues.states() == {"replayed": 250}


def test_a_drain_ends_with_its_outcomes_and_its_proof(queues: Queues) -> None:
    queues.begin()
    queues.letters(40)
    drain = queues.open()
    take_custody(drain, 60)
    assign(drain)
    (job,) = plan.make(drain, "retry_transient", plan.ready(drain), who="p", saw="s", canary=False)
    with SendRun(drain, job.id) as run:
        run.send(job.size, time.monotonic() + 60)
        run.close("done", "ready")
    assert len(queues.received()) == 40  # a consumer for which all goes well
    time.sleep(1.5)
    said = drain_remaining(drain, 60)
    assert (said["depth"], said["outstanding"]) == (0, 0)
    assert queues.states() == {"confirmed": 40}
    proof = verify_conservation(drain)
    assert proof["proven"], proof["said"]
    assert "not witnessed" in proof["witnesses"]["log"]
    assert "not witnessed" in proof["witnesses"]["target"]


def test_what_fails_again_comes_back_as_a_return_by_its_id(queues: Queues) -> None:
    queues.begin()
    queues.letters(12)
    drain = queues.open()
    take_custody(drain, 60)
    assign(drain)
    (job,) = plan.make(drain, "retry_transient", plan.ready(drain), who="p", saw="s", canary=False)
    with SendRun(drain, job.id) as run:
        run.send(job.size, time.monotonic() + 60)
        run.close("done", "ready")
    got: list[Any] = []
    while (
        len(got) < 12
    ):  # a consumer that fails for all: SQS dead-letters them when their visibility has ended
        got += queues.client.receive_message(QueueUrl=queues.url, MaxNumberOfMessages=10).get("Messages", [])
    time.sleep(1.2)
    for _ in range(3):  # which a receive makes it notice
        queues.client.receive_message(QueueUrl=queues.url, MaxNumberOfMessages=10)
    drain_remaining(drain, 60)
    assert queues.states() == {"returned": 12, "open": 12}
    assert queues.rows("SELECT COUNT(*) FROM entry WHERE return_of IS NOT NULL AND attempts = 1") == [(12,)]
    assert verify_conservation(drain)["proven"]


def test_how_far_its_consumers_are_behind_is_what_waits_to_be_received(queues: Queues) -> None:
    with dry(queues.config, run_id="look", connections=queues.connections) as drain:
        assert drain.target.lag(queues.orders) == 0
        for first in (0, 6):
            entries = [{"Id": str(n), "MessageBody": "x"} for n in range(first, first + 6)]
            queues.client.send_message_batch(QueueUrl=queues.url, Entries=entries)
        assert drain.target.lag(queues.orders) == 12
        received = queues.client.receive_message(QueueUrl=queues.url, MaxNumberOfMessages=10)["Messages"]
        assert drain.target.lag(queues.orders) == 12 - len(received)


def test_the_first_round_waits_for_a_decision(queues: Queues) -> None:
    queues.letters(5)
    drain = queues.open()
    take_custody(drain, 60)
    queues.letters(5, first=5)
    take_custody(drain, 60)
    assign(drain)
    assert dict(queues.rows("SELECT reason, COUNT(*) FROM entry GROUP BY reason")) == {
        "first_intake": 5,
        "ready": 5,
    }


def test_a_message_that_was_taken_and_not_deleted_is_known_by_its_id(queues: Queues) -> None:
    queues.begin()
    queues.letters(10)
    drain = queues.open()
    source = drain.source
    open_pass = source.open_pass

    def deaf(*arguments: Any, **more: Any) -> Any:
        reading = open_pass(*arguments, **more)
        reading.acknowledge = lambda _batch: None  # type: ignore[method-assign]
        return reading

    source.open_pass = deaf  # type: ignore[method-assign]
    take_custody(drain, 3)
    assert queues.rows("SELECT COUNT(*) FROM entry") == [(10,)]
    again = queues.attach()
    said = take_custody(again, 60)
    assert (said["taken"], said["again"], said["reached"]) == (0, 10, True)
    assert queues.rows("SELECT COUNT(*) FROM entry") == [(10,)]
    assert queues.rows("SELECT SUM(again) FROM intake") == [(10,)]


def test_a_custody_slower_than_the_visibility_receives_no_further_ahead_than_it_can_delete(
    queues: Queues, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = queues.config.source.model_copy(update={"visibility": 2.0})
    object.__setattr__(queues.config, "source", source)
    queues.begin()
    queues.letters(500)
    monkeypatch.setattr(intake, "MAX_ENTRIES", 20)
    write = Archive.write

    def slowly(*arguments: Any) -> Any:
        time.sleep(0.25)
        return write(*arguments)

    monkeypatch.setattr(Archive, "write", slowly)
    said = take_custody(queues.open(), 60)
    assert (said["taken"], said["reached"]) == (500, True)
    # what waits here longer than it is invisible comes twice, and costs custody as much as what is new
    assert said["again"] < 150


def test_fifo_keeps_the_order_of_a_group_and_sends_equal_bodies_twice(
    elasticmq: ElasticMq, tmp_path: Path
) -> None:
    queues = Queues(elasticmq, tmp_path, fifo=True)
    queues.begin()
    queues.letters(30)
    queues.letters(2, first=30)
    drain = queues.open()
    take_custody(drain, 60)
    assign(drain)
    (job,) = plan.make(drain, "retry_transient", plan.ready(drain), who="p", saw="s", canary=False)
    with SendRun(drain, job.id) as run:
        run.send(job.size, time.monotonic() + 60)
        run.close("done", "ready")
    by_group: dict[str, list[int]] = {}
    for message in queues.received():
        group = message["Attributes"]["MessageGroupId"]
        by_group.setdefault(group, []).append(int(message["Body"].split()[1]))
    assert sorted(n for group in by_group.values() for n in group) == list(range(32))
    assert all(group == sorted(group) for group in by_group.values())


def test_a_rebuilt_ledger_knows_a_return_by_our_attribute(queues: Queues, tmp_path: Path) -> None:
    queues.begin()
    queues.letters(2)
    drain = queues.open()
    take_custody(drain, 60)
    assign(drain)
    (job,) = plan.make(drain, "retry_transient", plan.ready(drain), who="p", saw="s", canary=False)
    with SendRun(drain, job.id) as run:
        run.send(job.size, time.monotonic() + 60)
        run.close("done", "ready")
    received = 0
    while received < 2:
        got = queues.client.receive_message(QueueUrl=queues.url, MaxNumberOfMessages=10)
        received += len(got.get("Messages", []))
    time.sleep(1.2)
    queues.client.receive_message(QueueUrl=queues.url, MaxNumberOfMessages=10)
    take_custody(drain, 60)
    queues.release(drain)
    of = "SELECT e.place, o.place FROM entry e JOIN entry o ON o.id = e.return_of ORDER BY e.place"
    known = queues.rows(of)
    assert len(known) == 2
    queues.ledger.close()
    lost = queues.config.model_copy(update={"ledger": f"sqlite:///{tmp_path}/new.db"})
    queues.config, queues.ledger = lost, Ledger.create(lost.ledger)
    assert rebuild(lost, who="ann", run_id="rebuild", connections=queues.connections).adopted == 4
    assert queues.rows(of) == known


def test_a_rebuilt_ledger_reads_the_archive_as_messages(queues: Queues, tmp_path: Path) -> None:
    """With their system attributes: a message that SQS itself moved is known by one of them."""
    queues.begin()
    queues.client.send_message(QueueUrl=queues.url, MessageBody="{}")
    while not (got := queues.client.receive_message(QueueUrl=queues.url).get("Messages")):
        pass
    time.sleep(1.2)
    queues.client.receive_message(QueueUrl=queues.url)
    drain = queues.open()
    assert take_custody(drain, 60)["taken"] == 1
    what = "SELECT e.place, e.target, g.format FROM entry e JOIN grp g ON g.id = e.grp"
    before = queues.rows(what)
    queues.release(drain)
    assert before[0][2] == "sqs-redrive"
    queues.ledger.close()
    lost = queues.config.model_copy(update={"ledger": f"sqlite:///{tmp_path}/new.db"})
    queues.config, queues.ledger = lost, Ledger.create(lost.ledger)
    assert rebuild(lost, who="ann", run_id="rebuild", connections=queues.connections).adopted == 1
    assert queues.rows(what) == before
    assert got[0]["MessageId"] == before[0][0]


def test_what_is_exported_is_explained(queues: Queues, tmp_path: Path) -> None:
    queues.begin()
    queues.letters(3)
    pointer = '["software.amazon.payloadoffloading.PayloadS3Pointer",{"s3BucketName":"b","s3Key":"k"}]'
    queues.client.send_message(QueueUrl=queues.dlq_url, MessageBody=pointer)
    drain = queues.open()
    assert take_custody(drain, 60)["taken"] == 4
    assert to_file(queues.config, Selection(everything=True), tmp_path / "letters.jsonl").entries == 4
    lines = (tmp_path / "letters.jsonl").read_bytes().splitlines()
    found = [
        each for each in explained(lines, Classifier(load_taxonomy(), Owners())) if isinstance(each, dict)
    ]
    kinds = Counter((each["format"], each["failure"]["error_type"], each["pointer"]) for each in found)
    assert kinds == {
        ("orchestrator", "TransientNetwork", None): 3,
        ("sqs-extended-client", None, "s3://b/k"): 1,
    }
