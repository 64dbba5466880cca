"""Kafka clients of our own settings: a Connection gives transport and security, never semantics."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, TypeVar

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicCollection, TopicPartition
from confluent_kafka.admin import AclOperation, AdminClient, ConfigResource, ResourceType

from dlq.errors import ConfigError, NotFound, SourceError
from dlq.ports import Connection

TIMEOUT_S = 30.0

# librdkafka's own log goes to this logger only: what matters arrives as an error of the call that met it.
QUIET = logging.getLogger("dlq.kafka.client")
QUIET.addHandler(logging.NullHandler())
QUIET.propagate = False

_FORCED_CONSUMER = {
    "enable.auto.commit": False,
    "enable.auto.offset.store": False,
    "isolation.level": "read_committed",
    "auto.offset.reset": "error",
    "group.protocol": "classic",
    "enable.partition.eof": True,
    "check.crcs": True,
}
_FORCED_PRODUCER = {"acks": "all", "enable.idempotence": True, "compression.type": "lz4"}
_OURS = {
    *_FORCED_CONSUMER,
    *_FORCED_PRODUCER,
    "group.id",
    "transactional.id",
    "partitioner",
    "transaction.timeout.ms",
}
_OURS -= {"compression.type"}
_MOVING = {
    KafkaError.NOT_LEADER_FOR_PARTITION,
    KafkaError.LEADER_NOT_AVAILABLE,
    KafkaError.NOT_COORDINATOR,
    KafkaError.COORDINATOR_NOT_AVAILABLE,
    KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
}
_Found = TypeVar("_Found")


def transport(connection: Connection) -> dict[str, Any]:
    """The librdkafka settings of a Connection's extra.

    :raises ConfigError: when it sets what a drain must set itself, or names no broker.
    """
    extra = dict(connection.extra)
    for key in sorted(_OURS & extra.keys()):
        raise ConfigError(
            f"Connection {connection.id}: remove {key!r} from its extra; the drain sets it, another value "
            "could lose or double entries"
        )
    if not extra.get("bootstrap.servers"):
        raise ConfigError(
            f'Connection {connection.id}: its extra needs "bootstrap.servers", for example '
            f'{{"bootstrap.servers": "broker:9092"}}'
        )
    return extra


def admin(connection: Connection) -> AdminClient:
    """A client to look around with; the first one made, so it is where a wrong setting is noticed.

    :raises ConfigError: naming the setting.
    """
    try:
        return AdminClient(transport(connection), logger=QUIET)
    except KafkaException as error:
        raise ConfigError(f"Connection {connection.id}: extra: {reason(error)}; mend or remove it") from None


def consumer(connection: Connection, group: str, **settings: Any) -> Consumer:
    """A consumer that is only ever assigned, never subscribed: ``group`` is where its offsets are kept."""
    config = {
        "queued.max.messages.kbytes": 32768,
        **transport(connection),
        **_FORCED_CONSUMER,
        "group.id": group,
        **settings,
    }
    return Consumer(config, logger=QUIET)


def producer_config(connection: Connection, **settings: Any) -> dict[str, Any]:
    return {**transport(connection), **_FORCED_PRODUCER, **settings}


def cluster_id(client: AdminClient) -> str:
    try:
        found = client.describe_cluster(request_timeout=TIMEOUT_S).result(TIMEOUT_S).cluster_id
    except (KafkaException, TimeoutError) as error:
        raise SourceError(
            f"Kafka can't be reached: {reason(error)}; is the broker up and the Connection right?"
        ) from error
    if not found:
        raise SourceError("the Kafka cluster tells no id; a drain needs one to name its entries")
    return str(found)


def topic(client: AdminClient, name: str, field: str) -> tuple[str, list[int]]:
    """A topic's id and partitions.

    :raises NotFound: when it doesn't exist; ``field`` names where it is configured.
    :raises ConfigError: when it may not be looked at.
    """
    try:
        described = client.describe_topics(TopicCollection([name]), request_timeout=TIMEOUT_S)[name].result(
            TIMEOUT_S
        )
    except KafkaException as error:
        if error.args[0].code() == KafkaError.UNKNOWN_TOPIC_OR_PART:
            raise NotFound(
                f"{field}: topic {name!r} does not exist on this cluster; create it or name the right one"
            ) from None
        if error.args[0].code() == KafkaError.TOPIC_AUTHORIZATION_FAILED:
            raise ConfigError(
                f"{field}: no permission to describe topic {name!r}; grant DESCRIBE and READ or WRITE"
            ) from None
        raise SourceError(f"topic {name!r} can't be described: {reason(error)}") from error
    except TimeoutError as error:
        raise SourceError(
            f"topic {name!r} can't be described in {TIMEOUT_S:.0f} s; is the broker up?"
        ) from error
    return str(described.topic_id), sorted(p.id for p in described.partitions)


def lacking(client: AdminClient, name: str, *needed: AclOperation) -> list[str]:
    """Those of the rights on a topic that are ``needed`` and not granted; none where the broker doesn't say."""
    topics = TopicCollection([name])
    try:
        asked = client.describe_topics(topics, include_authorized_operations=True, request_timeout=TIMEOUT_S)
        granted = asked[name].result(TIMEOUT_S).authorized_operations
    except (KafkaException, TimeoutError):
        return []
    return [right.name for right in needed if granted and right not in granted]


def settings(client: AdminClient, name: str) -> dict[str, str | None]:
    """A topic's configuration, as text.

    :raises KafkaException: when it may not be read, or the broker doesn't answer.
    :raises TimeoutError: likewise.
    """
    resource = ConfigResource(ResourceType.TOPIC, name)
    found = client.describe_configs([resource], request_timeout=TIMEOUT_S)[resource].result(TIMEOUT_S)
    return {key: entry.value for key, entry in found.items()}


def watermarks(client: Consumer, name: str, parts: list[int]) -> dict[int, tuple[int, int]]:
    """Log start and last stable offset of each partition (the client's isolation decides: read committed)."""
    found = {}
    for part in parts:
        place = TopicPartition(name, part)
        try:
            found[part] = _asked(partial(client.get_watermark_offsets, place, cached=False))
        except KafkaException as error:
            raise SourceError(f"{name}/{part}: offsets can't be read: {reason(error)}") from error
    return found


def offsets_at(client: Consumer, name: str, parts: Iterable[int], timestamp_ms: int) -> dict[int, int]:
    """The first offset of that time or later, for the partitions that have one."""
    moments = [TopicPartition(name, part, timestamp_ms) for part in parts]
    try:
        found = _asked(partial(client.offsets_for_times, moments))
    except KafkaException as error:
        raise SourceError(f"{name}: offsets of a time can't be read: {reason(error)}") from error
    return {p.partition: p.offset for p in found if p.offset >= 0}


def committed(client: Consumer, name: str, parts: list[int]) -> dict[int, tuple[int, str | None]]:
    """A group's committed offset and its metadata, for the partitions that have one."""
    try:
        found = _asked(partial(client.committed, [TopicPartition(name, p) for p in parts]))
    except KafkaException as error:
        raise SourceError(f"{name}: committed offsets can't be read: {reason(error)}") from error
    for partition in found:
        if partition.error is not None:
            raise SourceError(
                f"{name}/{partition.partition}: committed offset can't be read: {partition.error.str()}"
            )
    return {p.partition: (p.offset, p.metadata) for p in found if p.offset >= 0}


def _asked(call: Callable[..., _Found]) -> _Found:
    """The client does not ask again by itself when a leader or a coordinator moved, or is only just made."""
    until = time.monotonic() + TIMEOUT_S
    while True:
        try:
            return call(timeout=TIMEOUT_S)
        except KafkaException as error:
            if error.args[0].code() not in _MOVING or time.monotonic() >= until:
                raise
            time.sleep(0.1)


def reason(error: BaseException) -> str:
    """What librdkafka says, without its object's looks."""
    first = error.args[0] if error.args else error
    return first.str() if isinstance(first, KafkaError) else str(first) or type(error).__name__


def positions(mapping: Mapping[int, int], name: str, metadata: str) -> list[TopicPartition]:
    return [TopicPartition(name, part, offset, metadata=metadata) for part, offset in mapping.items()]
