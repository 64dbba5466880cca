"""The parts put together: one process that consumes, routes and answers."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import uvicorn

from dlq_orchestrator import telemetry
from dlq_orchestrator.core.backoff import Backoff, RetryBudget
from dlq_orchestrator.core.calls import PluginCalls
from dlq_orchestrator.core.circuit import CircuitPolicy
from dlq_orchestrator.core.plugin_sandbox import PluginSandbox
from dlq_orchestrator.core.rate_limiter import RateLimiter
from dlq_orchestrator.core.registry import Registry
from dlq_orchestrator.core.workflow_safety import KEEP_S, WorkflowSafety
from dlq_orchestrator.http.app import create_app
from dlq_orchestrator.http.idempotency import Idempotency
from dlq_orchestrator.http.parts import Parts
from dlq_orchestrator.injection import InjectedFaults
from dlq_orchestrator.kafka import KafkaSettings, kafka_origin
from dlq_orchestrator.origin import CannotStart, Origin
from dlq_orchestrator.plugins import MANIFESTS, TOOLS
from dlq_orchestrator.replays import Replays
from dlq_orchestrator.runner import Runner
from dlq_orchestrator.sqs_consumer import SqsConsumer
from dlq_orchestrator.sqs_queue import SqsQueue, SqsSettings
from dlq_orchestrator.store import Store
from dlq_orchestrator.submission import Submission


@dataclass(frozen=True, slots=True)
class Settings:
    """What the command line sets. Times in seconds; `port` 0 takes a free one."""

    origin: KafkaSettings | SqsSettings
    state: Path
    token: str
    host: str = "127.0.0.1"
    port: int = 0
    time_limit_s: float = 0.2
    backoff_base_s: float = 0.05
    keep_s: float = KEEP_S
    fault_injection: bool = False


def serve(settings: Settings, stop: threading.Event, ready: Callable[[str], None]) -> None:
    """Run until `stop` is set; `ready` is called with the URL once it consumes and answers.

    :raises CannotStart: the origin, the DLQ or the port is not there.
    :raises StateInUse: another orchestrator works on the state folder.
    :raises ConsumerFailed, NotAcknowledged: the origin failed for good; a restart loses and doubles nothing.
    """
    store = Store(settings.state)
    try:
        _serve(settings, store, stop, ready)
    finally:
        store.close()


def _serve(settings: Settings, store: Store, stop: threading.Event, ready: Callable[[str], None]) -> None:
    limiter = RateLimiter(
        store,
        {name: manifest.memory_mb for name, manifest in MANIFESTS.items()},
        (f"{plugin}.{tool}" for plugin, tool in TOOLS),
    )
    registry = Registry(store, MANIFESTS)
    safety = WorkflowSafety(store, settings.keep_s)
    sandbox = PluginSandbox(TOOLS, settings.time_limit_s)
    faults = InjectedFaults(Random()) if settings.fault_injection else None  # noqa: S311 - which calls fail
    calls = PluginCalls(registry, limiter, sandbox, CircuitPolicy(), faults)
    runner = Runner(
        calls,
        safety,
        Backoff(base_s=settings.backoff_base_s),
        Random(),  # noqa: S311 - jitter
        RetryBudget(),
    )
    if isinstance(settings.origin, SqsSettings):
        queue = SqsQueue(settings.origin)
        origin = Origin(SqsConsumer(queue, runner, safety, calls, store), queue, routing=None)
    else:
        origin = kafka_origin(settings.origin, store, runner, safety, calls)
    parts = Parts(
        token=settings.token,
        safety=safety,
        limiter=limiter,
        registry=registry,
        calls=calls,
        routing=origin.routing,
        replays=Replays(store, origin.inlet),
        faults=faults,
        submission=Submission(origin.inlet, safety),
        idempotency=Idempotency(store),
        consumer=origin.consumer,
    )
    telemetry.observe(
        lambda: [
            (int(calls.circuit(p.name).state != "closed"), {"plugin": p.name}) for p in registry.plugins()
        ],
        lambda: [(q.rejected, {"plugin": q.plugin, "resource": q.resource}) for q in limiter.quotas()],
        lambda: [] if origin.routing is None else [(origin.routing.state().held, {})],
    )
    with origin.consumer, _listen(settings) as listener, sandbox:
        url = f"http://{settings.host}:{listener.getsockname()[1]}"
        server = uvicorn.Server(
            uvicorn.Config(
                create_app(parts),
                log_config=None,
                access_log=False,
                timeout_graceful_shutdown=2,
                lifespan="off",
            )
        )
        thread = threading.Thread(target=server.run, args=([listener],), name="http", daemon=True)
        thread.start()
        try:
            origin.consumer.run(stop, lambda: ready(url))
        finally:
            server.should_exit = True
            thread.join(5)


def _listen(settings: Settings) -> socket.socket:
    try:
        return socket.create_server((settings.host, settings.port))
    except OSError as error:
        raise CannotStart(
            f"cannot listen on {settings.host}:{settings.port} ({error.strerror}); choose another --port"
        ) from None
