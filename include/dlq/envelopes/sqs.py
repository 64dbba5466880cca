"""What SQS itself says of a message: its redrive, and the extended client's bodies in S3.

Sources: the system attributes of ReceiveMessage as recorded against the service, and the extended client's
``PayloadS3Pointer``. A redrive records no error. System attributes are text; times are epoch milliseconds. A standard
queue keeps the time of the first sending over a redrive; a FIFO queue sets it anew.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from dlq.entry import Record, Understood
from dlq.envelopes import body, ids, pointer
from dlq.envelopes.untrusted import INT32, encoded, identifier, label, moment, number

REDRIVE = "sqs-redrive"
EXTENDED = "sqs-extended-client"

_SILENT = ("unknown", "sns", "cloudevents")  # what tells of no failure

_POINTER = re.compile(
    rb'\s*\[\s*"(?:software\.amazon\.payloadoffloading\.PayloadS3Pointer'
    rb'|com\.amazon\.sqs\.javamessaging\.MessageS3Pointer)"'
)


def read(record: Record, into: Understood) -> None:
    """Fill in what the queue knows, whatever the message itself says of a failure."""
    system = dict(record.system)
    ids.of_message(record, system, into)
    if "DeadLetterQueueSourceArn" in system:
        _moved(system, into)
    if (pointed := _offloaded(record.value)) is not None:
        into.pointer = pointed
        if into.format == "unknown":
            into.format = EXTENDED


def _moved(system: Mapping[str, str], into: Understood) -> None:
    """Where SQS moved it from, and how often it was received, there and here."""
    into.origin_queue = identifier(encoded(system.get("DeadLetterQueueSourceArn")))
    sent = moment(encoded(system.get("SentTimestamp")))
    if into.format in _SILENT:
        into.format = REDRIVE
        into.origin_topic = None  # the topic delivered it: it failed in the queue
        into.attempts = number(encoded(system.get("ApproximateReceiveCount")), INT32)
        into.origin_timestamp_ms = sent
        if "SequenceNumber" in system:  # FIFO
            into.failed_at_ms, into.origin_timestamp_ms = sent, None


def _offloaded(raw: bytes | None) -> str | None:
    """Where the extended client put the body: ``["<class>", {"s3BucketName", "s3Key"}]``; None where it didn't."""
    if raw is None or _POINTER.match(raw) is None:
        return None
    match body.value(raw):
        case [_, {"s3BucketName": str(bucket), "s3Key": str(key)}]:
            return pointer.s3(label(encoded(bucket)) or "", label(encoded(key)) or "")
    return pointer.S3
