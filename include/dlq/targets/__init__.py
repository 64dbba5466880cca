"""Where replays go: Kafka, SQS, and topics in memory, each a ``Target`` of :mod:`dlq.ports`."""
