"""What a person is shown when asked: our facts as Markdown, anybody else's text as code."""

from __future__ import annotations

import re

LABEL_DIGITS = 12
CAP = 6_000
"""Characters of untrusted text a form shows."""


def fenced(text: str, cap: int = CAP) -> str:
    """Untrusted text as a Markdown code block that nothing in it can end.

    Airflow renders a form's body with live links and images, and a dead letter may hold either. Invisible and
    direction-changing characters are shown as ``\\ufffd``; what is longer than ``cap`` is cut.
    """
    lines = text.expandtabs(4).replace("\r\n", "\n").replace("\r", "\n")
    clean = "".join(c if c == "\n" or c.isprintable() else "\ufffd" for c in lines)
    if len(clean) > cap:
        clean = f"{clean[:cap]}\n… {len(clean) - cap:,} more characters"
    longest = max((len(run) for run in re.findall(r"`+", clean)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{clean}\n{fence}"


def label(choice: str, digest: str) -> str:
    """An option that says which plan it is for: Airflow keeps the first form of a task that is cleared."""
    return f"{choice} {digest[:LABEL_DIGITS]}"


def is_for(option: str, digest: str) -> bool:
    """Whether an option was shown for the plan that has this hash now."""
    return option.rsplit(" ", 1)[-1] == digest[:LABEL_DIGITS]


def person(user: dict[str, str] | None, *, timed_out: bool) -> str:
    """Who answered, in the words of a decision's record. Ids differ by auth manager: a name, or a number as text."""
    if user is None:
        return "nobody (time was up)" if timed_out else "unknown"
    name, identity = user.get("name") or "", user.get("id") or ""
    return name if name == identity else f"{name} ({identity})"
