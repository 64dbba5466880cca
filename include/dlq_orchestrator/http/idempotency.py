"""`Idempotency-Key`: a change asked for twice under one key is made once, and answered the same."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Annotated, TypeVar

from fastapi import Header
from pydantic import BaseModel

from dlq_orchestrator.store import Store

IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=200,
        description="The same key with the same request is answered as before, and changes nothing more.",
    ),
]

_KEPT_MS = 24 * 3600 * 1000

Answer = TypeVar("Answer", bound=BaseModel)


class KeyReused(Exception):
    """The key was used for another request."""


class KeyInUse(Exception):
    """The first request under this key has not been answered yet."""


class Idempotency:
    """Remembers the answers of requests that changed something, for a day."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def once(
        self, key: str | None, request: str, answer_type: type[Answer], change: Callable[[], Answer]
    ) -> Answer:
        """Make a change, or give the answer it had under this key. A change that fails leaves no trace.

        :param request: what was asked, in full; another request under the same key is refused.
        :raises KeyReused, KeyInUse: see there.
        """
        if key is None:
            return change()
        fingerprint = hashlib.sha256(request.encode()).hexdigest()
        with self._store.transaction() as db:
            now = self._store.now_ms()
            db.execute("DELETE FROM idempotency WHERE at < ?", [now - _KEPT_MS])
            row = db.execute("SELECT request, answer FROM idempotency WHERE key = ?", [key]).fetchone()
            if row is None:
                db.execute("INSERT INTO idempotency VALUES (?, ?, NULL, ?)", [key, fingerprint, now])
        if row is not None:
            if row["request"] != fingerprint:
                raise KeyReused(f"Idempotency-Key {key} was used for another request: send a new one")
            if row["answer"] is None:
                raise KeyInUse(f"the first request under Idempotency-Key {key} is still at work: ask again")
            return answer_type.model_validate_json(row["answer"])
        try:
            answer = change()
        except BaseException:
            with self._store.transaction() as db:
                db.execute("DELETE FROM idempotency WHERE key = ?", [key])
            raise
        with self._store.transaction() as db:
            db.execute("UPDATE idempotency SET answer = ? WHERE key = ?", [answer.model_dump_json(), key])
        return answer
