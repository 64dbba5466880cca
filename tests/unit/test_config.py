"""A queue's file: what is wrong is said with file, field and fix; a run may only tighten it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from upath import UPath

from dlq.config import KafkaSource, KafkaTarget, QueueConfig, load_queue, queue_names, seconds
from dlq.errors import ConfigError

GOOD: dict[str, Any] = {
    "source": {"kind": "kafka", "connection": "kafka", "topic": "orders.dlq", "start": "earliest"},
    "target": {"kind": "kafka", "connection": "kafka", "allow": ["orders"]},
    "ledger": "sqlite:////var/lib/dlq/ledger.db",
    "archive": "file:///var/lib/dlq/archive",
    "report": "file:///var/lib/dlq/report",
}


def changed(**changes: Any) -> dict[str, Any]:
    """The good file with values set (``source__topic=...``), or taken out (``None``)."""
    data: dict[str, Any] = yaml.safe_load(yaml.safe_dump(GOOD))
    for path, value in changes.items():
        *parents, last = path.split("__")
        inner = data
        for parent in parents:
            inner = inner.setdefault(parent, {})
        if value is None:
            inner.pop(last)
        else:
            inner[last] = value
    return data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "queues").mkdir()
    return tmp_path


def load(folder: Path, data: dict[str, Any] | str, name: str = "orders") -> QueueConfig:
    text = data if isinstance(data, str) else yaml.safe_dump(data)
    (folder / "queues" / f"{name}.yaml").write_text(text)
    return load_queue(name, UPath(folder))


def refused(folder: Path, data: dict[str, Any] | str, name: str = "orders") -> str:
    with pytest.raises(ConfigError) as caught:
        load(folder, data, name)
    message = str(caught.value)
    assert f"{name}.yaml" in message, "the message names the file"
    return message


def test_a_good_file_has_the_stem_as_its_name_and_the_designs_defaults(folder: Path) -> None:
    config = load(folder, GOOD)
    assert config.name == "orders"
    assert (config.slo.ratio, config.slo.alert, config.slo.escalate) == (0.001, 0.0005, 0.01)
    assert (config.slo.escalate_after, config.slo.window) == (1800, 86400)
    assert (config.limits.batch, config.limits.returns, config.limits.dr, config.limits.budget) == (
        100,
        3,
        10_000,
        3600,
    )
    assert (config.outcome.grace, config.outcome.deadline) == (5, 600)
    assert config.approval.within == 900
    assert config.orchestrator is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"source__topic": None}, "source.topic: Field required"),
        ({"source__start": None}, "source.start: Field required"),
        ({"source__start": "yesterday"}, "source.start"),
        ({"source__kind": "rabbit"}, "source: Input tag 'rabbit'"),
        ({"source": None}, "source: Field required"),
        ({"target__allow": []}, "target.allow"),
        ({"target__topic": "elsewhere"}, "topic 'elsewhere' is not in allow: add it there"),
        ({"target__ordering": "by_luck"}, "target.ordering"),
        ({"ledger": None}, "ledger: Field required"),
        ({"limits__batch": 0}, "limits.batch"),
        ({"limits__rate": -1}, "limits.rate"),
        (
            {"limits__budget": "soon"},
            "limits.budget: Value error, not a duration: write 250ms, 5s, 30m, 1h or 1d",
        ),
        ({"outcome__grace": "-5s"}, "outcome.grace"),
        ({"approval__within": "20m"}, "approval.within"),
        ({"slo__ratio": 2}, "slo.ratio"),
        ({"limit": {"batch": 5}}, "limit: Extra inputs are not permitted"),
        ({"limits__bach": 5}, "limits.bach: Extra inputs are not permitted"),
        ({"alerts__connection": "am"}, "alerts.matchers"),
    ],
)
def test_what_is_wrong_is_said_with_its_field(folder: Path, change: dict[str, Any], said: str) -> None:
    assert said in refused(folder, changed(**change))


def test_every_wrong_field_is_named_at_once(folder: Path) -> None:
    message = refused(folder, changed(ledger=None, limits__batch=0))
    assert "ledger:" in message
    assert "limits.batch:" in message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "not YAML"),
        ("- a\n- b", "expected a mapping"),
        ("", "expected a mapping"),
        ("just words", "expected a mapping"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused(folder: Path, text: str, said: str) -> None:
    assert said in refused(folder, text)


def test_a_missing_file_says_which_queues_there_are(folder: Path) -> None:
    load(folder, GOOD, "orders")
    load(folder, GOOD, "refunds")
    with pytest.raises(ConfigError, match=r"no queue 'payments'.*known: orders, refunds.*DLQ_CONFIG"):
        load_queue("payments", UPath(folder))
    assert queue_names(UPath(folder)) == ["orders", "refunds"]


def test_a_file_that_is_not_text_is_refused(folder: Path) -> None:
    (folder / "queues" / "orders.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_queue("orders", UPath(folder))


@pytest.mark.parametrize("name", ["Orders", "orders-eu", "o" * 41, "", "../orders"])
def test_a_name_that_no_dag_could_carry_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="1 to 40"):
        load_queue(name, UPath(folder))


def test_a_broken_file_is_listed_so_that_its_dag_can_say_so(folder: Path) -> None:
    load(folder, GOOD, "orders")
    (folder / "queues" / "broken.yaml").write_text("a: [")
    assert queue_names(UPath(folder)) == ["broken", "orders"]


# The DLQ is never a target


@pytest.mark.parametrize(
    "topic", ["orders.dlq", "__consumer_offsets", "app-store-changelog", "app-repartition"]
)
def test_no_entry_is_replayed_into_the_dlq_or_an_internal_topic(folder: Path, topic: str) -> None:
    message = refused(folder, changed(target__allow=["orders", topic]))
    assert f"target.allow: {topic!r}" in message
    assert "remove it" in message


# Values


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("250ms", 0.25),
        ("5s", 5),
        ("30m", 1800),
        ("1h", 3600),
        ("1d", 86400),
        ("1m 30s", 90),
        ("1h30m", 5400),
        ("1.5h", 5400),
        (" 5s ", 5),
        (7, 7),
        (0.5, 0.5),
        (timedelta(minutes=2), 120),
    ],
)
def test_durations_read_as_people_write_them(given: Any, wanted: float) -> None:
    assert seconds(given) == wanted


@pytest.mark.parametrize(
    "given", ["", " ", "5", "5 parsecs", "s", "5s and more", "-5s", "1:30", True, None, [5]]
)
def test_what_is_no_duration_is_refused(given: Any) -> None:
    with pytest.raises(ValueError, match="not a duration"):
        seconds(given)


def test_a_moment_to_start_from_needs_its_time_zone(folder: Path) -> None:
    config = load(folder, changed(source__start=datetime(2026, 11, 24, 8, tzinfo=UTC)))
    assert isinstance(config.source, KafkaSource)
    assert config.source.start == datetime(2026, 11, 24, 8, tzinfo=UTC)
    message = refused(folder, changed(source__start=datetime(2026, 11, 24, 8)))  # noqa: DTZ001
    assert "source.start" in message
    assert "timezone" in message


@pytest.mark.parametrize("key", ["orchestrator", "alerts", "notify", "schedule"])
def test_none_may_be_written_as_a_word(folder: Path, key: str) -> None:
    assert getattr(load(folder, changed(**{key: "none"})), key) is None


def test_open_work_goes_to_the_owner_of_its_category_else_to_the_default(folder: Path) -> None:
    owners = load(folder, changed(owners__manual="data-team", owners__default="sre")).owners
    assert (owners.of("manual"), owners.of("transient"), owners.of("nonsense")) == ("data-team", "sre", "sre")


# Environment


def test_variables_are_put_into_values(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEDGER_PASSWORD", "p: [x] # 'q'")
    monkeypatch.delenv("RETRY_TOPIC", raising=False)
    data = changed(
        ledger="postgresql://dlq:${LEDGER_PASSWORD}@db/${DB:-ledger}",
        target__allow=["${RETRY_TOPIC:-orders.retry}"],
    )
    config = load(folder, data)
    assert config.ledger == "postgresql://dlq:p: [x] # 'q'@db/ledger"
    assert isinstance(config.target, KafkaTarget)
    assert config.target.allow == ("orders.retry",)


def test_a_variable_that_is_not_set_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LEDGER_PASSWORD", raising=False)
    message = refused(folder, changed(ledger="postgresql://dlq:${LEDGER_PASSWORD}@db/ledger"))
    assert "LEDGER_PASSWORD is not set" in message
    assert "${LEDGER_PASSWORD:-default}" in message


def test_an_empty_default_is_a_default(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SUFFIX", raising=False)
    assert load(folder, changed(report="file:///r${SUFFIX:-}")).report == "file:///r"


# Params of a run


@pytest.fixture
def config(folder: Path) -> QueueConfig:
    return load(
        folder, changed(limits__batch=50, limits__rate=100, limits__budget="30m", approval__dr="person")
    )


def test_a_run_may_tighten(config: QueueConfig) -> None:
    tight = config.tighten(
        {"batch": 10, "rate": 5, "budget": "10m", "approve_fix": "person", "approve_dr": None}
    )
    assert (tight.limits.batch, tight.limits.rate, tight.limits.budget) == (10, 5, 600)
    assert tight.approval.dr == "person"
    assert config.limits.batch == 50, "the queue's own is untouched"
    assert tight.sha != config.sha


def test_a_run_may_set_a_rate_where_the_file_has_none(folder: Path) -> None:
    assert load(folder, GOOD).tighten({"rate": 5}).limits.rate == 5


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"batch": 51}, "param batch=51 is looser"),
        ({"rate": 100.5}, "param rate"),
        ({"budget": "1h"}, "param budget"),
        ({"approve_fix": "policy"}, "approve_fix=policy is looser"),
        ({"approve_dr": "policy"}, "approve_dr=policy is looser"),
        ({"ledger": "sqlite:///mine.db"}, "unknown param 'ledger'"),
        ({"returns": 1}, "unknown param 'returns'"),
        ({"batch": 0}, "limits.batch"),
        ({"batch": "many"}, "param batch"),
        ({"batch": 1.5}, "limits.batch"),
        ({"budget": "soon"}, "param budget"),
        ({"approve_fix": "nobody"}, "approval.fix"),
    ],
)
def test_a_run_may_not_loosen_or_invent(config: QueueConfig, params: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.tighten(params)
    assert said in str(caught.value)


def test_the_fingerprint_tells_configurations_apart(folder: Path) -> None:
    one = load(folder, GOOD)
    assert one.sha == load(folder, GOOD).sha
    assert one.sha != load(folder, changed(limits__batch=99)).sha
    assert len(one.sha) == 12


def test_a_configuration_frozen_by_another_release_is_named_not_raised_raw(config: QueueConfig) -> None:
    frozen = config.frozen()
    assert QueueConfig.thaw(frozen, "orders-1").limits == config.limits
    with pytest.raises(ConfigError, match=r"orders-1: .*another release \(limits\.batch_size\)"):
        QueueConfig.thaw(frozen.replace('"batch"', '"batch_size"'), "orders-1")
