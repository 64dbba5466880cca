"""Fixes of plugins: what is proposed from which evidence, within which bounds, and how it is taken back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tests.memory_rig import MemoryRig

from dlq import fixes
from dlq.config import PluginPolicy, QuotaPolicy
from dlq.decisions import record
from dlq.drain import Drain
from dlq.errors import Refused
from dlq.orchestrator import (
    Circuit,
    OrchestratorUnreachable,
    Plugin,
    PluginChanged,
    PluginPatch,
    Quota,
    Violation,
)
from dlq.remedies import PatchPlugin, RaiseQuota
from dlq.triage import categorize

Make = Callable[..., MemoryRig]


class Plugins:
    """An orchestrator of which only plugins are asked."""

    def __init__(self, **fields: Any) -> None:
        seen = (Violation("payments:admin", 7),)
        of_payments = {"violations": seen, "grantable": ("payments:admin",)} | fields
        self.kept = Plugin("payments", "1.0", ("payments:write",), Circuit("closed"), 3, **of_payments)
        self.told: list[PluginPatch] = []
        self.levels = {"plugins"}
        self.down = False

    def capabilities(self) -> set[str]:
        return self.levels

    def plugins(self) -> list[Plugin]:
        if self.down:
            raise OrchestratorUnreachable("it is down")
        return [self.kept]

    def patch_plugin(self, name: str, patch: PluginPatch, idempotency_key: str) -> Plugin:
        assert (name, bool(idempotency_key)) == ("payments", True)
        if patch.revision != self.kept.revision:
            raise PluginChanged(f"at revision {self.kept.revision}")
        self.told.append(patch)
        fields = vars(self.kept) | {"revision": patch.revision + 1, "scopes": patch.scopes}
        self.kept = Plugin(**fields)
        return self.kept


@pytest.fixture
def waiting(queue: MemoryRig) -> Drain:
    """A drain with three entries whose plugin reached outside its scopes."""
    queue.put(3, "ScopeViolation")
    drain = queue.open("r1")
    queue.take(drain)
    categorize(drain)
    return drain


def proposed(drain: Drain, orchestrator: Plugins | None, **scopes: tuple[str, ...]) -> dict[str, Any]:
    drain.__dict__["orchestrator"] = orchestrator
    object.__setattr__(drain.config, "plugins", PluginPolicy(scopes=scopes))
    return fixes.propose_fix(drain)


def approved(drain: Drain, digest: str) -> int:
    return record(drain, drain.queue, who="ann", kind="approve_fix", subject=digest, saw="", choice="approve")


def test_a_plugin_is_given_the_scope_it_reached_for_by_whoever_approved_it(waiting: Drain) -> None:
    orchestrator = Plugins()
    said = proposed(waiting, orchestrator, payments=("payments:admin",))
    (fix,) = said["fixes"]
    assert said["within_policy"]
    assert "payments:admin (7 calls)" in said["summary"]
    assert "frees 3 entries" in said["summary"]
    fixes.apply_fix(waiting, said["hash"], approved(waiting, said["hash"]))
    (patch,) = orchestrator.told
    assert (patch.person, set(patch.scopes or ())) == ("ann", {"payments:write", "payments:admin"})
    assert "payments:admin" in patch.reason
    assert fix["before"] == ["payments:write"]


def test_outside_of_policy_it_is_a_persons_to_approve(waiting: Drain) -> None:
    assert not proposed(waiting, Plugins(), payments=("payments:read",))["within_policy"]
    assert not proposed(waiting, Plugins())["within_policy"]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"grantable": ()}, "payments:admin, which its orchestrator doesn't let it have"),
        ({"violations": ()}, "its owner has to look"),
        ({"violations": (Violation("payments:write", 1),)}, "its owner has to look"),
        ({"disabled": True}, "it is disabled"),
    ],
)
def test_what_no_patch_of_its_scopes_heals_is_left_with_the_reason(
    waiting: Drain, fields: dict[str, Any], says: str
) -> None:
    said = proposed(waiting, Plugins(**fields))
    assert said["fixes"] == []
    assert says in said["left"]


def test_an_orchestrator_without_the_level_or_without_an_answer_is_said(waiting: Drain) -> None:
    assert "no orchestrator is configured" in proposed(waiting, None)["left"]
    orchestrator = Plugins()
    orchestrator.levels = {"quotas"}
    assert "offers no plugins" in proposed(waiting, orchestrator)["left"]
    orchestrator = Plugins()
    orchestrator.down = True
    assert "it is down" in proposed(waiting, orchestrator)["left"]


def test_a_plugin_changed_since_it_was_looked_at_is_not_patched(waiting: Drain) -> None:
    orchestrator = Plugins()
    said = proposed(waiting, orchestrator, payments=("payments:admin",))
    orchestrator.kept = Plugin(**(vars(orchestrator.kept) | {"revision": 4}))
    with pytest.raises(Refused, match="clear propose_fix"):
        fixes.apply_fix(waiting, said["hash"], approved(waiting, said["hash"]))
    assert orchestrator.told == []


def test_a_patch_that_no_canary_tried_is_taken_back_unless_somebody_changed_it_since(waiting: Drain) -> None:
    orchestrator = Plugins()
    said = proposed(waiting, orchestrator, payments=("payments:admin",))
    fixes.apply_fix(waiting, said["hash"], approved(waiting, said["hash"]))
    (told,) = fixes.take_back_untried(waiting)
    assert "rolled back to payments:write" in told
    assert orchestrator.kept.scopes == ("payments:write",)
    fix = said["fixes"][0]
    assert "left as it is" in PatchPlugin().undo(orchestrator, fix, "k")  # type: ignore[arg-type]
    assert len(orchestrator.told) == 2


def test_of_several_quotas_the_one_that_was_exceeded_is_raised_within_its_own_ceiling(
    queue: MemoryRig,
) -> None:
    memory = Quota("payments", "memory_mb", 256, 1024, peak_need=100)
    calls = Quota("payments", "calls_per_s", 100, 1000, peak_need=300)

    class Quotas:
        def quotas(self) -> list[Quota]:
            return [calls, memory, Quota("search", "calls_per_s", 1, 1), Quota("search", "memory_mb", 1, 1)]

    found = RaiseQuota().evidence(Quotas())  # type: ignore[arg-type]
    assert (found["payments"], found["search"].resource) == (calls, "memory_mb")
    policy = QuotaPolicy(ceilings={"payments": 1, "payments.calls_per_s": 500})
    config = queue.config.model_copy(update={"quotas": policy})
    fix = RaiseQuota().propose("payments", calls, config)
    assert isinstance(fix, dict)
    assert (fix["proposed"], fix["within_policy"], fix["resource"]) == (375, True, "calls_per_s")
    config = queue.config.model_copy(update={"quotas": QuotaPolicy(ceilings={"payments": 1})})
    assert RaiseQuota().propose("payments", calls, config) == "needs 300, the ceiling is 1"


def test_two_fixes_of_one_plugin_are_two_changes_to_an_orchestrator_that_remembers_keys(
    queue: MemoryRig,
) -> None:
    keys: list[str] = []

    class Both(Plugins):
        def quotas(self) -> list[Quota]:
            return [Quota("payments", "memory_mb", 10, 100, peak_need=20)]

        def set_quota(self, plugin: str, limit: int, key: str, resource: str) -> Quota:
            keys.append(key)
            return Quota(plugin, resource, limit, 100)

        def patch_plugin(self, name: str, patch: PluginPatch, idempotency_key: str) -> Plugin:
            keys.append(idempotency_key)
            return super().patch_plugin(name, patch, idempotency_key)

    queue.put(3, "ScopeViolation")
    queue.put(3, "MemoryQuotaExceeded")
    drain = queue.open("r1")
    queue.take(drain)
    categorize(drain)
    orchestrator = Both()
    orchestrator.levels = {"quotas", "plugins"}
    said = proposed(drain, orchestrator)
    assert len(said["fixes"]) == 2
    fixes.apply_fix(drain, said["hash"], approved(drain, said["hash"]))
    assert len(set(keys)) == 2
