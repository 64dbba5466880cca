"""Acknowledging a queue's alerts: a silence in Alertmanager that ends with the drain.

API: https://github.com/prometheus/alertmanager/blob/main/api/v2/openapi.yaml
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import httpx
from sqlalchemy.exc import SQLAlchemyError

from dlq.config import AlertsRef
from dlq.errors import ConfigError, DlqError
from dlq.ports import Connection
from dlq.redact import redact

if TYPE_CHECKING:
    from dlq.drain import Drain

_AUTHOR = "dlq-runbook"
_TIMEOUT_S = 10.0
_NOT_CONFIGURED = "no alert is acknowledged: alerts is not configured in the queue's file"


def acknowledge_alert(drain: Drain) -> dict[str, Any]:
    """Silence exactly the alerts ``alerts.matchers`` names, until the drain's budget is up.

    Never raises: an alert that can't be acknowledged is said, and the drain goes on. Asked again, it finds
    its own silence. Returns ``acknowledged``, the ``silence``'s id or None, and ``said``.
    """
    alerts = drain.config.alerts
    if alerts is None:
        return _told(drain, "acknowledge_alert", _NOT_CONFIGURED)
    until = datetime.now(UTC) + timedelta(seconds=drain.config.limits.budget)
    if drain.dry_run:
        said = f"dry run: alerts with {_named(alerts)} would be silenced until {_clock(until)}"
        return _told(drain, "acknowledge_alert", said)

    def acknowledge(client: httpx.Client) -> tuple[str, str]:
        wanted = {
            "matchers": [
                {"name": name, "value": value, "isRegex": False, "isEqual": True}
                for name, value in sorted(alerts.matchers.items())
            ],
            "startsAt": datetime.now(UTC).isoformat(),
            "endsAt": until.isoformat(),
            "createdBy": _AUTHOR,
            "comment": _comment(drain),
        }
        mine = _own_silences(client, drain)
        if mine:  # extended in place, as long as its matchers and start stay
            wanted |= {"id": mine[0]["id"], "startsAt": mine[0]["startsAt"]}
        firing = len(_ask(client, "GET", "/api/v2/alerts", params={"filter": _filters(alerts)}))
        silence = str(_ask(client, "POST", "/api/v2/silences", json=wanted)["silenceID"])
        state = "stay silenced" if mine else "are silenced"
        return silence, f"{firing} alert(s) with {_named(alerts)} {state} until {_clock(until)} ({silence})"

    return _tried(drain, alerts, "acknowledge_alert", acknowledge)


def end_acknowledgement(drain: Drain) -> dict[str, Any]:
    """Expire this drain's silence: what is still wrong alerts again. Never raises; doing it twice is fine."""
    alerts = drain.config.alerts
    if alerts is None:
        return {"acknowledged": False, "silence": None, "said": _NOT_CONFIGURED}
    if drain.dry_run:
        return _told(drain, "end_acknowledgement", "dry run: no silence was made, none is ended")

    def end(client: httpx.Client) -> tuple[None, str]:
        mine = _own_silences(client, drain)
        for silence in mine:
            _ask(client, "DELETE", f"/api/v2/silence/{silence['id']}")
        return (
            None,
            f"alerts with {_named(alerts)} may fire again" if mine else "no silence of this drain is left",
        )

    return _tried(drain, alerts, "end_acknowledgement", end)


def _tried(
    drain: Drain, alerts: AlertsRef, stage: str, step: Callable[[httpx.Client], tuple[str | None, str]]
) -> dict[str, Any]:
    try:
        with _client(drain.connections(alerts.connection)) as client:
            silence, said = step(client)
    except (DlqError, httpx.HTTPError, httpx.InvalidURL, KeyError, TypeError, ValueError) as error:
        why = redact(str(error) or type(error).__name__)[:300]
        return _told(drain, stage, f"Alertmanager ({alerts.connection}) did not do it: {why}", failed=True)
    return _told(drain, stage, said, silence=silence)


def _told(
    drain: Drain, stage: str, said: str, *, silence: str | None = None, failed: bool = False
) -> dict[str, Any]:
    outcome = {"acknowledged": silence is not None, "silence": silence}
    try:
        drain.note(stage, said, level="warning" if failed else "info", **outcome)
    except (DlqError, SQLAlchemyError) as error:
        said = f"{said}; the ledger did not take the note: {type(error).__name__}"
    return {**outcome, "said": said}


@contextmanager
def _client(connection: Connection) -> Iterator[httpx.Client]:
    if not connection.host:
        raise ConfigError(f"Connection {connection.id}: host must be set to Alertmanager's address")
    host = connection.host.rstrip("/")
    if "://" not in host:
        host = f"{connection.schema or 'http'}://{host}"
    url = f"{host}:{connection.port}" if connection.port else host
    auth = httpx.BasicAuth(connection.login, connection.password or "") if connection.login else None
    bearer = (
        {"Authorization": f"Bearer {connection.password}"} if connection.password and auth is None else {}
    )
    with httpx.Client(base_url=url, auth=auth, headers=bearer, timeout=_TIMEOUT_S) as client:
        yield client


def _ask(client: httpx.Client, method: str, path: str, **arguments: Any) -> Any:
    answer = client.request(method, path, **arguments)
    if answer.is_error:
        raise DlqError(f"{method} {path}: HTTP {answer.status_code} {answer.text[:200]}")
    return answer.json() if answer.content else None


def _own_silences(client: httpx.Client, drain: Drain) -> list[dict[str, Any]]:
    """This drain's silences that are not over, told by their comment."""
    comment = _comment(drain)
    return [
        silence
        for silence in _ask(client, "GET", "/api/v2/silences")
        if silence["comment"] == comment and silence["status"]["state"] in ("active", "pending")
    ]


def _comment(drain: Drain) -> str:
    return f"drain {drain.id} is working on queue {drain.queue}"


def _filters(alerts: AlertsRef) -> list[str]:
    def quoted(text: str) -> str:
        escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        return f'"{escaped}"'

    return [f"{name}={quoted(value)}" for name, value in sorted(alerts.matchers.items())]


def _named(alerts: AlertsRef) -> str:
    return ", ".join(f"{name}={value}" for name, value in sorted(alerts.matchers.items()))


def _clock(at: datetime) -> str:
    return f"{at:%H:%M} UTC"
