"""Fixtures that every kind of test may ask for: a real broker, SQS server and Postgres, and names of their own."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import NoReturn

import pytest
from hypothesis import settings
from tests.shared import shared

from dlq_demo.broker import Broker, create_topic
from dlq_demo.elasticmq import ElasticMq
from dlq_demo.postgres import Postgres
from dlq_demo.process import Unavailable

# A shared two-core machine stalls now and then: the time one example takes says nothing about the code.
settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")


def pytest_configure(config: pytest.Config) -> None:
    """Keep Airflow, which writes into its home when it is imported, out of the user's."""
    home = tempfile.mkdtemp(prefix="dlq-airflow-home-")
    config.add_cleanup(lambda: shutil.rmtree(home, ignore_errors=True))
    os.environ["AIRFLOW_HOME"] = home
    os.environ["AIRFLOW__CORE__LOAD_EXAMPLES"] = "False"


@pytest.fixture(scope="session")
def broker(request: pytest.FixtureRequest) -> Broker:
    """One real Kafka broker a test run (2.5 s, 200 MB); tests keep apart by the names of their topics.

    A test that kills or configures a broker starts one of its own.
    """
    try:
        return shared(Broker, request)
    except Unavailable as error:
        _skip(error)


@pytest.fixture
def topic(broker: Broker) -> Callable[..., str]:
    """Creates topics on the shared broker under names nobody else uses: ``topic("orders", partitions=3)``."""

    def create(name: str = "topic", *, partitions: int = 1, config: Mapping[str, str] | None = None) -> str:
        unique = f"{name}-{uuid.uuid4().hex[:8]}"
        create_topic(broker.bootstrap, unique, partitions, config)
        return unique

    return create


@pytest.fixture(scope="session")
def elasticmq(request: pytest.FixtureRequest) -> ElasticMq:
    """One real SQS server a test run (2.5 s, 200 MB), in memory; tests keep apart by the names of their queues.

    A test that kills a server starts one of its own, in a folder.
    """
    try:
        return shared(ElasticMq, request)
    except Unavailable as error:
        _skip(error)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """One real Postgres a test process (0.6 s)."""
    try:
        with Postgres() as running:
            yield running
    except Unavailable as error:
        _skip(error)


@pytest.fixture
def postgres_url(postgres: Postgres) -> str:
    """The SQLAlchemy URL of an empty Postgres database of the test's own."""
    return postgres.create_database(f"test_{uuid.uuid4().hex[:8]}")


def _skip(error: Unavailable) -> NoReturn:
    if os.environ.get("CI"):
        pytest.fail(f"CI is set, so nothing may be skipped: {error}")
    pytest.skip(str(error))
