"""What can go wrong in a workflow, by the error type a dead letter carries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


class StepError(Exception):
    """A step failed. Messages name what failed and never hold a payload: they are shown to people."""

    error_type: ClassVar[str] = "PluginError"
    transient: ClassVar[bool] = False


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
    """The call ran into its time limit and was cancelled."""

    error_type = "PluginTimeout"
    transient = True


class MemoryQuotaExceeded(StepError):
    """The call needs more memory than the plugin's quota; it will until the quota is raised."""

    error_type = "MemoryQuotaExceeded"


class ScopeViolation(StepError):
    """The plugin reached outside its declared scopes."""

    error_type = "ScopeViolation"


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
