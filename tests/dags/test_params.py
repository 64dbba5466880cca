"""The trigger form starts at the queue's policy and may only tighten it, in the form and again in the run."""

from __future__ import annotations

from typing import Any

import pytest
from airflow.sdk.definitions.param import ParamsDict
from airflow.sdk.exceptions import AirflowFailException, ParamValidationError

from dlq.config import load_queue
from dlq.errors import ConfigError
from dlq_runbook.drains import configuration, is_dry
from dlq_runbook.params import trigger_form

POLICY = {"limits": {"batch": 100, "rate": 50, "budget": "1h"}, "approval": {"fix": "policy", "dr": "person"}}
LOOSER = [
    {"batch": 101},
    {"batch": 0},
    {"rate": 51},
    {"approve_dr": "policy"},
    {"approve_fix": "nobody"},
    {"dry_run": "yes"},
    {"budget": "soon"},
]
TIGHTER: list[dict[str, Any]] = [
    {"batch": 1},
    {"rate": 0.5},
    {"budget": "30m"},
    {"approve_fix": "person"},
    {"approve_dr": "person"},
    {"dry_run": True},
    {"incident": "INC-7"},
]


def form(queues: Any, **fields: Any) -> ParamsDict:
    queues.write("orders", **{**POLICY, **fields})
    return ParamsDict(trigger_form(load_queue("orders")))


def test_the_form_starts_at_the_policy(queues: Any) -> None:
    assert form(queues).validate() == {
        "dry_run": False,
        "incident": None,
        "batch": 100,
        "rate": 50,
        "budget": None,
        "approve_fix": "policy",
        "approve_dr": "person",
    }


def test_every_field_has_a_title_and_says_what_it_does(queues: Any) -> None:
    params = form(queues)
    for name in params:
        param = params.get_param(name)
        assert param.schema["title"], name
        assert len(param.description or "") > 20, name


@pytest.mark.parametrize("conf", TIGHTER, ids=str)
def test_what_is_tighter_is_taken(queues: Any, conf: dict[str, Any]) -> None:
    params = form(queues)
    params.update(conf)
    assert {name: params.validate()[name] for name in conf} == conf


@pytest.mark.parametrize("conf", LOOSER, ids=str)
def test_what_is_looser_is_no_choice_of_the_form(queues: Any, conf: dict[str, Any]) -> None:
    params = form(queues)
    with pytest.raises(ParamValidationError):
        params.update(conf)


@pytest.mark.parametrize(
    "conf", [{"batch": 101}, {"rate": 51}, {"budget": "2h"}, {"approve_dr": "policy"}], ids=str
)
def test_what_is_looser_is_refused_by_the_run_too(queues: Any, context: Any, conf: dict[str, Any]) -> None:
    form(queues)
    with pytest.raises(ConfigError, match=next(iter(conf))):
        configuration("orders", context(conf=conf))


def test_a_run_is_tightened(queues: Any, context: Any) -> None:
    form(queues)
    conf = {
        "batch": 10,
        "rate": None,
        "budget": "10m",
        "approve_fix": "person",
        "incident": "INC-7",
        "dry_run": True,
    }
    tightened = configuration("orders", context(conf=conf))
    assert (tightened.limits.batch, tightened.limits.rate, tightened.limits.budget) == (10, 50, 600)
    assert tightened.approval.fix == "person"


def test_an_unbounded_rate_may_be_bounded(queues: Any) -> None:
    params = form(queues, limits={"batch": 100})
    params.update({"rate": 9})
    assert params.validate()["rate"] == 9


def test_an_unknown_key_is_refused_before_anything_is_touched(queues: Any, context: Any) -> None:
    """A run with ``dryrun`` must not be a real one."""
    form(queues)
    queues.fill("orders")
    task = queues.dag("orders").get_task("open_drain")
    with pytest.raises(AirflowFailException, match=r"unknown key.*dryrun"):
        task.execute(context(task, conf={"dryrun": True}))
    # Nobody took the queue's lease.
    queues.open("orders", "another run").close()


def test_dry_run_is_true_or_false_and_nothing_else(context: Any) -> None:
    assert is_dry(context(conf={"dry_run": True}))
    assert not is_dry(context(conf={}))
    with pytest.raises(ConfigError, match="true or false"):
        is_dry(context(conf={"dry_run": "false"}))
