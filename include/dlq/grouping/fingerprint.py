"""What failures have in common: a message without its values, and the fingerprint of the whole signature.

The rules go by what kinds of values messages carry (numbers, ids, times, addresses, paths, what is quoted or
assigned), not by any program's messages. ``python -m benchmarks.fingerprints`` measures them. Whoever changes what a
rule makes of a message counts :data:`VERSION` up: the golden file of the tests says so.

Every pattern is bounded or possessive, so that the time is linear whatever the message holds.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from hashlib import sha256

from dlq.memo import Memo

VERSION = "v3"
VALUE = "<*>"
"""What stands for a value, of any kind: programs write one value in many shapes."""

_READ = 2_000  # characters of a message that are looked at
_KEPT = 400  # characters of it that a signature keeps

_URL = re.compile(r"\b[A-Za-z][A-Za-z0-9+.-]{1,15}://[^\s\"'<>`|\\^{}]*+")

# What is quoted, and data in braces (JSON, maps, objects) to the third depth, or cut off.
_SPAN = re.compile(
    r"(?P<data>[\"'`]?\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*+\})*+\})*+\}[\"'`]?|\{\s?[\"']\w[^{}]*+\Z)"
    r"|\"(?:[^\"\\\n]|\\.){0,500}+\""
    r"|(?<!\w)[bru]?'(?:[^'\n]|(?<=\w)'(?=\w)){0,500}+'(?!\w)"
    r"|`[^`\n]{0,500}+`|[“„][^”“\n]{0,500}+[”“]|«[^»\n]{0,500}+»"
)
_SPANS = ('"', "'", "{", "`", "“", "„", "«")  # without one of these there is no span

# An error's own words within data: an answer's body tells one refusal from another.
_ERROR = re.compile(
    r"[\"'](?:errors?|error_?[a-z]*|exception|fault|reason|__type)[\"']\s?:|\bkind: [A-Z]", re.IGNORECASE
)
_SAID = re.compile(
    r"[\"'](?:errors?|error_?[a-z]*|code|type|reason|message|detail|title|__type)[\"']\s?:\s?"
    r"(?:\"([^\"]{1,200})\"|'([^']{1,200})')"
    r"|\b(?:kind|error|message): (?:\"([^\"]{1,200})\"|([A-Z]\w{1,60}))",  # as Rust prints a struct
    re.IGNORECASE,
)

_ASSIGNED = re.compile(
    r"(?<![\w=!<>])([A-Za-z_][\w.-]{0,63}+\)?)=\s?"
    r"(?!(?:true|false|null|None|nil)\b)(?:[A-Za-z][^\s,;()\[\]{}\"'&|<>]*+|\([^()]{0,200}+\))"
)
# Names whose value says what failed.
_TELLING = re.compile(
    r"(?:.*[._-])?(?:code|err|error|errno|reason|status|state|type|kind|cause|msg|message|text|desc|description"
    r"|exception|op|operation|action|method|cmd|command|event|phase|step|stage|result|category|level|severity)",
    re.IGNORECASE,
)

# Whose name a bare word is, where what follows shows that it is one.
_WHOSE = re.compile(
    r"\b(?:[Uu]ser(?:name)?|[Tt]enant|[Cc]ustomer|[Aa]ccount|[Mm]erchant|[Cc]lient|[Ll]ogin|[Hh]ost|[Oo]rgani[sz]ation)"
    r":? (?!(?:the|a|an|no|not|and|or|of|for|from|by|in|on|at|to|with|without|is|was|has|had|does|did|can|cannot"
    r"|could|will|would|should|must|may|ids?|names?|data|sessions?|accounts?|requests?|tokens?|profiles?|agents?"
    r"|inputs?|limits?|quotas?|already|exists?|found|unknown|missing|invalid|records?|emails?|address(?:es)?|passwords?"
    r"|roles?|groups?|info|context|objects?|services?|details|settings|keys?|state|status|types?|pool|errors?|failure"
    r"|timeout|code|secret|version|down|lookup|side)\b)"
    r"(?P<name>[A-Za-z][\w.-]*+)(?<!ed)(?<!ing)(?<!tion)(?<!ment)(?<!ity)(?<!able)(?<![ae]nce)"
    r"(?=\Z|[.,;:)\]]|\s(?:[<(\[]|(?:not|no|is|was|has|had|does|did|cannot|can|could|will|must|may|with|for|from|by|in|on"
    r"|at|to|of|or|and|lacks|needs|exceeded|already|failed)\b))"
)
_WHOSE_NAMES = ("user", "tenant", "customer", "account", "merchant", "client", "login", "host", "organi")

# The same of things whose name only a mark shows to be one: "queue full" is none.
_WHICH_NAMES = (
    *(
        "namespace",
        "node",
        "bucket",
        "cluster",
        "topic",
        "queue",
        "warehouse",
        "worker",
        "database",
        "pod",
        "job",
    ),
    *("dag", "subject", "region"),
)
_WHICH = re.compile(
    rf"\b(?i:{'|'.join(_WHICH_NAMES)}):? (?!(?:not|out|non|un|in|is|over|too|re|up|down|off|read|write)[-_])"
    r"(?P<name>[A-Za-z][A-Za-z0-9]{0,60}+[-_.][\w.-]{0,200}+(?<=[A-Za-z0-9]))(?=\Z|[\s,;:)\]])"
)

# What somebody masked before: [redacted], ****, xxxx-xxxx.
_MASKED = re.compile(
    r"[\[<(](?:redacted|masked|filtered|removed|hidden|secret)[\])>]|(?<![\w*])(?:[*•]{3,}|[xX]{4,}+(?![a-z]))",
    re.IGNORECASE,
)
_MASKS = ("redacted", "masked", "filtered", "removed", "hidden", "secret", "***", "••", "xxxx")
_DEGREES = re.compile(r"\d{1,3}°\s?(?:\d{1,2}['′]\s?(?:[\d.]{1,8}[\"″]\s?)?)?[NSEWO]\b")

_STATUS = re.compile(
    r"\b(?:HTTP(?:/\d(?:\.\d)?)?|[Ss]tatus(?:[ _-]?[Cc]ode)?|(?:[Rr]esponse|[Ee]rror|[Rr]eply)[ _-][Cc]ode)"
    r"[\s:=]{1,3}[1-5]\d\d\b"
)
_STATUS_NAMES = ("http", "status", "code")
_HIDE = {ord(d): 0xE000 + int(d) for d in "0123456789"}  # digits that no rule takes for a value
_SHOW = {0xE000 + int(d): d for d in "0123456789"}

_MARK = r"[.:/\\@#_%$€£+~*&?-]"  # what a value has that a plain word has not, beside digits
_TOKEN = re.compile(
    r"(?P<path>(?<![\w>.)\]:/])[.~]{0,2}/[\w.~%+:=&?@#$!*/-]++|\$[.\[][\w.*\[\]-]*+)"
    rf"|(?<![A-Za-z])[A-Za-z]*+(?:\d|{_MARK}|(?<=\d),(?=\d))(?:\w|{_MARK}|[!^]|(?<=\d),(?=\d))*+"
)
_END = ".:!?,-=&"  # ends a sentence or a clause, not a value
_CALENDAR = re.compile(
    r"(?:Mon|Tue|Tues|Wed|Wednes|Thu|Thurs|Fri|Sat|Satur|Sun)(?:day)?|Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?"
    r"|May|June?|July?|Aug(?:ust)?|Sept?(?:ember)?|Oct(?:ober)?|Nov(?:ember)?|Dec(?:ember)?"
)

_RANDOM = re.compile(
    r"(?=[a-f]*\d)[0-9a-f]{7,}|(?=[A-F]*\d)[0-9A-F]{8,}"  # hexadecimal
    r"|[A-Za-z]+\d+[A-Za-z]+\d\w*"  # letters and digits by turns
    r"|[A-Za-z]+\d{4,}[A-Za-z]?"
    r"|eyJ\w*"  # a JSON web token
    r"|P(?:\d+[YMWD])*(?:T(?:[\d.]+[HMS])+)?"  # an ISO 8601 duration
)
# A name with a number, but for those whose number is part of the name.
_NUMBERED = re.compile(
    r"(?!(?i:sha|md|utf|base|int|uint|float|http|oauth|ipv|ssh|tls|ssl|s|ec|x|v|p|h|es|python|java|log)\d)"
    r"(?:[a-z]+|[A-Z]+|[A-Z][a-z]+)\d+"
)
_DOMAIN = re.compile(
    r"(?:[a-z0-9_-]+\.)+(?:com|net|org|io|dev|cloud|internal|local|localdomain|lan|corp|intra|svc|gov|edu|info|biz|app|ai"
    r"|co|uk|de|fr|eu|cn|jp|br|ru|nl|ch|es|se|pl|au|ca|kr|hk)"
)
_FILE = re.compile(
    r".+\.(?:csv|tsv|jsonl?|ndjson|xml|parquet|avro|orc|txt|log|gz|zst|zip|tar|tgz|pdf|png|jpe?g|gif|ya?ml|toml|tmp|bin"
    r"|dat|data|xlsx?|docx?|sql|db|lock|pem|key|crt|conf|cfg|ini|properties|sock|pid|html?|eml|bak|exe|dll)"
)
_SOURCE = re.compile(
    r".+\.(?:py|rs|go|[cm]?[jt]sx?|java|kts?|scala|rb|php|cs|fs|c|cc|cpp|hpp?|ex|exs|erl|swift|vue)"
)
_VERSION_NUMBER = re.compile(r"[vV]\d+(?:\.\w+)*(?:[-+][\w.+-]*)?")
_DIGEST = re.compile(r"(?i:sha\d*|md5|crc\w*|blake\w+|etag|xxh\w*):[\w+/=-]{6,}")
_BASE64 = re.compile(r"[\w+/-]+={0,2}")
_HASH = re.compile(r"[0-9a-f]{1,40}")
_COLONS = re.compile(r"(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?:%\w+)?")  # IPv6, MAC
_JOINTS = re.compile(r"[-_#+]")
_DIGITS = re.compile(r"\d+")
_LOWER = re.compile(r"[a-z]+")

_UNIT = (
    r"%|[mµun]?s|[mµun]?secs?|(?:milli|micro|nano)?seconds?|millis|m|mins?|minutes?|h|hrs?|hours?|d|days?"
    r"|[kKMGTP]?i?[bB](?:ytes?)?|[KMGT]i|EUR|USD|GBP|°[CF]|AM|PM|am|pm"
    r"|UTC|GMT|[CEW]ES?T|[ECMP][SD]T|BST|[IJKM]ST|MSK|SGT|HKT|A[CEW][SD]?T|NZ[SD]T"
)
# Values side by side are one: a list, a host with its port, a number with its unit, a date in words.
_RUN = re.compile(
    rf"<(?:\*|[A-Z][a-z]{{2,8}})>(?:[\s,;:/.#|x×-]{{0,3}}<(?:\*|[A-Z][a-z]{{2,8}})>| ?(?:{_UNIT})(?![\w-])"
    r"|={1,2}(?![\w<\"']))*+"
)
_LIST = re.compile(
    r"\[(?:[^\[\]\s,=:]{1,100}+(?:,\s?[^\[\]\s,=:]{1,100}+){1,50}+|(?<=[:=] \[)[\w.<>*-]{1,100}+)\]"
    r"|\((?:[^()\s,=:<]{1,100}+,\s?){1,9}+<\*>\)"
)
_BARE = {
    "(<*>)": VALUE,
    "[<*>]": VALUE,
    "{<*>}": VALUE,
    "<*><*>": VALUE,  # before what would cut into it
    "<<*>>": VALUE,
    "<<*>": VALUE,
    "><*>": VALUE,
}
_EMPTY = {" []": f" {VALUE}", " ()": f" {VALUE}", " {}": f" {VALUE}"}


def normalise(message: str) -> str:
    """``message`` with its values replaced by :data:`VALUE`: numbers and measures, ids and hashes, times, addresses,
    paths, what is quoted or assigned, data, lists.

    An HTTP status that is named as one stays: 429 and 503 are different failures. So do quoted sentences, and what
    an error in a JSON body says of itself.
    """
    text = message[:_READ]
    if "://" in text:
        text = _URL.sub(_url, text)
    if "°" in text:
        text = _DEGREES.sub(VALUE, text)
    if _has(text, _SPANS):
        text = _SPAN.sub(_span, text)
    if "=" in text:
        text = _ASSIGNED.sub(_assigned, text)
    lower = text.lower()
    if hidden := _has(lower, _STATUS_NAMES):
        text = _STATUS.sub(_hidden, text)
    if _has(lower, _MASKS):
        text = _MASKED.sub(VALUE, text)
    text = " ".join([_chunks[chunk] for chunk in text.split()])
    if _has(lower, _WHOSE_NAMES):
        text = _WHOSE.sub(_nameless, text)
    if _has(lower, _WHICH_NAMES):
        text = _WHICH.sub(_nameless, text)
    text = _replaced(text, _EMPTY)
    if "[" in text or "<" in text:
        text = _LIST.sub(VALUE, _replaced(_RUN.sub(_run, text), _BARE))
        text = _replaced(_RUN.sub(_run, text), _BARE)
    if hidden:
        text = text.translate(_SHOW)
    return text.strip(" .:;,")[:_KEPT]


def _has(text: str, parts: Iterable[str]) -> bool:
    for part in parts:  # noqa: SIM110 (a generator costs more than the search)
        if part in text:
            return True
    return False


def _replaced(text: str, puts: Mapping[str, str]) -> str:
    for part, put in puts.items():
        text = text.replace(part, put)
    return text


def _hidden(found: re.Match[str]) -> str:
    return found[0].translate(_HIDE)


def _nameless(found: re.Match[str]) -> str:
    return found[0][: -len(found["name"])] + VALUE


def _run(found: re.Match[str]) -> str:
    return VALUE if "*" in found[0] else found[0].replace("<", "").replace(">", "")


def _url(found: re.Match[str]) -> str:
    url = found[0]
    return VALUE + url[len(url.rstrip(").,;:]!?")) :]


def _span(found: re.Match[str]) -> str:
    text = found[0]
    if found["data"]:
        if not _ERROR.search(text):
            return VALUE
        return f"{{{', '.join(''.join(said) for said in _SAID.findall(text)[:4])}}}"
    said = text.lstrip("bru")[1:-1]
    return f'"{said}"' if _is_prose(said) else VALUE


def _is_prose(said: str) -> bool:
    """Whether a quotation is a sentence, such as another error's message; a name or a title is a value."""
    words = said.split(" ")
    if len(words) < 3:
        return False
    return sum(word[:1].islower() for word in words[1:]) >= max(2, 0.6 * (len(words) - 1))


def _assigned(found: re.Match[str]) -> str:
    name = found[1]
    return found[0] if _TELLING.fullmatch(name) else f"{name}={VALUE}"


def _chunk(chunk: str) -> str:
    """What stands between spaces."""
    word = chunk.strip(".,:;()[]!?")
    if word.isalpha():
        return chunk.replace(word, f"<{word}>") if _CALENDAR.fullmatch(word) else chunk
    return _TOKEN.sub(_token, chunk)


_chunks: Memo[str, str] = Memo(_chunk, 8192, lambda chunk: len(chunk) <= 40)


def _token(found: re.Match[str]) -> str:
    text = found[0]
    if found["path"] is None:
        return _word(text)
    return VALUE + text[len(text.rstrip(_END)) :] if len(text) > 1 else text


def _word(token: str) -> str:
    """A run of letters, digits and marks, without what in it is a value."""
    core = token.rstrip(_END)
    end = token[len(core) :]
    if core.isalpha():
        return token
    if (
        "\\" in core
        or core.startswith("arn:")
        or _DIGEST.fullmatch(core)
        or (len(core) >= 16 and _is_scrambled(core))
    ):
        return VALUE + end
    if "/" in core:
        pieces = [_piece(piece) for piece in core.split("/")]
        if len(pieces) > 2 or VALUE in pieces or _SOURCE.fullmatch(core.partition(":")[0]):
            return VALUE + end
        return "/".join(pieces) + end
    if "@" in core:
        left, _, right = core.rpartition("@")
        if (_HASH.fullmatch(right) or right[:1].isdigit()) and (name := _piece(left)) != VALUE:
            return f"{name}@{VALUE}{end}"
        return VALUE + end if left else token
    if ":" in core:
        if _COLONS.fullmatch(core):
            return VALUE + end
        return ":".join(map(_piece, core.split(":"))) + end
    return _piece(core) + end


def _piece(piece: str) -> str:
    """What stands between slashes and colons."""
    if piece.isalpha() or not piece:
        return VALUE if piece == "localhost" else piece
    core = piece.lstrip("-+~#$€£%*&?.")
    if (
        core[:1].isdigit()
        or _VERSION_NUMBER.fullmatch(core)
        or any(_is_id(part) for part in _JOINTS.split(core))
    ):
        return VALUE
    if "." in core and (
        _DOMAIN.fullmatch(core)
        or _FILE.fullmatch(core)
        or any(len(part) >= 10 and _RANDOM.fullmatch(part) for part in core.split("."))
    ):
        return VALUE
    return _DIGITS.sub(VALUE, piece)


def _is_id(part: str) -> bool:
    if part.isalpha():
        return len(part) >= 10 and _is_scrambled(part)
    if part[:1].isdigit() or _RANDOM.fullmatch(part) or _NUMBERED.fullmatch(part):
        return True
    return _is_scrambled(part)


def _is_scrambled(text: str) -> bool:
    """Whether letters change case as no name's do: base 64, random ids."""
    if text.islower() or text.isupper() or not _BASE64.fullmatch(text):
        return False
    runs = _LOWER.findall(text)
    return len(runs) >= 3 and sum(map(len, runs)) <= 2.5 * len(runs)


def signature(
    error_type: str | None, causes: Iterable[str], message: str | None, component: str | None
) -> str:
    """The failure in one line: ``type < cause < its cause: message without its values @ component``.

    The causes belong to it: two faults of one class and message may differ in nothing else.
    """
    chain = list(dict.fromkeys(filter(None, (error_type, *causes))))
    text = " < ".join(chain) or "unknown error"
    if message:
        text += f": {normalise(message)}"
    return f"{text} @ {component}" if component else text


def fingerprint(signature: str) -> str:
    """The name of a signature: the version of the rules above and 16 hex digits."""
    return f"{VERSION}:{sha256(signature.encode('utf-8', 'replace')).hexdigest()[:16]}"
