"""Replay to SQS queues: no transaction, so each message is marked before its call and what it did may stay unknown."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError, ConnectTimeoutError, EndpointConnectionError

from dlq import aws, mark, sqs
from dlq.config import SqsTarget
from dlq.errors import ConfigError, TargetError
from dlq.ports import Connections, Delivered, Output, Refusal
from dlq.targets.untransacted import Untransacted

_ATTRIBUTES = 10
_BODY = 1 << 20
_SENDERS = 8
_DENIED = sqs.DENIED | sqs.ABSENT
_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 5.0

_DEDUPLICATED_S = 270.0
"""So long a FIFO queue swallows what has the same deduplication id, with half a minute for the call and the clocks (it
does for 5 minutes: SendMessage, API reference)."""


class SqsReplay(Untransacted):
    """The target adapter for the queues in ``target.allow``."""

    def __init__(self, config: SqsTarget, connections: Connections) -> None:
        self._config = config
        connection = connections(config.connection)
        self._client = aws.client(connection, "sqs")
        self._once = aws.client(connection, "sqs", once=True)
        self._queues: dict[str, sqs.Queue] = {}
        self._empty_at: dict[str, float] = {}

    def _queue(self, name: str) -> sqs.Queue:
        if name not in self._queues:
            self._queues[name] = sqs.find(self._client, name, "target.allow", TargetError)
        return self._queues[name]

    def preflight(self) -> list[str]:
        for name in self._config.allow:
            self._queue(name)
        return []

    def findings(self, source: str) -> list[str]:
        found = []
        for name in self._config.allow:
            queue = self._queue(name)
            if (elsewhere := _elsewhere(queue, source)) is not None:
                found.append(
                    f"queue {name!r}: what fails again goes to {elsewhere}, not to this DLQ: without an orchestrator "
                    "nobody learns the outcome of a replay"
                )
            seconds = self._return_s(queue)
            if seconds is not None and seconds > 600:
                found.append(
                    f"queue {name!r}: a replay that fails again comes back after up to {seconds / 60:.0f} minutes "
                    "(maxReceiveCount x visibility + delay); until then its outcome is not known"
                )
        return found

    def sender(self, topic: str) -> SqsSender:
        return SqsSender(self._once, self._queue(topic))

    def digested(self, topic: str, source: str) -> float | None:
        """What was sent before the queue was last seen empty, and longer ago than a failure takes to come back."""
        queue = sqs.find(self._client, topic, "target.allow", TargetError)
        if _elsewhere(queue, source) is not None:
            return None
        now = time.time()
        if queue.held:
            return self._before(topic, queue)
        self._empty_at[topic] = now
        return self._before(topic, queue)

    def lag(self, topic: str) -> int | None:
        """What waits to be received, about."""
        return sqs.find(self._client, topic, "target.allow", TargetError).number(
            "ApproximateNumberOfMessages", 0
        )

    def _before(self, topic: str, queue: sqs.Queue) -> float | None:
        empty_at = self._empty_at.get(topic)
        if empty_at is None:
            return None
        return min(empty_at, time.time() - (self._return_s(queue) or 0.0))

    def _return_s(self, queue: sqs.Queue) -> float | None:
        """How long a failure takes to be dead-lettered, at most; None where it never is."""
        receives = queue.redrive.get("maxReceiveCount")
        if receives is None:
            return None
        return int(receives) * queue.number("VisibilityTimeout", 30) + queue.number("DelaySeconds", 0)

    def close(self) -> None:
        self._client.close()
        self._once.close()


def _elsewhere(queue: sqs.Queue, source: str) -> str | None:
    """The queue that takes its failures, where that is not the ``source``."""
    taker: str | None = queue.redrive.get("deadLetterTargetArn")
    return None if taker is None or taker == source.partition("#")[0] else taker


class SqsSender:
    """Sends to one queue: packed by bytes, then tens; several calls side by side."""

    def __init__(self, client: Any, queue: sqs.Queue) -> None:
        self._client = client
        self._queue = queue
        self.again_s = _DEDUPLICATED_S if queue.fifo else 0.0
        self._most = min(_BODY, queue.number("MaximumMessageSize", _BODY))

    def lane(self, output: Output) -> str | None:
        return _group(output) if self._queue.fifo else None

    def waves(self, outputs: Sequence[Output]) -> list[list[Output]]:
        if not self._queue.fifo:
            return [list(outputs)]
        seen: dict[str, int] = {}
        waves: list[list[Output]] = []
        for output in outputs:
            group = _group(output)
            number = seen[group] = seen.get(group, -1) + 1
            if number == len(waves):
                waves.append([])
            waves[number].append(output)
        return waves

    def send(self, outputs: Sequence[Output], deadline: float) -> list[Delivered | Refusal]:
        done: list[Delivered | Refusal] = []
        fit: list[tuple[Output, dict[str, Any]]] = []
        for output in outputs:
            reason, entry = self._entry(output)
            if reason is not None:
                done.append(Refusal(output.ordinal, reason))
            else:
                fit.append((output, entry))
        calls = list(_packed(fit))
        denied: list[ConfigError] = []

        def call(some: Sequence[tuple[Output, dict[str, Any]]]) -> list[Delivered | Refusal]:
            try:
                return self._call(some, deadline)
            except ConfigError as error:
                denied.append(error)
                return [Refusal(output.ordinal, "ready") for output, _ in some]

        with ThreadPoolExecutor(_SENDERS, thread_name_prefix="dlq-send") as pool:
            for answers in pool.map(call, calls):
                done.extend(answers)
        if denied and len(denied) == len(calls):
            raise denied[0]
        return done

    def _call(
        self, some: Sequence[tuple[Output, dict[str, Any]]], deadline: float
    ) -> list[Delivered | Refusal]:
        """One batch. What the service certainly did not take is sent again until the deadline; on a FIFO queue also
        what it may have taken, since it delivers one of an id.
        """
        left = {str(output.ordinal): (output, entry) for output, entry in some}
        unclear: set[str] = set()
        done: list[Delivered | Refusal] = []
        pause = _PAUSE_S

        def refuse(key: str, code: str) -> None:
            output, _ = left.pop(key)
            if key not in unclear:
                done.append(Refusal(output.ordinal, f"refused:{code}"[:80]))

        while left and time.monotonic() < deadline:
            try:
                answer = self._client.send_message_batch(
                    QueueUrl=self._queue.url, Entries=[entry for _, entry in left.values()]
                )
            except ClientError as error:
                code = aws.code(error)
                if code in _DENIED and (done or unclear):
                    break
                if code in _DENIED:
                    raise ConfigError(
                        f"target: nothing can be sent to {self._queue.name}: {aws.reason(error)}; grant sqs:SendMessage"
                    ) from error
                if _status(error) >= 500:
                    unclear |= left.keys()  # it may have taken them all the same
                elif not aws.throttled(error):
                    if len(left) > 1 and not unclear:  # it can't be said of which of them it complains
                        return [*done, *(d for one in left.values() for d in self._call([one], deadline))]
                    for key in list(left):
                        refuse(key, code)
            except (ConnectTimeoutError, EndpointConnectionError):
                pass  # it heard nothing
            except BotoCoreError:
                unclear |= left.keys()  # no answer came
            else:
                for sent in answer.get("Successful", []):
                    if (one := left.pop(sent["Id"], None)) is not None and _same(one[1], sent):
                        done.append(Delivered(one[0].ordinal, None, None, sent["MessageId"]))
                refused = {failed["Id"]: failed for failed in answer.get("Failed", [])}
                unclear |= left.keys() - refused.keys()
                for key, failed in refused.items():
                    if key in left and failed.get("SenderFault"):
                        refuse(key, str(failed.get("Code", "unknown")))
            if not self.again_s:
                left = {key: one for key, one in left.items() if key not in unclear}
            if left:
                time.sleep(max(0.0, min(pause, deadline - time.monotonic())))
            pause = min(pause * 2, _LONGEST_PAUSE_S)
        done.extend(
            Refusal(output.ordinal, "throttled") for key, (output, _) in left.items() if key not in unclear
        )
        return done

    def _entry(self, output: Output) -> tuple[str | None, dict[str, Any]]:
        """An output as the API takes it, or why it never will."""
        try:
            body = (output.value or b"").decode("utf-8", "strict")
        except UnicodeDecodeError:
            return "body_is_no_text", {}
        if not body or not _allowed(body):
            return "body_is_no_text" if body else "body_is_empty", {}
        ours = {name.removeprefix("dlq-"): (value or b"").decode() for name, value in output.headers[-_OWN:]}
        theirs = output.headers[:-_OWN]
        if len(theirs) > _ATTRIBUTES:
            return "too_many_attributes", {}
        if len({name for name, _ in theirs}) < len(theirs):
            return "attribute_repeated", {}
        attributes = {}
        for number, (name, value) in enumerate(theirs):
            if not value:
                return "attribute_is_empty", {}
            kind = output.types[number] if number < len(output.types) else None
            content = _content(kind, value)
            if content is None:
                return "attribute_is_no_text", {}
            attributes[name] = content
        size = len(output.value or b"") + sum(
            len(n.encode())
            + len(a["DataType"])
            + len(a.get("StringValue", "").encode() or a.get("BinaryValue", b""))
            for n, a in attributes.items()
        )
        if size > self._most:
            return "too_large_for_the_target", {}
        said = mark.written(
            mark.Mark(
                ours["drain"],
                ours["job"],
                int(ours["ordinal"]),
                ours["entry"],
                ours["key"],
                int(ours["retry-count"]),
                int(ours["original-timestamp"]),
            )
        )
        if len(attributes) < _ATTRIBUTES and size + len(said.encode()) + len(mark.NAME) + 6 <= self._most:
            attributes[mark.NAME] = {"DataType": "String", "StringValue": said}
        entry: dict[str, Any] = {
            "Id": str(output.ordinal),
            "MessageBody": body,
            "MessageAttributes": attributes,
        }
        system = dict(output.system)
        if "AWSTraceHeader" in system:
            entry["MessageSystemAttributes"] = {
                "AWSTraceHeader": {"DataType": "String", "StringValue": system["AWSTraceHeader"]}
            }
        if self._queue.fifo:
            entry["MessageGroupId"] = _group(output)
            entry["MessageDeduplicationId"] = ours["key"]  # the entry's for life, never the found one
        elif "MessageGroupId" in system:
            entry["MessageGroupId"] = system["MessageGroupId"]
        return None, entry


_OWN = 7  # headers of ours, the outbox's last


def _group(output: Output) -> str:
    found = dict(output.system).get("MessageGroupId")
    if found:
        return found
    key = output.key
    if key is None:  # nobody asked for an order: it has a group of its own
        key = dict(output.headers)["dlq-key"] or b""
    return hashlib.sha256(key).hexdigest()[:32]


def _content(kind: str | None, value: bytes) -> dict[str, Any] | None:
    """An attribute; a Kafka header, of no kind, is a string where it can be one. None where text is no text."""
    if kind is None or not kind.startswith("Binary"):
        try:
            text = value.decode()
        except UnicodeDecodeError:
            text = "\0"
        if _allowed(text):
            return {"DataType": kind or "String", "StringValue": text}
    return (
        {"DataType": kind or "Binary", "BinaryValue": value}
        if kind is None or kind.startswith("Binary")
        else None
    )


_NOT_XML = re.compile("[^\\t\\n\\r\\x20-\\ud7ff\\ue000-\\ufffd\\U00010000-\\U0010ffff]")


def _allowed(text: str) -> bool:
    """SQS takes the characters of XML 1.0 (SendMessage, API reference)."""
    return _NOT_XML.search(text) is None


def _packed(fit: Sequence[tuple[Output, dict[str, Any]]]) -> Iterator[list[tuple[Output, dict[str, Any]]]]:
    """By bytes first, then by ten: a call's messages together are bound as one is."""
    some: list[tuple[Output, dict[str, Any]]] = []
    size = 0
    for output, entry in fit:
        length = len(entry["MessageBody"].encode()) + sum(
            len(name) + len(str(a.get("StringValue") or "")) + len(a.get("BinaryValue") or b"") + 16
            for name, a in entry["MessageAttributes"].items()
        )
        if some and (len(some) == sqs.BATCH or size + length > _BODY):
            yield some
            some, size = [], 0
        some.append((output, entry))
        size += length
    if some:
        yield some


def _same(entry: Mapping[str, Any], sent: Mapping[str, Any]) -> bool:
    """Whether SQS took what was sent, by its sums."""
    sums = {"MD5OfMessageBody": sqs.md5_of_body(entry["MessageBody"])}
    if entry["MessageAttributes"]:
        sums["MD5OfMessageAttributes"] = sqs.md5_of_attributes(entry["MessageAttributes"])
    return all(sent.get(name, value) == value for name, value in sums.items())


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
