"""Chaos: break what a queue's workflows need, let them be dead-lettered, and see that a drain recovers them all.

Only a queue whose file has ``chaos`` is a target. Its golden flows are the load, and the measure: a workflow is
recovered when it ends as its golden flow says.
"""

from __future__ import annotations

from dlq.chaos.faults import require_target
from dlq.chaos.inject import Injected, inject
from dlq.chaos.recovery import end_faults, recover

__all__ = ["Injected", "end_faults", "inject", "recover", "require_target"]
