"""An SQS queue as origin: what is done with it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import boto3
import msgspec
import structlog
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from dlq_orchestrator.failures import DataCorruption
from dlq_orchestrator.origin import CannotStart, ConsumerFailed, NotSubmitted, Place
from dlq_orchestrator.workflow import Headers, Record

_log = structlog.get_logger()

AT_ONCE = 10
"""Messages in one call, at most: SQS's own limit."""

_MISSING = ("AWS.SimpleQueueService.NonExistentQueue", "QueueDoesNotExist")
_DENIED = ("AccessDenied", "AccessDeniedException", "InvalidClientTokenId", "UnrecognizedClientException")
# what was sent is at fault: sending it again can't help; the last is ElasticMQ's
_REFUSED = ("InvalidMessageContents", "InvalidParameterValue", "InvalidAttributeValue")


@dataclass(frozen=True, slots=True)
class SqsSettings:
    """Where workflows come from. `queue`: a name or a URL; `wait_s`: how long a poll may wait for messages.

    Region, endpoint and credentials that are not given are found where AWS's own tools find them.
    """

    queue: str
    endpoint_url: str | None = None
    region: str | None = None
    wait_s: int = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class SqsRecord(Record):
    """A message. Its `place` is its MessageId; `receives` counts this reception too."""

    receipt: str
    receives: int


class _Replay(msgspec.Struct):
    """What is read of a replay's `dlq` attribute."""

    key: str | None = None
    retry: int | None = None


class SqsQueue:
    """One queue; may be used by many threads.

    Its redrive policy and visibility time-out are read once: a change is seen by the next start.

    :raises CannotStart: it is not there, or is none whose failing messages end in a dead-letter queue.
    """

    def __init__(self, settings: SqsSettings) -> None:
        self._wait_s = settings.wait_s
        try:
            self._client: Any = boto3.client(
                "sqs",
                endpoint_url=settings.endpoint_url,
                region_name=settings.region,
                config=Config(
                    connect_timeout=3,
                    read_timeout=settings.wait_s + 10,
                    retries={"mode": "standard", "total_max_attempts": 3},
                ),
            )
            self.url = settings.queue
            if "://" not in self.url:
                self.url = self._client.get_queue_url(QueueName=settings.queue)["QueueUrl"]
            attributes: dict[str, str] = self._client.get_queue_attributes(
                QueueUrl=self.url, AttributeNames=["All"]
            )["Attributes"]
        except ClientError as error:
            if _code(error) in _MISSING:
                raise CannotStart(
                    f"there is no queue {settings.queue}: create it, or correct --origin-queue"
                ) from None
            raise CannotStart(
                f"queue {settings.queue}: {_code(error)}; check the credentials' rights"
            ) from None
        except (BotoCoreError, ValueError) as error:
            raise CannotStart(
                f"queue {settings.queue}: {error}; check --endpoint-url, --region and the credentials"
                " in the environment"
            ) from None
        self.name = self.url.rsplit("/", 1)[-1]
        if self.name.endswith(".fifo"):
            raise CannotStart(
                f"{self.name} is a FIFO queue, and workflows run beside each other, in no order:"
                " name a standard queue with --origin-queue"
            )
        if "RedrivePolicy" not in attributes:
            raise CannotStart(
                f"queue {self.name} has no redrive policy, so that what fails would come back for ever:"
                " give it a dead-letter queue and a maxReceiveCount"
            )
        self.max_receives = int(json.loads(attributes["RedrivePolicy"])["maxReceiveCount"])
        self.visibility_ms = int(attributes["VisibilityTimeout"]) * 1000

    def receive(self) -> list[SqsRecord]:
        """What one long poll gives, `AT_ONCE` at most.

        :raises ConsumerFailed: the queue is gone, or refuses for good.
        :raises BotoCoreError, ClientError: it can't be read now.
        """
        try:
            answer = self._client.receive_message(
                QueueUrl=self.url,
                MaxNumberOfMessages=AT_ONCE,
                WaitTimeSeconds=self._wait_s,
                MessageAttributeNames=["All"],
                MessageSystemAttributeNames=["ApproximateReceiveCount"],
            )
        except ClientError as error:
            if _code(error) in (*_MISSING, *_DENIED):
                raise ConsumerFailed(f"{self.name}: {_code(error)}") from None
            raise
        return [record_of(message) for message in answer.get("Messages", [])]

    def delete(self, records: Sequence[SqsRecord]) -> None:
        """Delete what is done, `AT_ONCE` at most. What can't be deleted now comes again, and is found done."""
        entries = [{"Id": str(n), "ReceiptHandle": record.receipt} for n, record in enumerate(records)]
        self._change(self._client.delete_message_batch, entries, "not deleted")

    def give_back(self, records: Sequence[SqsRecord]) -> None:
        """Make visible again what was received and not run, `AT_ONCE` at most."""
        entries = [
            {"Id": str(n), "ReceiptHandle": record.receipt, "VisibilityTimeout": 0}
            for n, record in enumerate(records)
        ]
        self._change(self._client.change_message_visibility_batch, entries, "not given back")

    def put(self, document: bytes, correlation_id: str, traceparent: str | None) -> Place:
        """
        :raises NotSubmitted: no acknowledgement.
        :raises DataCorruption: the queue takes no such text.
        """
        headers = {"correlation-id": correlation_id} | ({"traceparent": traceparent} if traceparent else {})
        try:
            sent = self._client.send_message(
                QueueUrl=self.url,
                MessageBody=document.decode(),
                MessageAttributes={
                    name: {"DataType": "String", "StringValue": value} for name, value in headers.items()
                },
            )
        except ClientError as error:
            if _code(error) in _REFUSED:
                raise DataCorruption(f"{self.name} takes no such message: {_code(error)}") from None
            raise NotSubmitted(f"{self.name}: {_code(error)}") from None
        except BotoCoreError as error:
            raise NotSubmitted(f"{self.name}: {error}") from None
        return Place(queue=self.name, message_id=sent["MessageId"])

    def _change(self, call: Any, entries: list[dict[str, Any]], what: str) -> None:
        try:
            failed = call(QueueUrl=self.url, Entries=entries).get("Failed", [])
        except (BotoCoreError, ClientError) as error:
            _log.warning(f"messages {what}", count=len(entries), why=str(error))
            return
        for entry in failed:
            _log.warning(f"message {what}", why=entry["Code"])


def record_of(message: dict[str, Any]) -> SqsRecord:
    """The record in a message as boto3 gives it: its attributes become headers, of whatever type they are.

    A replay's `dlq` attribute says what Kafka's `dlq-key` and `dlq-retry-count` do; one that can't be read
    makes the message an ordinary one.
    """
    headers: Headers = []
    for name, attribute in message.get("MessageAttributes", {}).items():
        value = attribute.get("BinaryValue")
        headers.append((name, _bytes(attribute["StringValue"]) if value is None else value))
        if name == "dlq" and value is None:
            headers += _of_replay(attribute["StringValue"])
    return SqsRecord(
        message["MessageId"],
        _bytes(message["Body"]),
        headers,
        receipt=message["ReceiptHandle"],
        receives=int(message["Attributes"]["ApproximateReceiveCount"]),
    )


def _of_replay(text: str) -> Headers:
    try:
        replay = msgspec.json.decode(_bytes(text), type=_Replay)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return []
    headers: Headers = []
    if replay.key:
        headers.append(("dlq-key", replay.key.encode()))
    if replay.retry is not None:
        headers.append(("dlq-retry-count", str(replay.retry).encode()))
    return headers


def _bytes(text: str) -> bytes:
    # half a surrogate pair, if a sender's escape smuggled one in, makes the record no UTF-8: a failure like others
    return text.encode(errors="surrogatepass")


def _code(error: ClientError) -> str:
    code: str = error.response["Error"]["Code"]
    return code
