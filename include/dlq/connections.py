"""Connections without Airflow: from the environment variables by which Airflow takes them too, and what is in them.

``AIRFLOW_CONN_<ID>`` holds JSON or a URI; both are read as Airflow reads them, so that one setting serves the Dags and
the command line. What lies in a secrets backend or in Airflow's database is not seen here.
https://airflow.apache.org/docs/apache-airflow/stable/howto/connection.html#storing-connections-in-environment-variables
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from dlq.errors import ConfigError
from dlq.ports import Connection

_FIELDS = ("conn_type", "host", "port", "schema", "login", "password", "extra", "description")
_EXTRA = "__extra__"  # the query key under which a URI carries an extra that is not flat


def from_environment(conn_id: str) -> Connection:
    """The Connection ``conn_id``.

    :raises ConfigError: naming the variable, where it is not set or can't be read. Its value is never shown.
    """
    variable = f"AIRFLOW_CONN_{conn_id.upper()}"
    value = os.environ.get(variable, "").strip()
    if not value:
        raise ConfigError(
            f"Connection {conn_id!r}: environment variable {variable} is not set; the command line looks only there. "
            f"""For Kafka: {variable}='{{"conn_type": "kafka", "extra": {{"bootstrap.servers": "broker:9092"}}}}'"""
        )
    return (
        _from_json(conn_id, variable, value) if value.startswith("{") else _from_uri(conn_id, variable, value)
    )


def _from_json(conn_id: str, variable: str, value: str) -> Connection:
    try:
        found = json.loads(value)
    except ValueError as error:
        # The decoder's own message quotes nothing; it gives the place.
        raise ConfigError(f"{variable}: not JSON: {error}; mind the shell's quotes") from None
    if unknown := sorted(found.keys() - set(_FIELDS)):
        raise ConfigError(f"{variable}: unknown key(s) {', '.join(unknown)}; known: {', '.join(_FIELDS)}")
    for key in ("conn_type", "host", "schema", "login", "password"):
        if not isinstance(found.get(key), (str, type(None))):
            raise ConfigError(f"{variable}: {key} is no text; put it in quotes")
    port = found.get("port") or None
    try:
        port = None if port is None else int(port)
    except (TypeError, ValueError):
        raise ConfigError(f"{variable}: port is no number") from None
    return Connection(
        conn_id,
        _conn_type(found.get("conn_type")),
        found.get("host"),
        port,
        found.get("schema"),
        found.get("login"),
        found.get("password"),
        _extra(variable, found.get("extra")),
    )


def _from_uri(conn_id: str, variable: str, value: str) -> Connection:
    """``type://login:password@host:port/schema?key=value``, each part percent-encoded.

    A host may have a protocol of its own: ``http://https://host``.
    """
    conn_type, separator, rest = value.partition("://")
    if not separator:
        raise ConfigError(
            f"{variable}: neither JSON nor a URI; write {{…}} or type://login:password@host:port/schema?key=value"
        )
    protocol = ""
    if "://" in rest.partition("?")[0]:
        protocol, _, rest = rest.partition("://")
    try:
        parts = urlsplit(f"//{rest}")
        port = parts.port
    except ValueError:
        raise ConfigError(
            f"{variable}: its host and port can't be read; percent-encode what is special in a URI"
        ) from None
    host = _host(parts)
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    return Connection(
        conn_id,
        _conn_type(conn_type),
        f"{protocol}://{host}" if protocol and host else host,
        port,
        unquote(parts.path[1:]) or None,
        None if parts.username is None else unquote(parts.username),
        None if parts.password is None else unquote(parts.password),
        _extra(variable, query.get(_EXTRA, query)),
    )


def _host(parts: SplitResult) -> str | None:
    """The host; in lower case, unless it is no host's name but an address with a path in it."""
    host = unquote(parts.hostname or "")
    if "/" in host:
        host = unquote(parts.netloc.rpartition("@")[2].partition(":")[0])
    return host or None


def _conn_type(given: str | None) -> str:
    """Airflow writes ``google_cloud`` as ``google-cloud`` in a URI, and knows ``postgresql`` as ``postgres``."""
    found = (given or "").replace("-", "_")
    return "postgres" if found == "postgresql" else found


def _extra(variable: str, given: Any) -> Mapping[str, Any]:
    if isinstance(given, str):
        try:
            given = json.loads(given or "{}")
        except ValueError as error:
            raise ConfigError(f"{variable}: its extra is not JSON: {error}") from None
    if not isinstance(given, (dict, type(None))):
        raise ConfigError(f"{variable}: its extra is no JSON object")
    return given or {}


def address(connection: Connection) -> str:
    """The base URL of an HTTP Connection, whose host may have a scheme.

    :raises ConfigError: it has no host.
    """
    host = connection.host
    if not host:
        raise ConfigError(
            f"Connection {connection.id}: host must be set, and port where it is not the scheme's own"
        )
    if "://" not in host:
        host = f"{connection.schema or 'http'}://{host}"
    return f"{host.rstrip('/')}:{connection.port}" if connection.port else host.rstrip("/")
