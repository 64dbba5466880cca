"""A trace store, asked for the spans of one trace: Jaeger's query API (``GET /api/traces/{id}``, as of 1.76)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Self

import httpx
from pydantic import TypeAdapter, ValidationError

from dlq.connections import address
from dlq.errors import DlqError
from dlq.ports import Connection

_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Span:
    """One span of a trace; its status is an error only if it was set so."""

    name: str
    status: str
    attributes: Mapping[str, Any]


class TracesError(DlqError):
    """The trace store could not be asked; the message names the address and what to do."""


@dataclass(frozen=True)
class _Tag:
    key: str
    value: Any = None


@dataclass(frozen=True)
class _Span:
    operationName: str  # noqa: N815 - Jaeger's
    tags: list[_Tag]


@dataclass(frozen=True)
class _Trace:
    spans: list[_Span]


@dataclass(frozen=True)
class _Answer:
    data: list[_Trace] | None = None


class JaegerTraces:
    """A client; close it, or use ``with``."""

    def __init__(self, url: str, token: str | None = None) -> None:
        self.url = url
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._client = httpx.Client(base_url=url, headers=headers, timeout=_TIMEOUT_S)

    @classmethod
    def connect(cls, connection: Connection) -> Self:
        """From an Airflow Connection: host and port of the query API, a bearer token as password if it wants one.

        :raises ConfigError: it has no host.
        """
        return cls(address(connection), connection.password)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def spans(self, trace_id: str) -> list[Span]:
        """The spans that have arrived; none where the store doesn't know the trace (yet).

        :raises TracesError: it doesn't answer, or something else than it should.
        """
        where = f"GET {self.url}/api/traces/{trace_id}"
        try:
            answer = self._client.get(f"/api/traces/{trace_id}")
            if answer.status_code == HTTPStatus.NOT_FOUND:
                return []
            answer.raise_for_status()
            found = TypeAdapter(_Answer).validate_json(answer.content)
        except httpx.TransportError as error:
            raise TracesError(
                f"{where}: no answer ({type(error).__name__}); is the trace store up, and the Connection of "
                "`traces` right?"
            ) from None
        except httpx.HTTPStatusError as error:
            raise TracesError(
                f"{where}: {error.response.status_code}; is the Connection of `traces` right?"
            ) from None
        except ValidationError:
            raise TracesError(f"{where}: this is no answer of Jaeger's query API") from None
        return [_span(each) for trace in found.data or [] for each in trace.spans]


def _span(found: _Span) -> Span:
    tags = {tag.key: tag.value for tag in found.tags}
    failed = tags.get("error") is True or tags.get("otel.status_code") == "ERROR"
    return Span(found.operationName, "error" if failed else "ok", tags)
