"""Reaching the people a queue's file names, through Apprise and an Airflow Connection of type ``apprise``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from dlq.errors import ConfigError
from dlq.ports import Connection
from dlq.redact import redact

if TYPE_CHECKING:
    from dlq.drain import Drain

_TITLE, _BODY = 200, 2_000


def notify(drain: Drain, title: str, body: str) -> tuple[bool, str]:
    """Tell the queue's people; returns whether anybody was reached, and how that went in words.

    Never raises: a notification that fails is said, and stops no drain. Both texts are redacted.
    """
    if drain.config.notify is None:
        return False, "not delivered: notify is not configured in the queue's file"
    if drain.dry_run:
        return (
            False,
            f"dry run: {drain.config.notify.connection} would have been told: {redact(title)[:_TITLE]}",
        )
    try:
        urls = service_urls(drain.connections(drain.config.notify.connection))
        return _send(urls, redact(title)[:_TITLE], redact(body)[:_BODY])
    except ConfigError as error:
        return False, f"not delivered: {error}"
    except Exception as error:  # noqa: BLE001 - whatever a service's plugin raises, the drain goes on
        return False, f"not delivered: {type(error).__name__}: {redact(str(error))[:200]}"


def service_urls(connection: Connection) -> list[str]:
    """The Apprise URLs of a Connection: ``{"path": url}``, or a list of such, in ``extra.config``.

    That is where Airflow's provider keeps them. Without it, one URL as its password or host will do.

    :raises ConfigError: naming the field and the fix.
    """
    config: Any = connection.extra.get("config")
    if isinstance(config, str):
        try:
            config = json.loads(config)
        except ValueError:
            raise ConfigError(_wrong(connection, "is not JSON")) from None
    if config is None:
        url = next((u for u in (connection.password, connection.host) if u and "://" in u), None)
        if url is None:
            raise ConfigError(_wrong(connection, "is missing"))
        return [url]
    services = config if isinstance(config, list) else [config]
    if not services or not all(isinstance(s, dict) and isinstance(s.get("path"), str) for s in services):
        raise ConfigError(_wrong(connection, "has no path"))
    return [service["path"] for service in services]


def _wrong(connection: Connection, what: str) -> str:
    return (
        f'Connection {connection.id}: extra.config {what}; write {{"config": {{"path": "<an Apprise URL>"}}}}'
    )


def _send(urls: list[str], title: str, body: str) -> tuple[bool, str]:
    import apprise

    reached: list[str] = []
    missed: list[str] = []
    for position, url in enumerate(urls, 1):
        # One at a time, so that one that fails doesn't make all look undelivered. A URL holds its service's
        # secret: it is never shown.
        service = apprise.Apprise()
        if not service.add(url):
            missed.append(f"service {position} (its URL is not one Apprise knows)")
            continue
        name = f"{service[0].service_name} {position}"
        told = service.notify(title=title, body=body, body_format=apprise.NotifyFormat.TEXT)
        (reached if told else missed).append(name)
    said = []
    if reached:
        said.append(f"delivered to {', '.join(reached)}")
    if missed:
        said.append(f"not delivered to {', '.join(missed)}")
    return bool(reached), "; ".join(said)
