"""The reports' app: nobody sees a report who may not see the Dag, and a report can do nothing but be read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.api_fastapi.core_api import security
from fastapi import FastAPI
from fastapi.testclient import TestClient

from dlq_runbook.links import REPORTS, ReportLink
from dlq_runbook.reports import app

DRAIN = "orders-0123456789ab"
PATH = f"/report/dlq_drain__orders/{DRAIN}.html"


class AuthManager:
    """Lets ``reader`` see the runs of ``dlq_drain__orders`` and nobody anything else."""

    def is_authorized_dag(self, *, method: str, access_entity: Any, details: Any, user: str) -> bool:
        return (method, access_entity.name, details.id, user) == ("GET", "RUN", "dlq_drain__orders", "reader")


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    monkeypatch.setattr(security, "get_auth_manager", AuthManager)
    monkeypatch.setattr(security.DagModel, "get_team_name", lambda _dag_id: None)
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client
    app.dependency_overrides.clear()


@pytest.fixture
def reader(client: TestClient) -> TestClient:
    app.dependency_overrides[security.get_user] = lambda: "reader"
    return client


@pytest.fixture
def report(queues: Any, tmp_path: Path) -> Path:
    queues.write("orders")
    folder = tmp_path / "report"
    folder.mkdir()
    (folder / f"{DRAIN}.html").write_text("<h1>Green</h1>")
    (folder / f"{DRAIN}.json").write_text('{"verdict": "green"}')
    (tmp_path / "secret.html").write_text("not yours")
    return folder


def test_who_is_not_logged_in_sees_nothing(client: TestClient, report: Path) -> None:
    for path in (PATH, PATH.replace("html", "json"), "/report/dlq_drain__orders/nothing.html"):
        assert client.get(path).status_code == 401


def test_who_may_not_see_the_dag_sees_nothing(client: TestClient, report: Path) -> None:
    app.dependency_overrides[security.get_user] = lambda: "somebody"
    assert client.get(PATH).status_code == 403


def test_every_route_asks_who_it_is(client: TestClient) -> None:
    assert [route.path for route in app.routes] == ["/report/{dag_id}/{drain}.{form}"]
    assert all(route.dependencies for route in app.routes)  # type: ignore[attr-defined]


def test_a_report_is_shown_and_can_do_nothing(reader: TestClient, report: Path) -> None:
    page = reader.get(PATH)
    assert (page.status_code, page.text) == (200, "<h1>Green</h1>")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = {part.strip() for part in page.headers["content-security-policy"].split(";")}
    assert policy == {"default-src 'none'", "style-src 'unsafe-inline'", "img-src data:", "sandbox"}
    assert page.headers["x-content-type-options"] == "nosniff"
    assert reader.get(PATH.replace("html", "json")).json() == {"verdict": "green"}


@pytest.mark.parametrize(
    "path",
    [
        "/report/dlq_drain__orders/..%2F..%2Fsecret.html",
        "/report/dlq_drain__orders/../secret.html",
        "/report/dlq_drain__orders/orders-0123456789ab%00.html",
        "/report/dlq_drain__orders/billing-0123456789ab.html",
        "/report/dlq_drain__orders/orders-0123456789AB.html",
        "/report/dlq_drain__orders/orders-0123456789ab.html.html",
        "/report/dlq_drain__orders/secret.html",
    ],
)
def test_only_a_drain_of_this_queue_names_a_file(reader: TestClient, report: Path, path: str) -> None:
    answer = reader.get(path)
    assert answer.status_code in (403, 404)
    assert "not yours" not in answer.text


def test_another_form_is_no_report(reader: TestClient, report: Path) -> None:
    assert reader.get(PATH.replace("html", "parquet")).status_code == 422


def test_a_report_that_is_not_there_yet(reader: TestClient, report: Path) -> None:
    answer = reader.get("/report/dlq_drain__orders/orders-ba9876543210.html")
    assert answer.status_code == 404
    assert "written when the drain is closed" in answer.json()["detail"]
    assert "content-security-policy" in answer.headers


def test_a_broken_file_is_no_crash(reader: TestClient, queues: Any, report: Path) -> None:
    queues.write_text("orders", "limits: {btach: 1}")
    assert reader.get(PATH).status_code == 404


def test_airflow_mounts_it_where_the_button_points(
    queues: Any, reader: TestClient, report: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dlq_runbook_plugin
    from dlq.drain import drain_id

    [mounted] = dlq_runbook_plugin.DlqRunbookPlugin().fastapi_apps
    assert mounted["url_prefix"] == REPORTS
    outer = FastAPI()
    outer.mount(mounted["url_prefix"], mounted["app"])
    (report / f"{drain_id('orders', 'run')}.html").write_text("the run's")
    task = queues.dag("orders").get_task("write_report")
    [link] = task.operator_extra_links
    assert isinstance(link, ReportLink)
    key = SimpleNamespace(dag_id="dlq_drain__orders", run_id="run")
    assert TestClient(outer).get(link.get_link(task, ti_key=key)).text == "the run's"  # type: ignore[arg-type]
    monkeypatch.setenv("AIRFLOW__API__BASE_URL", "https://example.org/airflow/")
    assert link.get_link(task, ti_key=key).startswith("https://example.org/airflow/dlq/report/")  # type: ignore[arg-type]
