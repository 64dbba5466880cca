"""Fixtures that every kind of test may ask for: a real broker and topics of its own."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping

import pytest
from hypothesis import settings

from dlq_demo.broker import Broker, create_topic
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
def broker() -> Iterator[Broker]:
    """One real Kafka broker a test process (2.5 s, 200 MB); tests keep apart by the names of their topics.

    A test that kills or configures a broker starts one of its own.
    """
    try:
        with Broker() as running:
            yield running
    except Unavailable as error:
        if os.environ.get("CI"):
            pytest.fail(f"CI is set, so nothing may be skipped: {error}")
        pytest.skip(str(error))


@pytest.fixture
def topic(broker: Broker) -> Callable[..., str]:
    """Creates topics on the shared broker under names nobody else uses: ``topic("orders", partitions=3)``."""

    def create(name: str = "topic", *, partitions: int = 1, config: Mapping[str, str] | None = None) -> str:
        unique = f"{name}-{uuid.uuid4().hex[:8]}"
        create_topic(broker.bootstrap, unique, partitions, config)
        return unique

    return create
