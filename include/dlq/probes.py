"""Probes: whether a replay may be tried, asked of the world that it would go to."""

from __future__ import annotations

import time
from dataclasses import dataclass

import httpx

from dlq import clock
from dlq.config import HttpProbe, Probe
from dlq.connections import address
from dlq.drain import Drain
from dlq.errors import DlqError
from dlq.orchestrator import Plugin

_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Answer:
    """What a probe told; ``passed`` is None where only a canary can tell."""

    passed: bool | None
    said: str


def ask(drain: Drain, probe: Probe, plugin: str = "") -> Answer:
    """Ask once. What can't be asked has not passed, and says why.

    :param plugin: the one that failed, for a probe that asks for its circuit.
    """
    if probe.canary:
        return Answer(None, "a canary decides")
    try:
        if probe.http is not None:
            return _http(drain, probe.http)
        return _circuit(drain, plugin if probe.circuit is True else str(probe.circuit))
    except (DlqError, httpx.InvalidURL) as error:
        return Answer(False, f"{probe}: {error}")


def start_probe(drain: Drain) -> None:
    """Ask the queue's start probe, where it has one; where it fails :func:`dlq.limits.forbids` this drain's replays.

    A canary needs no word of its own here: every replay begins with one.
    """
    if (probe := drain.config.start_probe) is None or drain.kind == "restore":
        return
    answer = ask(drain, probe)
    passed = answer.passed is not False
    said = answer.said if passed else f"the start probe failed: {answer.said}"
    drain.note("start_probe", said, level="info" if passed else "warning", passed=passed, why=said)


def _http(drain: Drain, probe: HttpProbe) -> Answer:
    connection = drain.connections(probe.connection)
    asked = f"GET {probe.path} of Connection {probe.connection}"
    headers, auth = {}, None
    if connection.login:
        auth = (connection.login, connection.password or "")
    elif connection.password:
        headers["Authorization"] = f"Bearer {connection.password}"
    try:
        # The body is nobody's to read: only the status tells.
        with httpx.stream(
            "GET", address(connection) + probe.path, headers=headers, auth=auth, timeout=_TIMEOUT_S
        ) as response:
            status = response.status_code
    except httpx.HTTPError as error:
        return Answer(False, f"{asked}: no answer ({type(error).__name__})")
    if status != probe.expect:
        return Answer(False, f"{asked}: {status}, not {probe.expect}")
    return Answer(True, f"{asked}: {status}")


def _circuit(drain: Drain, plugin: str) -> Answer:
    if drain.orchestrator is None:
        return Answer(False, "circuits are not known: no orchestrator is configured")
    if "plugins" not in drain.orchestrator.capabilities():
        return Answer(False, "circuits are not known: the orchestrator doesn't offer the level plugins")
    found = next((p for p in drain.orchestrator.plugins() if p.name == plugin), None)
    if found is None:
        return Answer(False, f"the orchestrator has no plugin {plugin!r}")
    if found.disabled:
        return Answer(False, f"plugin {plugin} is disabled")
    if found.circuit.state == "closed":
        return Answer(True, f"the circuit of {plugin} is closed")
    if _lets_a_call_through(found):
        return Answer(None, f"the circuit of {plugin} is half open: a canary decides")
    until = clock.from_ms(found.circuit.until_ms)
    return Answer(False, f"the circuit of {plugin} is open" + (f" until {until}" if until else ""))


def _lets_a_call_through(plugin: Plugin) -> bool:
    """An open circuit whose time is over closes by a call only: where nobody makes one it would stay open for good."""
    until = plugin.circuit.until_ms
    return plugin.circuit.state == "half_open" or (until is not None and until <= time.time() * 1000)
