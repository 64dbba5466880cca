"""A queue's own dedupe key: a path to it in the JSON value, as ``$.order.id`` or ``$.lines[0]['odd name']``."""

from __future__ import annotations

import re
from typing import Any

from dlq.envelopes import body
from dlq.envelopes.untrusted import encoded, identifier

_STEP = re.compile(r"""\.([A-Za-z_][\w-]*)|\[(\d{1,6})\]|\['([^']+)'\]|\["([^"]+)"\]""", re.ASCII)


class JsonPath:
    """A JSONPath (RFC 9535) that names one value: members and indexes only, so that a letter has one key or none.

    :raises ValueError: where it is none, with what to write.
    """

    def __init__(self, path: str) -> None:
        steps: list[str | int] = []
        at = 1
        while path.startswith("$") and (step := _STEP.match(path, at)) is not None:
            member, index, *quoted = step.groups()
            steps.append(int(index) if index is not None else member or next(filter(None, quoted)))
            at = step.end()
        if at != len(path) or not steps:
            raise ValueError(
                f"{path!r} names no single value; write it as $.order.id or $.lines[0]['odd name']"
            )
        self._steps = tuple(steps)

    def find(self, value: bytes | None) -> str | None:
        """The text or whole number there, as an id; None where there is none, or the value is not JSON."""
        return None if value is None else self.among(body.value(value))

    def among(self, found: Any) -> str | None:
        """The same, of a value that was read already."""
        for step in self._steps:
            if isinstance(step, int):
                found = found[step] if isinstance(found, list) and step < len(found) else None
            else:
                found = found.get(step) if isinstance(found, dict) else None
        return identifier(encoded(found))
