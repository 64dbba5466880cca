"""Entries on hold: until a time, or until a probe passes; a start probe keeps a whole drain from replaying."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.memory_rig import MemoryRig

from dlq import held, limits
from dlq.config import QueueConfig
from dlq.drain import Drain
from dlq.errors import ConfigError
from dlq.grouping.taxonomy import load_taxonomy
from dlq.orchestrator import Circuit, OrchestratorError, Plugin
from dlq.ports import Connection
from dlq.replay import drain_remaining, replay_canary
from dlq.report.write import build_report
from dlq.status import status
from dlq.triage import assign, categorize, choose_remedies

Make = Callable[..., MemoryRig]
Serve = Callable[[], "Server"]

PROBE = {"probe": {"http": {"connection": "target", "path": "/healthz"}}}


class Server:
    """A target's health, as it answers now."""

    def __init__(self) -> None:
        self.status = 503
        self.asked: list[tuple[str, str | None]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append((self.path, self.headers.get("authorization")))
                self.send_response(outer.status)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def connections(self, name: str) -> Connection:
        if name == "nowhere":
            raise ConfigError("Connection 'nowhere' is not defined")
        return Connection(name, "http", "127.0.0.1", self._server.server_address[1], None, None, "hunter2")

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.close()


@pytest.fixture
def rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Writes the taxonomy's rule for failures that are held, with this ``hold``."""
    folder = tmp_path / "rules"
    folder.mkdir()
    monkeypatch.setenv("DLQ_CONFIG", str(folder))

    def write(hold: str) -> None:
        (folder / "taxonomy.yaml").write_text(
            "rules:\n"
            f"  - {{name: psp is down, when: {{exception: PspDown}}, category: transient, remedy: hold{hold}}}\n"
            "  - {name: network, when: {exception: TransientNetwork}, category: transient, remedy: retry}\n"
        )

    return write


@pytest.fixture
def make(make_queue: Make, server: Server, rules: Callable[[str], None]) -> Make:
    """Makes queues of which ``PspDown`` is held, by the queue's ``hold``."""
    rules("")

    def made(**how: Any) -> MemoryRig:
        queue = make_queue(**how)
        queue.connections = server.connections
        queue.begin()
        queue.consumer()
        return queue

    return made


def next_drain(queue: MemoryRig, drain: Drain, run: str) -> Drain:
    queue.release(drain)
    return queue.taken(run=run)


def make_due(queue: MemoryRig) -> None:
    queue.write("UPDATE entry SET hold_until = '2020-01-01T00:00:00.000+00:00' WHERE hold_until IS NOT NULL")


def until(queue: MemoryRig) -> float:
    """Seconds from now to the next look."""
    at = queue.one("SELECT DISTINCT hold_until FROM entry WHERE reason = 'hold'")
    return (datetime.fromisoformat(at) - datetime.now(UTC)).total_seconds()


def said(queue: MemoryRig, stage: str = "hold") -> str:
    return queue.rows("SELECT text FROM event WHERE stage = :s ORDER BY id", s=stage)[-1].text


# Until a time


def test_held_for_a_time_they_go_when_it_is_over_and_not_before(make: Make) -> None:
    queue = make(hold={"for": "10m"})
    queue.put(4, "PspDown")
    queue.put(2)
    drain = queue.taken()
    assert queue.reasons() == {"hold": 4, "ready": 2}
    assert 595 < until(queue) <= 600
    assert drain_remaining(drain, 30)["replayed"] == 2
    assert queue.reasons() == {"hold": 4}

    drain = next_drain(queue, drain, "r2")
    assert queue.reasons() == {"hold": 4}
    make_due(queue)
    drain = next_drain(queue, drain, "r3")
    assert queue.reasons() == {"ready": 4}
    assert drain_remaining(drain, 30)["confirmed"] == 4
    assert queue.states() == {"confirmed": 6}
    queue.check()


def test_a_rules_own_hold_is_instead_of_the_queues(make: Make, rules: Callable[[str], None]) -> None:
    rules(", hold: {until: 2999-01-31T06:00:00Z}")
    queue = make(hold={"for": "10m"})
    queue.put(2, "PspDown")
    queue.taken()
    assert queue.one("SELECT DISTINCT hold_until FROM entry") == "2999-01-31T06:00:00.000+00:00"
    assert said(queue) == "2 entries are held until 2999-01-31T06:00:00.000+00:00"


def test_without_a_word_of_how_long_it_is_a_quarter_of_an_hour(make: Make) -> None:
    queue = make()
    queue.put(1, "PspDown")
    queue.taken()
    assert 895 < until(queue) <= 900


def test_what_came_back_is_held_twice_as_long(make: Make) -> None:
    queue = make(hold={"for": "10m"})
    queue.put(1, "PspDown")
    drain = queue.taken()
    queue.consumer(lambda _: True)
    make_due(queue)
    drain = next_drain(queue, drain, "r2")
    drain_remaining(drain, 30)
    assert queue.states() == {"returned": 1, "open": 1}
    queue.write(
        "UPDATE grp SET remedy = 'hold', rule = 'psp is down'"
    )  # its return, as the orchestrator would write it
    drain = next_drain(queue, drain, "r3")
    assert queue.reasons() == {"hold": 1}
    assert 1_195 < until(queue) <= 1_200


def test_assigning_again_does_not_put_a_hold_off(make: Make) -> None:
    queue = make(hold={"for": "10m"})
    queue.put(3, "PspDown")
    drain = queue.taken()
    before = queue.rows("SELECT id, reason, hold_until FROM entry")
    for _ in range(3):
        assign(drain)
    assert queue.rows("SELECT id, reason, hold_until FROM entry") == before


def test_what_is_held_needs_no_person_but_has_an_owner_in_the_end(make: Make) -> None:
    queue = make(hold={"for": "10m"})
    queue.put(3, "PspDown")
    chosen = choose_remedies(queue.taken())
    assert (chosen["branches"], chosen["said"]) == (["nothing_to_do"], "held: 3 entries")


# HTTP


def test_a_probe_that_fails_is_asked_again_later_and_later_and_frees_when_it_passes(
    make: Make, server: Server
) -> None:
    queue = make(hold=PROBE)
    queue.put(3, "PspDown")
    drain = queue.taken()
    assert server.asked == [("/healthz", "Bearer hunter2")]
    assert 55 < until(queue) <= 60
    assert said(queue).startswith(
        "GET /healthz of Connection target: 503, not 200: 3 entries are held, the next look"
    )

    drain_remaining(drain, 30)
    assert len(server.asked) == 1, "not due: nobody asks"
    for held_for, pause in ((300, 300), (90_000, 3_600)):
        queue.write(
            "UPDATE drain SET opened_at = :t", t=(datetime.now(UTC) - timedelta(seconds=held_for)).isoformat()
        )
        make_due(queue)
        assign(drain)
        assert pause - 5 < until(queue) <= pause + 5

    server.status = 200
    make_due(queue)
    drain = next_drain(queue, drain, "r2")
    assert queue.reasons() == {"ready": 3}
    assert said(queue) == "GET /healthz of Connection target: 200: 3 entries are free"
    drain_remaining(drain, 30)
    assert queue.states() == {"confirmed": 3}
    assert "hunter2" not in str(queue.rows("SELECT text, data FROM event"))
    queue.check()


def test_what_comes_while_others_are_held_waits_for_their_next_look(make: Make, server: Server) -> None:
    queue = make(hold=PROBE)
    queue.put(1, "PspDown")
    drain = queue.taken()
    queue.put(1, "PspDown")
    queue.take(drain)
    assign(drain)
    assert len(server.asked) == 1
    assert queue.one("SELECT COUNT(DISTINCT hold_until) FROM entry") == 1


def test_a_probe_that_can_not_be_asked_holds_and_says_why(make: Make, server: Server) -> None:
    queue = make(hold=PROBE)
    queue.put(1, "PspDown")
    server.close()
    queue.taken()
    assert queue.reasons() == {"hold": 1}
    assert said(queue).startswith(
        "GET /healthz of Connection target: no answer (ConnectError): 1 entries are held"
    )


def test_a_probe_without_its_connection_holds_and_names_it(make: Make) -> None:
    queue = make(hold={"probe": {"http": {"connection": "nowhere"}}})
    queue.put(1, "PspDown")
    queue.taken()
    assert queue.reasons() == {"hold": 1}
    assert "Connection 'nowhere' is not defined" in said(queue)


def test_a_redirect_is_no_passing_and_leads_nowhere(make: Make, server: Server) -> None:
    queue = make(hold=PROBE)
    queue.put(1, "PspDown")
    server.status = 302
    queue.taken()
    assert said(queue).startswith("GET /healthz of Connection target: 302, not 200")
    assert len(server.asked) == 1


def test_a_dead_letter_does_not_choose_what_is_asked(make: Make, server: Server) -> None:
    queue = make(hold=PROBE)
    headers = (("wf-error-type", b"PspDown"), ("wf-component", b"http://elsewhere/../x"), ("path", b"/admin"))
    queue.put(1, headers=headers)
    queue.taken()
    assert server.asked == [("/healthz", "Bearer hunter2")]


# A canary of one


def test_a_canary_of_one_frees_the_others_when_it_is_confirmed(make: Make) -> None:
    queue = make(hold={"probe": {"canary": True}})
    queue.put(5, "PspDown")
    drain = queue.taken()
    assert queue.delivered() == [], "what only looks sends nothing"
    done = drain_remaining(drain, 30)
    assert (done["replayed"], done["confirmed"]) == (5, 5)
    jobs = queue.rows("SELECT p.stage, j.size FROM job j JOIN plan p ON p.id = j.plan ORDER BY j.id")
    assert jobs[0].size == 1
    assert jobs[0].stage.startswith("hold:")
    assert said(queue) == "a canary decides; it passed: 4 entries are free"
    queue.check()


def test_a_canary_of_one_that_comes_back_holds_the_others(make: Make) -> None:
    queue = make(hold={"probe": {"canary": True}})
    queue.put(5, "PspDown")
    drain = queue.taken()
    queue.consumer(lambda _: True)
    assert drain_remaining(drain, 30)["replayed"] == 1
    assert len(queue.delivered()) == 1
    assert queue.reasons() == {"hold": 4, "returned": 1}
    assert 55 < until(queue) <= 60
    assert "it did not pass: 4 entries are held" in said(queue)
    queue.check()


def test_a_canary_that_could_not_be_sent_is_held_with_the_others_in_the_next_drain(make: Make) -> None:
    queue = make(hold={"probe": {"canary": True}})
    queue.topics.live = lambda: 0
    queue.topics.positions.clear()
    queue.put(3, "PspDown")
    drain = queue.taken()
    drain_remaining(drain, 30)
    assert queue.reasons() == {"hold": 2, "nobody_consumes": 1}
    next_drain(queue, drain, "r2")
    assert queue.reasons() == {"hold": 3}


# Circuits


def orchestrator(**circuits: Circuit | None) -> Any:
    plugins = [Plugin(name, "1", (), found, 1) for name, found in circuits.items() if found is not None]
    return SimpleNamespace(
        capabilities=lambda: frozenset({"plugins"}), plugins=lambda: plugins, close=lambda: None
    )


def ahead(seconds: float) -> int:
    return int((datetime.now(UTC).timestamp() + seconds) * 1000)


@pytest.mark.parametrize(
    ("circuit", "replayed", "words"),
    [
        (Circuit("closed"), 3, "the circuit of payments is closed: 3 entries are free"),
        (Circuit("open", ahead(7 * 86_400)), 0, "the circuit of payments is open until 2"),
        (Circuit("open"), 0, "the circuit of payments is open: 3 entries are held"),
        (Circuit("open", ahead(-1)), 3, "half open: a canary decides; it passed: 2 entries are free"),
        (Circuit("half_open"), 3, "half open: a canary decides; it passed: 2 entries are free"),
        (None, 0, "the orchestrator has no plugin 'payments'"),
    ],
)
def test_the_circuit_of_the_plugin_that_failed_decides(
    make: Make, rules: Callable[[str], None], circuit: Circuit | None, replayed: int, words: str
) -> None:
    rules(", hold: {probe: {circuit: true}}")
    queue = make()
    queue.put(3, "PspDown")
    drain = queue.open()
    drain.__dict__["orchestrator"] = orchestrator(payments=circuit, other=Circuit("closed"))
    queue.take(drain)
    done = drain_remaining(drain, 30)
    assert done["replayed"] == replayed
    assert words in said(queue)
    queue.check()


@pytest.mark.parametrize("broken", ["none", "level", "down"])
def test_a_circuit_nobody_can_tell_of_holds_and_says_so(
    make: Make, rules: Callable[[str], None], broken: str
) -> None:
    def down() -> Any:
        raise OrchestratorError("it is down")

    rules(", hold: {probe: {circuit: payments}}")
    queue = make()
    queue.put(1, "PspDown")
    drain = queue.open()
    client = orchestrator(payments=Circuit("closed"))
    if broken == "level":
        client.capabilities = lambda: frozenset({"outcome"})
    if broken == "down":
        client.capabilities = down
    drain.__dict__["orchestrator"] = None if broken == "none" else client
    queue.take(drain)
    assign(drain)
    assert queue.reasons() == {"hold": 1}
    words = {"none": "no orchestrator is configured", "level": "the level plugins", "down": "it is down"}
    assert words[broken] in said(queue)


# The start probe


def test_a_start_probe_that_fails_takes_into_custody_and_replays_nothing(make: Make, server: Server) -> None:
    queue = make(start_probe=PROBE["probe"])
    queue.put(3)
    queue.put(2, "PspDown")
    drain = queue.taken()
    why = "the start probe failed: GET /healthz of Connection target: 503, not 200"
    assert limits.forbids(drain) == why
    assert queue.reasons() == {"start_probe_failed": 3, "hold": 2}
    assert choose_remedies(drain)["said"] == "held: 5 entries"
    canary = replay_canary(drain, "retry_transient", 30)
    assert (canary["passed"], canary["jobs"]) == (False, [])
    assert drain_remaining(drain, 30)["why_stopped"] == why
    assert queue.delivered() == []
    assert why in "\n".join(n.text for n in build_report(drain).notes)

    server.status = 200
    drain = next_drain(queue, drain, "r2")
    assert queue.reasons() == {"ready": 3, "hold": 2}
    assert drain_remaining(drain, 30)["replayed"] == 3
    queue.check()


def test_a_start_probe_that_fails_again_leaves_the_reason(make: Make) -> None:
    queue = make(start_probe=PROBE["probe"])
    queue.put(3)
    drain = queue.taken()
    next_drain(queue, drain, "r2")
    assert queue.reasons() == {"start_probe_failed": 3}


def test_a_start_probe_without_its_connection_replays_nothing_and_says_so(make: Make) -> None:
    queue = make(start_probe={"http": {"connection": "nowhere"}})
    queue.put(1)
    assert "Connection 'nowhere' is not defined" in str(limits.forbids(queue.taken()))


def test_nothing_is_asked_nor_freed_while_nothing_may_be_replayed(make: Make, server: Server) -> None:
    queue = make(hold=PROBE)
    server.status = 200
    queue.put(1, "PspDown")
    drain = queue.open()
    queue.take(drain)
    drain.note("guard_data_loss", "over", next="invoke_dr_plan")
    categorize(drain)
    assert (server.asked, queue.reasons()) == ([], {"hold": 1})


# Looking


def test_a_status_and_a_report_say_what_is_held_until_when_and_why(make: Make, server: Server) -> None:
    queue = make(hold=PROBE)
    queue.put(3, "PspDown")
    drain = queue.taken()
    (found,) = status(queue.config, server.connections)["on_hold"]
    assert (found["entries"], found["error_type"]) == (3, "PspDown")
    assert found["until"] == queue.one("SELECT DISTINCT hold_until FROM entry")
    assert found["why"].startswith("GET /healthz of Connection target: 503, not 200")
    (still,) = build_report(drain).open
    assert (still.held_until, still.held_for) == (found["until"], found["why"])
    server.status = 200
    make_due(queue)
    assign(drain)
    assert status(queue.config, server.connections)["on_hold"] == []
    assert held.REASON not in queue.reasons()


# Files


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"hold": {}}, "write one of for: 10m"),
        ({"hold": {"for": "10m", "probe": {"canary": True}}}, "write one of for: 10m"),
        ({"hold": {"for": "soon"}}, "not a duration"),
        ({"hold": {"until": "2026-01-31T06:00:00"}}, "timezone"),
        ({"hold": {"probe": {}}}, "write one of http"),
        ({"hold": {"probe": {"http": {"connection": "x"}, "canary": True}}}, "write one of http"),
        ({"hold": {"probe": {"http": {"connection": "x", "path": "healthz"}}}}, "pattern"),
        ({"hold": {"probe": {"http": {"path": "/"}}}}, "Field required"),
        ({"hold": {"probe": {"circuit": "payments"}}}, r"hold.probe.circuit: no orchestrator is configured"),
        ({"start_probe": {"canary": True}}, "nothing has failed or been sent yet"),
        ({"start_probe": {"circuit": True}}, "nothing has failed or been sent yet"),
        ({"start_probe": {"circuit": "payments"}}, r"start_probe.circuit: no orchestrator is configured"),
        ({"limits": {"lag": 0}}, "greater than or equal to 100"),
    ],
)
def test_a_wrong_hold_is_refused_and_says_what_to_write(
    make_queue: Make, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        make_queue(**settings)


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (
            "remedy: retry, hold: {for: 1m}",
            "hold does not go with remedy retry; write remedy: hold, or remove it",
        ),
        ("remedy: hold, hold: {for: 1m, until: 2999-01-01T00:00:00Z}", "hold: write one of for: 10m"),
        ("remedy: hold, hold: {fro: 1m}", r"hold.fro: is not a field here; docs/taxonomy.md lists them"),
        (
            "remedy: hold, hold: {probe: {http: {connection: x, path: health}}}",
            "hold.probe.http.path: String should match pattern",
        ),
    ],
)
def test_a_rule_with_a_wrong_hold_is_named(tmp_path: Path, monkeypatch: Any, rule: str, words: str) -> None:
    monkeypatch.setenv("DLQ_CONFIG", str(tmp_path))
    (tmp_path / "taxonomy.yaml").write_text(
        f"rules: [{{name: psp, when: {{exception: X}}, category: transient, {rule}}}]"
    )
    with pytest.raises(ConfigError, match=rf"rule 'psp': .*{words}"):
        load_taxonomy()


def test_a_hold_is_frozen_with_the_drain(make: Make) -> None:
    config = make(hold={"for": "10m"}).config
    assert QueueConfig.thaw(config.frozen(), "d").hold == config.hold
    assert config.tighten({"batch": 10}).hold == config.hold
