"""CloudEvents, and what Knative adds to one that it could not deliver.

Sources: the CloudEvents 1.0 bindings (binary mode: attributes under ``ce_`` on Kafka, ``ce-`` over HTTP; structured
mode: one JSON object), and ``knative_error.go`` of knative/eventing. The error's data is the answer's body, often in
base64, cut at 1,024 bytes.
"""

from __future__ import annotations

import binascii
from base64 import b64decode
from collections.abc import Set as AbstractSet

from dlq.entry import Understood
from dlq.envelopes import body
from dlq.envelopes.letter import Letter
from dlq.envelopes.untrusted import identifier, iso, label, message, number

_PREFIXES = ("ce_", "ce-")
_ERROR = ("knativeerrordest", "knativeerrorcode", "knativeerrordata")
_CUT = 1024


def _plain(header: str) -> str:
    """An attribute's name as the specification has it: HTTP doesn't count case."""
    lower = header.lower()
    return lower[3:] if lower.startswith(_PREFIXES) else lower


class Knative:
    """A dead letter of a Knative broker, channel or trigger."""

    name = "knative"

    def owns(self, name: str) -> bool:
        """The three extensions, as headers with or without the prefix."""
        return _plain(name) in _ERROR

    def recognises(self, names: AbstractSet[str]) -> bool:
        """One of them is enough."""
        return any(map(self.owns, names))

    def read(self, letter: Letter) -> Understood:
        """The destination that refused is the failing component, its answer's status the error."""
        return _understood(self.name, _attributes(letter))


class CloudEvent:
    """An event of which no failure is told, or which tells it inside (structured mode)."""

    name = "cloudevents"

    def owns(self, _name: str) -> bool:
        """None: the attributes are the record's own."""
        return False

    def recognises(self, names: AbstractSet[str]) -> bool:
        """The two attributes that every event has, or a content type that may say so."""
        plain = {_plain(name) for name in names if name.lower().startswith(_PREFIXES)}
        return {"id", "source"} <= plain or any(name.lower() == "content-type" for name in names)

    def read(self, letter: Letter) -> Understood | None:
        """Its id and time; in structured mode also what Knative added."""
        kind = next((value for name, value in letter.last.items() if name.lower() == "content-type"), None)
        if kind is not None and kind.startswith(b"application/cloudevents+json"):
            inside = body.fields(letter.record.value)
            found = {name: text for name, raw in inside.items() if (text := body.text(raw)) is not None}
        else:
            found = _attributes(letter)
        if "id" not in found or "source" not in found:
            return None
        return _understood(self.name if found.keys().isdisjoint(_ERROR) else Knative.name, found)


def _attributes(letter: Letter) -> dict[str, bytes]:
    return {
        _plain(name): value
        for name, value in letter.last.items()
        if value is not None and name.lower().startswith((*_PREFIXES, "knative"))
    }


def _understood(name: str, attributes: dict[str, bytes]) -> Understood:
    get = attributes.get
    code = get("knativeerrorcode")
    status = number(code, 599)
    return Understood(
        name,
        label(code),
        None,
        message(_answer(get("knativeerrordata"))),
        label(get("knativeerrordest")),
        origin_timestamp_ms=iso(get("time")),
        correlation_id=identifier(get("id")),
        http_status=status if status is not None and status >= 400 else None,
    )


def _answer(data: bytes | None) -> bytes | None:
    """The error's data, out of base64 where it is text in it."""
    if data is None or (len(data) % 4 and len(data) != _CUT):
        return data
    try:
        plain = b64decode(data, validate=True)
        text = plain.decode("utf-8", "strict" if len(data) < _CUT else "ignore")
    except (binascii.Error, ValueError):
        return data
    return plain if text and all(c.isprintable() or c.isspace() for c in text) else data
