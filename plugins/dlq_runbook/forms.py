"""What a person is shown when asked: our facts as Markdown, anybody else's text as code."""

from __future__ import annotations

import re
from collections.abc import Iterable

SHORT = 12
CAP = 6_000
"""Characters of untrusted text a form shows."""


def body(facts: Iterable[str], untrusted: str) -> str:
    """A form's text: our facts first, others' text only inside a fence."""
    lines = [f"- {fact}" for fact in facts]
    if untrusted:
        lines += ["", "In the words of the platform and its failures:", "", fenced(untrusted)]
    return "\n".join(lines)


def fenced(text: str, cap: int = CAP) -> str:
    """Untrusted text as a Markdown code block that nothing in it can end.

    Airflow renders a form with live links and images, and a dead letter may hold either. Invisible and
    direction-changing characters are shown as ``\\ufffd``; what is longer than ``cap`` is cut.
    """
    lines = text.expandtabs(4).replace("\r\n", "\n").replace("\r", "\n")
    clean = "".join(c if c == "\n" or c.isprintable() else "\ufffd" for c in lines)
    if len(clean) > cap:
        clean = f"{clean[:cap]}\n… {len(clean) - cap:,} more characters"
    longest = max((len(run) for run in re.findall(r"`+", clean)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{clean}\n{fence}"


def one_line(text: object) -> str:
    """Untrusted text on one line of a log."""
    return "".join(c if c.isprintable() else " " for c in str(text))


def short(digest: str) -> str:
    """A hash as people see it."""
    return digest[:SHORT]


def label(choice: str, digest: str) -> str:
    """An option that says which plan it is for: Airflow keeps the first form of a task that is cleared."""
    return f"{choice} #{short(digest)}"


def unlabelled(option: str) -> tuple[str, str]:
    """The choice and the short hash of an option."""
    choice, _, digest = option.rpartition(" #")
    return choice, digest


def is_for(option: str, digest: str) -> bool:
    """Whether an option was shown for the plan that has this hash now."""
    return unlabelled(option)[1] == short(digest)


def person(user: dict[str, str] | None, *, timed_out: bool) -> str:
    """Who answered, for a decision's record. Ids differ by auth manager: a name, or a number as text."""
    if user is None:
        return "nobody" if timed_out else "unknown"
    name, identity = user.get("name") or "", user.get("id") or ""
    return identity if name in ("", identity) else f"{name} ({identity})"
