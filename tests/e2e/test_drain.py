"""The whole runbook in a real Airflow, on a real broker, beside the orchestrator. Each test goes on from the last."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from sqlalchemy import func, select
from tests.e2e.house import DRAIN, QUEUE, REVIEW, House, Seen, built, identity

from dlq.ledger.schema import decision, entry, grp
from dlq_demo.broker import Broker

pytestmark = [pytest.mark.airflow, pytest.mark.timeout(600)]

DEAD = 150
# The taxonomy's remedies lead every failure of the stream into one of the three branches.
STATES = {
    **dict.fromkeys(
        (
            *(
                "open_drain",
                "acknowledge_alert",
                "isolate",
                "take_custody",
                "inspect_sample",
                "guard_data_loss",
            ),
            *("within_limits", "categorize", "find_root_cause", "choose_remedies"),
            *("replay_canary", "replay_batches[0]"),
            *("propose_fix", "approve_fix", "apply_fix", "canary_fix"),
            *("open_review", "drain_remaining", "restore_routing"),
            *("verify_conservation", "verify_golden_flows", "close_drain", "write_report"),
        ),
        "success",
    ),
    **dict.fromkeys(
        ("invoke_dr_plan", "approve_dr", "nothing_to_do", "wait_threshold", "escalate"), "skipped"
    ),
}


@pytest.fixture(scope="module")
def house(broker: Broker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with built(broker, tmp_path_factory.mktemp("house")) as house:
        yield house


@pytest.fixture(scope="module")
def drained(house: House) -> str:
    """The run that drained the first incident."""
    house.incident(DEAD)
    run_id = house.start(DRAIN)
    house.finish(DRAIN, run_id)
    return run_id


def test_every_stage_ran_or_was_not_needed(house: House, drained: str) -> None:
    assert house.airflow.api.task_states(DRAIN, drained) == STATES


def test_the_accounts_add_up(house: House, drained: str) -> None:
    dead = len(house.records(house.around.dlq))
    states = house.states()
    assert sum(states.values()) == dead >= DEAD
    assert set(states) == {"confirmed", "open"}
    with house.look(drained) as drain:
        assert drain.depth().entries == 0
        assert drain.unsettled() == states["open"]
        with drain.ledger.read() as tx:
            kinds = tx.execute(
                select(grp.c.category, entry.c.state, func.count())
                .join(grp, grp.c.id == entry.c.grp)
                .group_by(grp.c.category, entry.c.state)
            ).all()
            homeless = select(func.count()).where(
                entry.c.state == "open", entry.c.work.is_(None) | entry.c.owner.is_(None)
            )
            assert tx.execute(homeless).scalar_one() == 0, "open entries without owner or work"
    assert {state for category, state, _ in kinds if category == "transient"} == {"confirmed"}
    assert {state for category, state, _ in kinds if category == "manual"} == {"open"}


def test_each_replay_is_on_the_origin_topic_once_with_the_bytes_that_died(house: House, drained: str) -> None:
    dead, replays = house.records(house.around.dlq), house.replays(identity(drained))
    assert len(replays) == house.states()["confirmed"]
    for place, sent in replays.items():
        [replay] = sent
        assert (replay.key, replay.value) == (dead[place].key, dead[place].value)
        assert replay.headers["dlq-retry-count"] == b"1"
        assert replay.headers["correlation-id"] == dead[place].headers["correlation-id"]
        assert not [name for name in replay.headers if name.startswith("wf-")], (
            "the failure's headers stay behind"
        )
    assert len({replay.headers["dlq-key"] for [replay] in replays.values()}) == len(replays)


def test_routing_is_back_and_nothing_is_held(house: House, drained: str) -> None:
    routing = house.orchestrator("/v1/routing")
    assert (routing["mode"], routing["held"], routing["undeliverable"]) == ("auto", 0, 0)


def test_the_quota_was_raised_within_the_policy(house: House, drained: str) -> None:
    quotas = house.orchestrator("/v1/quotas")["quotas"]
    [quota] = [q for q in quotas if (q["plugin"], q["resource"]) == ("embedding", "memory_mb")]
    assert 512 < quota["peak_need"] <= quota["limit"] <= house.config.quotas.ceilings["embedding"]
    with house.look(drained) as drain, drain.ledger.read() as tx:
        who = tx.execute(select(decision.c.who).where(decision.c.kind == "approve_fix")).scalar_one()
    assert who == f"policy:{QUEUE}.yaml@{house.config.sha}"


def test_the_report_says_so_and_holds_no_payload(house: House, drained: str) -> None:
    report = house.folder / "dlq" / "report" / f"{identity(drained)}.html"
    told = json.loads(report.with_suffix(".json").read_text())
    assert (told["verdict"], told["proof"]["proven"]) == ("green", True)
    assert told["numbers"]["success"] == 1.0
    page = report.read_bytes()
    for record in house.records(house.around.dlq).values():
        assert not record.value or record.value not in page


def test_a_dry_run_changes_nothing(house: House, drained: str) -> None:
    house.incident(40)
    waiting = len(house.records(house.around.dlq)) - sum(house.states().values())
    before = house.everything()
    run_id = house.start(DRAIN, dry_run=True)
    states = house.finish(DRAIN, run_id)
    assert "failed" not in states.values()
    assert house.everything() == before
    assert f"at most {waiting} entries would be taken" in house.airflow.api.log(DRAIN, run_id, "take_custody")


def test_a_review_sends_the_draft_in_place_of_its_entry(house: House, drained: str) -> None:
    with (
        house.look() as drain,
        drain.ledger.read() as tx,
    ):  # what the dry run left in the queue is in nobody's custody
        rows = tx.execute(select(entry.c.part, entry.c.place).where(entry.c.state == "open")).all()
        in_custody = {(int(part), int(offset)) for part, offset in rows}
    place, dead = next(
        (place, record)
        for place, record in house.records(house.around.dlq).items()
        if record.value and b'"stepz"' in record.value and place in in_custody
    )
    mended = (dead.value or b"").replace(b'"stepz"', b'"steps"')
    house.dlq("edit", QUEUE, f"{place[0]}/{place[1]}", "--value", "-", "--who", "someone", stdin=mended)
    sent_before = house.replays()

    run_id = house.start(REVIEW)
    asked = house.question(REVIEW, run_id)
    assert mended.decode() not in json.dumps(asked), "a form carries ids and hashes, never a payload"
    form = {name: param["value"] for name, param in asked["params"].items()}
    [field] = [name for name in form if name.startswith("draft")]
    form[field] = form[field].replace("leave", "replay")
    house.airflow.api.answer(asked, ["Apply these decisions"], form)
    house.finish(REVIEW, run_id)

    sent = house.replays()
    assert {p: s for p, s in sent.items() if p != place} == sent_before, "what was left is where it was"
    [replay] = sent[place]
    assert (replay.key, replay.value) == (dead.key, mended)
    assert _of(house, dead)["state"] == "succeeded"
    with house.look() as drain, drain.ledger.read() as tx:
        here = (entry.c.part == place[0], entry.c.place == str(place[1]))
        assert tx.execute(select(entry.c.state).where(*here)).scalar_one() == "confirmed"
        who = tx.execute(select(decision.c.who).where(decision.c.kind == "review:replay")).scalar_one()
    assert who == "admin"


def _of(house: House, dead: Seen) -> dict[str, str]:
    workflow: dict[str, str] = house.orchestrator(f"/v1/workflows/{dead.headers['correlation-id'].decode()}")
    return workflow
