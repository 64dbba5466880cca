"""Real services without an installation: a Kafka broker and an Airflow for the demo and the tests."""

from __future__ import annotations
