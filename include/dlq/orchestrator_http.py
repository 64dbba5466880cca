"""The client of an orchestrator behind the HTTP contract."""

from __future__ import annotations

import base64
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any, Self, TypeVar
from urllib.parse import quote

import httpx
import stamina
from pydantic import TypeAdapter, ValidationError

from dlq import telemetry
from dlq.connections import address
from dlq.errors import ConfigError
from dlq.orchestrator import (
    AboveCeiling,
    CapabilityMissing,
    ContractBroken,
    FailedWorkflow,
    Level,
    OrchestratorBusy,
    OrchestratorError,
    OrchestratorUnauthorized,
    OrchestratorUnreachable,
    OutcomeState,
    Plugin,
    PluginChanged,
    PluginPatch,
    Quota,
    Replay,
    Replayed,
    RoutingHeld,
    RoutingLease,
    SuccessRate,
    WorkflowState,
)
from dlq.ports import Connection

_MAJOR = "1"
_AT_ONCE = 1000
_TRIES_S = 15.0

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class _Capabilities:
    version: str
    levels: frozenset[str]


@dataclass(frozen=True)
class _Outcomes:
    outcomes: dict[str, OutcomeState]


@dataclass(frozen=True)
class _Failures:
    failures: dict[str, FailedWorkflow | None]


@dataclass(frozen=True)
class _Quotas:
    quotas: list[Quota]


@dataclass(frozen=True)
class _Replays:
    replays: dict[str, Replayed]


@dataclass(frozen=True)
class _Plugins:
    plugins: list[Plugin]
    next: str | None = None


class HttpOrchestrator:
    """An orchestrator behind its HTTP contract.

    Every call of the contract may be repeated, so each is tried up to 6 times within 15 s on connection
    errors, 429 and 5xx; a Retry-After is waited for where the 15 s allow it (else: `OrchestratorBusy`).

    :param base_url: scheme, host and port.
    :param token: the bearer token.
    :param timeout: seconds for one try.
    :param connection_id: the Airflow Connection the two came from, for messages.
    """

    def __init__(
        self, base_url: str, token: str, timeout: float = 10.0, *, connection_id: str | None = None
    ) -> None:
        self.url = base_url.rstrip("/")
        self._connection = f"Connection {connection_id}" if connection_id else "Connection"
        self._levels: frozenset[str] | None = None
        self._client = httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {token}"},
            timeout=timeout,
            event_hooks={"request": [lambda request: request.headers.update(telemetry.headers())]},
        )

    @classmethod
    def connect(cls, connection: Connection) -> Self:
        """From an Airflow Connection: host (with or without scheme), port, and the token as password.

        :raises ConfigError: host or password is missing.
        """
        missing = [name for name in ("host", "password") if not getattr(connection, name)]
        if missing:
            raise ConfigError(
                f"Connection {connection.id}: {' and '.join(missing)} must be set; it needs the "
                "orchestrator's address as host and port, and its bearer token as password."
            )
        return cls(address(connection), connection.password or "", connection_id=connection.id)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._client.close()

    def capabilities(self) -> frozenset[str]:
        found = self._ask(_Capabilities, "GET", "/capabilities")
        if found.version.split(".")[0] != _MAJOR:
            raise ContractBroken(
                f"The orchestrator at {self.url} speaks version {found.version} of the contract, this "
                f"bundle version {_MAJOR}: use matching versions."
            )
        self._levels = found.levels
        return found.levels

    def outcomes(self, keys: Sequence[str]) -> dict[str, OutcomeState]:
        self._need("outcome")
        found: dict[str, OutcomeState] = {}
        for first in range(0, len(keys), _AT_ONCE):
            some = list(keys[first : first + _AT_ONCE])
            answer = self._ask(_Outcomes, "POST", "/v1/outcomes", json={"keys": some}).outcomes
            if silent := [key for key in some if key not in answer]:
                raise ContractBroken(
                    f"{self.url}/v1/outcomes left out {len(silent)} of {len(some)} keys: each needs a "
                    "state, `unknown` where there is none."
                )
            found |= {key: answer[key] for key in some}
        return found

    def submit_workflow(self, document: Mapping[str, Any], correlation_id: str) -> None:
        self._need("outcome")
        self._request(
            "POST",
            "/v1/workflows",
            json={**document, "correlation_id": correlation_id},
            headers={"Idempotency-Key": f"submit {correlation_id}"},
        )

    def workflow(self, correlation_id: str) -> WorkflowState | None:
        self._need("outcome")
        path = f"/v1/workflows/{quote(correlation_id, safe='')}"
        response = self._request("GET", path, accept=HTTPStatus.NOT_FOUND)
        return None if response.status_code == HTTPStatus.NOT_FOUND else self._read(WorkflowState, response)

    def failures(self, correlation_ids: Sequence[str]) -> dict[str, FailedWorkflow]:
        self._need("failures")
        found: dict[str, FailedWorkflow] = {}
        for first in range(0, len(correlation_ids), _AT_ONCE):
            some = list(correlation_ids[first : first + _AT_ONCE])
            answer = self._ask(_Failures, "POST", "/v1/failures", json={"correlation_ids": some}).failures
            found |= {each: failed for each in some if (failed := answer.get(each)) is not None}
        return found

    def success_rate(self, window_s: int) -> SuccessRate:
        self._need("outcome")
        return self._ask(SuccessRate, "GET", "/v1/success-rate", params={"window": window_s})

    def routing(self) -> RoutingLease:
        self._need("routing")
        return self._ask(RoutingLease, "GET", "/v1/routing")

    def pause_routing(self, holder: str, seconds: int) -> RoutingLease:
        self._need("routing")
        return self._ask(
            RoutingLease, "POST", "/v1/routing/pause", json={"holder": holder, "seconds": seconds}
        )

    def resume_routing(self, holder: str) -> RoutingLease:
        self._need("routing")
        return self._ask(RoutingLease, "POST", "/v1/routing/resume", json={"holder": holder})

    def quotas(self) -> list[Quota]:
        self._need("quotas")
        return self._ask(_Quotas, "GET", "/v1/quotas").quotas

    def set_quota(self, plugin: str, limit: int, idempotency_key: str, resource: str = "memory_mb") -> Quota:
        self._need("quotas")
        path = f"/v1/quotas/{quote(plugin, safe='')}"
        new = {"limit": limit, "resource": resource}
        return self._ask(Quota, "PUT", path, json=new, headers={"Idempotency-Key": idempotency_key})

    def replay_workflows(self, replays: Sequence[Replay]) -> dict[str, Replayed]:
        self._need("replay")
        found: dict[str, Replayed] = {}
        for first in range(0, len(replays), _AT_ONCE):
            some = replays[first : first + _AT_ONCE]
            answer = self._ask(
                _Replays, "POST", "/v1/replays", json={"replays": [_replay_document(each) for each in some]}
            ).replays
            if silent := [each for each in some if each.key not in answer]:
                raise ContractBroken(
                    f"{self.url}/v1/replays left out {len(silent)} of {len(some)} keys: each needs a state."
                )
            found |= {each.key: answer[each.key] for each in some}
        return found

    def plugins(self) -> list[Plugin]:
        self._need("plugins")
        found: list[Plugin] = []
        cursor: str | None = ""
        while cursor is not None:
            page = self._ask(_Plugins, "GET", "/v1/plugins", params={"cursor": cursor} if cursor else {})
            found += page.plugins
            cursor = page.next
        return found

    def patch_plugin(self, name: str, patch: PluginPatch, idempotency_key: str) -> Plugin:
        self._need("plugins")
        change = {key: value for key, value in asdict(patch).items() if value is not None}
        path = f"/v1/plugins/{quote(name, safe='')}"
        return self._ask(Plugin, "PATCH", path, json=change, headers={"Idempotency-Key": idempotency_key})

    def inject_fault(self, name: str, plugin: str, error: str, seconds: float) -> None:
        self._need("faults")
        new = {"plugin": plugin, "error": error, "share": 1.0, "seconds": seconds}
        self._request("PUT", f"/v1/faults/{quote(name, safe='')}", json=new)

    def end_fault(self, name: str) -> None:
        self._need("faults")
        self._request("DELETE", f"/v1/faults/{quote(name, safe='')}")

    def _need(self, level: Level) -> None:
        levels = self._levels if self._levels is not None else self.capabilities()
        if level not in levels:
            raise CapabilityMissing(self.url, level)

    def _ask(self, kind: type[Answer], method: str, path: str, **request: Any) -> Answer:
        return self._read(kind, self._request(method, path, **request))

    def _request(
        self, method: str, path: str, *, accept: int | None = None, **request: Any
    ) -> httpx.Response:
        where = f"{method} {self.url}{path}"
        give_up = time.monotonic() + _TRIES_S
        try:
            for attempt in stamina.retry_context(
                on=lambda error: _may_heal(error, give_up),
                attempts=6,
                timeout=_TRIES_S,
                wait_initial=0.2,
                wait_max=3.0,
            ):
                with attempt:
                    response = self._client.request(method, path, **request)
                    if response.status_code != accept:
                        response.raise_for_status()
        except httpx.TransportError as error:
            raise OrchestratorUnreachable(
                f"{where}: no answer ({type(error).__name__}: {error}). Is the orchestrator running? Check "
                f"host and port of the {self._connection}."
            ) from None
        except httpx.HTTPStatusError as error:
            raise self._refusal(where, error.response) from None
        return response

    def _refusal(self, where: str, response: httpx.Response) -> OrchestratorError:
        status = response.status_code
        try:
            problem = response.json()
        except ValueError:
            problem = None
        if not isinstance(problem, dict):
            problem = {}
        said = f"{where}: {status}, {problem.get('detail') or response.reason_phrase}."
        if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            return OrchestratorUnauthorized(
                f"{said} Put the orchestrator's token into the password of the {self._connection}."
            )
        after_s = _retry_after_s(response)
        if status == HTTPStatus.TOO_MANY_REQUESTS or (
            status == HTTPStatus.SERVICE_UNAVAILABLE and after_s is not None
        ):
            when = "later" if after_s is None else f"in {after_s:.0f} s"
            return OrchestratorBusy(f"{said} It asks to be tried again {when}.", after_s)
        if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            return OrchestratorUnreachable(f"{said} Its log says why; a later try may help.")
        if status == HTTPStatus.CONFLICT and "/routing/" in where:
            return RoutingHeld(f"{said} Wait for the lease's end, or have its holder resume.")
        if status == HTTPStatus.CONFLICT and "/plugins/" in where:
            return PluginChanged(f"{said} Look at the plugin again, and decide anew.")
        if isinstance(ceiling := problem.get("ceiling"), int):
            return AboveCeiling(
                f"{said} Ask for less, or have the orchestrator's owner raise the ceiling.", ceiling
            )
        return OrchestratorError(f"{said} What was asked is not what the orchestrator takes.")

    def _read(self, kind: type[Answer], response: httpx.Response) -> Answer:
        try:
            return TypeAdapter(kind).validate_json(response.content)
        except ValidationError as error:
            # not str(error): it quotes the answer, in which outputs may stand
            fields = ", ".join(
                f"{'.'.join(map(str, e['loc'])) or 'body'} ({e['type']})" for e in error.errors()
            )
            raise ContractBroken(
                f"{response.request.method} {response.request.url}: the answer is not what the contract "
                f"says: {fields}. See docs/orchestrator.md."
            ) from None


def _replay_document(replay: Replay) -> dict[str, Any]:
    overrides: dict[str, Any] = {"retry_count": replay.retry_count}
    if replay.value is not None:
        overrides["value"] = base64.b64encode(replay.value).decode()
    if replay.headers:
        overrides["headers"] = dict(replay.headers)
    return {"correlation_id": replay.correlation_id, "key": replay.key, "overrides": overrides}


def _may_heal(error: Exception, give_up: float) -> bool | float:
    """Whether another try may help, or in how many seconds the next one is to be; none past ``give_up`` (monotonic)."""
    if not isinstance(error, httpx.HTTPStatusError):
        return isinstance(error, httpx.TransportError)
    status = error.response.status_code
    if status != HTTPStatus.TOO_MANY_REQUESTS and status < HTTPStatus.INTERNAL_SERVER_ERROR:
        return False
    after_s = _retry_after_s(error.response)
    if after_s is None:
        return True
    return after_s if time.monotonic() + after_s < give_up else False


def _retry_after_s(response: httpx.Response) -> float | None:
    """The header Retry-After in seconds from now (RFC 9110: their number, or a date); None where it says nothing."""
    said = response.headers.get("retry-after", "").strip()
    if said.isascii() and said.isdigit():
        return float(said[:9])
    try:
        at = parsedate_to_datetime(said)
    except ValueError:
        return None
    if at.tzinfo is None:
        at = at.replace(tzinfo=UTC)
    return max(0.0, (at - datetime.now(UTC)).total_seconds())
