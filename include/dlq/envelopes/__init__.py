"""Envelope formats: how a producer wrote the failure onto a dead letter, chosen by what each carries.

docs/formats.md lists every convention, what is read of it, and from where that is known.
"""

from __future__ import annotations

from dlq.envelopes.letter import Format, Letter
from dlq.envelopes.path import JsonPath
from dlq.envelopes.registry import Envelopes, load

__all__ = ["Envelopes", "Format", "JsonPath", "Letter", "decode", "load", "survives"]

_shipped = Envelopes()
decode = _shipped.decode
survives = _shipped.survives
