"""What can go wrong in a workflow, by the error type a dead letter carries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


class StepError(Exception):
    """A step failed. Messages name what failed and never hold a payload: they are shown to people.

    :param retry_after_s: whoever refused said how long to wait before the next try, in seconds.
    """

    error_type: ClassVar[str] = "PluginError"
    transient: ClassVar[bool] = False

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class PluginError(StepError):
    """The plugin refused, or broke in a way nobody foresaw."""


class TransientNetwork(StepError):
    """The plugin's upstream could not be reached; a later try may."""

    error_type = "TransientNetwork"
    transient = True


class RateLimit(StepError):
    """The plugin's upstream asked for fewer calls."""

    error_type = "RateLimit"
    transient = True


class PluginTimeout(StepError):
    """The call ran into its time limit and was stopped."""

    error_type = "PluginTimeout"
    transient = True


class MemoryQuotaExceeded(StepError):
    """The call needs more memory than the plugin's quota; it will until the quota is raised."""

    error_type = "MemoryQuotaExceeded"


class ScopeViolation(StepError):
    """The plugin reached outside its declared scopes; `scope` is what it reached for."""

    error_type = "ScopeViolation"

    def __init__(self, message: str, scope: str = "") -> None:
        super().__init__(message)
        self.scope = scope


class QuotaExceeded(StepError):
    """The plugin, tool or tenant is past its own calls a second here; later it won't be."""

    error_type = "QuotaExceeded"
    transient = True


class CircuitOpen(StepError):
    """The plugin failed so often in a row that it is left alone for a while."""

    error_type = "CircuitOpen"
    transient = True


class PluginCrashed(StepError):
    """The process of the call died under it: a signal, an exit, out of memory."""

    error_type = "PluginCrashed"


class PluginDisabled(StepError):
    """A person has disabled the plugin."""

    error_type = "PluginDisabled"


class DataCorruption(StepError):
    """The record, or a step's arguments, cannot be understood."""

    error_type = "DataCorruption"


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a workflow failed, as its dead letter and its state tell it. `failed_at` in epoch ms."""

    error_type: str
    message: str
    component: str
    stage: str
    attempts: int
    failed_at: int
    stack_trace: str
