"""The Dags in a real Airflow, on a real broker, beside the reference orchestrator; each test goes on from the last."""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import func, select
from tests.dags.conftest import DAGS, ROOT

from dlq.config import load_queue
from dlq.connections import from_environment
from dlq.drain import Drain, drain_id, open_drain
from dlq.intake import take_custody
from dlq.ledger import Ledger, lease
from dlq.ledger.schema import decision, entry
from dlq_demo.airflow import AirflowStandalone
from dlq_demo.broker import Broker
from dlq_demo.stream import stream
from dlq_demo.surroundings import Surroundings

pytestmark = [pytest.mark.airflow, pytest.mark.timeout(900)]

DRAIN, REVIEW = "dlq_drain__orders", "dlq_review__orders"


@dataclass
class House:
    """Everything that runs, and what it is asked for."""

    airflow: AirflowStandalone
    around: Surroundings
    folder: Path
    quotas: dict[str, int]
    seed: int = 1

    def incident(self, dead: int) -> None:
        """Workflows fail until ``dead`` more are dead-lettered."""
        self.seed += 10_000
        stream(self.around, until=self._dead() + dead, seed=self.seed)

    def _dead(self) -> int:
        with self.drain_of_nobody() as looked:
            return looked.source.depth({}).entries

    def lower_quotas(self) -> None:
        """As they were before any fix, so that there is something to fix again."""
        with self.drain_of_nobody() as looked:
            assert looked.orchestrator is not None
            for plugin, limit in self.quotas.items():
                looked.orchestrator.set_quota(plugin, limit, uuid.uuid4().hex)

    def start(self, dag_id: str, conf: dict[str, Any] | None = None) -> str:
        run_id = f"test__{uuid.uuid4().hex[:8]}"
        self.airflow.api.trigger(dag_id, run_id, conf)
        return run_id

    def drain(self, run_id: str) -> Drain:
        identity = drain_id("orders", run_id)
        return Drain.look(identity, config=load_queue("orders"), connections=from_environment)

    def question(self, dag_id: str, run_id: str) -> dict[str, Any]:
        """What the run asks, once it has asked for so long that an answer can't get lost."""
        [asked] = until(lambda: self.airflow.api.questions(dag_id, run_id), "a question")
        since = time.monotonic()
        until(lambda: time.monotonic() > since + 10, "the question to settle")
        return dict(asked)

    def ended(self, dag_id: str, run_id: str, seconds: float = 300) -> dict[str, str | None]:
        """The run's task states, once it has ended."""
        state = self.airflow.api.wait_for_run(dag_id, run_id, seconds=seconds)
        states = self.airflow.api.task_states(dag_id, run_id)
        failed = [task for task, found in states.items() if found == "failed"]
        said = "".join(f"\n--- {task}\n{self.airflow.api.log(dag_id, run_id, task)}" for task in failed)
        assert state == "success", f"{states}{said}"
        return states

    def unsettled(self) -> int:
        with self.drain_of_nobody() as looked:
            return looked.unsettled()

    def drain_of_nobody(self) -> Drain:
        config = load_queue("orders")
        return Drain("none", config, Ledger.open(config.ledger), from_environment, epoch=-1, dry_run=True)


def until(condition: Callable[[], Any], what: str, seconds: float = 120) -> Any:
    """Poll ``condition`` until it is true, and return it."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.5)
    return found


@pytest.fixture(scope="module")
def house(broker: Broker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("house")
    shutil.copytree(ROOT / "include" / "config", folder / "config")
    unique = uuid.uuid4().hex[:8]
    shipped = folder / "config" / "queues" / "orders.yaml"
    text = shipped.read_text().replace("orders.dlq", f"orders.dlq.{unique}")
    text = text.replace("allow: [orders]", f"allow: [orders.{unique}]")
    shipped.write_text(text.replace("group: orders-workers", f"group: workers.{unique}"))
    variables = {
        "DLQ_CONFIG": str(folder / "config"),
        "DLQ_HOME": str(folder),
        "DLQ_LEDGER": f"sqlite:///{folder / 'ledger.db'}",
        "DLQ_APPROVE_FIX": "policy",
    }
    with pytest.MonkeyPatch.context() as patch, ExitStack() as services:
        for name, value in variables.items():
            patch.setenv(name, value)
        config = load_queue("orders")
        around = Surroundings(config, orchestrator=folder / "orchestrator", broker=broker)
        for name, value in around.connections.items():
            patch.setenv(name, value)
        services.enter_context(around)
        airflow = services.enter_context(
            AirflowStandalone(
                folder / "airflow",
                dags=DAGS,
                plugins=ROOT / "plugins",
                env={**variables, **around.connections},
            )
        )
        Ledger.create(config.ledger).close()
        # The queue's first intake, while it is empty: what comes later is nobody's old letter.
        with open_drain(config, run_id="set-up", kind="cli", connections=from_environment) as drain:
            take_custody(drain, 60)
            lease.release(drain.ledger, drain.queue, drain.id, drain.epoch, "done")
        airflow.wait_for_dag(DRAIN)
        airflow.wait_for_dag(REVIEW)
        assert not airflow.api.import_errors()
        house = House(airflow, around, folder, quotas={})
        with house.drain_of_nobody() as looked:
            assert looked.orchestrator is not None
            house.quotas = {quota.plugin: quota.limit for quota in looked.orchestrator.quotas()}
        yield house


def test_a_drain_decided_by_policy_is_green_and_proven(house: House) -> None:
    house.incident(150)
    run_id = house.start(DRAIN, {"incident": "INC-1"})
    states = house.ended(DRAIN, run_id)
    for task in ("replay_canary", "approve_fix", "apply_fix", "open_review", "write_report", "close_drain"):
        assert states[task] == "success", task
    # Nobody had to be told, and the sensor ended with the drain, not half an hour later.
    assert (states["wait_threshold"], states["escalate"]) == ("skipped", "skipped")
    verdict = house.airflow.api.xcom(DRAIN, run_id, "close_drain")
    assert verdict["verdict"] == "green"
    assert all(left["owner"] and left["work"] for left in verdict["open"])
    with house.drain(run_id) as drain, drain.ledger.read() as tx:
        assert drain.depth().entries == 0
        who = tx.execute(select(decision.c.who).where(decision.c.kind == "approve_fix")).scalar_one()
    assert who.startswith("policy:orders.yaml@")


def test_its_logs_read_well(house: House) -> None:
    run_id = _last(house, DRAIN)
    api = house.airflow.api
    for task, said in {
        "take_custody": "taken into custody",
        "inspect_sample": "place  category",
        "choose_remedies": "retry_transient",
        "approve_fix": "by policy:orders.yaml@",
        "verify_conservation": "proven:",
        "close_drain": "green",
        "write_report": "conservation",
    }.items():
        log = api.log(DRAIN, run_id, task)
        assert said in log, f"{task}:\n{log}"
        assert "Traceback" not in log, task


def test_airflow_holds_no_payload(house: House) -> None:
    """Neither its database nor its logs, with all XComs, forms and rendered fields."""
    held = [path for path in (house.folder / "airflow").rglob("*") if path.is_file()]
    with house.drain_of_nobody() as looked:
        for record in _payloads(looked):
            assert len(record) > 20
            for path in held:
                assert record not in path.read_bytes(), path


def _payloads(looked: Drain, most: int = 5) -> list[bytes]:
    from dlq.archive import Rows
    from dlq.ledger.schema import segment

    with looked.ledger.read() as tx:
        rows = tx.execute(
            select(segment.c.uri, entry.c.row_no).join(segment, segment.c.id == entry.c.segment).limit(most)
        ).all()
    return [Rows(looked.archive.read(uri))[row].value or b"" for uri, row in rows]


def test_a_report_is_for_those_who_may_see_the_dag(house: House) -> None:
    run_id = _last(house, DRAIN)
    links = house.airflow.api.request(
        "GET", f"/dags/{DRAIN}/dagRuns/{run_id}/taskInstances/write_report/links"
    ).json()
    url = links["extra_links"]["Report"]
    assert url.startswith(house.airflow.url)
    assert httpx.get(url, trust_env=False).status_code == 401
    token = httpx.post(
        f"{house.airflow.url}/auth/token",
        json={"username": "admin", "password": house.airflow.password},
        trust_env=False,
    ).json()["access_token"]
    page = httpx.get(url, headers={"Authorization": f"Bearer {token}"}, trust_env=False)
    assert page.status_code == 200
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "Green: done, and proven" in page.text


def test_a_dry_run_changes_nothing(house: House) -> None:
    house.lower_quotas()
    house.incident(60)
    before = _ledger(house)
    run_id = house.start(DRAIN, {"dry_run": True, "approve_fix": "person"})
    states = house.ended(DRAIN, run_id)
    assert "failed" not in states.values()
    assert _ledger(house) == before


def test_a_person_approves_and_is_on_record(house: House) -> None:
    run_id = house.start(DRAIN, {"approve_fix": "person"})
    asked = house.question(DRAIN, run_id)
    assert "raise" in asked["subject"]
    approve, reject = asked["options"]
    assert (approve.split(" #")[0], reject) == ("Approve", "Reject")
    house.airflow.api.answer(asked, [approve])
    states = house.ended(DRAIN, run_id)
    assert states["canary_fix"] == "success"
    with house.drain(run_id) as drain, drain.ledger.read() as tx:
        rows = tx.execute(select(decision.c.who, decision.c.choice).where(decision.c.drain == drain.id))
        assert ("admin", "approve") in [tuple(row) for row in rows]


def test_what_a_person_rejects_stays_open(house: House) -> None:
    house.lower_quotas()
    house.incident(60)
    run_id = house.start(DRAIN, {"approve_fix": "person"})
    house.airflow.api.answer(house.question(DRAIN, run_id), ["Reject"])
    states = house.ended(DRAIN, run_id)
    assert (states["apply_fix"], states["canary_fix"], states["drain_remaining"]) == (
        "skipped",
        "skipped",
        "success",
    )
    with house.drain(run_id) as drain, drain.ledger.read() as tx:
        waiting = select(func.count()).where(entry.c.state == "open", entry.c.reason == "waiting_for_fix")
        assert tx.execute(waiting).scalar_one() > 0


def test_a_review_does_what_a_person_chose(house: House) -> None:
    before = house.unsettled()
    run_id = house.start(REVIEW)
    asked = house.question(REVIEW, run_id)
    form = {name: param["value"] for name, param in asked["params"].items()}
    assert all(value.startswith("leave #") for value in form.values())
    first = next(iter(form))
    form[first] = form[first].replace("leave", "discard")
    house.airflow.api.answer(asked, ["Apply these decisions"], form)
    states = house.ended(REVIEW, run_id)
    assert set(states.values()) == {"success"}
    assert house.unsettled() < before


def test_a_second_answer_to_the_same_proposals_is_refused(house: House) -> None:
    api = house.airflow.api
    runs = [house.start(REVIEW), house.start(REVIEW)]
    asked = [house.question(REVIEW, run) for run in runs]
    form = {name: param["value"] for name, param in asked[0]["params"].items()}
    first = next(iter(form))
    form[first] = form[first].replace("leave", "discard")
    api.answer(asked[0], ["Apply these decisions"], form)
    house.ended(REVIEW, runs[0])
    api.answer(asked[1], ["Apply these decisions"], form)
    assert api.wait_for_run(REVIEW, runs[1], seconds=300) == "failed"
    assert api.task_states(REVIEW, runs[1])["apply_review"] == "failed"
    assert "changed since it was looked at" in str(api.xcom(REVIEW, runs[1], "apply_review", "applied"))


def test_leaving_everything_touches_nothing(house: House) -> None:
    before = _ledger(house)
    run_id = house.start(REVIEW)
    house.airflow.api.answer(house.question(REVIEW, run_id), ["Leave everything open"])
    states = house.ended(REVIEW, run_id)
    assert {states[t] for t in ("open_drain", "apply_review", "close_drain", "write_report")} == {"skipped"}
    assert _ledger(house) == before


def test_a_drain_goes_on_after_its_scheduler_was_killed(house: House) -> None:
    house.incident(150)
    run_id = house.start(DRAIN)
    until(lambda: house.airflow.api.task_states(DRAIN, run_id).get("take_custody") == "running", "the intake")
    house.airflow.kill_scheduler()
    with house.drain(run_id) as drain:
        assert drain.noted("close_drain") is None
    house.airflow.start_scheduler()
    states = house.ended(DRAIN, run_id, seconds=600)
    assert states["close_drain"] == "success"
    assert house.airflow.api.xcom(DRAIN, run_id, "verify_conservation")["proven"] is True


def _last(house: House, dag_id: str) -> str:
    page = house.airflow.api.request(
        "GET", f"/dags/{dag_id}/dagRuns", params={"order_by": "-start_date"}
    ).json()
    return str(page["dag_runs"][0]["dag_run_id"])


def _ledger(house: House) -> dict[str, int]:
    from dlq.ledger.schema import metadata

    with house.drain_of_nobody() as looked, looked.ledger.read() as tx:
        return {
            t.name: tx.execute(select(func.count()).select_from(t)).scalar_one()
            for t in metadata.sorted_tables
        }
