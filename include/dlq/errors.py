"""The core's errors: each message says what happened, to what, and what to do next."""

from __future__ import annotations


class DlqError(Exception):
    """Base of every error the core raises. Retrying may help unless a subclass says otherwise."""


class ConfigError(DlqError):
    """A configuration is wrong; the message names the file, the field and the fix. A retry can't heal it."""


class NotFound(ConfigError):
    """What a configuration names, or named, does not exist."""


class Refused(DlqError):
    """The world is not what the ledger remembers, so nothing is guessed (law 10). A retry can't heal it."""


class Fenced(DlqError):
    """Another holder took over; this process is a zombie and must change nothing more. A retry can't heal it."""


class Overtaken(Fenced):
    """Another process of this same drain took what this one had read: custody is well, but this pass is over."""


class QueueBusy(DlqError):
    """Another drain, review or restore holds the queue's lease; a later try may get it."""


class SourceError(DlqError):
    """The dead-letter queue could not be read or told; the pass ends and a later try goes on from the ledger."""


class TargetError(DlqError):
    """The replay target refused or did not answer; the job's cursor says where the next try goes on."""


class ArchiveError(DlqError):
    """The archive could not be written or what it holds is not what was written."""


class GateFailed(DlqError):
    """A replay's outcomes fell below the gate; the job stopped and the rest stays open."""
