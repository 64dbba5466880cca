"""What a dead letter is before and after it is understood."""

from __future__ import annotations

from hashlib import sha256
from struct import pack
from typing import Literal

import msgspec

Headers = tuple[tuple[str, bytes | None], ...]
"""Headers in their order, repeats and nulls kept."""

FLAWS = ("unrepresentable_headers", "damaged_in_transit", "pointer")
"""What a client can fail to represent of a record; why such an entry is open, and is never replayed as it is."""


class Record(msgspec.Struct, gc=False):
    """One dead letter as the queue gave it, byte for byte.

    ``part`` and ``pos`` are the Kafka partition and offset (SQS: part 0, pos None); ``place`` identifies the
    record within its source (the offset as text, or the MessageId). ``flaw`` names what the client could not
    represent (then ``headers`` is empty); such an entry is never replayed as it is.

    Of an SQS message ``value`` is the body in UTF-8, ``headers`` are the message attributes (strings in UTF-8),
    ``types`` their DataTypes in the same order, ``system`` the system attributes, and ``timestamp_ms`` is the
    SentTimestamp. Kafka has neither types nor system.
    """

    part: int
    place: str
    pos: int | None
    key: bytes | None
    value: bytes | None
    headers: Headers
    timestamp_ms: int | None
    flaw: str | None = None
    types: tuple[str, ...] = ()
    system: tuple[tuple[str, str], ...] = ()
    transport: Literal["kafka", "sqs"] = "kafka"

    @property
    def lane(self) -> bytes | None:
        """What its order is kept by, where a target keeps one: its key, or an SQS message's group."""
        if self.key is not None or not self.system:
            return self.key
        group = dict(self.system).get("MessageGroupId")
        return None if group is None else group.encode()


class Understood(msgspec.Struct, gc=False):
    """What an envelope decoder read from a record; ``None`` where the record does not say.

    All text is untrusted. Times are epoch milliseconds. ``retry_count`` is how often the record was replayed, by our
    header or its own; ``retries`` the same where one of them is there, else how often its producer says that it had
    retried. ``causes`` are the exception classes of the cause chain, outermost first. ``http_status`` is an envelope's
    own status field of 400 or more. ``pointer`` is set where the payload is not the original's, and says where that
    lies (:mod:`dlq.envelopes.pointer`): such a record is never replayed as it is.
    """

    format: str = "unknown"
    error_type: str | None = None
    cause_type: str | None = None
    message: str | None = None
    component: str | None = None
    stage: str | None = None
    attempts: int | None = None
    failed_at_ms: int | None = None
    origin_topic: str | None = None
    origin_partition: int | None = None
    origin_offset: int | None = None
    origin_timestamp_ms: int | None = None
    consumer_group: str | None = None
    correlation_id: str | None = None
    trace_id: str | None = None
    dedupe_key: str | None = None
    retry_count: int = 0
    causes: tuple[str, ...] = ()
    http_status: int | None = None
    origin_queue: str | None = None
    pointer: str | None = None
    retries: int | None = None

    @property
    def origin(self) -> str | None:
        """The source identity two copies of one failed message share, or None where a field of it is missing."""
        if self.origin_topic is None or self.origin_partition is None or self.origin_offset is None:
            return None
        return f"{self.origin_topic}/{self.origin_partition}/{self.origin_offset}@{self.consumer_group or ''}"


class Group(msgspec.Struct, frozen=True):
    """What a failure's signature and the taxonomy make of it; entries sharing one are handled alike."""

    fingerprint: str
    signature: str
    component: str
    error_type: str
    category: str
    remedy: str
    rule: str
    format: str
    owner: str


def payload_sha(key: bytes | None, value: bytes | None) -> str:
    """The payload sum of a record (hex sha256): key and value, each framed so that null is not empty."""
    digest = sha256(pack(">i", -1) if key is None else pack(">i", len(key)) + key)
    digest.update(b"\xff" if value is None else b"\x00" + value)
    return digest.hexdigest()


def idempotency_key(entry_ref: str, payload: str, target: str) -> str:
    """The key an entry is sent under for life (hex sha256): its place, payload sum and target; no attempt in it."""
    return sha256(f"{entry_ref}\n{payload}\n{target}".encode()).hexdigest()
