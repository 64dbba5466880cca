"""Where an entry's replay goes: by configuration; what a dead letter tells of its origin only selects among that."""

from __future__ import annotations

from dlq.config import KafkaTarget, MemoryEnd, QueueConfig, SqsTarget
from dlq.entry import Understood


class Destination:
    """The target of each entry of a queue, None where none is allowed."""

    def __init__(self, config: QueueConfig) -> None:
        target = config.target
        self._allow = frozenset(target.allow)
        self._by_group = target.topics if isinstance(target, KafkaTarget | MemoryEnd) else {}
        if isinstance(target, KafkaTarget):
            self._fixed = target.topic
        elif isinstance(target, SqsTarget):
            self._fixed = target.queue
        else:
            self._fixed = target.allow[0]

    def of(self, what: Understood) -> str | None:
        if self._by_group and (own := self._by_group.get(what.consumer_group or "")) is not None:
            return own
        if self._fixed is not None:
            return self._fixed
        if what.origin_topic in self._allow:
            return what.origin_topic
        queue = what.origin_queue
        if queue is None or queue in self._allow:
            return queue
        name = queue.rpartition(":")[2]  # an ARN ends in the queue's name
        return name if name in self._allow else None
