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

from dlq_orchestrator import telemetry
from dlq_orchestrator.core.workflow_safety import KEEP_S
from dlq_orchestrator.dead_letter import NotAcknowledged
from dlq_orchestrator.kafka import KafkaSettings
from dlq_orchestrator.origin import CannotStart, ConsumerFailed
from dlq_orchestrator.service import Settings, serve
from dlq_orchestrator.sqs_queue import SqsSettings
from dlq_orchestrator.store import StateInUse


def main() -> int:
    arguments = _arguments()
    token = os.environ.get(arguments.token_env, "")
    if not token:
        return _fail(
            f"the environment variable {arguments.token_env} must hold the bearer token (--token-env)"
        )
    settings = Settings(
        origin=_origin(arguments),
        state=arguments.state,
        token=token,
        host=arguments.host,
        port=arguments.port,
        time_limit_s=arguments.time_limit,
        backoff_base_s=arguments.backoff_base,
        keep_s=arguments.keep_days * 86400.0,
        fault_injection=arguments.fault_injection,
    )
    _log_to_stderr()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        with telemetry.exported():
            serve(settings, stop, lambda url: print(f"ready {url}", flush=True))
    except (CannotStart, ConsumerFailed, NotAcknowledged, StateInUse) as error:
        return _fail(str(error))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="dlq-orchestrator",
        description="Runs workflows from a Kafka topic or an SQS queue, and has those that fail dead-lettered."
        " Prints one line, `ready URL`, when it consumes and answers; stops cleanly on SIGTERM.",
    )
    kafka = parser.add_argument_group("from Kafka: all four")
    kafka.add_argument("--bootstrap-servers", help="host:port[,host:port]")
    kafka.add_argument("--origin-topic", help="where workflows come from")
    kafka.add_argument("--dlq-topic", help="where failed ones go")
    kafka.add_argument("--group", help="consumer group")
    sqs = parser.add_argument_group(
        "from SQS",
        "Credentials come from the environment; failed workflows go where the queue's redrive policy says.",
    )
    sqs.add_argument("--origin-queue", help="where workflows come from: a queue's name or URL")
    sqs.add_argument("--endpoint-url", help="of an SQS other than AWS's own")
    sqs.add_argument("--region", help="the queue's (default: the environment's)")
    sqs.add_argument(
        "--wait",
        default=10,
        type=int,
        choices=range(1, 21),
        metavar="1…20",
        help="seconds a poll waits for messages, and a stop for the polls (default: %(default)s)",
    )
    add = parser.add_argument
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
    add(
        "--keep-days",
        default=KEEP_S / 86400,
        type=float,
        help="how long a workflow that is over is remembered; its record is run again after that"
        " (default: %(default).0f)",
    )
    add(
        "--fault-injection",
        action="store_true",
        help="let whoever has the token break plugin calls (level `faults`): for tests only",
    )
    arguments = parser.parse_args()
    if arguments.keep_days <= 0:
        parser.error("--keep-days must be more than 0")
    if (arguments.origin_queue is None) == (arguments.origin_topic is None):
        parser.error("name where workflows come from: either --origin-topic or --origin-queue")
    if arguments.origin_topic is not None:
        for name in ("bootstrap_servers", "dlq_topic", "group"):
            if getattr(arguments, name) is None:
                parser.error(f"--origin-topic needs --{name.replace('_', '-')} too")
    return arguments


def _origin(arguments: argparse.Namespace) -> KafkaSettings | SqsSettings:
    if arguments.origin_queue is not None:
        return SqsSettings(arguments.origin_queue, arguments.endpoint_url, arguments.region, arguments.wait)
    return KafkaSettings(
        arguments.bootstrap_servers, arguments.origin_topic, arguments.dlq_topic, arguments.group
    )


def _fail(why: str) -> int:
    print(f"dlq-orchestrator: {why}", file=sys.stderr)
    return 1


def _log_to_stderr() -> None:
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.format_exc_info,
            telemetry.correlated,
            telemetry.sent,
            structlog.processors.LogfmtRenderer(key_order=["timestamp", "level", "event"]),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


if __name__ == "__main__":
    sys.exit(main())
