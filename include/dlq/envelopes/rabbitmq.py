"""RabbitMQ's dead letters, bridged in with their headers; and those that Spring AMQP republishes.

Sources: ``mc.erl`` and ``mc_amqpl.erl`` of RabbitMQ 4, ``RepublishMessageRecoverer`` of Spring AMQP. ``x-death`` is a
list, the latest death first: bridges write it as JSON, or as Java prints a list of maps. The reason is one of
``rejected``, ``expired``, ``maxlen`` and ``delivery_limit``.
"""

from __future__ import annotations

import re
from collections.abc import Set as AbstractSet

from dlq.entry import Understood
from dlq.envelopes import body, trace
from dlq.envelopes.letter import Letter
from dlq.envelopes.untrusted import INT32, encoded, identifier, label, message, number

name = "rabbitmq"

_DEATH = ("x-death", "x-first-death-", "x-last-death-")
_REPUBLISHED = (
    "x-original-exchange",
    "x-original-routingKey",
    "x-exception-message",
    "x-exception-stacktrace",
)
_PRINTED = re.compile(rb"\b(queue|reason|count)=([^,}\]]{0,256})")


def owns(header: str) -> bool:
    """The deaths, and what republishing adds."""
    return header.startswith(_DEATH) or header in _REPUBLISHED


def recognises(names: AbstractSet[str]) -> bool:
    """A death, or an exchange the message was republished from."""
    return "x-original-exchange" in names or any(each.startswith(_DEATH) for each in names)


def read(letter: Letter) -> Understood:
    """The queue of the first death is where it came from, the reason of the latest why it is here."""
    get = letter.last.get
    latest, oldest = _deaths(get("x-death"))
    chain = trace.causes(get("x-exception-stacktrace"))
    reason = get("x-last-death-reason") or latest.get("reason") or get("x-first-death-reason")
    return Understood(
        name,
        label(reason),
        trace.telling(chain),
        message(get("x-exception-message")),
        attempts=number(latest.get("count"), INT32),
        causes=chain,
        origin_queue=identifier(get("x-first-death-queue") or oldest.get("queue")),
    )


def _deaths(raw: bytes | None) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """The latest death and the oldest, of each its queue, reason and count."""
    if raw is None:
        return {}, {}
    found = body.value(raw)
    if isinstance(found, dict):
        found = [found]
    if isinstance(found, list):
        tables = [table for table in found if isinstance(table, dict)] or [{}]
        return _table(tables[0]), _table(tables[-1])
    printed = [table for text in raw[:65_536].split(b"}") if (table := _printed(text))] or [{}]
    return printed[0], printed[-1]


def _table(table: dict[str, object]) -> dict[str, bytes]:
    return {
        each: text for each in ("queue", "reason", "count") if (text := encoded(table.get(each))) is not None
    }


def _printed(text: bytes) -> dict[str, bytes]:
    return {found[1].decode(): found[2].strip() for found in _PRINTED.finditer(text)}
