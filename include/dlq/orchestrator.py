"""The orchestrator of a queue's workflows, as the drain knows it: somebody else's program, behind HTTP.

The contract is docs/orchestrator.md. It comes in levels; ask :meth:`Orchestrator.capabilities` first, and
leave out, saying so, what a missing level makes impossible.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Annotated, Any, Literal, Protocol, Self, TypeVar
from urllib.parse import quote

import httpx
import stamina
from pydantic import Field, TypeAdapter, ValidationError

from dlq import telemetry
from dlq.errors import ConfigError, DlqError

Level = Literal["outcome", "failures", "replay", "routing", "quotas", "plugins", "debugger", "faults"]

_MAJOR = "1"
_AT_ONCE = 1000
_TRIES_S = 15.0


@dataclass(frozen=True)
class OutcomeState:
    """What became of one replay, by the value of its header ``dlq-key``.

    ``succeeded`` is final. ``failed``: its newest run failed, and the dead letter of that is in the DLQ.
    ``pending``: being run. ``unknown``: not read yet, or never sent: neither success nor failure.
    """

    state: Literal["succeeded", "failed", "pending", "unknown"]
    failed_at_ms: Annotated[int | None, Field(validation_alias="failed_at")] = None


@dataclass(frozen=True)
class StepState:
    """One step of a workflow; ``attempts`` counts its tries over all runs."""

    name: str
    plugin: str
    tool: str
    state: Literal["succeeded", "failed"]
    attempts: int
    output: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class WorkflowFailure:
    """Why a workflow's newest run failed; holds no payload, but is untrusted text."""

    error_type: str
    message: str
    component: str
    stage: str
    attempts: int
    failed_at_ms: Annotated[int, Field(validation_alias="failed_at")]


@dataclass(frozen=True)
class FailedWorkflow(WorkflowFailure):
    """A workflow whose newest run failed, for dead letters that don't say why."""

    workflow: str | None = None
    trace_id: str | None = None
    retry_count: int = 0


@dataclass(frozen=True)
class WorkflowState:
    """A workflow as its newest run left it; steps not reached are not listed."""

    correlation_id: str
    state: Literal["pending", "succeeded", "failed"]
    workflow: str | None = None
    retry_count: int = 0
    trace_id: str | None = None
    duplicate_of: str | None = None
    steps: tuple[StepState, ...] = ()
    failure: WorkflowFailure | None = None


@dataclass(frozen=True)
class SuccessRate:
    """Distinct workflows that ended within the window, by their last state."""

    succeeded: int
    failed: int
    total: int
    window_s: int

    @property
    def rate(self) -> float | None:
        """Succeeded ÷ total; None where nothing ended."""
        return self.succeeded / self.total if self.total else None


@dataclass(frozen=True)
class RoutingLease:
    """Whether failures are dead-lettered, and who paused that until when (epoch ms).

    ``held`` failures wait, durably, for the lease's end; ``undeliverable`` ones are kept because the DLQ
    takes no record of their size.
    """

    mode: Literal["auto", "paused"]
    holder: str | None = None
    until_ms: Annotated[int | None, Field(validation_alias="until")] = None
    held: int = 0
    undeliverable: int = 0

    @property
    def paused(self) -> bool:
        return self.mode == "paused"


@dataclass(frozen=True)
class Quota:
    """What a plugin, a tool (``payments.charge``) or a tenant (``tenant:acme``) may use; ``plugin`` names it and
    ``resource`` the unit. ``peak_need`` is the most that was asked for.
    """

    plugin: str
    resource: str
    limit: int
    ceiling: int
    peak_need: int = 0
    rejected: int = 0


@dataclass(frozen=True)
class Replay:
    """A workflow to be run again. ``key`` is the header ``dlq-key`` its outcome is asked for by: the same key is put
    into the origin once. ``value`` replaces the record's (an approved edit); ``headers`` are ours (``dlq-…``).
    """

    correlation_id: str
    key: str
    retry_count: int
    value: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Replayed:
    """What the orchestrator said to a :class:`Replay`; ``why`` it refused is a short code."""

    state: Literal["accepted", "refused"]
    why: str | None = None


@dataclass(frozen=True)
class Circuit:
    """A plugin's circuit breaker; an open one lets a probe through from ``until_ms`` (epoch) on."""

    state: Literal["closed", "open", "half_open"]
    until_ms: Annotated[int | None, Field(validation_alias="until")] = None


@dataclass(frozen=True)
class Violation:
    """Calls of a plugin that reached for a scope it doesn't declare."""

    scope: str
    count: int
    last_at_ms: Annotated[int | None, Field(validation_alias="last_at")] = None


@dataclass(frozen=True)
class Plugin:
    """A plugin as it runs now. ``grantable`` scopes may be declared, beside those that are; ``revision`` counts its
    changes, whoever made them.
    """

    name: str
    version: str
    scopes: tuple[str, ...]
    circuit: Circuit
    revision: int
    versions: tuple[str, ...] = ()
    grantable: tuple[str, ...] = ()
    disabled: bool = False
    violations: tuple[Violation, ...] = ()


@dataclass(frozen=True)
class PluginPatch:
    """A change of a plugin, made by a named person (or policy) for a reason, of the revision that was looked at."""

    revision: int
    person: str
    reason: str
    scopes: tuple[str, ...] | None = None
    version: str | None = None
    disabled: bool | None = None


class OrchestratorError(DlqError):
    """The orchestrator could not do what was asked; the message names the address and what to do."""


class OrchestratorUnreachable(OrchestratorError):
    """No answer, or only 5xx, after some tries: a later try may help."""


class OrchestratorBusy(OrchestratorUnreachable):
    """It asks to be left alone (429, or 503 with Retry-After), for :attr:`retry_after_s` seconds where it says so."""

    def __init__(self, message: str, retry_after_s: float | None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class OrchestratorUnauthorized(OrchestratorError):
    """The token was refused. A retry can't heal it."""


class ContractBroken(OrchestratorError):
    """The answer is not what the contract says. A retry can't heal it."""


class CapabilityMissing(OrchestratorError):
    """The orchestrator doesn't keep that level of the contract; :attr:`level` names it."""

    def __init__(self, url: str, level: Level) -> None:
        super().__init__(
            f"The orchestrator at {url} doesn't offer the level {level!r} of the contract: ask "
            "capabilities() first and leave the stage out, or add the level there (docs/orchestrator.md)."
        )
        self.level = level


class RoutingHeld(OrchestratorError):
    """Another holder's routing lease is live; it ends by itself."""


class AboveCeiling(OrchestratorError):
    """The limit asked for is above the quota's ceiling, :attr:`ceiling`. A retry can't heal it."""

    def __init__(self, message: str, ceiling: int) -> None:
        super().__init__(message)
        self.ceiling = ceiling


class PluginChanged(OrchestratorError):
    """The plugin was changed since it was looked at: look again."""


class Orchestrator(Protocol):
    """What the drain asks of an orchestrator. Every call may raise `OrchestratorError`.

    Levels: *outcome* (outcomes, submit_workflow, workflow, success_rate), *failures*, *replay*, *routing*, *quotas*,
    *plugins*, *faults*; a call of a level that is not offered raises `CapabilityMissing`.
    """

    def capabilities(self) -> frozenset[str]:
        """The levels offered now."""

    def outcomes(self, keys: Sequence[str]) -> dict[str, OutcomeState]:
        """What became of the replays with these keys (header ``dlq-key``): one state for each."""

    def submit_workflow(self, document: Mapping[str, Any], correlation_id: str) -> None:
        """Have a workflow run, under this correlation id; repeating the call does not run it again."""

    def workflow(self, correlation_id: str) -> WorkflowState | None:
        """A workflow's state; None where it was never seen."""

    def failures(self, correlation_ids: Sequence[str]) -> dict[str, FailedWorkflow]:
        """Those of the workflows whose newest run failed, and why; what is left out is not known to have failed."""

    def success_rate(self, window_s: int) -> SuccessRate:
        """How many workflows ended well in the last ``window_s`` seconds."""

    def routing(self) -> RoutingLease:
        """Whether failures are dead-lettered now."""

    def pause_routing(self, holder: str, seconds: int) -> RoutingLease:
        """Hold failures, those of replays excepted, for at least so many seconds from now; again: extend it.

        :raises RoutingHeld: another holder's lease is live.
        """

    def resume_routing(self, holder: str) -> RoutingLease:
        """End one's own pause. Not paused: nothing to do.

        :raises RoutingHeld: another holder's lease is live.
        """

    def quotas(self) -> list[Quota]:
        """The plugins' quotas."""

    def set_quota(self, plugin: str, limit: int, idempotency_key: str, resource: str = "memory_mb") -> Quota:
        """Change a limit of a plugin, tool or tenant for the next call on.

        :raises AboveCeiling: the orchestrator doesn't allow so much.
        """

    def replay_workflows(self, replays: Sequence[Replay]) -> dict[str, Replayed]:
        """Have workflows run again; an answer for each key. A repeated key is not put in twice."""

    def plugins(self) -> list[Plugin]:
        """The plugins as they run now."""

    def patch_plugin(self, name: str, patch: PluginPatch, idempotency_key: str) -> Plugin:
        """Change a plugin for its next call on.

        :raises PluginChanged: it is not at the revision the patch was made for.
        """

    def inject_fault(self, name: str, plugin: str, error: str, seconds: float) -> None:
        """Have every call of a plugin fail with ``error``, for so long at most; in place of a fault of that name."""

    def end_fault(self, name: str) -> None:
        """End a fault. None of that name: nothing to do."""

    def close(self) -> None: ...


class HttpConnection(Protocol):
    """The fields of an Airflow HTTP Connection; `dlq.ports.Connection` has them."""

    @property
    def id(self) -> str: ...
    @property
    def schema(self) -> str | None: ...
    @property
    def host(self) -> str | None: ...
    @property
    def port(self) -> int | None: ...
    @property
    def password(self) -> str | None: ...


def address(connection: HttpConnection) -> str:
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
    def connect(cls, connection: HttpConnection) -> Self:
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
