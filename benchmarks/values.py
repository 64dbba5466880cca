"""The kinds of values that failure messages carry, each in the shapes that programs write them in.

A shape is text in which ``«kind»`` stands for another value.
"""

from __future__ import annotations

import base64
import ipaddress
import json
import re
import string
import uuid
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from random import Random

_ALNUM = string.ascii_letters + string.digits
_UPPER = string.ascii_uppercase + string.digits
_CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_POD = "bcdfghjklmnpqrstvwxz2456789"  # what Kubernetes names pods with
_MARK = re.compile(r"«([^»]+)»")
_ROUGHLY = 10**6


def _text(alphabet: str, count: int) -> Callable[[Random], str]:
    return lambda r: "".join(r.choices(alphabet, k=count))


def _hex(count: int) -> Callable[[Random], str]:
    return lambda r: f"{r.getrandbits(4 * count):0{count}x}"


def _uuid(r: Random) -> str:
    return str(uuid.UUID(int=r.getrandbits(128), version=4))


def _int(r: Random) -> str:
    return str(r.randrange(10 ** r.randrange(1, 10)))


def _float(places: int) -> Callable[[Random], str]:
    return lambda r: f"{r.uniform(0, 10 ** r.randrange(1, 5)):.{places}f}"


def _when(r: Random) -> datetime:
    second = r.randrange(94_608_000)
    return datetime(2024, 1, 1, tzinfo=UTC) + timedelta(seconds=second, microseconds=r.randrange(_ROUGHLY))


def _time(form: str) -> Callable[[Random], str]:
    return lambda r: _when(r).strftime(form)


def _path(r: Random) -> str:
    folders = ("var", "lib", "data", "tmp", "srv", "app", "opt", "orders", "out")
    return "/" + "/".join(r.choices(folders, k=r.randrange(2, 6)))


def _json(r: Random) -> str:
    found: dict[str, object] = {"id": r.randrange(_ROUGHLY), "customer": _text(string.ascii_lowercase, 6)(r)}
    if r.random() < 0.5:
        found["lines"] = [{"sku": f"A-{r.randrange(999)}", "n": r.randrange(9)}]
    if r.random() < 0.5:
        found |= {"paid": r.random() < 0.5, "note": None}
    return json.dumps(found)


def _jwt(r: Random) -> str:
    parts = (b'{"alg":"HS256"}', json.dumps({"sub": r.randrange(_ROUGHLY)}).encode(), r.randbytes(24))
    return ".".join(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in parts)


def _list(item: Callable[[Random], str]) -> Callable[[Random], str]:
    return lambda r: ", ".join(item(r) for _ in range(r.randrange(1, 7)))


_DRAWN: Mapping[str, Callable[[Random], str]] = {
    "int": _int,
    "small": lambda r: str(r.randrange(100)),
    "float1": _float(1),
    "float2": _float(2),
    "float4": _float(4),
    "cents": lambda r: f"{r.randrange(100, 10**7) / 100:,.2f}",
    "d3": _text(string.digits, 3),
    "d5": _text(string.digits, 5),
    "d7": _text(string.digits, 7),
    "d12": _text(string.digits, 12),
    "d20": _text(string.digits, 20),
    "hex7": _hex(7),
    "hex8": _hex(8),
    "hex12": _hex(12),
    "hex16": _hex(16),
    "hex17": _hex(17),
    "hex24": _hex(24),
    "hex32": _hex(32),
    "hex40": _hex(40),
    "hex64": _hex(64),
    "alnum10": _text(_ALNUM, 10),
    "alnum16": _text(_ALNUM, 16),
    "alnum24": _text(_ALNUM, 24),
    "upper16": _text(_UPPER, 16),
    "upper52": _text(_UPPER, 52),
    "lower8": _text(string.ascii_lowercase + string.digits + "_", 8),
    "crockford24": _text(_CROCKFORD, 24),
    "pod5": _text(_POD, 5),
    "pod9": _text(_POD, 9),
    "pod10": _text(_POD, 10),
    "char": _text("}{<>abcxyz", 1),
    "UUID": lambda r: _uuid(r).upper(),
    "dashed": _uuid,
    "ipv4": lambda r: str(ipaddress.IPv4Address(r.getrandbits(32))),
    "ipv6": lambda r: str(ipaddress.IPv6Address(r.getrandbits(128))),
    "port": lambda r: str(r.choice((80, 443, 5432, 6379, 8080, 9092, r.randrange(1024, 65536)))),
    "base64": lambda r: base64.b64encode(r.randbytes(r.randrange(18, 60))).decode(),
    "jwt": _jwt,
    "json": _json,
    "folders": _path,
    "ints": _list(_int),
    "uuids": _list(_uuid),
    "mac:": lambda r: ":".join(f"{b:02x}" for b in r.randbytes(6)),
    "mac-": lambda r: "-".join(f"{b:02X}" for b in r.randbytes(6)),
    "epochms": lambda r: str(int(_when(r).timestamp() * 1000)),
    "isoz": lambda r: _when(r).isoformat().replace("+00:00", "Z"),
    "isoms": lambda r: _when(r).isoformat(timespec="milliseconds"),
    "day": _time("%Y-%m-%d"),
    "clock": _time("%H:%M:%S"),
    "dated": _time("%Y/%m/%d"),
}

_TIMES: Mapping[str, tuple[str, ...]] = {
    "time": (
        "%Y-%m-%d %H:%M:%S",
        "%a, %d %b %Y %H:%M:%S GMT",
        "%d/%b/%Y:%H:%M:%S +0000",
        "%m/%d/%Y %I:%M:%S %p",
        "%a %b %d %H:%M:%S UTC %Y",
        "%Y%m%dT%H%M%SZ",
        "%H:%M:%S.%f",
    ),
    "iso": ("%Y-%m-%dT%H:%M:%SZ", "%Y-%m-%dT%H:%M:%S.%fZ", "%Y-%m-%d %H:%M:%S,%f"),
    "date": ("%Y-%m-%d", "%d.%m.%Y", "%m/%d/%Y", "%d %b %Y", "%b %d, %Y", "%Y%m%d"),
    "cardexp": ("%m/%y", "%m/%Y"),
}

_SHAPES: Mapping[str, str] = {
    # numbers and measures
    "float": "«float1»|«float2»",
    "percent": "«small»%|«float1»%|«small» %",
    "duration": (
        "«int»ms|«int» ms|«small»s|«small» seconds|«float2»s|«small»m«small»s|PT«small»S|"
        "«small» minutes|«small» hours|«small»h|«int»µs"
    ),
    "size": "«int»MB|«int» MB|«float1» GiB|«int» bytes|«int»KiB|«small»Mi|«int»B",
    "money": "$«cents»|«cents» EUR|€«cents»|«cents» USD",
    "coords": "«float4»,«float4»|-«float4», «float4»",
    "httpstatus": "200|204|302|404|500",
    "timespan": "«clock»|«clock».«d7»|«small».«clock»",
    "cron": "«small» «small» * * *|*/«small» * * * *",
    "iso": "«isoz»|«isoms»",
    "time": "«isoz»|«epochms»",
    # addresses
    "short6": "2001:db8::«hex7»|fe80::1",
    "ipv4port": "«ipv4»:«port»",
    "ipv6port": "[«ipv6»]:«port»|[fe80::«d3»]:«port»",
    "host": (
        "«noun»-«small».«company».«tld»|api.«company».«tld»|«noun».«company».svc.cluster.local|"
        "«noun».c«hex12».«region».rds.amazonaws.com|ip-10-«small»-«small»-«small».ec2.internal|"
        "«machine»-«small»"
    ),
    "hostport": (
        "«noun»-«small».«company».«tld»:«port»|api.«company».«tld»:«port»|"
        "«machine»-«small»:«port»|localhost:«port»|«noun».«company».svc.cluster.local:«port»"
    ),
    "mac": "«mac:»|«mac-»",
    "url": (
        "https://api.«company».«tld»«urlpath»|"
        "http://«noun»-«small».«company».«tld»:«port»«urlpath»|http://localhost:«port»«urlpath»|"
        "http://«ipv4»«urlpath»"
    ),
    "urlpath": (
        "/v1/«noun»/«int»|/api/«noun»/«dashed»|/«noun»?page=«small»|"
        "/v2/«noun»/«adjective»?from=«day»&full=true"
    ),
    "s3url": "s3://«noun»-«adjective»«folders»/«noun».json|s3://«noun»/«dated»/part-«d5».gz",
    "sqsurl": "https://sqs.«region».amazonaws.com/«d12»/«noun»-dlq",
    "email": (
        "«first».«last»@«company».«tld»|«first»«small»@mail.«company».co.uk|«first»+«noun»@«company».com"
    ),
    "phone": "+49 «d3» «d7»|(«d3») 555-«d3»",
    # ids
    "uuid": "«dashed»|«dashed»|«UUID»",
    "guid": "«dashed»|{«UUID»}",
    "ulid": "01«crockford24»",
    "ksuid": "2«alnum16»«alnum10»",
    "hex": "«hex8»|«hex12»|0x«hex8»|«hex40»",
    "hexbyte": "0x8«small»|0xe«small»",
    "md5": "«hex32»",
    "sha256": "sha256:«hex64»",
    "gitsha": "«hex7»|«hex12»|«hex40»",
    "pointer": "0x7f«hex8»d0",
    "@hash": "@«hex7»|@«hex8»",
    "object": "com.example.Order@«hex8»|com.example.Order$Line@«hex7»",
    "AWSREQ": "«upper16»|«upper52»",
    "account": "«d12»",
    "arn": (
        "arn:aws:lambda:«region»:«d12»:function:«noun»-«adjective»|"
        "arn:aws:sqs:«region»:«d12»:«noun»|arn:aws:iam::«d12»:role/«noun»-«adjective»|"
        "arn:aws:states:«region»:«d12»:execution:«noun»:«dashed»"
    ),
    "shard": "shardId-000000000«d3»",
    "instance": "i-«hex17»|i-«hex8»",
    "zone": "«region»a|«region»b|«region»c",
    "logstream": "«dated»/[$LATEST]«hex32»",
    "orderid": "ORD-«int»|«int»|order_«alnum16»|#«d5»|«dashed»",
    "paymentid": "pi_«alnum24»|pay-«hex12»|«int»|PAY«d7»",
    "orgid": "org-«alnum24»",
    "toolcall": "call_«alnum24»",
    "messageid": "«dashed»|«int»|«hex24»|<«int».«hex8»@mail.example.com>",
    "requestid": "req_«alnum16»|«hex32»|«dashed»|«hex8»/«alnum10»-«d5»",
    "invoice": "INV-2026-«d5»|R«d5»",
    "tracking": "1Z«upper16»|JJD«d20»",
    "iban": "DE«d20»|GB«small»BARC«d12»",
    "cachekey": "«noun»:«int»|user:«int»:«noun»|«noun»#«dashed»",
    "lock": "lock:«noun»:«int»|«noun»-«small»",
    "tenant": "t-«d3»|tenant_«small»|«company»",
    "user": "«first».«last»|u«d5»|svc_«noun»|«first»",
    "version": "«small».«small».0|v«small».«small»",
    # names
    "topic": "«noun».«adjective».v«small»|«noun»-dlt|«noun»",
    "topicpart": "«noun»-«small»|«noun».«adjective»-«small»",
    "group": "«noun»-«adjective»-«small»|«noun»-consumer-«hex8»",
    "consumer": "consumer-«noun»-«small»-«dashed»|amq.ctag-«alnum24»",
    "queue": "«noun».«adjective»|«noun»-«small»",
    "index": "«noun»-2026.07.«small»|«noun»-«d5»",
    "pod": "«noun»-«pod9»-«pod5»|«noun»-«pod10»-«pod5»",
    "image": "registry.«company».io/«noun»:«small».«small»|«noun»@sha256:«hex64»",
    "thread": "pool-«small»-thread-«small»|http-nio-8080-exec-«small»|worker-«small»",
    "branch": "feature/«adjective»-«small»|release/«small».«small»",
    "container": "«noun»-«small»|«hex12»",
    "value": "«first»|«int»|«dashed»|«adjective»|«alnum10»||N/A|12,50|«first» «last»",
    "path": ("«folders»/«noun»-«small».json|/data/«noun»/«dated»/part-«d5».avro|/tmp/«lower8»/«noun»"),
    "relpath": "base/«d5»/«d5»|pg_wal/«hex24»",
    "winpath": r"C:\inetpub\«noun»\«adjective».cs|D:\data\«noun»\part«small».csv",
    "file": "«noun»-2026«d3».csv|«noun»_«small».json|«adjective».parquet",
    "jsonpath": "$.«noun»|$.lines[«small»].«noun»|/lines/«small»/«noun»",
    "intlist": "[«ints»]|«ints»|{«ints»}",
    "uuidlist": "[«uuids»]|(«uuids»)",
}
"""The shapes of a kind, between bars."""

_WORDS: Mapping[str, str] = {
    "first": "alice bob carol dmitri eve fatima george hana igor jun kofi lena maria noor olga pedro",
    "last": "abe baker costa doe eriksen fischer garcia huang ito jones kaya lopez meyer nkosi owens",
    "noun": "orders payments invoices customers shipments users events metrics sessions catalog ledger refunds",
    "adjective": "amber brisk calm dusty early fierce green hollow idle jolly keen late mellow neat",
    "company": "acme globex initech umbrella hooli stark wayne tyrell soylent cyberdyne vandelay",
    "machine": "kafka web node db redis worker",
    "tld": "com net org io dev cloud internal local",
    "region": "us-east-1 us-west-2 eu-central-1 eu-west-3 ap-southeast-2 sa-east-1 ap-northeast-1",
    "country": "DE FR GB US",
    "currency": "EUR USD GBP XAU",
    "namespace": "prod staging team-a",
}

# What a program calls its own parts: a fault has one of each, whatever the message's other values are.
_PARTS: Mapping[str, str] = {
    "class": "com.example.billing.OrderService org.acme.payments.CaptureHandler io.shop.cart.CartListener",
    "Model": "Order PaymentIntent Cart InvoiceLine",
    "Field": "Customer Address Total",
    "field": "amount total customer_id email orderId createdAt status currency quantity lines",
    "table": "orders payments invoices order_lines",
    "constraint": "orders_pkey users_email_key uk_6dotkott2kjsp8vw4d0m25fb7 fk_order_customer",
    "CONST": "SHOP ORDERS PK_ORDERS CREATED_AT",
    "db": "shop billing crm",
    "service": "inventory payment-gateway crm-sync fraud-check",
    "plugin": "crm.sync mail.send search.web billing.charge",
    "agent": "planner refund-bot triage",
    "scope": "crm.write mail.send files:read",
    "connector": "jdbc-sink s3-sink elastic",
    "pool": "HikariPool main-pool reporting",
    "pyfunc": "handle_order app.tasks.sync_customer process_batch",
    "pymod": "requests_oauthlib app.handlers.orders numpy.core",
    "pyfile": "handler.py tasks.py",
    "jsfile": "/app/dist/handler.js /srv/node_modules/lib/index.js",
    "gofile": "handler.go /go/src/app/orders.go",
    "rsfile": "src/main.rs src/handler/mod.rs",
    "rbfile": "app/jobs/order_job.rb",
    "word": "Payments Shop Platform",
}


class Fault:
    """A message's template and how this fault writes its values: mostly in one shape each, sometimes in any.

    :param rng: decides the shapes, and the names of the program's own parts.
    """

    def __init__(self, template: str, rng: Random, mixed: float = 0.3) -> None:
        parts = _MARK.split(template)
        self._texts, kinds = parts[::2], parts[1::2]
        self._values: list[tuple[str, ...]] = []
        named: dict[str, str] = {}
        for kind in kinds:
            if kind in _PARTS:
                name = named.setdefault(kind, rng.choice(_PARTS[kind].split()))
                self._values.append((name,))
            else:
                shapes = _shapes(kind)
                self._values.append(shapes if rng.random() < mixed else (rng.choice(shapes),))

    def message(self, rng: Random) -> str:
        """One message of this fault."""
        said = [self._texts[0]]
        for shapes, text in zip(self._values, self._texts[1:], strict=True):
            said += [_filled(rng.choice(shapes), rng), text]
        return "".join(said)


def _shapes(kind: str) -> tuple[str, ...]:
    """Every shape of ``kind``; a strftime form counts as one.

    :raises KeyError: for a kind that nobody draws.
    """
    composed = _SHAPES[kind].split("|") if kind in _SHAPES else ()
    shapes = (*composed, *(f"«{form}»" for form in _TIMES.get(kind, ())))
    if shapes:
        return shapes
    if kind in _WORDS or kind in _DRAWN or "%" in kind:
        return (f"«{kind}»",)
    raise KeyError(f"«{kind}» is no kind of value: benchmarks/values.py has none of this name")


def _filled(shape: str, rng: Random) -> str:
    return _MARK.sub(lambda found: _drawn(found[1], rng), shape)


def _drawn(kind: str, rng: Random) -> str:
    if kind in _WORDS:
        return rng.choice(_WORDS[kind].split())
    if kind in _DRAWN:
        return _DRAWN[kind](rng)
    if "%" in kind:
        return _when(rng).strftime(kind)
    return _filled(rng.choice(_shapes(kind)), rng)
