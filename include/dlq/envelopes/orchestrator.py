"""The reference orchestrator's ``wf-*`` headers: text, numbers decimal; of a repeated one the last counts."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from dlq.entry import Understood
from dlq.envelopes.letter import Letter
from dlq.envelopes.untrusted import INT32, INT64, identifier, label, message, moment, number, topic

name = "orchestrator"

_FAILURE = frozenset(
    {"wf-error-type", "wf-error-message", "wf-component", "wf-stage", "wf-attempts", "wf-failed-at"}
)
_ORIGIN = frozenset({"wf-origin-topic", "wf-origin-partition", "wf-origin-offset", "wf-origin-timestamp"})


def recognises(names: AbstractSet[str]) -> bool:
    """Whether the orchestrator dead-lettered it: one failure or origin header is enough."""
    return not (_FAILURE | _ORIGIN).isdisjoint(names)


def owns(header: str) -> bool:
    """All under its prefix."""
    return header.startswith("wf-")


def read(letter: Letter) -> Understood:
    """The failure and the origin; a missing or broken header costs that field."""
    get = letter.last.get
    return Understood(
        name,
        label(get("wf-error-type")),
        None,
        message(get("wf-error-message")),
        label(get("wf-component")),
        label(get("wf-stage")),
        number(get("wf-attempts"), INT32),
        moment(get("wf-failed-at")),
        topic(get("wf-origin-topic")),
        number(get("wf-origin-partition"), INT32),
        number(get("wf-origin-offset"), INT64),
        moment(get("wf-origin-timestamp")),
        identifier(get("wf-consumer-group")),
    )
