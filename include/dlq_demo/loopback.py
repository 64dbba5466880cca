"""Ports on the loopback interface: a free one, or a clear word about who has the one that was asked for."""

from __future__ import annotations

import contextlib
import random
import socket

import psutil

from dlq_demo.process import ServiceError

HOST = "127.0.0.1"
# Not the shared generator: a test that seeds it would draw the same ports in every process.
_RANDOM = random.SystemRandom()


def free_ports(count: int) -> list[int]:
    """Distinct TCP ports that are free now.

    They are drawn from below the ranges that systems give to outgoing connections (Linux from 32768, others
    from 49152): a port the system itself picks may go to a client before a slow server gets to bind it.
    """
    ports: set[int] = set()
    while len(ports) < count:
        port = _RANDOM.randrange(15_000, 32_000)
        if is_free(port):
            ports.add(port)
    return list(ports)


def is_free(port: int) -> bool:
    """Whether a server could listen on ``port`` now. What only lingers in TIME_WAIT does not count."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def require_free(port: int, what: str) -> None:
    """Raise ServiceError that names ``port``, who listens on it (where that may be known) and what to do."""
    if is_free(port):
        return
    holder = "another program"
    with contextlib.suppress(psutil.Error):  # on some systems only root may ask
        for connection in psutil.net_connections("tcp"):
            listens = connection.status == psutil.CONN_LISTEN and connection.laddr[1:2] == (port,)
            if listens and connection.pid:
                holder = f"process {connection.pid} ({psutil.Process(connection.pid).name()})"
                break
    raise ServiceError(f"{what}: port {port} is taken by {holder}. Stop it, or choose another port.")
