"""The built-in plugins: small, real, deterministic, so that a golden flow can say what they must answer."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec

from dlq_orchestrator.failures import PluginError
from dlq_orchestrator.workflow import Call

_CATALOGUE = {
    "sku-anvil": "cast iron anvil for the workshop",
    "sku-kettle": "copper kettle for tea, two litres",
    "sku-lamp": "brass desk lamp with a green shade",
    "sku-rope": "hemp rope, twenty metres",
    "sku-teapot": "cast iron teapot with a strainer for tea",
}
_WAREHOUSES = ("bergen", "gdansk", "porto")
_STOCK_MAX = 1000


@dataclass(frozen=True, slots=True)
class Tool:
    """One tool of a plugin. Its `run` is called in another process, so it is a function of a module.

    :param effect: it changes the world, so each run of it goes to the effect log.
    """

    args: type[msgspec.Struct]
    run: Callable[[Any, Call], dict[str, Any]]
    effect: bool


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a plugin declares: the first of its versions runs until somebody sets another.

    :param scopes: what it may reach for.
    :param grantable: what a person may let it reach for too.
    :param memory_mb: limit and ceiling of one call, MiB.
    """

    versions: tuple[str, ...]
    scopes: frozenset[str]
    grantable: frozenset[str]
    memory_mb: tuple[int, int]


MANIFESTS: dict[str, Manifest] = {
    "embedding": Manifest(("1.0", "1.1"), frozenset({"embedding:read"}), frozenset(), (512, 2048)),
    "inventory": Manifest(("1.0", "1.1"), frozenset({"inventory:write"}), frozenset(), (256, 1024)),
    "notify": Manifest(
        ("1.0", "1.1"), frozenset({"notify:send"}), frozenset({"notify:admin", "network"}), (128, 512)
    ),
    "payments": Manifest(("1.0", "1.1"), frozenset({"payments:write"}), frozenset(), (256, 1024)),
    "search": Manifest(("1.0", "1.1"), frozenset({"search:read"}), frozenset(), (512, 2048)),
}


class Reserve(msgspec.Struct, frozen=True):
    sku: str
    quantity: Annotated[int, msgspec.Meta(ge=1)]


def _reserve(args: Reserve, call: Call) -> dict[str, Any]:
    call.require("inventory:write")
    if args.quantity > _STOCK_MAX:
        raise PluginError(f"no warehouse holds more than {_STOCK_MAX} of anything")
    warehouse = _WAREHOUSES[hashlib.sha256(args.sku.encode()).digest()[0] % len(_WAREHOUSES)]
    return {
        "reservation": call.reference("rsv"),
        "sku": args.sku,
        "quantity": args.quantity,
        "warehouse": warehouse,
    }


class Charge(msgspec.Struct, frozen=True):
    amount_cents: Annotated[int, msgspec.Meta(ge=1)]
    currency: Annotated[str, msgspec.Meta(pattern="^[A-Z]{3}$")]


def _charge(args: Charge, call: Call) -> dict[str, Any]:
    call.require("payments:write")
    fee = (args.amount_cents * 29 + 999) // 1000 + 30
    return {
        "payment": call.reference("pay"),
        "amount_cents": args.amount_cents,
        "currency": args.currency,
        "fee_cents": fee,
        "net_cents": args.amount_cents - fee,
    }


class Query(msgspec.Struct, frozen=True):
    text: str
    top: Annotated[int, msgspec.Meta(ge=1, le=100)] = 3


def _query(args: Query, call: Call) -> dict[str, Any]:
    call.require("search:read")
    wanted = set(args.text.lower().split())
    scores = {sku: len(wanted & set(text.replace(",", "").split())) for sku, text in _CATALOGUE.items()}
    hits = sorted((sku for sku, score in scores.items() if score), key=lambda sku: (-scores[sku], sku))
    return {"hits": hits[: args.top], "total": len(hits)}


class Embed(msgspec.Struct, frozen=True):
    text: str
    dimensions: Annotated[int, msgspec.Meta(ge=2, le=64)] = 8


def _embed(args: Embed, call: Call) -> dict[str, Any]:
    """A bag of words by feature hashing, scaled to length 1."""
    call.require("embedding:read")
    vector = [0.0] * args.dimensions
    for word in args.text.lower().split():
        digest = hashlib.sha256(word.encode()).digest()
        vector[digest[0] % args.dimensions] += 1.0 if digest[1] % 2 else -1.0
    length = math.sqrt(sum(x * x for x in vector)) or 1.0
    return {"dimensions": args.dimensions, "vector": [round(x / length, 6) for x in vector]}


class Send(msgspec.Struct, frozen=True):
    channel: Literal["email", "sms"]
    to: str
    subject: str


def _send(args: Send, call: Call) -> dict[str, Any]:
    call.require("notify:send")
    parts = math.ceil(len(args.subject) / 160) or 1
    return {
        "message": call.reference("msg"),
        "channel": args.channel,
        "parts": parts if args.channel == "sms" else 1,
    }


TOOLS: dict[tuple[str, str], Tool] = {
    ("embedding", "embed"): Tool(Embed, _embed, effect=False),
    ("inventory", "reserve"): Tool(Reserve, _reserve, effect=True),
    ("notify", "send"): Tool(Send, _send, effect=True),
    ("payments", "charge"): Tool(Charge, _charge, effect=True),
    ("search", "query"): Tool(Query, _query, effect=False),
}
