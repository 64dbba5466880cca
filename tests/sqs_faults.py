"""What AWS does to its clients and an emulator does not: a proxy before an SQS server that injects faults.

It is a real HTTP server, so that the client's own retries, time-outs and parsing are part of what is tested. It reads
the JSON protocol of SQS (AWS JSON 1.0: the action is in ``X-Amz-Target``).
"""

from __future__ import annotations

import hashlib
import http.client
import json
import random
import socket
import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, NamedTuple, Self

HOST = "127.0.0.1"


class Answer(NamedTuple):
    status: int
    body: bytes
    error: str = ""
    """The code of the query protocol, which boto3 takes for the error's (``x-amzn-query-error``)."""


class Cut(Exception):
    """The connection ends without an answer."""


Forward = Callable[[Mapping[str, Any]], Answer]
"""Asks the server itself."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A client was killed."""


class SqsFaults:
    """The proxy; a context manager. Faults come by chance, by :meth:`next`, or not at all.

    :param port: of the SQS server on loopback.
    :param chances: how likely each fault is where it can happen, see :data:`FAULTS`.
    """

    def __init__(self, port: int, *, chances: Mapping[str, float] | None = None, seed: int = 0) -> None:
        self._port = port
        self._chances = dict(chances or {})
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._next: dict[str, deque[str]] = {}
        self._lent: deque[dict[str, Any]] = deque(maxlen=200)
        self._known: set[str] = set()
        self._deleted: deque[dict[str, Any]] = deque(maxlen=200)
        self._here = threading.local()
        self.first_sent = ""
        self.injected: Counter[str] = Counter()
        self.calls: list[tuple[str, dict[str, Any]]] = []
        """Each call's action and arguments, as the client made it."""
        self._server = _Server((HOST, 0), self._handler())
        self.endpoint = f"http://{HOST}:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True, name="sqs-faults").start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def next(self, *faults: str) -> None:
        """Inject these, one a call, from the next call on at which the first can happen; ``fine`` is none."""
        for fault in faults:
            self._next.setdefault(FAULTS[fault][0], deque()).append(fault)

    def quiet(self) -> None:
        """From now on all goes well."""
        with self._lock:
            self._chances.clear()
            self._next.clear()

    def of(self, action: str) -> list[dict[str, Any]]:
        """The arguments of each call of ``action`` so far."""
        with self._lock:
            return [arguments for name, arguments in self.calls if name == action]

    def _fault(self, action: str) -> str | None:
        with self._lock:
            waiting = self._next.get(action)
            if waiting:
                return waiting.popleft()
            for fault, chance in self._chances.items():
                if FAULTS[fault][0] == action and self._random.random() < chance:
                    return fault
        return None

    def _answer(self, action: str, body: bytes, headers: Mapping[str, str]) -> Answer:
        arguments = json.loads(body)
        with self._lock:
            self.calls.append((action, arguments))

        def forward(what: Mapping[str, Any]) -> Answer:
            found = self._ask(json.dumps(what).encode(), headers)
            self._remember(action, what, found)
            return found

        fault = self._fault(action)
        if fault is None:
            return forward(arguments)
        with self._lock:
            self.injected[fault] += 1
        return FAULTS[fault][1](self, arguments, forward)

    def _ask(self, body: bytes, headers: Mapping[str, str]) -> Answer:
        connection: http.client.HTTPConnection | None = getattr(self._here, "connection", None)
        if connection is None:
            connection = self._here.connection = http.client.HTTPConnection(HOST, self._port, timeout=30)
        passed = {k: v for k, v in headers.items() if k.lower() not in ("host", "content-length")}
        connection.request("POST", "/", body, passed)
        response = connection.getresponse()
        return Answer(response.status, response.read(), response.getheader("x-amzn-query-error") or "")

    def _remember(self, action: str, arguments: Mapping[str, Any], answer: Answer) -> None:
        if answer.status != 200:
            return
        with self._lock:
            if action == "ReceiveMessage":
                got = json.loads(answer.body).get("Messages") or []
                self._lent.extend(m for m in got if m["MessageId"] not in self._known)
                self._known.update(m["MessageId"] for m in got)
            elif action == "SendMessageBatch":
                sent = json.loads(answer.body)["Successful"]
                self.first_sent = self.first_sent or (sent[0]["MessageId"] if sent else "")
            elif action == "DeleteMessageBatch":
                gone = {e["ReceiptHandle"] for e in arguments["Entries"]}
                self._deleted.extend(m for m in self._lent if m["ReceiptHandle"] in gone)

    def some(self, kind: str, most: int = 2) -> list[dict[str, Any]]:
        """Messages that were ``lent`` or ``deleted`` before; each once, or a queue would never seem empty."""
        with self._lock:
            kept = self._lent if kind == "lent" else self._deleted
            return [kept.popleft() for _ in range(min(most, len(kept)))]

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                action = self.headers["X-Amz-Target"].rpartition(".")[2]
                try:
                    answer = proxy._answer(action, body, self.headers)
                except (Cut, OSError, http.client.HTTPException):
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                self.send_response(answer.status)
                self.send_header("Content-Type", "application/x-amz-json-1.0")
                self.send_header("Content-Length", str(len(answer.body)))
                if answer.error:
                    self.send_header("x-amzn-query-error", answer.error)
                self.end_headers()
                self.wfile.write(answer.body)

            def log_message(self, *_: object) -> None:
                """Nothing."""

        return Handler


def _lost(_: SqsFaults, arguments: Mapping[str, Any], forward: Forward) -> Answer:
    forward(arguments)
    raise Cut


def _unsent(_: SqsFaults, _arguments: Mapping[str, Any], _forward: Forward) -> Answer:
    raise Cut


def _throttled(_: SqsFaults, _arguments: Mapping[str, Any], _forward: Forward) -> Answer:
    body = {"__type": "com.amazonaws.sqs#RequestThrottled", "message": "slow down"}
    return Answer(400, json.dumps(body).encode(), "RequestThrottled;Sender")


def _denied(_: SqsFaults, _arguments: Mapping[str, Any], _forward: Forward) -> Answer:
    body = {"__type": "com.amazon.coral.service#AccessDeniedException", "Message": "not you"}
    return Answer(403, json.dumps(body).encode())


def _complained(_: SqsFaults, arguments: Mapping[str, Any], forward: Forward) -> Answer:
    """A call that carries the poisoned message is refused as a whole, without saying which it was."""
    if any("poison" in entry["MessageBody"] for entry in arguments["Entries"]):
        body = {"__type": "com.amazonaws.sqs#InvalidMessageContents", "message": "one of them"}
        return Answer(400, json.dumps(body).encode(), "InvalidMessageContents;Sender")
    return forward(arguments)


def _server_error(_: SqsFaults, arguments: Mapping[str, Any], forward: Forward) -> Answer:
    forward(arguments)
    return Answer(500, json.dumps({"__type": "com.amazonaws.sqs#InternalFailure"}).encode())


def _without_last(arguments: Mapping[str, Any], forward: Forward, failed: Mapping[str, Any] | None) -> Answer:
    """All but the last of a batch; ``failed`` is said of that one, or nothing."""
    *first, last = arguments["Entries"]
    found = json.loads(forward({**arguments, "Entries": first}).body) if first else {"Successful": []}
    if failed is not None:
        found["Failed"] = [*found.get("Failed", []), {"Id": last["Id"], **failed}]
    return Answer(200, json.dumps(found).encode())


def _sender_fault(_: SqsFaults, arguments: Mapping[str, Any], forward: Forward) -> Answer:
    return _without_last(arguments, forward, {"SenderFault": True, "Code": "InvalidMessageContents"})


def _service_fault(_: SqsFaults, arguments: Mapping[str, Any], forward: Forward) -> Answer:
    return _without_last(arguments, forward, {"SenderFault": False, "Code": "InternalError"})


def _unlisted_unsent(_: SqsFaults, arguments: Mapping[str, Any], forward: Forward) -> Answer:
    return _without_last(arguments, forward, None)


def _unlisted(_: SqsFaults, arguments: Mapping[str, Any], forward: Forward) -> Answer:
    found = json.loads(forward(arguments).body)
    last = arguments["Entries"][-1]["Id"]
    found["Successful"] = [s for s in found["Successful"] if s["Id"] != last]
    return Answer(200, json.dumps(found).encode())


def _other_sum(_: SqsFaults, arguments: Mapping[str, Any], forward: Forward) -> Answer:
    found = json.loads(forward(arguments).body)
    found["Successful"][-1]["MD5OfMessageBody"] = "0" * 32
    return Answer(200, json.dumps(found).encode())


def _swallowed(proxy: SqsFaults, arguments: Mapping[str, Any], forward: Forward) -> Answer:
    last = arguments["Entries"][-1]
    found = json.loads(_without_last(arguments, forward, None).body)
    body = hashlib.md5(last["MessageBody"].encode(), usedforsecurity=False).hexdigest()
    had = {"Id": last["Id"], "MessageId": proxy.first_sent, "MD5OfMessageBody": body}
    return Answer(200, json.dumps({**found, "Successful": [*found["Successful"], had]}).encode())


def _subset(_: SqsFaults, arguments: Mapping[str, Any], forward: Forward) -> Answer:
    return forward({**arguments, "MaxNumberOfMessages": 1})


def _empty(_: SqsFaults, _arguments: Mapping[str, Any], _forward: Forward) -> Answer:
    return Answer(200, b"{}")


def _again(kind: str) -> Callable[[SqsFaults, Mapping[str, Any], Forward], Answer]:
    def answer(proxy: SqsFaults, arguments: Mapping[str, Any], forward: Forward) -> Answer:
        more = proxy.some(kind)
        found = json.loads(forward(arguments).body)
        here = found.get("Messages") or []
        known = {m["MessageId"] for m in here}
        found["Messages"] = [*here, *(m for m in more if m["MessageId"] not in known)]
        return Answer(200, json.dumps(found).encode())

    return answer


def _damaged(_: SqsFaults, arguments: Mapping[str, Any], forward: Forward) -> Answer:
    found = json.loads(forward(arguments).body)
    for message in found.get("Messages") or []:
        message["Body"] += "?"
    return Answer(200, json.dumps(found).encode())


def _expired(_: SqsFaults, arguments: Mapping[str, Any], _forward: Forward) -> Answer:
    failed = [
        {"Id": e["Id"], "SenderFault": True, "Code": "ReceiptHandleIsInvalid"} for e in arguments["Entries"]
    ]
    return Answer(200, json.dumps({"Successful": [], "Failed": failed}).encode())


def _undeleted(_: SqsFaults, arguments: Mapping[str, Any], forward: Forward) -> Answer:
    return _without_last(arguments, forward, {"SenderFault": False, "Code": "InternalError"})


def _stale(_: SqsFaults, arguments: Mapping[str, Any], forward: Forward) -> Answer:
    found = json.loads(forward(arguments).body)
    counts = {k: "0" for k in found["Attributes"] if k.startswith("ApproximateNumberOfMessages")}
    found["Attributes"].update(counts)
    return Answer(200, json.dumps(found).encode())


def _fine(_: SqsFaults, arguments: Mapping[str, Any], forward: Forward) -> Answer:
    return forward(arguments)


FAULTS: Mapping[str, tuple[str, Callable[[SqsFaults, Mapping[str, Any], Forward], Answer]]] = {
    # sends
    "fine_send": ("SendMessageBatch", _fine),
    "lost": ("SendMessageBatch", _lost),  # taken, and no answer
    "unsent": ("SendMessageBatch", _unsent),  # not taken, and no answer
    "send_throttled": ("SendMessageBatch", _throttled),
    "send_denied": ("SendMessageBatch", _denied),
    "complained": ("SendMessageBatch", _complained),
    "send_500": ("SendMessageBatch", _server_error),  # taken, and an error for an answer
    "sender_fault": ("SendMessageBatch", _sender_fault),  # of the last of the batch
    "service_fault": ("SendMessageBatch", _service_fault),
    "unlisted": ("SendMessageBatch", _unlisted),  # taken, and in neither list
    "unlisted_unsent": ("SendMessageBatch", _unlisted_unsent),  # not taken, and in neither list
    "other_sum": ("SendMessageBatch", _other_sum),  # something was taken, with another body's sum
    "swallowed": ("SendMessageBatch", _swallowed),  # the last: its deduplication id was used before
    # receives
    "fine_receive": ("ReceiveMessage", _fine),
    "receive_throttled": ("ReceiveMessage", _throttled),
    "receive_lost": ("ReceiveMessage", _lost),  # in flight, and nobody has them
    "subset": ("ReceiveMessage", _subset),
    "empty": ("ReceiveMessage", _empty),
    "duplicate": ("ReceiveMessage", _again("lent")),  # delivered before, under its old handle
    "reappear": ("ReceiveMessage", _again("deleted")),
    "damaged": ("ReceiveMessage", _damaged),
    # deletes and counts
    "expired": ("DeleteMessageBatch", _expired),
    "undeleted": ("DeleteMessageBatch", _undeleted),
    "delete_lost": ("DeleteMessageBatch", _lost),
    "delete_throttled": ("DeleteMessageBatch", _throttled),
    "stale": ("GetQueueAttributes", _stale),
}
"""Each fault, the action it can happen to, and what it does."""

CAMPAIGN: Mapping[str, float] = {
    **dict.fromkeys(("lost", "unsent", "send_500", "unlisted", "unlisted_unsent", "sender_fault"), 0.01),
    **dict.fromkeys(("send_throttled", "service_fault"), 0.05),
    **dict.fromkeys(("receive_throttled", "receive_lost"), 0.002),
    **dict.fromkeys(("subset", "empty", "duplicate", "reappear"), 0.02),  # there are many polls
    **dict.fromkeys(("expired", "undeleted"), 0.05),
    **dict.fromkeys(("delete_lost", "delete_throttled"), 0.02),
    "stale": 0.1,
}
"""All at once, for long runs."""
