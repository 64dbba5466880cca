"""Clients of AWS services: where and as whom the Connection says, how they retry and wait is ours.

boto3's own retries double what is not idempotent without a trace, and its time-outs are a minute.
"""

from __future__ import annotations

import functools
import threading
from http import HTTPStatus
from typing import Any

import boto3
import botocore.session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from dlq.errors import ConfigError
from dlq.ports import Connection

CONNECT_S = 3.0
ANSWER_S = 10.0
LONG_POLL_S = 20
"""The longest a receive may wait (SQS's own bound)."""

_POOL = 32
_MAKING = threading.Lock()  # a session makes one client at a time
_THROTTLES = {"OverLimit", "RequestLimitExceeded", "LimitExceededException", "SlowDown"}


def client(connection: Connection, service: str, *, once: bool = False) -> Any:
    """A client of ``service``.

    :param once: every call is made once: for sending, where a lost answer must not become a second message.
    :raises ConfigError: when the Connection can't be used.
    """
    config = Config(
        connect_timeout=CONNECT_S,
        read_timeout=ANSWER_S if once else LONG_POLL_S + ANSWER_S,
        retries={"total_max_attempts": 1} if once else {"total_max_attempts": 4, "mode": "standard"},
        max_pool_connections=_POOL,
        # Each call would do both anew, a tenth of its time. The service checks the same; CloudTrail shows the name.
        parameter_validation=False,
        user_agent=_user_agent(),
    )
    try:
        if connection.aws is not None:
            return connection.aws(service, config)
        return _alone(connection, service, config)
    except (BotoCoreError, ValueError) as error:
        raise ConfigError(
            f"Connection {connection.id}: no {service} client can be made: {error}; its extra may name region_name, "
            "endpoint_url and profile_name"
        ) from error


def _alone(connection: Connection, service: str, config: Config) -> Any:
    """Without Airflow: keys from login and password, or what boto3 finds by itself."""
    extra = dict(connection.extra)
    if "role_arn" in extra:
        raise ConfigError(
            f"Connection {connection.id}: role_arn is taken inside Airflow only; on the command line name a "
            "profile_name of ~/.aws/config that has it"
        )
    endpoint = (extra.get("service_config", {}).get(service, {}) or {}).get("endpoint_url")
    with _MAKING:
        session = _session(
            connection.login or None,
            connection.password or None,
            extra.get("aws_session_token"),
            extra.get("region_name"),
            extra.get("profile_name"),
        )
        return session.client(service, endpoint_url=endpoint or extra.get("endpoint_url"), config=config)


@functools.cache
def _session(
    key: str | None, secret: str | None, token: str | None, region: str | None, profile: str | None
) -> boto3.Session:
    """One for all clients of the same keys: each reads the services' descriptions anew, 0.1 s of CPU."""
    return boto3.Session(key, secret, token, region, profile_name=profile)


@functools.cache
def _user_agent() -> str:
    return f"{botocore.session.Session().user_agent()} dlq-runbook"


def code(error: ClientError) -> str:
    """The service's error code, such as ``AccessDenied``."""
    return str(error.response.get("Error", {}).get("Code", "Unknown"))


def throttled(error: ClientError) -> bool:
    """Whether the service asks to wait: it did nothing, and nothing is wrong with the call."""
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    found = code(error)
    return status == HTTPStatus.TOO_MANY_REQUESTS or "Throttl" in found or found in _THROTTLES


def reason(error: BaseException) -> str:
    """What went wrong, without the request's contents."""
    if isinstance(error, ClientError):
        found = error.response.get("Error", {})
        return f"{found.get('Code', 'Unknown')}: {found.get('Message', '')}".strip(": ")
    return f"{type(error).__name__}: {error}"
