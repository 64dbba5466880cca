"""From an Airflow Connection to the core's."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from typing import Any

from airflow.sdk import Connection as AirflowConnection
from airflow.sdk.bases.hook import BaseHook
from airflow.sdk.exceptions import AirflowNotFoundException
from airflow.sdk.log import mask_secret

from dlq.errors import ConfigError
from dlq.ports import Connection, Connections

# Airflow's masker goes by names; it doesn't know these two of librdkafka's as secrets.
_SECRET_KEYS = ("ssl.key.pem", "sasl.oauthbearer.assertion.private.key.pem")


def connection(conn_id: str) -> Connection:
    """The Connection ``conn_id`` as Airflow resolves it: secrets backend, environment, database.

    :raises ConfigError: where there is none.
    """
    try:
        found = BaseHook.get_connection(conn_id)
    except AirflowNotFoundException:
        raise _absent(conn_id) from None
    return converted(found)


async def fetched(conn_ids: Iterable[str]) -> Connections:
    """Connections got ahead of time by a trigger, whose event loop must not wait; to be used in a thread."""
    found: dict[str, AirflowConnection] = {}
    for conn_id in conn_ids:
        with suppress(AirflowNotFoundException):
            found[conn_id] = await AirflowConnection.async_get(conn_id)

    def get(conn_id: str) -> Connection:
        if conn_id not in found:
            raise _absent(conn_id)
        return converted(found[conn_id])

    return get


def converted(found: AirflowConnection) -> Connection:
    """An Airflow Connection as the core's; a Kafka one with the token callbacks the provider makes for it."""
    extra = _kafka_settings(found) if found.conn_type == "kafka" else found.extra_dejson
    for key in _SECRET_KEYS:
        if key in extra:
            mask_secret(extra[key])
    return Connection(
        id=found.conn_id,
        conn_type=found.conn_type or "",
        host=found.host,
        port=found.port,
        schema=found.schema,
        login=found.login,
        password=found.password,
        extra=extra,
        aws=partial(_aws_client, found) if found.conn_type == "aws" else None,
    )


def _aws_client(found: AirflowConnection, service: str, config: Any) -> Any:
    """As the amazon provider's hook makes it: with roles, profiles and federated sign-on, but our own ``config``."""
    from airflow.providers.amazon.aws.hooks.base_aws import AwsBaseHook

    class Hook(AwsBaseHook):  # type: ignore[misc]
        def get_connection(self, _conn_id: str) -> AirflowConnection:  # type: ignore[override]
            return found

    return Hook(aws_conn_id=found.conn_id, client_type=service, config=config).get_client_type(config=config)


def _absent(conn_id: str) -> ConfigError:
    return ConfigError(
        f"Connection {conn_id!r} does not exist: create it under Admin > Connections, "
        f"or set AIRFLOW_CONN_{conn_id.upper()}"
    )


def _kafka_settings(found: AirflowConnection) -> dict[str, Any]:
    """The client settings the apache-kafka provider makes of its Connection.

    They have what the extra alone has not: callbacks named by path and allowed in ``[apache_kafka]``, and the
    tokens of Amazon MSK (IAM) and Google's managed Kafka. Its consumer hook would subscribe.

    :raises ConfigError: when the provider refuses the Connection.
    """
    from airflow.providers.apache.kafka.hooks.base import KafkaBaseHook

    class Settings(KafkaBaseHook):  # type: ignore[misc]
        def get_connection(self, _conn_id: str) -> AirflowConnection:  # type: ignore[override]
            return found

        def _get_client(self, config: dict[str, Any]) -> dict[str, Any]:
            return config

    try:
        settings: dict[str, Any] = Settings(kafka_config_id=found.conn_id).get_conn
    except ValueError as error:
        raise ConfigError(f"Connection {found.conn_id!r}: {error}") from None
    return settings
