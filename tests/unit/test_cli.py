"""The command line without a broker: help, exit statuses, one line an error, explaining a file, creating ledgers."""

from __future__ import annotations

import io
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest
import yaml

from dlq import errors
from dlq.archive import Stored
from dlq.cli import terminal
from dlq.cli.exits import BROKEN, OK, REFUSED, WRONG, exit_code
from dlq.cli.main import commands, main
from dlq.export import exported
from dlq.grouping.fingerprint import VERSION
from dlq.sample import escaped

SHIPPED = Path(__file__).resolve().parents[2] / "include" / "config"


class Said(NamedTuple):
    status: int
    out: str
    err: str


Run = Callable[..., Said]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command in this process, whose log and signals stay as they are."""
    monkeypatch.setattr("dlq.cli.terminal.log_to_terminal", lambda: None)
    monkeypatch.setattr("dlq.cli.main.signal.signal", lambda *_: None)

    def run(*arguments: str) -> Said:
        with pytest.raises(SystemExit) as end:
            main(arguments)
        said = capsys.readouterr()
        assert "Traceback" not in said.out + said.err
        return Said(int(end.value.code or 0), said.out, said.err)

    return run


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration folder with one queue, ``orders``, whose ledger does not exist yet."""
    (tmp_path / "queues").mkdir()
    shutil.copy(SHIPPED / "taxonomy.yaml", tmp_path)
    add_queue(tmp_path, "orders")
    monkeypatch.setenv("DLQ_CONFIG", str(tmp_path))
    monkeypatch.delenv("AIRFLOW_CONN_KAFKA", raising=False)
    return tmp_path


def add_queue(folder: Path, name: str, **changes: Any) -> None:
    data: dict[str, Any] = {
        "source": {"kind": "kafka", "connection": "kafka", "topic": f"{name}.dlq", "start": "earliest"},
        "target": {"kind": "kafka", "connection": "kafka", "allow": [name]},
        "ledger": f"sqlite:///{folder}/ledger.db",
        "archive": str(folder / "archive"),
        "report": str(folder / "report"),
    }
    (folder / "queues" / f"{name}.yaml").write_text(yaml.safe_dump({**data, **changes}))


def every_command(
    group: click.Group = commands, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from every_command(command, (*path, name))
        else:
            yield (*path, name), command


COMMANDS = dict(every_command())


# Help


def test_the_commands_are_those_of_the_design() -> None:
    design = {
        "status",
        "sample",
        "find",
        "take",
        "plan",
        "replay",
        "edit",
        "repair",
        "group",
        "explain",
        "verify",
        "restore",
        "ledger",
    }
    assert set(commands.commands) == design
    assert {path for path in COMMANDS if path[0] == "ledger"} == {
        ("ledger", each) for each in ("create", "rebuild", "adopt-source", "resolve")
    }


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_command_explains_itself_and_each_of_its_options(path: tuple[str, ...], run: Run) -> None:
    said = run(*path, "--help")
    assert said.status == OK
    assert len(said.out.splitlines()) > 5
    for parameter in COMMANDS[path].params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{' '.join(path)} {parameter.name} has no help"
    short = COMMANDS[path].get_short_help_str(45)
    assert not short.endswith("..."), f"{short!r} is cut in the list of commands"


def test_the_exit_statuses_are_in_the_help(run: Run) -> None:
    said = run("--help").out
    for status in (OK, BROKEN, WRONG, REFUSED):
        assert f"\n    {status}  " in said


# Errors


def every_error(base: type[errors.DlqError] = errors.DlqError) -> Iterator[type[errors.DlqError]]:
    for one in base.__subclasses__():
        yield one
        yield from every_error(one)


EXPECTED: Mapping[str, int] = {
    "ConfigError": WRONG,
    "Refused": REFUSED,
    "Fenced": REFUSED,
    "Overtaken": REFUSED,
    "QueueBusy": REFUSED,
    "SourceError": REFUSED,
    "TargetError": REFUSED,
    "LedgerError": REFUSED,
    "GateFailed": BROKEN,
    "ArchiveError": BROKEN,
}


def test_every_error_of_the_core_has_an_exit_status() -> None:
    found = {one.__name__: exit_code(one.__new__(one)) for one in every_error()}
    assert {name: found[name] for name in EXPECTED} == EXPECTED
    assert set(found.values()) <= {BROKEN, WRONG, REFUSED}


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("take",), "Missing argument 'QUEUE'"),
        (("take", "orders", "--deadline", "soon"), "not a duration"),
        (("take", "orders", "--what"), "No such option"),
        (("nonsense",), "No such command"),
        (("take", "nosuch"), "no queue 'nosuch'"),
        (("take", "../etc"), "a queue's name is"),
        (("status", "orders"), "dlq ledger create"),
        (("take", "orders"), "dlq ledger create"),
        (("explain",), "name either a FILE or --entry"),
        (("explain", "/nowhere.jsonl"), "No such file"),
        (("restore", "orders", "--to", "file", "x"), "say which entries"),
        (("restore", "orders", "--to", "file", "--all"), "needs a PATH"),
        (("restore", "orders", "--to", "dlq", "x", "--all"), "takes no WHERE"),
        (("restore", "orders", "--to", "file", "x", "--since", "yesterday"), "not a time"),
        (("ledger", "resolve", "orders", "0/1", "--as", "gone", "--why", "x"), "'gone' is not one of"),
        (("ledger", "resolve", "orders", "0/1", "--as", "open"), "Missing option '--why'"),
        (("edit", "orders", "0/1"), "Missing option '--value'"),
    ],
)  # fmt: skip
def test_wrong_use_is_one_line_and_status_2(
    arguments: tuple[str, ...], what: str, run: Run, config: Path
) -> None:
    said = run(*arguments)
    assert said.status == WRONG
    assert said.out == ""
    assert len(said.err.splitlines()) == 1
    assert said.err.startswith("dlq: ")
    assert what in said.err


def test_a_missing_connection_names_its_variable(run: Run, config: Path) -> None:
    run("ledger", "create")
    said = run("take", "orders")
    assert said.status == WRONG
    assert "AIRFLOW_CONN_KAFKA is not set" in said.err


def test_a_broker_that_is_down_is_status_3(run: Run, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dlq.kafka.TIMEOUT_S", 0.5)
    kafka = {"conn_type": "kafka", "extra": {"bootstrap.servers": "127.0.0.1:1"}}
    monkeypatch.setenv("AIRFLOW_CONN_KAFKA", json.dumps(kafka))
    said = run("sample", "orders")
    assert said.status == REFUSED
    assert len(said.err.splitlines()) == 1
    assert "can't be reached" in said.err
    run("ledger", "create")
    said = run("status", "orders")
    assert (said.status, "not known" in said.out) == (OK, True)
    assert "can't be reached" in said.err


def test_a_broken_queue_file_names_file_field_and_fix(run: Run, config: Path) -> None:
    add_queue(config, "orders", source={"kind": "kafka", "connection": "kafka", "topic": "x"})
    said = run("take", "orders")
    assert said.status == WRONG
    assert "orders.yaml: source.start: Field required" in said.err


def test_status_of_all_queues_goes_on_past_a_broken_one(run: Run, config: Path) -> None:
    add_queue(config, "broken", source="?")
    said = run("status")
    assert said.status == WRONG
    assert [line.split(":")[1].strip() for line in said.err.splitlines()] == ["broken", "orders"]


def test_no_queue_at_all_is_said(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DLQ_CONFIG", str(tmp_path))
    assert "no queue is configured" in run("status").err
    assert "no queue is configured" in run("ledger", "create").err


# The ledger


def test_ledgers_are_created_once(run: Run, config: Path) -> None:
    add_queue(config, "billing", ledger=f"sqlite:///{config}/other.db")
    add_queue(config, "users")
    said = run("ledger", "create", "--json")
    made = [json.loads(line) for line in said.out.splitlines()]
    assert [(one["created"], one["queues"]) for one in made] == [
        (True, ["billing"]),
        (True, ["orders", "users"]),
    ]
    assert len({one["ledger"] for one in made}) == 2
    with sqlite3.connect(config / "ledger.db") as ledger:
        assert ledger.execute("SELECT COUNT(*) FROM queue").fetchone() == (0,)

    again = [json.loads(line) for line in run("ledger", "create", "--json").out.splitlines()]
    assert [(one["created"], one["ledger"]) for one in again] == [(False, one["ledger"]) for one in made]
    assert "is there already" in run("ledger", "create", "orders").out


def test_a_ledgers_password_is_not_shown(run: Run, config: Path) -> None:
    add_queue(config, "orders", ledger="postgresql://me:hunter2@127.0.0.1:1/dlq")
    for arguments in (("ledger", "create"), ("status", "orders")):
        said = run(*arguments)
        assert said.status == REFUSED
        assert "hunter2" not in said.out + said.err


# Explain


def letter(**headers: bytes | None) -> bytes:
    pairs = tuple((name.replace("_", "-"), value) for name, value in headers.items())
    return exported(Stored(0, 7, b"k", b"{}", pairs, 1764000000000), "orders.dlq")


WORKFLOW = {
    "wf_error_type": b"RateLimit",
    "wf_error_message": b"HTTP 429 from upstream",
    "wf_component": b"payments.charge",
    "wf_stage": b"charge",
    "wf_attempts": b"3",
    "wf_origin_topic": b"orders",
    "wf_origin_partition": b"2",
    "wf_origin_offset": b"41",
    "wf_origin_timestamp": b"1763999999000",
    "correlation_id": b"c-1",
    "dedupe_key": b"d-1",
    "traceparent": b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    "retry_count": b"1",
}


def test_a_file_is_explained_line_by_line(run: Run, config: Path, tmp_path: Path) -> None:
    path = tmp_path / "letters.jsonl"
    sqs = {
        "transport": "sqs",
        "body": "{}",
        "attributes": {},
        "message_attributes": {"correlation-id": {"DataType": "String", "StringValue": "c-2"}},
    }
    path.write_bytes(letter(**WORKFLOW) + letter() + json.dumps(sqs).encode() + b"\n")
    said = run("explain", str(path))
    assert said.status == OK
    first, second, third = (json.loads(line) for line in said.out.splitlines())
    assert first.pop("fingerprint").startswith(f"{VERSION}:")
    assert first == {
        "format": "orchestrator",
        "origin": {
            "topic": "orders",
            "queue": None,
            "partition": 2,
            "offset": 41,
            "timestamp_ms": 1763999999000,
        },
        "failure": {
            "error_type": "RateLimit",
            "cause_type": None,
            "message": "HTTP 429 from upstream",
            "component": "payments.charge",
            "stage": "charge",
            "attempts": 3,
        },
        "correlation_id": "c-1",
        "trace_id": "0af7651916cd43dd8448eb211c80319c",
        "dedupe_key": "d-1",
        "pointer": None,
        "retry_count": 1,
        "category": "transient",
        "remedy": "retry",
        "rule": "rate limit",
        "why": "rule 'rate limit' matched exception (*RateLimit*)",
    }
    assert second["format"] == third["format"] == "unknown"
    assert set(second) == set(first) | {"fingerprint"}
    assert second["failure"] == dict.fromkeys(first["failure"])
    assert second["origin"] == {**dict.fromkeys(first["origin"]), "timestamp_ms": 1764000000000}
    assert second["retry_count"] is None
    assert third["correlation_id"] == "c-2"


def test_standard_input_is_explained(run: Run, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(letter(**WORKFLOW))))
    said = run("explain", "-")
    assert json.loads(said.out)["failure"]["error_type"] == "RateLimit"


def test_a_line_that_is_no_export_is_named(run: Run, config: Path, tmp_path: Path) -> None:
    path = tmp_path / "letters.jsonl"
    path.write_bytes(letter() + b'\n{"transport": "pigeon", "secret": "hunter2"}\n' + letter() + b"{")
    said = run("explain", str(path))
    assert said.status == WRONG
    assert len(said.out.splitlines()) == 2, "the others are explained all the same"
    assert f"{path}:3: its transport is neither" in said.err
    assert f"{path}:5: not JSON" in said.err
    assert "hunter2" not in said.err


def test_it_is_explained_as_a_queue_reads_it(run: Run, config: Path, tmp_path: Path) -> None:
    path = tmp_path / "letters.jsonl"
    path.write_bytes(exported(Stored(0, 7, b"k", b'{"order": {"id": "o-1"}}', (), None), "orders.dlq"))
    add_queue(config, "orders", dedupe_key="$.order.id")
    assert json.loads(run("explain", str(path), "--queue", "orders").out)["dedupe_key"] == "o-1"
    assert json.loads(run("explain", str(path)).out)["dedupe_key"] is None


def test_the_shipped_taxonomy_explains_where_nothing_is_configured(tmp_path: Path) -> None:
    """As a team runs it from the project's environment."""
    path = tmp_path / "letters.jsonl"
    path.write_bytes(letter(**WORKFLOW))
    environment = {k: v for k, v in os.environ.items() if k != "DLQ_CONFIG"}
    said = subprocess.run(
        [sys.executable, "-m", "dlq", "explain", str(path)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert json.loads(said.stdout)["category"] == "transient"


def test_a_taxonomy_of_ones_own_is_tried_on_exported_entries(run: Run, config: Path, tmp_path: Path) -> None:
    rule = {"name": "ours", "when": {"component": "payments.charge"}, "category": "manual", "remedy": "edit"}
    (config / "taxonomy.yaml").write_text(yaml.safe_dump({"rules": [rule]}))
    path = tmp_path / "letters.jsonl"
    path.write_bytes(letter(**WORKFLOW))
    assert json.loads(run("explain", str(path)).out)["rule"] == "ours"


# Hostile text

HOSTILE = "\x1b[2J\x1b]0;owned\x07 [bold]x[/bold] \u202egnp.exe\u200b\r\n:smile:"


def test_text_of_dead_letters_does_nothing_to_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.say(HOSTILE)
    terminal.show(HOSTILE, ["a"], [[HOSTILE]])
    terminal.complain(HOSTILE)
    terminal.warn(HOSTILE)
    said = capsys.readouterr()
    for text in (said.out, said.err):
        assert text
        assert not [c for c in text if not c.isprintable() and c != "\n"]
        assert "[bold]x[/bold]" in text
        assert ":smile:" in text


def test_a_payload_is_shown_escaped_and_capped() -> None:
    shown = escaped(HOSTILE.encode() + b"\xff\x00")
    assert shown.isprintable()
    assert shown.startswith("\\x1b[2J")
    assert shown.endswith("\\xff\\x00")
    assert escaped(None) == "null"
    assert escaped(b"") == ""
    assert escaped(b"a" * 5000).endswith("… (5,000 bytes)")
    assert escaped("ü€".encode()) == "ü€"
