"""Where dead letters lie: Kafka, SQS, and a log in memory, each a ``Source`` of :mod:`dlq.ports`."""
