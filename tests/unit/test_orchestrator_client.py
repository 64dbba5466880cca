"""The bundle's client against orchestrators that are away, broken, or keep only a part of the contract.

Against one that keeps it, see tests/contract/test_orchestrator_contract.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from types import SimpleNamespace
from typing import Any

import pytest
import stamina

from dlq.errors import ConfigError, DlqError
from dlq.orchestrator import (
    CapabilityMissing,
    ContractBroken,
    OrchestratorBusy,
    OrchestratorError,
    OrchestratorUnauthorized,
    OrchestratorUnreachable,
)
from dlq.orchestrator_http import HttpOrchestrator

"""Status, body, headers."""

ALL = (200, {"version": "1.4", "levels": ["outcome", "routing", "quotas", "a-later-level"]})


@pytest.fixture(autouse=True)
def no_waiting() -> Iterator[None]:
    """The client's tries, without the waits between them."""
    with stamina.set_testing(True, attempts=3):
        yield


def test_a_server_error_is_tried_again(serve):
    rate = {"succeeded": 3, "failed": 1, "total": 4, "window_s": 60}
    url, asked = serve(
        {"GET /capabilities": ALL, "GET /v1/success-rate": [(503, {}), (500, b"oops"), (200, rate)]}
    )
    with HttpOrchestrator(url, "t") as orchestrator:
        assert orchestrator.success_rate(60).rate == 0.75
    assert asked == ["GET /capabilities", *["GET /v1/success-rate"] * 3]


def test_an_orchestrator_that_asks_for_less_is_asked_again_when_it_says(serve, monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr("tenacity.nap.time.sleep", waits.append)
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=5), usegmt=True)
    url, asked = serve(
        {
            "GET /capabilities": [
                (429, {}, ("retry-after", "2")),
                (503, {}, ("retry-after", soon)),
                (429, {}, ("retry-after", "soon")),
                ALL,
            ]
        }
    )
    stamina.set_testing(False)
    with HttpOrchestrator(url, "t") as orchestrator:
        assert "outcome" in orchestrator.capabilities()
    assert len(asked) == 4
    assert waits[0] == 2.0
    assert 3.0 < waits[1] <= 5.0
    assert waits[2] <= 3.0 + 1.0, "what can't be read is waited for as if nothing was said"


@pytest.mark.parametrize(
    ("status", "headers", "after", "tries"),
    [
        (429, [("retry-after", "3600")], 3600.0, 1),
        (503, [("retry-after", "3600")], 3600.0, 1),
        (429, [("retry-after", "0")], 0.0, 3),
        (429, [], None, 3),
    ],
)
def test_an_orchestrator_that_stays_busy_is_left_alone_and_says_for_how_long(
    serve, status, headers, after, tries
):
    url, asked = serve({"GET /capabilities": (status, {"detail": "too many"}, *headers)})
    with HttpOrchestrator(url, "t") as orchestrator:
        with pytest.raises(OrchestratorBusy, match=f"{status}, too many. It asks to be tried again") as busy:
            orchestrator.capabilities()
    assert busy.value.retry_after_s == after
    assert len(asked) == tries


def test_server_errors_without_end_give_up_and_say_where(serve):
    url, asked = serve({"GET /capabilities": (503, {"detail": "the broker is away"})})
    with HttpOrchestrator(url, "t") as orchestrator:
        with pytest.raises(
            OrchestratorUnreachable, match=rf"GET {url}/capabilities: 503, the broker is away"
        ):
            orchestrator.capabilities()
    assert len(asked) == 3


def test_an_orchestrator_that_does_not_run_is_said_to_be_away():
    with HttpOrchestrator("http://127.0.0.1:9", "t", connection_id="orders_orchestrator") as orchestrator:
        with pytest.raises(
            OrchestratorUnreachable, match=r"Is the orchestrator running\?.*orders_orchestrator"
        ):
            orchestrator.capabilities()


def test_a_refused_token_is_said_once_and_names_the_connection(serve):
    url, asked = serve({"GET /capabilities": (401, {"detail": "no"})})
    with HttpOrchestrator(url, "hunter2", connection_id="orders_orchestrator") as orchestrator:
        with pytest.raises(
            OrchestratorUnauthorized, match="password of the Connection orders_orchestrator"
        ) as e:
            orchestrator.capabilities()
    assert "hunter2" not in str(e.value)
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("levels", "call", "missing"),
    [
        (["routing", "quotas"], lambda o: o.outcomes(["k"]), "outcome"),
        (["routing", "quotas"], lambda o: o.workflow("c"), "outcome"),
        (["routing", "quotas"], lambda o: o.submit_workflow({}, "c"), "outcome"),
        (["routing", "quotas"], lambda o: o.success_rate(1), "outcome"),
        (["outcome", "quotas"], lambda o: o.routing(), "routing"),
        (["outcome", "quotas"], lambda o: o.pause_routing("d", 1), "routing"),
        (["outcome", "quotas"], lambda o: o.resume_routing("d"), "routing"),
        (["outcome", "routing"], lambda o: o.quotas(), "quotas"),
        (["outcome", "routing"], lambda o: o.set_quota("p", 1, "k"), "quotas"),
        ([], lambda o: o.quotas(), "quotas"),
    ],
)
def test_a_level_that_is_not_offered_is_named_and_not_asked_for(serve, levels, call, missing):
    url, asked = serve({"GET /capabilities": (200, {"version": "1.0", "levels": levels})})
    with HttpOrchestrator(url, "t") as orchestrator:
        with pytest.raises(CapabilityMissing, match=missing) as refusal:
            call(orchestrator)
    assert refusal.value.level == missing
    assert asked == ["GET /capabilities"]


def test_another_major_version_of_the_contract_is_refused(serve):
    url, _ = serve({"GET /capabilities": (200, {"version": "2.0", "levels": []})})
    with HttpOrchestrator(url, "t") as orchestrator, pytest.raises(ContractBroken, match=r"2\.0"):
        orchestrator.capabilities()


@pytest.mark.parametrize(
    "body",
    [
        b"<html>secret</html>",
        {"outcomes": {"k": {"state": "secret"}}},
        {"outcomes": {"other": {"state": "failed"}}},
        {"outcomes": []},
    ],
)
def test_an_answer_outside_the_contract_is_refused_without_quoting_it(serve, body):
    url, _ = serve({"GET /capabilities": ALL, "POST /v1/outcomes": (200, body)})
    with HttpOrchestrator(url, "t") as orchestrator, pytest.raises(ContractBroken) as refusal:
        orchestrator.outcomes(["k"])
    assert "outcomes" in str(refusal.value)
    assert "secret" not in str(refusal.value)


def test_a_refusal_that_is_no_problem_document_is_told_by_its_status(serve):
    url, _ = serve({"GET /capabilities": ALL, "GET /v1/quotas": (418, b"teapot")})
    with HttpOrchestrator(url, "t") as orchestrator, pytest.raises(OrchestratorError, match="418"):
        orchestrator.quotas()
    assert issubclass(OrchestratorError, DlqError)


def connection(**fields: Any) -> Any:
    empty = {"id": "orch", "schema": None, "host": None, "port": None, "password": None}
    return SimpleNamespace(**{**empty, **fields})


@pytest.mark.parametrize(
    ("fields", "url"),
    [
        ({"host": "http://127.0.0.1", "port": 1234}, "http://127.0.0.1:1234"),
        ({"host": "orch.example", "schema": "https"}, "https://orch.example"),
        ({"host": "orch.example", "port": 80}, "http://orch.example:80"),
    ],
)
def test_the_address_comes_from_the_connection(fields, url):
    with HttpOrchestrator.connect(connection(password="t", **fields)) as orchestrator:
        assert orchestrator.url == url


def test_a_connection_without_address_or_token_is_refused_by_name():
    with pytest.raises(ConfigError, match="Connection orch: host and password"):
        HttpOrchestrator.connect(connection())
