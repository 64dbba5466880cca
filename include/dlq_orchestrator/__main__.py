"""`python -m dlq_orchestrator`: run the reference orchestrator."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
from pathlib import Path

import structlog

from dlq_orchestrator.consumer import ConsumerFailed
from dlq_orchestrator.dead_letter import NotAcknowledged
from dlq_orchestrator.service import CannotStart, Settings, serve
from dlq_orchestrator.store import StateInUse


def main() -> int:
    arguments = _arguments()
    token = os.environ.get(arguments.token_env, "")
    if not token:
        return _fail(
            f"the environment variable {arguments.token_env} must hold the bearer token (--token-env)"
        )
    settings = Settings(
        bootstrap_servers=arguments.bootstrap_servers,
        origin_topic=arguments.origin_topic,
        dlq_topic=arguments.dlq_topic,
        group=arguments.group,
        state=arguments.state,
        token=token,
        host=arguments.host,
        port=arguments.port,
        time_limit_s=arguments.time_limit,
        backoff_base_s=arguments.backoff_base,
    )
    _log_to_stderr()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        serve(settings, stop, lambda url: print(f"ready {url}", flush=True))
    except (CannotStart, ConsumerFailed, NotAcknowledged, StateInUse) as error:
        return _fail(str(error))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="dlq-orchestrator",
        description="Runs workflows from a Kafka topic and dead-letters those that fail."
        " Prints one line, `ready URL`, when it consumes and answers; stops cleanly on SIGTERM.",
    )
    add = parser.add_argument
    add("--bootstrap-servers", required=True, help="Kafka, host:port[,host:port]")
    add("--origin-topic", required=True, help="where workflows come from")
    add("--dlq-topic", required=True, help="where failed ones go")
    add("--group", required=True, help="consumer group")
    add("--state", required=True, type=Path, help="folder of its memory; one process to a folder")
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    add("--port", default=0, type=int, help="port to listen on; 0 takes a free one (default)")
    add(
        "--token-env",
        default="DLQ_ORCHESTRATOR_TOKEN",
        help="variable with the bearer token (default: %(default)s)",
    )
    add("--time-limit", default=0.2, type=float, help="seconds a plugin call may take (default: %(default)s)")
    add(
        "--backoff-base",
        default=0.05,
        type=float,
        help="longest first wait between tries, seconds (default: %(default)s)",
    )
    return parser.parse_args()


def _fail(why: str) -> int:
    print(f"dlq-orchestrator: {why}", file=sys.stderr)
    return 1


def _log_to_stderr() -> None:
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.format_exc_info,
            structlog.processors.LogfmtRenderer(key_order=["timestamp", "level", "event"]),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


if __name__ == "__main__":
    sys.exit(main())
