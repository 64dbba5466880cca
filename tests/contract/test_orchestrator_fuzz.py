"""The contract as OpenAPI describes it, against the running reference: whatever is asked, it answers as it says."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

from dlq_demo.broker import Broker, create_topic
from dlq_demo.orchestrator import ReferenceOrchestrator
from dlq_orchestrator.http.app import create_app


@pytest.fixture(scope="module")
def service(broker: Broker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReferenceOrchestrator]:
    """One of its own: what is asked of it pauses routing and breaks plugins."""
    name = f"fuzz-{uuid.uuid4().hex[:8]}"
    for topic in (name, f"{name}.dlq"):
        create_topic(broker.bootstrap, topic, 1)
    with ReferenceOrchestrator(
        broker.bootstrap,
        origin=name,
        dlq=f"{name}.dlq",
        folder=tmp_path_factory.mktemp("orchestrator"),
        group=name,
        options=["--fault-injection"],
    ) as running:
        yield running


# Not checked: that whatever fits the schema is accepted. What a schema can't say (a ceiling, a grantable scope, a key
# that was used) is refused with 422.
SCHEMA = schemathesis.openapi.from_dict(create_app().openapi())
OPERATIONS = {operation.ok().label: operation.ok() for operation in SCHEMA.get_all_operations()}


@pytest.mark.parametrize("label", OPERATIONS)
def test_whatever_is_asked_is_answered_as_described(service: ReferenceOrchestrator, label: str) -> None:
    headers = {"Authorization": f"Bearer {service.token}"}

    @given(case=OPERATIONS[label].as_strategy())
    @settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    def ask(case: Any) -> None:
        case.call_and_validate(
            base_url=service.url, headers=headers, excluded_checks=[positive_data_acceptance]
        )

    ask()
