"""A dead-letter queue on SQS: received, taken into custody, deleted.

It has no positions. What a Kafka partition calls its position is here the number of rounds that found the queue empty:
a round begins at one and ends at the next, so that the ledger's chain of ranges holds for both.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError

from dlq import aws, sqs
from dlq.config import SqsSource
from dlq.entry import Headers, Record
from dlq.errors import Refused, SourceError
from dlq.ledger.custody import batched
from dlq.ports import Batch, Connections, Depth, Echo, Range

_RECEIVERS = 8
_DELETERS = 8
_EMPTY_POLLS = 3  # in a row, of all receivers together, since the last message came
_WAITING = 1_000  # messages held by a pass and not read from it, at most
_COUNT_EVERY_S = 15.0
_GLANCE_S = 1.0
_PEEK_HELD_S = 60


class SqsDlq:
    """The source adapter of a queue; ``uri`` is its ARN."""

    has_log = False

    def __init__(self, config: SqsSource, connections: Connections) -> None:
        self._config = config
        self._connection = connections(config.connection)
        self._client = aws.client(self._connection, "sqs")
        self.uri = self._look().arn

    def _look(self) -> sqs.Queue:
        return sqs.find(self._client, self._config.queue, "source.queue", SourceError)

    def depth(self, _positions: Mapping[int, int]) -> Depth:
        """About: visible, in flight and delayed."""
        held = self._look().held
        return Depth(held, {0: held})

    def retention_ms(self) -> int | None:
        """Of a standard queue counted from the first time the message was sent, wherever to; the move into a
        dead-letter queue does not renew it (a FIFO queue's does).
        """
        seconds = self._look().number("MessageRetentionPeriod", 0)
        return seconds * 1000 or None

    def check(self, _positions: Mapping[int, int], _ledger_id: str, _epoch: int) -> list[str]:
        """Who else is at the queue. It remembers nothing of us."""
        found = self._look()
        self._refuse_to_push_on(found)
        if moving := self._moving(found):
            raise Refused(
                f"queue {found.name}: a message move task is {moving}; wait for it, or cancel it (aws sqs "
                "cancel-message-move-task): it moves entries without a filter, under new ids"
            )
        if readers := self._functions(found):
            raise Refused(
                f"queue {found.name} is read by Lambda function {readers[0]}, whose mapping is on: disable the event "
                "source mapping; it would take entries away beside us"
            )
        findings = []
        if flying := found.number("ApproximateNumberOfMessagesNotVisible", 0):
            findings.append(
                f"queue {found.name}: about {flying} messages are in flight: another consumer reads it, or a killed "
                "process did; they come back when their visibility ends"
            )
        return findings

    def _refuse_to_push_on(self, found: sqs.Queue) -> None:
        if found.redrive and not self._config.redrives_on:
            raise Refused(
                f"queue {found.name} has a redrive policy of its own: receiving counts, and could push entries on to "
                f"{found.redrive.get('deadLetterTargetArn')}. Drain that one first, or set source.redrives_on: true"
            )

    def _moving(self, found: sqs.Queue) -> str | None:
        try:
            tasks = self._client.list_message_move_tasks(SourceArn=found.arn, MaxResults=1).get("Results", [])
        except (ClientError, BotoCoreError):
            return None  # not allowed to look, or an emulator that has none
        return next((t["Status"] for t in tasks if t.get("Status") in ("RUNNING", "CANCELLING")), None)

    def _functions(self, found: sqs.Queue) -> list[str]:
        """The Lambda functions that are fed from the queue now."""
        try:
            client = aws.client(self._connection, "lambda", once=True)
            listed = client.list_event_source_mappings(EventSourceArn=found.arn).get(
                "EventSourceMappings", []
            )
        except (ClientError, BotoCoreError):
            return []  # not allowed to look, or an emulator that has none
        return [m["FunctionArn"] for m in listed if m.get("State") in ("Enabled", "Enabling", "Updating")]

    def echoes(self) -> dict[int, Echo]:
        return {}

    def remember(self, positions: Mapping[int, int], ledger_id: str, epoch: int) -> None:
        """A queue remembers nothing."""

    def first(self) -> dict[int, tuple[int, int]]:
        """The first round is the first intake."""
        return {0: (0, 1)}

    def open_pass(
        self,
        positions: Mapping[int, int],
        parts: Sequence[int] | None = None,
        *,
        glance: bool = False,
    ) -> SqsPass:
        return SqsPass(self._client, self._look(), self._config, positions.get(0, 0), glance=glance)

    def peek(self, most: int, seconds: float) -> list[Record]:
        found, until = self._look(), time.monotonic() + min(seconds, _PEEK_HELD_S / 2)
        self._refuse_to_push_on(found)
        held: dict[str, tuple[str, Record]] = {}
        empty = 0
        try:
            while len(held) < most and empty < _EMPTY_POLLS and time.monotonic() < until:
                got = self._client.receive_message(
                    QueueUrl=found.url,
                    MaxNumberOfMessages=min(sqs.BATCH, most - len(held)),
                    VisibilityTimeout=_PEEK_HELD_S,
                    WaitTimeSeconds=1,
                    MessageAttributeNames=["All"],
                    MessageSystemAttributeNames=["All"],
                ).get("Messages", [])
                held.update({m["MessageId"]: (m["ReceiptHandle"], recorded(m)) for m in got})
                empty = 0 if got else empty + 1
        except (ClientError, BotoCoreError) as error:
            raise SourceError(f"queue {found.name} can't be looked at: {aws.reason(error)}") from error
        finally:
            _give_back(self._client, found.url, [handle for handle, _ in held.values()])
        return [record for _, record in held.values()]

    def originals(
        self, _topic: str, _places: Collection[tuple[int, int]]
    ) -> Mapping[tuple[int, int], Record]:
        return {}

    def reread(self, _spans: Sequence[Range]) -> Iterator[list[tuple[int, str, int]]]:
        return iter(())

    def close(self) -> None:
        self._client.close()


class SqsPass:
    """Receives until the queue is empty, in threads, since a call gives ten messages at most.

    What it received and nobody took into custody is given back when it is closed; after a kill it comes back when its
    visibility ends.
    """

    def __init__(
        self, client: Any, found: sqs.Queue, config: SqsSource, round_: int, *, glance: bool
    ) -> None:
        self._client = client
        self._queue = found
        self._config = config
        self._glance = glance
        self._wait = min(config.wait, _GLANCE_S) if glance else config.wait
        self.starts: Mapping[int, int] = {0: round_}
        self.cutoffs: Mapping[int, int] = {0: round_ if glance else round_ + 1}
        self._come: queue.SimpleQueue[tuple[float, dict[str, Any]]] = queue.SimpleQueue()
        self._waited = 0.0  # how long, in seconds, the message read last had waited here
        self._held: dict[str, str] = {}  # the handles of what was read and is not in custody, by id
        self._error: Exception | None = None
        self._empty_polls = 0
        self._quiet_since: float | None = None
        self._counted = 0.0
        self._done = False
        self._stop = threading.Event()
        receivers = 1 if glance else _RECEIVERS
        self._pool = ThreadPoolExecutor(receivers + _DELETERS, thread_name_prefix="dlq-sqs")
        for _ in range(receivers):
            self._pool.submit(self._receive)

    def _receive(self) -> None:
        while not self._stop.is_set():
            if self._far_ahead():
                self._stop.wait(0.05)
                continue
            asked = time.monotonic()
            try:
                got = self._client.receive_message(
                    QueueUrl=self._queue.url,
                    MaxNumberOfMessages=sqs.BATCH,
                    VisibilityTimeout=round(self._config.visibility),
                    WaitTimeSeconds=round(self._wait),
                    MessageAttributeNames=["All"],
                    MessageSystemAttributeNames=["All"],
                ).get("Messages", [])
            except Exception as error:  # noqa: BLE001 - whatever ends this thread is told where batches are read
                if isinstance(error, ClientError) and aws.throttled(error):
                    self._stop.wait(1)
                    continue
                self._error = error
                return
            for message in got:
                self._come.put((asked, message))
            self._empty_polls = 0 if got else self._empty_polls + 1
            if not got and self._wait < 1:  # a short poll answers at once
                self._stop.wait(0.1)

    def _far_ahead(self) -> bool:
        """Whether custody can't keep up: what waits here is on its visibility time-out, and comes twice past it."""
        waiting = self._come.qsize()
        return waiting > _WAITING or (waiting > 0 and self._waited > self._config.visibility / 4)

    def read(self, max_entries: int, max_bytes: int, max_seconds: float) -> Batch | None:
        if self._done:
            return None
        records: list[Record] = []
        receipts: list[tuple[str, str]] = []
        size, until, empty = 0, time.monotonic() + max_seconds, False
        while len(records) < max_entries and size < max_bytes and (left := until - time.monotonic()) > 0:
            try:
                asked, message = self._come.get(timeout=min(left, 0.2))
            except queue.Empty:
                self._waited = 0.0
                if self._error is not None:
                    raise SourceError(
                        f"queue {self._queue.name} can't be received from: {aws.reason(self._error)}; grant "
                        "sqs:ReceiveMessage and sqs:DeleteMessage"
                    ) from self._error
                if records or (empty := self._is_empty()):
                    break
                continue
            self._quiet_since = None
            self._waited = time.monotonic() - asked
            if self._waited > self._config.visibility * 0.75:
                continue  # it couldn't be deleted in time, and comes again
            record = recorded(message)
            records.append(record)
            receipts.append((record.place, message["ReceiptHandle"]))
            self._held[record.place] = message["ReceiptHandle"]
            size += len(record.value or b"") + sum(len(v or b"") for _, v in record.headers)
        if not empty:
            return Batch(records, [], receipts)
        self._done = True
        if self._glance:
            return None
        start = self.starts[0]
        return Batch([], [Range(0, start, start + 1)], [])

    def _is_empty(self) -> bool:
        """Whether nothing comes any more and, but for a glance, nothing will: the counts were zero long enough."""
        if self._empty_polls < _EMPTY_POLLS or self._come.qsize():
            return False
        if self._glance:
            return True
        now = time.monotonic()
        if self._quiet_since is not None and now - self._counted < min(
            _COUNT_EVERY_S, self._config.quiet / 4
        ):
            return False
        self._counted = now
        try:
            held = sqs.find(self._client, self._queue.url, "source.queue", SourceError).held
        except SourceError:
            return False
        if held:
            self._quiet_since = None
            return False
        self._quiet_since = self._quiet_since or now
        return now - self._quiet_since >= self._config.quiet

    def echo(self) -> None:
        """Nobody to tell."""

    def acknowledge(self, batch: Batch) -> None:
        """Delete what is in custody. What can't be deleted comes again, is known by its place, and deleted then."""
        for place, _ in batch.receipts or []:
            self._held.pop(place, None)
        calls = [
            [{"Id": str(n), "ReceiptHandle": handle} for n, (_, handle) in enumerate(some)]
            for some in batched(batch.receipts or [], sqs.BATCH)
        ]

        def delete(entries: list[dict[str, str]]) -> None:
            try:
                self._client.delete_message_batch(QueueUrl=self._queue.url, Entries=entries)
            except ClientError as error:
                if aws.code(error) in ("AccessDenied", "AccessDeniedException"):
                    raise SourceError(
                        f"queue {self._queue.name}: messages in custody can't be deleted: {aws.reason(error)}; grant "
                        "sqs:DeleteMessage"
                    ) from error
            except BotoCoreError:
                pass

        list(self._pool.map(delete, calls))

    def close(self) -> None:
        """Give back what is not in custody."""
        self._stop.set()
        self._pool.shutdown()
        handles = [*self._held.values()]
        while not self._come.empty():
            handles.append(self._come.get()[1]["ReceiptHandle"])
        _give_back(self._client, self._queue.url, handles)


def _give_back(client: Any, url: str, handles: Sequence[str]) -> None:
    """Have messages visible at once; those of a call that fails come back by themselves."""
    for some in batched(handles, sqs.BATCH):
        entries = [
            {"Id": str(n), "ReceiptHandle": handle, "VisibilityTimeout": 0} for n, handle in enumerate(some)
        ]
        with suppress(ClientError, BotoCoreError):
            client.change_message_visibility_batch(QueueUrl=url, Entries=entries)


def recorded(message: Mapping[str, Any]) -> Record:
    """A message as a record, its body and attributes to the byte."""
    body: str | None = message.get("Body")
    value = None if body is None else body.encode("utf-8", "surrogatepass")
    headers: list[tuple[str, bytes | None]] = []
    types: list[str] = []
    attributes = message.get("MessageAttributes") or {}
    for name, attribute in attributes.items():
        text, binary = attribute.get("StringValue"), attribute.get("BinaryValue")
        headers.append((name, text.encode() if text is not None else binary))
        types.append(str(attribute.get("DataType", "String")))
    system = message.get("Attributes") or {}
    sent = system.get("SentTimestamp", "")
    told, told_too = message.get("MD5OfBody"), message.get("MD5OfMessageAttributes")
    whole = told is None or body is None or sqs.md5_of_body(body) == told
    whole = whole and (not attributes or told_too is None or sqs.md5_of_attributes(attributes) == told_too)
    found: Headers = tuple(headers)
    return Record(
        0,
        message["MessageId"],
        None,
        None,
        value,
        found,
        int(sent) if sent.isdigit() else None,
        None if whole else "damaged_in_transit",
        tuple(types),
        tuple((name, str(value)) for name, value in system.items()),
        "sqs",
    )
