"""Waiting beside a drain for the moment at which somebody must be told."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

from airflow.triggers.base import BaseTrigger, TriggerEvent

from dlq.config import load_queue
from dlq.errors import DlqError
from dlq_runbook.connections import fetched

log = logging.getLogger(__name__)

FIRST_S = 5.0
"""A trigger that fires at once can meet the task before Airflow has parked it, and is lost."""
POLL_S = 5.0
PATIENCE_S = 60.0
"""How long past the clock an answer that can't be had is waited for."""


class ThresholdTrigger(BaseTrigger):
    """Fires when the drain is over, or at the clock with how the queue stands then. It only reads.

    :param queue_name: The queue's name.
    :param drain: The drain's id.
    :param until: The clock: the incident's start and the queue's ``slo.escalate_after``, ISO 8601.
    """

    def __init__(self, *, queue_name: str, drain: str, until: str) -> None:
        super().__init__()
        self.queue_name = queue_name
        self.drain = drain
        self.until = until

    def serialize(self) -> tuple[str, dict[str, Any]]:
        return (
            f"{type(self).__module__}.{type(self).__qualname__}",
            {"queue_name": self.queue_name, "drain": self.drain, "until": self.until},
        )

    async def run(self) -> AsyncIterator[TriggerEvent]:
        from dlq.threshold import OVER_PHASES

        clock = datetime.fromisoformat(self.until)
        await asyncio.sleep(FIRST_S)
        while True:
            now = datetime.now(UTC)
            try:
                state = await self.look()
            except DlqError as error:
                if now >= clock + timedelta(seconds=PATIENCE_S):
                    yield TriggerEvent({"over": None, "error": str(error)})
                    return
                log.warning("Not known yet: %s", error)
            else:
                if state["phase"] in OVER_PHASES or now >= clock:
                    yield TriggerEvent(state)
                    return
            await asyncio.sleep(min(POLL_S, max((clock - now).total_seconds(), 1.0)))

    async def look(self) -> dict[str, Any]:
        """The threshold's state now: SQL and librdkafka in a thread, Connections before it."""
        from dlq.threshold import threshold_state

        config = await asyncio.to_thread(load_queue, self.queue_name)
        named = (config.source, config.target, config.orchestrator)
        connections = await fetched({end.connection for end in named if end is not None})
        return await asyncio.to_thread(threshold_state, config, connections, self.drain)
