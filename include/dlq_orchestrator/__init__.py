"""The reference orchestrator: runs workflows from a Kafka topic and dead-letters those that fail."""
