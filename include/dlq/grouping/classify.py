"""From a dead letter to its group: what it says, its fingerprint, and what the taxonomy makes of it.

This runs once for every record taken, so a group is worked out once for each distinct set of failure fields.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Self

from dlq.config import Owners, QueueConfig
from dlq.entry import Group, Record, Understood
from dlq.envelopes import Envelopes
from dlq.grouping.conditions import texts
from dlq.grouping.fingerprint import fingerprint, signature
from dlq.grouping.regrouping import NONE, Regrouping
from dlq.grouping.taxonomy import Decision, Taxonomy, load_taxonomy
from dlq.memo import Memo

_Looked = tuple[int, tuple[tuple[str, str], ...]]
"""What else rules look at: the retry count, as far as one asks for it, and the headers that one names."""


class _Failure(NamedTuple):
    """All that a group depends on."""

    format: str
    error_type: str | None
    cause_type: str | None
    causes: tuple[str, ...]
    message: str | None
    component: str | None
    stage: str | None
    http_status: int | None
    consumer_group: str | None
    looked: _Looked | None = None


class Classifier:
    """Puts dead letters into groups by one taxonomy and one queue's owners.

    Equal groups are one object as long as they are remembered, so a caller's dict keyed on groups hits fast.

    :param regrouping: what people merged and split.
    """

    def __init__(
        self,
        taxonomy: Taxonomy,
        owners: Owners,
        envelopes: Envelopes | None = None,
        regrouping: Regrouping = NONE,
    ) -> None:
        self.taxonomy = taxonomy
        self._decode = (envelopes or Envelopes()).decode
        self._owners = owners
        self._regrouping = regrouping
        self._rule_owners = {rule.name: rule.owner for rule in taxonomy.rules if rule.owner}
        self._looks = bool(taxonomy.headers or taxonomy.retries)
        self._groups: Memo[tuple[Any, ...], Group] = Memo(self._group, 4096)
        self._same: Memo[Group, Group] = Memo(lambda group: group, 4096)

    @classmethod
    def load(cls, config: QueueConfig, regrouping: Regrouping = NONE) -> Self:
        """By the taxonomy of the configuration folder, and the owners and formats of one queue's file.

        :raises ConfigError: when the taxonomy can't be used.
        """
        return cls(load_taxonomy(), config.owners, config.envelopes, regrouping)

    def classify(self, record: Record) -> tuple[Understood, Group]:
        """What ``record`` says and the group it belongs to. Never raises."""
        u = self._decode(record)
        # The fields of _Failure, as a plain tuple: one is made for every record.
        return u, self._groups[
            u.format,
            u.error_type,
            u.cause_type,
            u.causes,
            u.message,
            u.component,
            u.stage,
            u.http_status,
            u.consumer_group,
            self._looked(record, u) if self._looks else None,
        ]

    def group(self, u: Understood) -> Group:
        """The group of a failure that no record tells of."""
        looked: _Looked | None = (min(u.retries or 0, self.taxonomy.retries), ()) if self._looks else None
        return self._groups[
            u.format,
            u.error_type,
            u.cause_type,
            u.causes,
            u.message,
            u.component,
            u.stage,
            u.http_status,
            u.consumer_group,
            looked,
        ]

    def why(self, record: Record, understood: Understood) -> str:
        """Which rule of the taxonomy decided, and by what."""
        return self.taxonomy.why(understood, texts(record.headers))

    def owner(self, category: str, rule: str = "") -> str:
        """Who gets open work: the rule's owner where it names one, else the queue's for the category."""
        return self._rule_owners.get(rule) or self._owners.of(category)

    def _looked(self, record: Record, understood: Understood) -> _Looked:
        wanted = self.taxonomy.headers
        headers = texts(record.headers) if wanted else {}
        retries = understood.retry_count if understood.retries is None else understood.retries
        return min(retries, self.taxonomy.retries), tuple(
            (name, value) for name, value in headers.items() if name in wanted
        )

    def _group(self, fields: tuple[Any, ...]) -> Group:
        failure = _Failure(*fields)
        retries, headers = failure.looked or (0, ())
        understood = Understood(
            format=failure.format,
            error_type=failure.error_type,
            cause_type=failure.cause_type,
            causes=failure.causes,
            message=failure.message,
            component=failure.component,
            stage=failure.stage,
            http_status=failure.http_status,
            retries=retries,
        )
        decision = self.taxonomy.decide(understood, dict(headers))
        # Where nobody names the failing component, the consumer group that gave up is the nearest to it.
        component = failure.component or failure.consumer_group
        said = _signature(failure, decision, component)
        group = Group(
            fingerprint=f"rule:{decision.fingerprint}" if decision.fingerprint else fingerprint(said),
            signature=said,
            component=component or "unknown",
            error_type=self.taxonomy.telling(understood) or "unknown",
            category=decision.category,
            remedy=decision.remedy,
            rule=decision.rule,
            format=failure.format,
            owner=self.owner(decision.category, decision.rule),
        )
        return self._same[self._regrouping.regrouped(group, failure.message)]


def _signature(failure: _Failure, decision: Decision, component: str | None) -> str:
    if decision.fingerprint:
        named = f"{decision.fingerprint}, by rule {decision.rule!r}"
        return f"{named} @ {component}" if component else named
    causes = failure.causes or ((failure.cause_type,) if failure.cause_type else ())
    return signature(failure.error_type, causes, failure.message, component)
