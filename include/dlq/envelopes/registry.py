"""Which convention a dead letter was written by, and what it says: chosen per letter, by what it carries."""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import msgspec

from dlq.entry import Record, Understood
from dlq.envelopes import (
    aws_lambda,
    azure,
    eventbridge,
    ids,
    kafka_connect,
    kafka_streams,
    lambda_destination,
    masstransit,
    nservicebus,
    orchestrator,
    pubsub,
    pulsar,
    rabbitmq,
    share_group,
    sns,
    sqs,
)
from dlq.envelopes.cloudevents import CloudEvent, Knative
from dlq.envelopes.letter import Format, Letter
from dlq.envelopes.path import JsonPath
from dlq.envelopes.smallrye import DeadLetter, DelayedRetry
from dlq.envelopes.spring import CloudStream, RetryTopic, Spring
from dlq.memo import Memo

log = logging.getLogger("dlq.envelopes")
T = TypeVar("T")
R = TypeVar("R")

SHIPPED: tuple[Format, ...] = (
    orchestrator,
    RetryTopic(),
    Spring(),
    CloudStream(),
    kafka_connect,
    kafka_streams,
    share_group,
    DeadLetter(),
    DelayedRetry(),
    masstransit,
    nservicebus,
    Knative(),
    rabbitmq,
    azure,
    pubsub,
    pulsar,
    eventbridge.Schedule(),
    eventbridge.Rule(),
    aws_lambda,
)
_EVENT = CloudEvent()
_BODIES = (lambda_destination.read, eventbridge.batch)
_OURS = ("dlq", "dlq-")  # what a replay adds, on SQS in one attribute
_DEAD = re.compile(r"(?:^|[-._])(?:dlt|dlq|dead-?letter)", re.IGNORECASE)


class _Shape(msgspec.Struct, frozen=True):
    """What follows from a record's header names: which of a queue's own formats it may be, by which conventions it was
    dead-lettered (the latest hop first; ``unsure`` where the order of the names can't tell), whether it may be an
    event, and where its ids are.
    """

    own: tuple[Format, ...]
    hops: tuple[Format, ...]
    unsure: bool
    event: bool
    ids: ids.Where


class Envelopes:
    """The conventions that one queue's letters are read by.

    :param own: the queue's own formats, asked before the shipped ones.
    :param dedupe: where the dedupe key lies in the value, where no header has one.
    """

    def __init__(self, own: Sequence[Format] = (), dedupe: JsonPath | None = None) -> None:
        self._own = tuple(own)
        self._broken: set[str] = set()
        self._dedupe = dedupe
        # One producer's records carry the same names in the same order: what follows from them is worked out once.
        self._shapes: Memo[tuple[str, ...], _Shape] = Memo(
            self._shape, 1024, lambda names: sum(map(len, names)) <= 4096
        )

    def decode(self, record: Record) -> Understood:
        """What ``record`` says of its failure, origin and ids. Never raises: a broken header costs its field."""
        letter, shape = self._opened(record)
        if record.transport == "sqs":
            found = self._message(letter, shape)
        else:
            found = self._told(letter, shape) or _unknown(record)
            ids.read(letter.last, shape.ids, found)
        if self._dedupe is not None and found.dedupe_key is None:
            found.dedupe_key = self._dedupe.find(record.value)
        return found

    def survives(self, name: str) -> bool:
        """Whether a record keeps the header on its replay: those of earlier hops' failures and replays go, or it would
        grow with every hop.
        """
        if name == _OURS[0] or name.startswith(_OURS[1]):
            return False
        return not any(form.owns(name) for form in (*self._own, *SHIPPED))

    def _opened(self, record: Record) -> tuple[Letter, _Shape]:
        headers = record.headers
        last = dict(headers)
        if len(last) == len(headers):
            return Letter(record, last, last), self._shapes[tuple(last)]
        return (
            Letter(record, dict(reversed(headers)), last),
            self._shapes[tuple([name for name, _ in headers])],
        )

    def _shape(self, names: tuple[str, ...]) -> _Shape:
        present = frozenset(names)
        hops = [form for form in SHIPPED if form.recognises(present)]
        if len(hops) > 1:
            # Each hop appends its headers to those that were there, so the latest one's end last.
            ends = {
                form.name: max((at for at, name in enumerate(names) if form.owns(name)), default=-1)
                for form in hops
            }
            hops.sort(key=lambda form: ends[form.name], reverse=True)
        return _Shape(
            tuple(form for form in self._own if self._asked(form, form.recognises, present)),
            tuple(hops),
            len(hops) > 1 and any(isinstance(form, DeadLetter) for form in hops),
            _EVENT.recognises(present),
            ids.where(dict.fromkeys(names)),
        )

    def _asked(self, form: Format, question: Callable[[T], R], about: T) -> R | None:
        """The answer of a format of the queue's own, None where it raises: said once, and never the end of a drain."""
        try:
            return question(about)
        except Exception as error:  # noqa: BLE001  # somebody else's code, and a letter somebody else wrote
            if form.name not in self._broken:
                self._broken.add(form.name)
                log.warning(
                    "format %s raised %s: such letters are read without it", form.name, type(error).__name__
                )
            return None

    def _told(self, letter: Letter, shape: _Shape) -> Understood | None:
        """What the headers tell; None where they tell of no failure and no event."""
        for form in shape.own:
            if (found := self._asked(form, form.read, letter)) is not None:
                return found
        if len(shape.hops) == 1:
            return shape.hops[0].read(letter)
        if shape.hops:
            return _through(letter, shape)
        return _EVENT.read(letter) if shape.event else None

    def _reported(self, letter: Letter, shape: _Shape) -> Understood | None:
        """What an SQS message's attributes tell, else its body."""
        if (found := self._told(letter, shape)) is not None:
            return found
        raw = letter.record.value
        if raw is None or not raw.startswith(b"{"):
            return None
        return next((found for read in _BODIES if (found := read(raw)) is not None), None)

    def _message(self, letter: Letter, shape: _Shape) -> Understood:
        found = self._reported(letter, shape)
        if found is None and (envelope := sns.opened(letter.record)) is not None:
            letter, shape = self._opened(envelope.inside)
            found = self._reported(letter, shape) or Understood(
                sns.NAME, origin_topic=envelope.topic, origin_timestamp_ms=envelope.published_ms
            )
        found = found or _unknown(letter.record)
        ids.read(letter.last, shape.ids, found)
        sqs.read(letter.record, found)
        return found


def _unknown(record: Record) -> Understood:
    """Nothing is said of a failure; the record's own time is the nearest to its origin's."""
    return Understood(origin_timestamp_ms=record.timestamp_ms)


def _through(letter: Letter, shape: _Shape) -> Understood | None:
    """A record that was dead-lettered more than once: the latest hop's failure, the earliest's origin."""
    hops = [found for form in shape.hops if (found := form.read(letter)) is not None]
    if shape.unsure:
        # SmallRye puts its headers before all others, at whichever hop: who read from a dead-letter topic came later.
        hops.sort(key=lambda hop: _DEAD.search(hop.origin_topic or "") is None)
    latest = hops[0]
    for hop in reversed(hops):
        if hop.origin_topic is not None:
            latest.origin_topic, latest.origin_partition = hop.origin_topic, hop.origin_partition
            latest.origin_offset, latest.origin_timestamp_ms = hop.origin_offset, hop.origin_timestamp_ms
            latest.consumer_group = hop.consumer_group
            break
    latest.origin_queue = next((q for hop in reversed(hops) if (q := hop.origin_queue) is not None), None)
    return latest


def load(names: Iterable[str]) -> tuple[Format, ...]:
    """A queue's own formats, by ``module.Class``.

    :raises ValueError: where one can't be had, with the fix.
    """
    return tuple(map(_made, names))


def _made(name: str) -> Format:
    module, _, attribute = name.rpartition(".")
    if not module:
        raise ValueError(f"{name!r} is no class; write it as module.Class")
    try:
        made = getattr(importlib.import_module(module), attribute)()
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{name!r}: {error}; put the module where every component finds it (PYTHONPATH)"
        ) from None
    except AttributeError as error:
        raise ValueError(f"{name!r}: {error}; correct the name") from None
    except Exception as error:  # noqa: BLE001  # somebody else's code
        raise ValueError(
            f"{name!r} can't be made: {type(error).__name__}: {error}; it takes no arguments"
        ) from None
    if not isinstance(made, Format):
        raise ValueError(f"{name!r} is no format; it needs name, recognises, read and owns")
    return made
