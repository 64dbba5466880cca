"""Fixtures of the tests that drain a real broker's queues."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.forks import forked_expectations as forked_expectations
from tests.integration.rig import Rig, rigs
from tests.integration.sqs_rig import SqsRig, sqs_rigs
from tests.sqs_faults import SqsFaults

from dlq_demo.broker import Broker
from dlq_demo.elasticmq import ElasticMq


@pytest.fixture
def make_rig(broker: Broker, tmp_path: Path) -> Iterator[Callable[..., Rig]]:
    """Makes queues to drain on the shared broker: ``make_rig(parts=6, limits={"jobs": 2})``."""
    yield from rigs(broker.bootstrap, tmp_path)


@pytest.fixture
def make_sqs_rig(elasticmq: ElasticMq, tmp_path: Path) -> Iterator[Callable[..., SqsRig]]:
    """Makes queues to drain on the shared SQS server: ``make_sqs_rig(fifo=True)``."""
    yield from sqs_rigs(elasticmq, tmp_path)


@pytest.fixture
def sqs_faults(elasticmq: ElasticMq) -> Iterator[SqsFaults]:
    """A proxy before the shared SQS server, through which all goes well until it is told."""
    with SqsFaults(elasticmq.port) as proxy:
        yield proxy
