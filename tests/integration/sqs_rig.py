"""A queue to drain on a real SQS server, the receiver behind its target, and the accounts of both."""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from botocore.exceptions import BotoCoreError, ClientError
from tests.integration.rig import TRANSIENT, Rig, _kafka, wait_until

from dlq import plan
from dlq.archive import Archive, Rows
from dlq.conservation import Proof, prove
from dlq.drain import Drain
from dlq.entry import payload_sha
from dlq.intake import take_custody
from dlq.ledger.custody import batched
from dlq.ledger.jobs import Job
from dlq.report.account import ReportData
from dlq.report.tally import build_report
from dlq.sending import SendRun
from dlq.triage import assign
from dlq_demo.broker import create_topic
from dlq_demo.elasticmq import ElasticMq

SENT = {"replayed", "confirmed", "returned", "handed_back"}


class Arrived(NamedTuple):
    """A message as the target's receiver got it; ``mark`` is our attribute's JSON, None where there is none."""

    id: str
    body: str
    attributes: Mapping[str, Any]
    system: Mapping[str, str]
    mark: Mapping[str, Any] | None


class SqsRig(Rig):
    """One queue: DLQ and origin of its own on the server, or one of the two on a broker.

    :param endpoint: what the drain calls, where it is not the server itself.
    :param source, target: more of the queue's file.
    :param make_queues: others that the attributes name.
    :param kafka_dlq, kafka_origin: the broker has that one.
    """

    def __init__(
        self,
        server: ElasticMq,
        folder: Path,
        *,
        endpoint: str | None = None,
        bootstrap: str = "",
        kafka_dlq: bool = False,
        kafka_origin: bool = False,
        fifo: bool = False,
        source: Mapping[str, Any] | None = None,
        target: Mapping[str, Any] | None = None,
        limits: Mapping[str, Any] | None = None,
        tuning: Mapping[str, Any] | None = None,
        queue_attributes: Mapping[str, str] | None = None,
        make_queues: Sequence[str] = (),
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.server, self.folder, self.bootstrap, self.fifo = server, folder, bootstrap, fifo
        self.client = server.client(max_pool_connections=16)
        self.queue = f"q{uuid.uuid4().hex[:10]}"
        suffix = ".fifo" if fifo else ""
        self.dlq, self.origin = f"{self.queue}-dlq{suffix}", f"{self.queue}-orders{suffix}"
        self.group = f"{self.queue}.workers"
        self.tuning = {"lease_s": 300.0, "grace_s": 0.0, "batch": 5_000, "records": 200, **(tuning or {})}
        aws = {"kind": "sqs", "connection": "aws", **(source or {})}
        for name in make_queues:
            server.create_queue(name)
        from_sqs = {"queue": self.dlq, "start": "earliest", "visibility": 2, "wait": 0, "quiet": 0.5, **aws}
        to_sqs = {"kind": "sqs", "connection": "aws", "allow": [self.origin], "queue": self.origin}
        kafka = {"kind": "kafka", "connection": "kafka"}
        if kafka_dlq:
            create_topic(bootstrap, self.dlq, 3)
            from_sqs = {**kafka, "topic": self.dlq, "start": "earliest"}
        else:
            self.dlq_url = server.create_queue(self.dlq, visibility=30)
        if kafka_origin:
            create_topic(bootstrap, self.origin, 3)
            to_sqs = {**kafka, "allow": [self.origin], "topic": self.origin, "group": self.group}
        else:
            self.origin_url = server.create_queue(self.origin, visibility=30, **(queue_attributes or {}))
        self.data = {
            "name": self.queue,
            "source": from_sqs,
            "target": {**to_sqs, **(target or {})},
            "limits": {"dr": 1_000_000, **(limits or {})},
            "outcome": {"grace": 0, "deadline": "20s"},
            "ledger": f"sqlite:///{folder}/ledger.db",
            "archive": str(folder / "archive"),
            "report": str(folder / "report"),
        }
        connection = {**server.connection}
        connection["extra"] = {**connection["extra"], "endpoint_url": endpoint or server.endpoint}
        self.connection_data = {"aws": connection, "kafka": _kafka(bootstrap)}
        self.lettered: dict[str, tuple[str, Mapping[str, Any]]] = {}
        self._receivers: list[Receiver] = []
        self._begin()

    def close(self) -> None:
        super().close()
        for receiver in self._receivers:
            receiver.stop()

    # Dead letters

    def letters(
        self, count: int, *, kinds: Sequence[str] = TRANSIENT, groups: int = 3, body: str | None = None
    ) -> None:
        """Dead-letter ``count`` more messages, kinds in turn; on FIFO of ``groups`` message groups in turn."""
        numbers = range(self._number, self._number + count)
        self._number += count
        made = [self._letter(n, kinds[n % len(kinds)], groups, body) for n in numbers]
        if self.fifo:
            for some in batched(made, 10):
                self._dead_letter(some)
            return
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(self._dead_letter, batched(made, 10)))

    def _letter(self, n: int, kind: str, groups: int, body: str | None) -> dict[str, Any]:
        text = {
            "correlation-id": f"c-{n}",
            "dedupe-key": f"d-{n}",
            "wf-error-type": kind,
            "wf-error-message": "HTTP 503 from upstream" if kind in TRANSIENT else "it broke",
            "wf-component": "payments.charge",
        }
        attributes: dict[str, Any] = {k: {"DataType": "String", "StringValue": v} for k, v in text.items()}
        attributes["size"] = {"DataType": "Number.int", "StringValue": str(n)}
        attributes["blob"] = {"DataType": "Binary.gif", "BinaryValue": bytes([n % 256, 0, 255])}
        entry = {
            "Id": str(n),
            "MessageBody": json.dumps({"order": n, "filler": "é" * (n % 100)}) if body is None else body,
            "MessageAttributes": attributes,
        }
        if self.fifo:
            entry |= {"MessageGroupId": f"g{n % groups}", "MessageDeduplicationId": f"letter-{n}"}
        return entry

    def _dead_letter(self, entries: Sequence[dict[str, Any]]) -> None:
        answer = self.client.send_message_batch(QueueUrl=self.dlq_url, Entries=list(entries))
        assert len(answer["Successful"]) == len(entries), answer
        by_id = {e["Id"]: e for e in entries}
        for sent in answer["Successful"]:
            entry = by_id[sent["Id"]]
            self.lettered[sent["MessageId"]] = (entry["MessageBody"], entry["MessageAttributes"])

    def taken(self, count: int, run: str = "r1", **letters: Any) -> Drain:
        """A drain that has these dead letters in custody, each with its reason."""
        self.begin()
        self.letters(count, **letters)
        drain = self.open(run)
        assert take_custody(drain, 60)["taken"] == count
        assign(drain)
        return drain

    def job(self, drain: Drain) -> Job:
        """One job of all that is ready."""
        (job,) = plan.make(drain, "retry_transient", plan.ready(drain), who="p", saw="s", canary=False)
        return job

    def send(self, drain: Drain, job: Job | None = None) -> SendRun:
        """Run a job to its end, without gates."""
        job = job or self.job(drain)
        with SendRun(drain, job.id) as run:
            run.send(job.size, time.monotonic() + 60)
            run.close("done", "ready")
        return run

    # The target's side

    def receiver(self, **how: Any) -> Receiver:
        receiver = Receiver(self, **how)
        self._receivers.append(receiver)
        receiver.start()
        return receiver

    def held(self, url: str) -> int:
        """What a queue holds: visible, in flight and delayed."""
        names = [f"ApproximateNumberOfMessages{what}" for what in ("", "NotVisible", "Delayed")]
        found = self.client.get_queue_attributes(QueueUrl=url, AttributeNames=names)["Attributes"]
        return sum(int(found[name]) for name in names)

    # What must hold whatever was killed

    def check_custody(self) -> None:
        """Each dead letter is exactly one row, its body and attributes are in the archive; the queue is empty."""
        rows = self.sql(
            "SELECT e.place, e.payload_sha, s.uri, e.row_no FROM entry e JOIN segment s ON s.id = e.segment "
            "ORDER BY s.uri"
        )
        assert Counter(r.place for r in rows) == Counter(dict.fromkeys(self.lettered, 1))
        archive, uri, segment = Archive(self.config.archive, self.queue), "", None
        for row in rows:
            if row.uri != uri:
                uri, segment = row.uri, Rows(archive.read(row.uri))
            assert segment is not None
            stored, (body, attributes) = segment[row.row_no], self.lettered[row.place]
            assert stored.value == body.encode()
            assert payload_sha(stored.key, stored.value) == row.payload_sha
            kept = {
                name: (kind, value) for (name, value), kind in zip(stored.headers, stored.types, strict=True)
            }
            assert kept == {
                name: (a["DataType"], a["StringValue"].encode() if "StringValue" in a else a["BinaryValue"])
                for name, a in attributes.items()
            }
        self.check_chain()
        assert self.held(self.dlq_url) == 0

    def check_arrivals(self, receiver: Receiver) -> Figures:
        """What is settled as sent arrived, what is in doubt did or did not; each effect once."""
        lines = self.sql(
            "SELECT je.job, je.ordinal, je.idem_key, e.id, e.state, e.job = je.job AS now FROM job_entry je "
            "JOIN entry e ON e.id = je.entry"
        )
        by_line = {(r.job, r.ordinal): r for r in lines}
        for one in receiver.arrived:
            assert one.mark is not None
            line = by_line[one.mark["job"], one.mark["ordinal"]]
            assert one.mark["key"] == line.idem_key
        arrived = Counter(one.mark["key"] for one in receiver.arrived if one.mark)
        state = {r.idem_key: r.state for r in lines}
        lost = [k for k, s in state.items() if s in SENT and not arrived[k]]
        unknown = [k for k, s in state.items() if s not in SENT and s != "ambiguous" and arrived[k]]
        assert not lost, f"{len(lost)} are settled as sent and never arrived"
        assert set(receiver.effects.values()) <= {1}
        assert set(receiver.effects) == set(arrived)
        doubtful = [k for k, s in state.items() if s == "ambiguous"]
        figures = Figures(
            entries=self.count(),
            sent=sum(s in SENT for s in state.values()),
            ambiguous=len(doubtful),
            ambiguous_arrived=sum(arrived[k] > 0 for k in doubtful),
            doubled=sum(n - 1 for n in arrived.values()),
            lost=len(lost),
            unrecorded=len(unknown),
        )
        print(self.queue, figures)
        return figures

    def check_same_figures(self, drain: Drain) -> tuple[Proof, ReportData]:
        """The proof holds, and says what the report and the rows say."""
        proof, report = prove(drain), build_report(drain)
        assert proof.broken == []
        held, told = proof.accounts, report.numbers
        assert (held["before"], held["taken"], held["settled"], held["unsettled"]) == (
            told.open_before,
            told.taken,
            told.settled,
            told.unsettled,
        )
        states = Counter({s.partition(":")[0]: 0 for s in self.states()})
        for state, n in self.states().items():
            states[state.partition(":")[0]] += n
        assert told.unsettled == states["open"] + states["ambiguous"]
        counted = Counter[str]()
        for group in report.open:
            counted[group.state] += group.count
        assert counted == +Counter({s: states[s] for s in ("open", "ambiguous")})
        return proof, report


class Figures(NamedTuple):
    """``ambiguous_arrived``: of those in doubt; ``doubled``: arrivals beyond a key's first; ``unrecorded``: arrived,
    and open in the ledger.
    """

    entries: int
    sent: int
    ambiguous: int
    ambiguous_arrived: int
    doubled: int
    lost: int
    unrecorded: int


class Receiver(threading.Thread):
    """The program behind the origin queue: idempotent by our key, else by the letter's own; deletes what it has done.

    :param fails: says which messages it leaves: SQS has them again later.
    """

    def __init__(self, rig: SqsRig, *, fails: Callable[[Arrived], bool] = lambda _: False) -> None:
        super().__init__(daemon=True, name="receiver")
        self._rig, self._fails = rig, fails
        self._over = threading.Event()
        self._seen: set[str] = set()
        self.arrived: list[Arrived] = []
        """Each message once, in order of arrival."""
        self.effects: Counter[str] = Counter()
        """How often what a key asks for was done."""
        self.polls = 0

    def stop(self) -> None:
        self._over.set()
        self.join(30)

    def run(self) -> None:
        client = self._rig.server.client()
        while not self._over.is_set():
            with suppress(BotoCoreError, ClientError):
                self._receive(client)
        client.close()

    def _receive(self, client: Any) -> None:
        got = client.receive_message(
            QueueUrl=self._rig.origin_url,
            MaxNumberOfMessages=10,
            WaitTimeSeconds=1,
            MessageAttributeNames=["All"],
            MessageSystemAttributeNames=["All"],
        ).get("Messages", [])
        done = []
        for message in got:
            one = arrived(message)
            if one.id not in self._seen:
                self._seen.add(one.id)
                self.arrived.append(one)
            if self._fails(one):
                continue
            done.append(message)
            key = one.mark["key"] if one.mark else one.attributes["dedupe-key"]["StringValue"]
            if key not in self.effects:
                self.effects[key] += 1
        if done:
            client.delete_message_batch(
                QueueUrl=self._rig.origin_url,
                Entries=[{"Id": str(n), "ReceiptHandle": m["ReceiptHandle"]} for n, m in enumerate(done)],
            )
        self.polls += 1

    def settle(self) -> None:
        """Wait until it has received all that the queue holds."""
        wait_until(lambda: self._rig.held(self._rig.origin_url) == 0, "the receiver had everything")
        polls = self.polls
        wait_until(lambda: self.polls > polls + 1, "the receiver looked again")


def arrived(message: Mapping[str, Any]) -> Arrived:
    attributes = message.get("MessageAttributes") or {}
    mark = attributes.get("dlq")
    return Arrived(
        message["MessageId"],
        message["Body"],
        attributes,
        message.get("Attributes") or {},
        json.loads(mark["StringValue"]) if mark else None,
    )


def sqs_rigs(server: ElasticMq, folder: Path) -> Iterator[Callable[..., SqsRig]]:
    """For a fixture: makes rigs on a server and closes them all."""
    made: list[SqsRig] = []

    def make(**how: Any) -> SqsRig:
        rig = SqsRig(server, folder / f"rig{len(made)}", **how)
        made.append(rig)
        return rig

    yield make
    for rig in made:
        rig.close()
