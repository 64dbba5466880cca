"""A queue's file: one YAML a queue, read into models that name file, field and fix when it is wrong.

``DLQ_CONFIG`` names the folder (any path or URL that every component can read) holding ``queues/<name>.yaml``,
``taxonomy.yaml`` and ``golden_flows/``; without it, the ``config`` folder shipped beside this package.
"""

from __future__ import annotations

import hashlib
import os
import re
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from upath import UPath

from dlq.envelopes import Envelopes, JsonPath, load
from dlq.errors import ConfigError

_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)")
_VARIABLE = re.compile(r"\$\{([A-Z_][A-Z0-9_]*)(:-([^}]*))?\}")
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
NAME = re.compile(r"[a-z0-9_]{1,40}")


def seconds(value: Any) -> float:
    """Seconds from a number, a timedelta or text such as ``30m``, ``1h``, ``1m 30s``, ``250ms``."""
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, str) and _DURATION.sub("", value).strip() == "" and value.strip():
        return sum(float(n) * _UNITS[u] for n, u in _DURATION.findall(value))
    raise ValueError("not a duration: write 250ms, 5s, 30m, 1h or 1d")


Seconds = Annotated[float, BeforeValidator(seconds), Field(ge=0)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class KafkaSource(_Model):
    """The dead-letter topic. ``start`` says what a first intake takes: there is no default, old letters may matter.

    ``originals`` are topics of the same cluster, besides those of ``target.allow``, from which dead letters that only
    point to their original may be completed.
    """

    kind: Literal["kafka"]
    connection: str
    topic: str
    start: Literal["earliest", "latest"] | AwareDatetime
    originals: tuple[str, ...] = ()


class KafkaTarget(_Model):
    """Where replays go. ``allow`` lists the topics an origin header may select among; ``topic`` (if set) takes all.

    ``topics`` gives a consumer group that failed a topic of its own, so that no other group sees its replays; it comes
    before ``topic``. ``group`` is the consumer group whose progress tells the outcome where no orchestrator does.
    """

    kind: Literal["kafka"]
    connection: str
    allow: tuple[str, ...] = Field(min_length=1)
    topic: str | None = None
    topics: dict[str, str] = Field(default_factory=dict)
    group: str | None = None
    ordering: Literal["none", "per_key"] = "none"
    partitioner: Literal["murmur2_random", "murmur2", "consistent_random", "consistent", "fnv1a_random"] = (
        "murmur2_random"
    )
    origin_consumers: Literal["read_committed", "read_uncommitted", "unknown"] = "unknown"
    allow_compacted: bool = False

    @model_validator(mode="after")
    def _topic_is_allowed(self) -> KafkaTarget:
        if self.topic is not None and self.topic not in self.allow:
            raise ValueError(f"topic {self.topic!r} is not in allow: add it there")
        for group, topic in self.topics.items():
            if topic not in self.allow:
                raise ValueError(f"topics: {topic!r} of group {group!r} is not in allow: add it there")
        return self


class SqsSource(_Model):
    """The dead-letter queue, by name, URL or ARN.

    ``start: earliest`` says that the first intake takes all there is; a queue can't begin later. ``visibility`` is how
    long a message is ours before it is in custody, ``wait`` a long poll; it is empty after some empty polls and when
    its counts are zero for ``quiet``, since what a killed process had received comes back only then. A receive counts,
    so a queue with a redrive policy of its own is refused unless ``redrives_on`` says that it may push entries on.
    A redrive records no error: what the orchestrator can't explain is tried by a ``canary``, or left to a person.
    """

    kind: Literal["sqs"]
    connection: str
    queue: str
    start: Literal["earliest"]
    visibility: Annotated[Seconds, Field(ge=1, le=43_200)] = 120.0
    wait: Annotated[Seconds, Field(ge=0, le=20)] = 20.0
    quiet: Seconds = 120.0
    redrives_on: bool = False
    no_error: Literal["canary", "manual"] = "canary"


class SqsTarget(_Model):
    """Where replays go. ``allow`` lists the queues an entry's own may select among; ``queue`` (if set) takes all.

    ``on_ambiguous`` is what becomes of a message of which it is not known whether it was sent. FIFO queues are ordered
    by key, the message group; there is no order on others.
    """

    kind: Literal["sqs"]
    connection: str
    allow: tuple[str, ...] = Field(min_length=1)
    queue: str | None = None
    ordering: Literal["none", "per_key"] = "none"
    on_ambiguous: Literal["hold", "resend"] = "hold"

    @model_validator(mode="before")
    @classmethod
    def _fifo_is_ordered(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(allow := data.get("allow"), (list, tuple)):
            fifo = any(str(queue).endswith(".fifo") for queue in allow)
            if data.get("ordering") == "per_key" and not fifo:
                raise ValueError("ordering: none of the queues in allow is FIFO (.fifo); remove it")
            return {**data, "ordering": "per_key" if fifo else "none"}
        return data

    @model_validator(mode="after")
    def _queue_is_allowed(self) -> SqsTarget:
        if self.queue is not None and self.queue not in self.allow:
            raise ValueError(f"queue {self.queue!r} is not in allow: add it there")
        return self


class OrchestratorTarget(_Model):
    """Replays are asked of the queue's orchestrator (level ``replay`` of its contract), which knows where they go.

    A replay whose answer was lost is asked for again: under its key the orchestrator takes it once.
    """

    kind: Literal["orchestrator"]

    @property
    def connection(self) -> str:
        return "the queue's orchestrator"

    @property
    def allow(self) -> tuple[str, ...]:
        return ("orchestrator",)

    @property
    def ordering(self) -> Literal["none"]:
        return "none"

    @property
    def on_ambiguous(self) -> Literal["resend"]:
        return "resend"


class MemoryEnd(_Model):
    """The in-memory twin, for tests."""

    kind: Literal["memory"]
    connection: str = "memory"
    allow: tuple[str, ...] = ("memory",)
    topics: dict[str, str] = Field(default_factory=dict)
    allow_compacted: bool = False
    originals: tuple[str, ...] = ()
    start: Literal["earliest", "latest"] = "earliest"
    ordering: Literal["none", "per_key"] = "none"


class Slo(_Model):
    """Ratios are outstanding ÷ workflows in ``window``; ``workflows`` is that count where nothing can be asked."""

    ratio: float = Field(default=0.001, gt=0, le=1)
    alert: float = Field(default=0.0005, gt=0, le=1)
    escalate: float = Field(default=0.01, gt=0, le=1)
    escalate_after: Seconds = 1800.0
    window: Seconds = 86400.0
    workflows: int | None = Field(default=None, gt=0)
    success: float = Field(default=0.99, gt=0, le=1)


class Limits(_Model):
    """``batch`` entries a step, ``rate`` entries/s at most (none: unbounded), ``returns`` replays an entry may fail;
    ``lag`` is how far, in records, a replay may leave the target's consumers behind.
    """

    batch: int = Field(default=100, ge=1, le=10_000)
    rate: float | None = Field(default=None, gt=0)
    lag: int = Field(default=10_000, ge=100)
    returns: int = Field(default=3, ge=1)
    dr: int = Field(default=10_000, ge=1)
    budget: Seconds = 3600.0
    sample: int = Field(default=50, ge=10, le=50)
    gate: float = Field(default=0.95, gt=0, le=1)
    jobs: int = Field(default=1, ge=1, le=64)


class Outcome(_Model):
    """How long after the target's progress a dead letter may still appear, and when waiting ends."""

    grace: Seconds = 5.0
    deadline: Seconds = 600.0


class Approval(_Model):
    """Who decides fixes and disaster recovery: a person in the UI, or this file's policy.

    ``who`` are the Airflow user ids that may answer; none: whoever Airflow lets.
    """

    fix: Literal["person", "policy"] = "person"
    dr: Literal["person", "policy"] = "policy"
    who: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    within: Annotated[Seconds, Field(le=900)] = 900.0


class OrchestratorRef(_Model):
    connection: str


class AlertsRef(_Model):
    """An Alertmanager; ``matchers`` are the labels that name exactly this queue's alerts."""

    connection: str
    matchers: dict[str, str] = Field(min_length=1)


class NotifyRef(_Model):
    """An Apprise connection that reaches the engineering lead."""

    connection: str


class TracesRef(_Model):
    """A trace store, as an Airflow Connection of type ``http`` to Jaeger's query API."""

    connection: str


class SchemaRegistryRef(_Model):
    """A Schema Registry by its REST interface: what payloads framed for one are read and repaired with."""

    connection: str


class Owners(_Model):
    """Who gets open work, by category; ``default`` takes the rest."""

    default: str = "on-call"
    transient: str | None = None
    permanent: str | None = None
    manual: str | None = None
    unknown: str | None = None

    def of(self, category: str) -> str:
        return getattr(self, category, None) or self.default


class HttpProbe(_Model):
    """A GET of ``path`` at the address of an Airflow Connection; it passes where the status is ``expect``."""

    connection: str
    path: str = Field(default="/", pattern="^/")
    expect: int = Field(default=200, ge=100, le=599)


class Probe(_Model):
    """What tells that a replay may be tried: an HTTP answer, the ``circuit`` of a plugin at the orchestrator (true: of
    the plugin that failed), or a ``canary``: one entry, whose outcome decides for the others.
    """

    http: HttpProbe | None = None
    circuit: str | Literal[True] | None = None
    canary: Literal[True] | None = None

    @model_validator(mode="after")
    def _one(self) -> Probe:
        if sum(each is not None for each in (self.http, self.circuit, self.canary)) != 1:
            raise ValueError("write one of http: {connection, path, expect}, circuit: <plugin>, canary: true")
        return self

    def __str__(self) -> str:
        if self.http is not None:
            return f"GET {self.http.path} of Connection {self.http.connection}"
        if self.circuit is not None:
            return f"circuit of {'the plugin that failed' if self.circuit is True else self.circuit}"
        return "canary of one"


class HoldPolicy(_Model):
    """How long entries whose remedy is ``hold`` wait: ``for`` a time from when they are first looked at (twice as long
    after each return), ``until`` a moment, or until a ``probe`` passes.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_by_name=True, validate_by_alias=True)

    for_: Seconds | None = Field(default=None, alias="for")
    until: AwareDatetime | None = None
    probe: Probe | None = None

    @model_validator(mode="after")
    def _one(self) -> HoldPolicy:
        if sum(each is not None for each in (self.for_, self.until, self.probe)) != 1:
            raise ValueError(
                "write one of for: 10m, until: 2026-01-31T06:00:00Z, probe: {http | circuit | canary}"
            )
        return self


class QuotaPolicy(_Model):
    """Bounds within which policy may raise a plugin's quota: ``ceilings`` by plugin, or by plugin and resource
    (``payments.calls_per_s``); ``headroom`` over the peak need.
    """

    ceilings: dict[str, float] = Field(default_factory=dict)
    headroom: float = Field(default=1.25, ge=1)


class PluginPolicy(_Model):
    """The scopes that policy may let a plugin have, by plugin; any other takes a person."""

    scopes: dict[str, tuple[str, ...]] = Field(default_factory=dict)


class ChaosFault(_Model):
    """One fault of a chaos run: what is broken while workflows like the golden flow ``flow`` run.

    Exactly one of ``error`` (what the plugin's calls fail with), ``memory_mb`` (what its quota is lowered to),
    ``scope`` (which is taken from it) and ``corrupt`` (records cut short) says how. ``plugin`` is one the flow calls.
    """

    flow: str
    plugin: str | None = None
    error: str | None = None
    memory_mb: int | None = Field(default=None, ge=1)
    scope: str | None = None
    corrupt: Literal[True] | None = None

    @model_validator(mode="after")
    def _is_one(self) -> ChaosFault:
        if sum(how is not None for how in (self.error, self.memory_mb, self.scope, self.corrupt)) != 1:
            raise ValueError("write exactly one of error, memory_mb, scope and corrupt")
        if (self.plugin is None) != (self.corrupt is True):
            raise ValueError("plugin: name the one that is broken; corrupt has none")
        return self


class Chaos(_Model):
    """Marks a queue as a chaos target: ``workflows`` of each fault fail within ``deadline``, then a drain must recover
    them all.
    """

    workflows: int = Field(default=10, ge=1, le=1000)
    deadline: Annotated[Seconds, Field(gt=0, le=3000)] = 60.0
    faults: dict[Annotated[str, Field(pattern=r"^[a-z0-9_]{1,40}$")], ChaosFault] = Field(min_length=1)


_MAY_BE_NONE = {
    *("orchestrator", "alerts", "notify", "schedule", "schema_registry", "traces", "start_probe", "chaos"),
}


class QueueConfig(_Model):
    """One queue's file; its stem is the queue's name."""

    name: str = Field(pattern=r"^[a-z0-9_]{1,40}$")
    source: Annotated[KafkaSource | SqsSource | MemoryEnd, Field(discriminator="kind")]
    target: Annotated[KafkaTarget | SqsTarget | OrchestratorTarget | MemoryEnd, Field(discriminator="kind")]
    orchestrator: OrchestratorRef | None = None
    alerts: AlertsRef | None = None
    notify: NotifyRef | None = None
    schema_registry: SchemaRegistryRef | None = None
    traces: TracesRef | None = None
    slo: Slo = Slo()
    limits: Limits = Limits()
    outcome: Outcome = Outcome()
    approval: Approval = Approval()
    hold: HoldPolicy = HoldPolicy.model_validate({"for": "15m"})
    start_probe: Probe | None = None
    quotas: QuotaPolicy = QuotaPolicy()
    plugins: PluginPolicy = PluginPolicy()
    owners: Owners = Owners()
    formats: tuple[str, ...] = ()
    dedupe_key: str | None = None
    golden_flows: str | None = None
    chaos: Chaos | None = None
    schedule: str | None = None
    ledger: str
    archive: str
    report: str

    @model_validator(mode="before")
    @classmethod
    def _none_is_none(cls, data: Any) -> Any:
        """``orchestrator: none`` reads better than ``null`` in an incident."""
        if isinstance(data, dict):
            return {k: None if v == "none" and k in _MAY_BE_NONE else v for k, v in data.items()}
        return data

    @field_validator("start_probe")
    @classmethod
    def _asks_before_the_start(cls, probe: Probe | None) -> Probe | None:
        if probe is not None and (probe.canary or probe.circuit is True):
            raise ValueError(
                "nothing has failed or been sent yet: write http: {connection, path, expect} or circuit: <plugin>"
            )
        return probe

    @model_validator(mode="after")
    def _circuits_are_an_orchestrators(self) -> QueueConfig:
        asked = {"start_probe": self.start_probe, "hold.probe": self.hold.probe}
        for field, probe in asked.items():
            if probe is not None and probe.circuit is not None and self.orchestrator is None:
                raise ValueError(f"{field}.circuit: no orchestrator is configured; name one, or write http")
        return self

    @field_validator("formats")
    @classmethod
    def _can_be_made(cls, formats: tuple[str, ...]) -> tuple[str, ...]:
        load(formats)
        return formats

    @field_validator("dedupe_key")
    @classmethod
    def _is_a_path(cls, path: str | None) -> str | None:
        if path is not None:
            JsonPath(path)
        return path

    @model_validator(mode="after")
    def _asks_somebody(self) -> QueueConfig:
        if isinstance(self.target, OrchestratorTarget) and self.orchestrator is None:
            raise ValueError("target.kind: orchestrator needs one: name its connection under `orchestrator`")
        return self

    @model_validator(mode="after")
    def _breaks_what_it_can_judge(self) -> QueueConfig:
        missing = [name for name in ("orchestrator", "golden_flows") if getattr(self, name) is None]
        if self.chaos is not None and missing:
            raise ValueError(f"chaos: needs {' and '.join(missing)}: what is broken, and how it should end")
        return self

    @model_validator(mode="after")
    def _never_the_dlq(self) -> QueueConfig:
        if isinstance(self.source, KafkaSource) and isinstance(self.target, KafkaTarget):
            for topic in self.target.allow:
                if (
                    topic == self.source.topic
                    or topic.startswith("__")
                    or topic.endswith(("-repartition", "-changelog"))
                ):
                    raise ValueError(
                        f"target.allow: {topic!r} is the DLQ itself or an internal topic; remove it"
                    )
        if isinstance(self.source, SqsSource) and isinstance(self.target, SqsTarget):
            names = {_name(queue) for queue in self.target.allow}
            if _name(self.source.queue) in names:
                raise ValueError(f"target.allow: {self.source.queue!r} is the DLQ itself; remove it")
        return self

    @cached_property
    def envelopes(self) -> Envelopes:
        """What this queue's letters are read by: its ``formats``, then the shipped ones, and its ``dedupe_key``."""
        return Envelopes(load(self.formats), JsonPath(self.dedupe_key) if self.dedupe_key else None)

    @cached_property
    def sha(self) -> str:
        """The configuration's fingerprint, written beside every decision that policy made."""
        return hashlib.sha256(self.frozen().encode()).hexdigest()[:12]

    def frozen(self) -> str:
        """The configuration as JSON, to be kept with a drain: whose ``ledger`` says where, but not how to get in."""
        from sqlalchemy.engine import make_url  # files are read where nobody needs a database
        from sqlalchemy.exc import ArgumentError

        try:
            ledger = make_url(self.ledger).set(query={}).render_as_string()
        except ArgumentError:
            ledger = "not a database URL"
        return self.model_copy(update={"ledger": ledger}).model_dump_json()

    @classmethod
    def thaw(cls, frozen: str, drain: str) -> QueueConfig:
        """The configuration kept with ``drain``.

        :raises ConfigError: it is of a release whose fields were others.
        """
        try:
            return cls.model_validate_json(frozen)
        except ValidationError as error:
            fields = ", ".join(sorted({_field(e["loc"]) for e in error.errors()}))
            raise ConfigError(
                f"drain {drain}: the configuration it was opened with is of another release ({fields}); look at it "
                "with the release that ran it"
            ) from None

    def tighten(self, overrides: dict[str, Any]) -> QueueConfig:
        """This queue with a run's params applied; they may only tighten.

        :raises ConfigError: for an unknown key or a value looser than the file's.
        """
        limits = self.limits.model_dump()
        approval = self.approval.model_dump()
        for key, value in overrides.items():
            if value is None:
                continue
            if key in {"batch", "rate", "budget"}:
                held = limits[key]
                try:
                    value = seconds(value) if key == "budget" else float(value)
                except (TypeError, ValueError) as error:
                    raise ConfigError(f"{self.name}: param {key}: {error}") from None
                if held is not None and value > held:
                    raise ConfigError(
                        f"{self.name}: param {key}={value:g} is looser than the queue's file ({held}); "
                        "a run may only tighten it"
                    )
                limits[key] = value
            elif key in {"approve_fix", "approve_dr"}:
                field = key.removeprefix("approve_")
                if value == "policy" and approval[field] == "person":
                    raise ConfigError(
                        f"{self.name}: param {key}=policy is looser than approval.{field}: person in the queue's file"
                    )
                approval[field] = value
            else:
                raise ConfigError(
                    f"{self.name}: unknown param {key!r}; known: batch, rate, budget, approve_fix, approve_dr"
                )
        return _validated(
            {**self.model_dump(), "limits": limits, "approval": approval}, f"params of {self.name}"
        )


def _name(queue: str) -> str:
    """A queue's own name in its URL or ARN."""
    return queue.rpartition("/")[2].rpartition(":")[2]


def config_root() -> UPath:
    """The configuration folder (``DLQ_CONFIG``), else the one shipped with this checkout."""
    return UPath(os.environ.get("DLQ_CONFIG") or Path(__file__).resolve().parent.parent / "config")


def queue_names(root: UPath | None = None) -> list[str]:
    """The stems of ``queues/*.yaml``, sorted; a broken file is listed too (loading it says what is wrong)."""
    folder = (root or config_root()) / "queues"
    return sorted(p.stem for p in folder.glob("*.yaml")) if folder.exists() else []


def load_queue(name: str, root: UPath | None = None) -> QueueConfig:
    """A queue's configuration, environment variables (``${NAME}``) in its values replaced.

    :raises ConfigError: naming the file, the field and the fix.
    """
    path = (root or config_root()) / "queues" / f"{name}.yaml"
    if not NAME.fullmatch(name):
        raise ConfigError(f"{path}: a queue's name is 1 to 40 of a-z, 0-9 and _; rename the file")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        known = ", ".join(queue_names(root)) or "none"
        raise ConfigError(
            f"no queue {name!r}: {path} does not exist (known: {known}); set DLQ_CONFIG to the folder that has queues/"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    try:
        data = _expand(yaml.safe_load(text), str(path))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping with source, target, ledger, archive and report")
    return _validated({**data, "name": name}, str(path))


def _expand(value: Any, path: str) -> Any:
    """Environment variables put into the values of a parsed file: what they hold is never read as YAML."""
    if isinstance(value, dict):
        return {key: _expand(inner, path) for key, inner in value.items()}
    if isinstance(value, list):
        return [_expand(inner, path) for inner in value]
    return _VARIABLE.sub(lambda match: _variable(match, path), value) if isinstance(value, str) else value


def _variable(match: re.Match[str], path: str) -> str:
    value = os.environ.get(match[1], match[3])
    if value is None:
        raise ConfigError(
            f"{path}: environment variable {match[1]} is not set; set it, or write ${{{match[1]}:-default}}"
        )
    return value


def _validated(data: dict[str, Any], where: str) -> QueueConfig:
    try:
        return QueueConfig.model_validate(data)
    except ValidationError as error:
        lines = [f"{_field(e['loc'])}: {e['msg']}" for e in error.errors()]
        raise ConfigError(f"{where}: " + "; ".join(lines)) from None


def _field(where: tuple[int | str, ...]) -> str:
    """A field's name as the file has it: the kind that chose among models is none of its parents."""
    if where[:1] in (("source",), ("target",)):
        where = (where[0], *where[2:])
    return ".".join(str(part) for part in where) or "(file)"
