"""Records that no workflow can be read from, put where workflows come from."""

from __future__ import annotations

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from dlq import aws, kafka, sqs
from dlq.config import KafkaTarget, SqsTarget
from dlq.drain import Drain
from dlq.errors import ConfigError, SourceError

_WAIT_S = 30.0


def put(drain: Drain, records: dict[str, bytes]) -> None:
    """Put values into the origin, by correlation id.

    :raises ConfigError: the target's kind gives no way to the origin, or its Connection is wrong.
    :raises SourceError: they were not taken.
    """
    target = drain.config.target
    if isinstance(target, KafkaTarget):
        _produce(drain, target, records)
    elif isinstance(target, SqsTarget):
        client = aws.client(drain.connections(target.connection), "sqs")
        queue = sqs.find(client, target.queue or target.allow[0], "target.allow", SourceError)
        for correlation_id, value in records.items():
            named = {"correlation-id": {"DataType": "String", "StringValue": correlation_id}}
            client.send_message(QueueUrl=queue.url, MessageBody=value.decode(), MessageAttributes=named)
    else:
        raise ConfigError(
            f"chaos: corrupt records can't be put into the origin by target.kind: {target.kind}; leave them out"
        )


def _produce(drain: Drain, target: KafkaTarget, records: dict[str, bytes]) -> None:
    refused: list[str] = []

    def report(error: KafkaError | None, _: Message) -> None:
        if error is not None:
            refused.append(error.str())

    topic = target.topic or target.allow[0]
    try:
        producer = Producer(kafka.producer_config(drain.connections(target.connection)), logger=kafka.QUIET)
        for correlation_id, value in records.items():
            headers: list[tuple[str, str | bytes | None]] = [("correlation-id", correlation_id.encode())]
            producer.produce(topic, value=value, key=correlation_id, headers=headers, on_delivery=report)
    except KafkaException as error:
        raise SourceError(f"chaos: {topic} takes no records: {kafka.reason(error)}") from error
    if producer.flush(_WAIT_S) or refused:
        raise SourceError(
            f"chaos: {topic} did not take all records: {refused[0] if refused else 'no answer'}"
        )
