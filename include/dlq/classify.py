"""From a dead letter to its group: what it says, its fingerprint, and what the taxonomy makes of it.

This runs once for every record taken, so a group is worked out once for each distinct set of failure fields.
"""

from __future__ import annotations

from typing import Self

from dlq.config import Owners, QueueConfig
from dlq.entry import Group, Record, Understood
from dlq.envelopes import decode
from dlq.fingerprint import fingerprint, signature
from dlq.memo import Memo
from dlq.taxonomy import Taxonomy, load_taxonomy

_Failure = tuple[str, str | None, str | None, str | None, str | None, str | None, str | None]


class Classifier:
    """Puts dead letters into groups by one taxonomy and one queue's owners.

    Equal groups are one object as long as they are remembered, so a caller's dict keyed on groups hits fast.
    """

    def __init__(self, taxonomy: Taxonomy, owners: Owners) -> None:
        self._taxonomy = taxonomy
        self._owners = owners
        self._rule_owners = {rule.name: rule.owner for rule in taxonomy.rules if rule.owner}
        self._groups: Memo[_Failure, Group] = Memo(self._group, 4096)
        self._same: Memo[Group, Group] = Memo(lambda group: group, 4096)

    @classmethod
    def load(cls, config: QueueConfig) -> Self:
        """By the taxonomy of the configuration folder and the owners of one queue's file.

        :raises ConfigError: when the taxonomy can't be used.
        """
        return cls(load_taxonomy(), config.owners)

    def classify(self, record: Record) -> tuple[Understood, Group]:
        """What ``record`` says and the group it belongs to. Never raises."""
        u = decode(record)
        return u, self._groups[
            u.format, u.error_type, u.cause_type, u.message, u.component, u.stage, u.consumer_group
        ]

    def owner(self, category: str, rule: str = "") -> str:
        """Who gets open work: the rule's owner where it names one, else the queue's for the category."""
        return self._rule_owners.get(rule) or self._owners.of(category)

    def _group(self, failure: _Failure) -> Group:
        form, error_type, cause_type, message, component, stage, consumers = failure
        decision = self._taxonomy.decide(
            Understood(
                format=form,
                error_type=error_type,
                cause_type=cause_type,
                message=message,
                component=component,
                stage=stage,
            )
        )
        # Where nobody names the failing component, the consumer group that gave up is the nearest to it.
        component = component or consumers
        said = signature(error_type, cause_type, message, component)
        return self._same[
            Group(
                fingerprint=fingerprint(said),
                signature=said,
                component=component or "unknown",
                error_type=error_type or cause_type or "unknown",
                category=decision.category,
                remedy=decision.remedy,
                rule=decision.rule,
                format=form,
                owner=self.owner(decision.category, decision.rule),
            )
        ]
