"""An SQS queue as origin: what is done with it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import boto3
import msgspec
import structlog
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from dlq_orchestrator.failures import DataCorruption
from dlq_orchestrator.origin import CannotStart, ConsumerFailed, NotSubmitted, Outgoing, Place
from dlq_orchestrator.workflow import Headers, Record

_log = structlog.get_logger()

AT_ONCE = 10
"""Messages in one call, at most: SQS's own limit."""

_ATTRIBUTES = 10
_SENDERS = 8
_STRING = "String"

# what a Kafka header after `dlq-` is called in the attribute, and which are numbers there
_FIELDS = {"retry-count": "retry", "original-timestamp": "ts"}
_COUNTS = ("ordinal", "retry-count", "original-timestamp")

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

    def put(self, records: Sequence[Outgoing]) -> list[Place | NotSubmitted | DataCorruption]:
        with ThreadPoolExecutor(_SENDERS, thread_name_prefix="sender") as senders:
            return list(senders.map(self._send, records))

    def _send(self, record: Outgoing) -> Place | NotSubmitted | DataCorruption:
        attributes = _attributes(record)
        if not record.value or len(attributes) > _ATTRIBUTES:
            return DataCorruption(
                f"{self.name} takes no empty message, nor one of over {_ATTRIBUTES} attributes"
            )
        try:
            sent = self._client.send_message(
                QueueUrl=self.url, MessageBody=record.value.decode(), MessageAttributes=attributes
            )
        except UnicodeDecodeError:
            return DataCorruption(f"{self.name} takes text only")
        except ClientError as error:
            if _code(error) in _REFUSED:
                return DataCorruption(f"{self.name} takes no such message: {_code(error)}")
            return NotSubmitted(f"{self.name}: {_code(error)}")
        except BotoCoreError as error:
            return NotSubmitted(f"{self.name}: {error}")
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
    types: dict[str, str] = {}
    for name, attribute in message.get("MessageAttributes", {}).items():
        value = attribute.get("BinaryValue")
        if attribute["DataType"] != _STRING:
            types[name] = attribute["DataType"]
        headers.append((name, _bytes(attribute["StringValue"]) if value is None else value))
        if name == "dlq" and value is None:
            headers += _of_replay(attribute["StringValue"])
    return SqsRecord(
        message["MessageId"],
        _bytes(message["Body"]),
        headers,
        types=types,
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


def _attributes(record: Outgoing) -> dict[str, dict[str, Any]]:
    """A record's headers as attributes, those of a replay (`dlq-…`) in one: a message has ten at most."""
    attributes: dict[str, dict[str, Any]] = {}
    ours: dict[str, str | int] = {}
    for name, value in record.headers:
        if name.startswith("dlq-"):
            field, text = name.removeprefix("dlq-"), (value or b"").decode()
            count = field in _COUNTS and text.isdigit() and len(text) < 18
            ours[_FIELDS.get(field, field)] = int(text) if count else text
        elif name != "dlq" and value:
            kind = record.types.get(name, _STRING)
            content = {"BinaryValue": value} if kind.startswith("Binary") else {"StringValue": _text(value)}
            attributes[name] = {"DataType": kind, **content}
    if ours:
        attributes["dlq"] = {"DataType": _STRING, "StringValue": msgspec.json.encode(ours).decode()}
    return attributes


def _text(value: bytes) -> str:
    return value.decode(errors="surrogatepass")


def _bytes(text: str) -> bytes:
    # half a surrogate pair, if a sender's escape smuggled one in, makes the record no UTF-8: a failure like others
    return text.encode(errors="surrogatepass")


def _code(error: ClientError) -> str:
    code: str = error.response["Error"]["Code"]
    return code
