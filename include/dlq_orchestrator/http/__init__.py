"""The HTTP contract (docs/orchestrator.md), as the reference orchestrator keeps it."""
