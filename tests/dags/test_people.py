"""What people see and decide, in a real Airflow on a real broker: forms, logs, reports. Each goes on from the last."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from sqlalchemy import func, select
from tests.e2e.house import DRAIN, REVIEW, House, built, identity

from dlq.archive import Rows
from dlq.ledger.schema import decision, entry, segment
from dlq_demo.broker import Broker

pytestmark = [pytest.mark.airflow, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def house(broker: Broker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with built(broker, tmp_path_factory.mktemp("house")) as house:
        yield house


@pytest.fixture(scope="module")
def limits(house: House) -> dict[str, int]:
    """The plugins' quotas before any fix."""
    with house.look() as drain:
        assert drain.orchestrator is not None
        memory = [quota for quota in drain.orchestrator.quotas() if quota.resource == "memory_mb"]
        return {quota.plugin: quota.limit for quota in memory}


@pytest.fixture(scope="module")
def drained(house: House, limits: dict[str, int]) -> str:
    """A run whose fix a person approved."""
    house.incident(120)
    run_id = house.start(DRAIN, incident="INC-1", approve_fix="person")
    asked = house.question(DRAIN, run_id)
    approve, reject = asked["options"]
    assert (approve.split(" #")[0], reject) == ("Approve", "Reject")
    house.airflow.api.answer(asked, [approve])
    states = house.finish(DRAIN, run_id)
    assert (states["apply_fix"], states["canary_fix"]) == ("success", "success")
    return run_id


def again(house: House, limits: dict[str, int], dead: int) -> None:
    """Quotas as they were, so that there is something to fix again, and new failures."""
    with house.look() as drain:
        assert drain.orchestrator is not None
        for plugin, limit in limits.items():
            drain.orchestrator.set_quota(plugin, limit, uuid.uuid4().hex)
    house.incident(dead)


def decided(house: House, run_id: str) -> list[tuple[Any, ...]]:
    with house.look() as drain, drain.ledger.read() as tx:
        mine = decision.c.drain == identity(run_id)
        rows = tx.execute(
            select(decision.c.who, decision.c.choice).where(mine, decision.c.kind == "approve_fix")
        )
        return [tuple(row) for row in rows]


def test_who_approved_is_on_record(house: House, drained: str) -> None:
    assert decided(house, drained) == [("admin", "approve")]


def test_the_logs_read_well(house: House, drained: str) -> None:
    for task, said in {
        "open_drain": "INC-1",
        "take_custody": "taken into custody",
        "inspect_sample": "place  category",
        "choose_remedies": "retry_transient",
        "approve_fix": "by admin",
        "wait_threshold": "Nobody is told",
        "verify_conservation": "proven:",
        "close_drain": "green",
        "write_report": "conservation proven",
    }.items():
        log = house.airflow.api.log(DRAIN, drained, task)
        assert said in log, f"{task}:\n{log}"
        assert "Traceback" not in log, task


def test_airflow_holds_no_payload(house: House, drained: str) -> None:
    """Not in its database with all XComs, forms and rendered fields, and in no log."""
    with house.look() as drain, drain.ledger.read() as tx:
        rows = tx.execute(
            select(segment.c.uri, entry.c.row_no).join(segment, segment.c.id == entry.c.segment).limit(20)
        ).all()
        payloads = {Rows(drain.archive.read(uri))[row].value or b"" for uri, row in rows}
    assert len(payloads) > 10
    for path in (house.folder / "airflow").rglob("*"):
        if path.is_file():
            held = path.read_bytes()
            assert not [payload for payload in payloads if len(payload) > 20 and payload in held], path


def test_a_report_is_for_those_who_may_see_the_dag(house: House, drained: str) -> None:
    path = f"/dags/{DRAIN}/dagRuns/{drained}/taskInstances/write_report/links"
    url = house.airflow.api.request("GET", path).json()["extra_links"]["Report"]
    assert url.startswith(house.airflow.url)
    assert httpx.get(url, trust_env=False).status_code == 401
    login = {"username": "admin", "password": house.airflow.password}
    token = httpx.post(f"{house.airflow.url}/auth/token", json=login, trust_env=False).json()["access_token"]
    page = httpx.get(url, headers={"Authorization": f"Bearer {token}"}, trust_env=False)
    assert (page.status_code, "Green: done, and proven" in page.text) == (200, True)
    assert "default-src 'none'" in page.headers["content-security-policy"]


def test_what_a_person_rejects_stays_open(house: House, drained: str, limits: dict[str, int]) -> None:
    again(house, limits, 60)
    run_id = house.start(DRAIN, approve_fix="person")
    house.airflow.api.answer(house.question(DRAIN, run_id), ["Reject"])
    states = house.finish(DRAIN, run_id)
    assert (states["apply_fix"], states["canary_fix"]) == ("skipped", "skipped")
    assert states["drain_remaining"] == "success"
    assert decided(house, run_id) == [("admin", "reject")]
    with house.look() as drain, drain.ledger.read() as tx:
        waiting = select(func.count()).where(entry.c.state == "open", entry.c.reason == "waiting_for_fix")
        assert tx.execute(waiting).scalar_one() > 0


def test_a_second_answer_to_the_same_proposals_is_refused(house: House, drained: str) -> None:
    api = house.airflow.api
    runs = [house.start(REVIEW), house.start(REVIEW)]
    asked = [house.question(REVIEW, run) for run in runs]
    form = {name: param["value"] for name, param in asked[0]["params"].items()}
    first = next(iter(form))
    form[first] = form[first].replace("leave", "discard")
    api.answer(asked[0], ["Apply these decisions"], form)
    house.finish(REVIEW, runs[0])
    discarded = house.states()["discarded"]
    assert discarded > 0
    api.answer(asked[1], ["Apply these decisions"], form)
    assert api.wait_for_run(REVIEW, runs[1], seconds=240) == "failed"
    assert "changed since it was looked at" in str(api.xcom(REVIEW, runs[1], "apply_review", "applied"))
    assert house.states()["discarded"] == discarded


def test_leaving_everything_touches_nothing(house: House, drained: str) -> None:
    before = house.everything()
    run_id = house.start(REVIEW)
    house.airflow.api.answer(house.question(REVIEW, run_id), ["Leave everything open"])
    states = house.finish(REVIEW, run_id)
    assert {states[task] for task in ("open_drain", "apply_review", "close_drain", "write_report")} == {
        "skipped"
    }
    assert house.everything() == before
