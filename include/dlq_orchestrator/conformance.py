"""`python -m dlq_orchestrator.conformance URL TOKEN`: does an orchestrator keep the contract it announces?

Each level it announces is tried from outside, over HTTP alone; a level it doesn't announce is skipped, and said. It
runs real workflows, and leaves limits, scopes and routing as they were. The contract: docs/orchestrator.md.
"""

from __future__ import annotations

import argparse
import base64
import json
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

_MAJOR = "1"
_PROBLEM = "application/problem+json"
_POLL_S = 0.1
_HEALTHY = {"name": "charge", "plugin": "payments", "tool": "charge"}
_ARGS = {"amount_cents": 1000, "currency": "EUR"}

WORKFLOW: dict[str, Any] = {"workflow": "conformance", "steps": [{**_HEALTHY, "args": _ARGS}]}
"""What the reference runs through; another orchestrator is given its own."""

FAILING: dict[str, Any] = {
    "workflow": "conformance",
    "steps": [{**_HEALTHY, "args": {**_ARGS, "fault": {"error": "PluginError", "attempts": 1}}}],
}
"""What fails when it is run first, and succeeds when it is replayed."""


class Wrong(Exception):
    """The contract says otherwise; the message says what was expected and what came."""


@dataclass(frozen=True)
class Result:
    """How one check went: `passed`, `failed` or `skipped`, and why."""

    level: str
    check: str
    state: str
    why: str = ""


class Subject:
    """The orchestrator being tried.

    :param deadline_s: how long a workflow may take to end, in seconds.
    """

    def __init__(
        self, url: str, token: str, workflow: dict[str, Any], failing: dict[str, Any], deadline_s: float
    ) -> None:
        self.url = url.rstrip("/")
        self.http = httpx.Client(
            base_url=self.url, headers={"Authorization": f"Bearer {token}"}, timeout=max(10.0, deadline_s)
        )
        self.workflow, self._failing = workflow, failing
        self._deadline_s = deadline_s

    def ask(self, method: str, path: str, status: int = 200, **request: Any) -> Any:
        """One call; its answer as JSON. Errors have to be problems.

        :raises Wrong: another status came, or no JSON.
        """
        response = self.http.request(method, path, **request)
        _expect(response.status_code == status, f"{method} {path}: status {status}", response.status_code)
        if status >= 400:
            kind = response.headers.get("content-type", "").partition(";")[0]
            _expect(kind == _PROBLEM, f"{method} {path}: content type {_PROBLEM}", kind)
        try:
            return response.json() if response.content else None
        except ValueError:
            raise Wrong(f"{method} {path}: the answer is no JSON") from None

    def until(self, what: str, look: Callable[[], Any]) -> Any:
        """Ask until there is an answer that is true."""
        give_up = time.monotonic() + self._deadline_s
        while not (found := look()):
            if time.monotonic() > give_up:
                raise Wrong(f"{what}: not within {self._deadline_s:g} s")
            time.sleep(_POLL_S)
        return found

    def submit(self, *, failing: bool = False) -> str:
        """Have a workflow run; returns its correlation id."""
        correlation_id = f"conformance-{uuid.uuid4().hex}"
        document = {**(self._failing if failing else self.workflow), "correlation_id": correlation_id}
        self.ask("POST", "/v1/workflows", 202, json=document)
        return correlation_id

    def ended(self, correlation_id: str) -> Any:
        """A workflow's state once it has ended."""

        def look() -> Any:
            state = self.ask("GET", f"/v1/workflows/{correlation_id}")
            return state if state["state"] != "pending" else None

        return self.until(f"workflow {correlation_id} ends", look)

    def failed(self) -> str:
        """The correlation id of a workflow that has failed."""
        correlation_id = self.submit(failing=True)
        state = self.ended(correlation_id)["state"]
        _expect(state == "failed", "the failing workflow (--failing) fails", state)
        return correlation_id

    def outcome(self, key: str) -> str:
        """The outcome of a replay once it is known."""

        def look() -> Any:
            state = self.ask("POST", "/v1/outcomes", json={"keys": [key]})["outcomes"][key]["state"]
            return state if state in ("succeeded", "failed") else None

        return str(self.until(f"the outcome of {key} is known", look))


Check = Callable[[Subject], None]
CHECKS: list[tuple[str, Check]] = []


def _of(level: str) -> Callable[[Check], Check]:
    def add(check: Check) -> Check:
        CHECKS.append((level, check))
        return check

    return add


def _expect(holds: bool, what: str, came: object) -> None:
    if not holds:
        raise Wrong(f"{what}: expected; came {str(came)[:200]}")


@_of("every")
def a_token_is_needed(subject: Subject) -> None:
    for headers in ({"Authorization": ""}, {"Authorization": "Bearer wrong"}):
        answer = httpx.get(f"{subject.url}/capabilities", headers=headers, timeout=10)
        _expect(answer.status_code == 401, "without the right token: status 401", answer.status_code)


@_of("every")
def errors_are_problems(subject: Subject) -> None:
    problem = subject.ask("GET", "/nowhere", 404)
    _expect({"title", "status", "detail"} <= problem.keys(), "a problem's title, status, detail", problem)


@_of("outcome")
def a_submitted_workflow_runs_and_tells_its_steps(subject: Subject) -> None:
    state = subject.ended(subject.submit())
    _expect(state["state"] == "succeeded", "the workflow (--workflow) succeeds", state["state"])
    steps = {step["state"] for step in state["steps"]}
    _expect(steps == {"succeeded"}, "each step of it succeeded", steps)


@_of("outcome")
def a_change_under_one_key_is_made_once(subject: Subject) -> None:
    key = {"Idempotency-Key": uuid.uuid4().hex}
    document = {**subject.workflow, "correlation_id": f"conformance-{uuid.uuid4().hex}"}
    first = subject.ask("POST", "/v1/workflows", 202, json=document, headers=key)
    again = subject.ask("POST", "/v1/workflows", 202, json=document, headers=key)
    _expect(first == again, "the same key with the same request: the same answer", again)
    other = {**document, "correlation_id": f"conformance-{uuid.uuid4().hex}"}
    subject.ask("POST", "/v1/workflows", 422, json=other, headers=key)


@_of("outcome")
def what_was_never_sent_is_unknown(subject: Subject) -> None:
    never = uuid.uuid4().hex
    said = subject.ask("POST", "/v1/outcomes", json={"keys": [never]})["outcomes"]
    _expect(said == {never: {"state": "unknown"}}, "an outcome that is unknown", said)
    subject.ask("GET", f"/v1/workflows/{never}", 404)
    subject.ask("POST", "/v1/outcomes", 422, json={"keys": [str(n) for n in range(1001)]})


@_of("outcome")
def the_success_rate_counts_what_ended(subject: Subject) -> None:
    subject.ended(subject.submit())
    rate = subject.ask("GET", "/v1/success-rate", params={"window": 3600})
    _expect(rate["total"] == rate["succeeded"] + rate["failed"] > 0, "total = succeeded + failed", rate)
    subject.ask("GET", "/v1/success-rate", 422, params={"window": 0})


@_of("failures")
def a_failure_is_told(subject: Subject) -> None:
    bad, good, never = subject.failed(), subject.submit(), uuid.uuid4().hex
    subject.ended(good)
    query = {"correlation_ids": [bad, good, never]}
    said = subject.ask("POST", "/v1/failures", json=query)["failures"]
    _expect(said.keys() == {bad, good, never}, "an answer for each id", sorted(said))
    _expect(said[good] is None and said[never] is None, "null for what did not fail", said)
    missing = {"error_type", "message", "component", "stage", "attempts", "failed_at"} - said[bad].keys()
    _expect(not missing, "every field of a failure", f"without {missing}")


@_of("replay")
def a_replay_is_put_in_once_and_its_outcome_told(subject: Subject) -> None:
    correlation_id, key = subject.failed(), f"conformance-{uuid.uuid4().hex}"
    replay = {"correlation_id": correlation_id, "key": key, "overrides": {"retry_count": 1}}
    for _ in range(2):
        said = subject.ask("POST", "/v1/replays", 202, json={"replays": [replay]})["replays"]
        _expect(said[key]["state"] == "accepted", "a replay that is accepted", said)
    _expect(subject.outcome(key) == "succeeded", "the failing workflow succeeds as a replay", "failed")
    count = subject.ask("GET", f"/v1/workflows/{correlation_id}")["retry_count"]
    _expect(count == 1, "retry_count as the replay overrides it: 1", count)


@_of("replay")
def a_replay_of_what_was_never_seen_is_refused(subject: Subject) -> None:
    key = uuid.uuid4().hex
    replay = {"correlation_id": uuid.uuid4().hex, "key": key, "overrides": {"retry_count": 1}}
    said = subject.ask("POST", "/v1/replays", 202, json={"replays": [replay]})["replays"][key]
    _expect((said["state"], bool(said.get("why"))) == ("refused", True), "refused, and why", said)
    broken = {**replay, "overrides": {"retry_count": 1, "value": "!"}}
    subject.ask("POST", "/v1/replays", 422, json={"replays": [broken]})


@_of("replay")
def a_replays_own_value_is_what_runs(subject: Subject) -> None:
    correlation_id, key = subject.failed(), f"conformance-{uuid.uuid4().hex}"
    document = {**subject.workflow, "correlation_id": correlation_id}
    value = base64.b64encode(json.dumps(document).encode()).decode()
    overrides = {"retry_count": 1, "value": value}
    replay = {"correlation_id": correlation_id, "key": key, "overrides": overrides}
    subject.ask("POST", "/v1/replays", 202, json={"replays": [replay]})
    _expect(subject.outcome(key) == "succeeded", "the healthy workflow in its place succeeds", "failed")


@_of("routing")
def routing_is_paused_by_one_holder_under_a_lease(subject: Subject) -> None:
    holder, other = f"conformance-{uuid.uuid4().hex}", f"conformance-{uuid.uuid4().hex}"
    lease = subject.ask("POST", "/v1/routing/pause", json={"holder": holder, "seconds": 60})
    try:
        _expect((lease["mode"], lease["holder"]) == ("paused", holder), "a pause", lease)
        later = subject.ask("POST", "/v1/routing/pause", json={"holder": holder, "seconds": 5})
        _expect(later["until"] >= lease["until"], "a lease that is never shortened", later)
        subject.ask("POST", "/v1/routing/pause", 409, json={"holder": other, "seconds": 60})
        subject.ask("POST", "/v1/routing/resume", 409, json={"holder": other})
        before = lease["held"]
        subject.failed()
        subject.until("a failure is held", lambda: subject.ask("GET", "/v1/routing")["held"] > before)
    finally:
        subject.ask("POST", "/v1/routing/resume", json={"holder": holder})
    subject.until("what was held is dead-lettered", lambda: subject.ask("GET", "/v1/routing")["held"] == 0)
    subject.ask("POST", "/v1/routing/resume", json={"holder": holder})


@_of("routing")
def a_lease_ends_by_itself(subject: Subject) -> None:
    holder = f"conformance-{uuid.uuid4().hex}"
    subject.ask("POST", "/v1/routing/pause", json={"holder": holder, "seconds": 1})
    subject.until("the lease ends", lambda: subject.ask("GET", "/v1/routing")["mode"] == "auto")


@_of("quotas")
def a_limit_is_changed_within_its_ceiling(subject: Subject) -> None:
    quotas = subject.ask("GET", "/v1/quotas")["quotas"]
    _expect(bool(quotas), "at least one quota", quotas)
    quota = quotas[0]
    path, resource = f"/v1/quotas/{quota['plugin']}", {"resource": quota["resource"]}
    try:
        said = subject.ask("PUT", path, json={"limit": quota["ceiling"], **resource})
        _expect(said["limit"] == quota["ceiling"], "the new limit", said)
        problem = subject.ask("PUT", path, 422, json={"limit": quota["ceiling"] + 1, **resource})
        _expect(problem.get("ceiling") == quota["ceiling"], "a refusal that says the ceiling", problem)
    finally:
        subject.ask("PUT", path, json={"limit": quota["limit"], **resource})
    subject.ask("PUT", f"/v1/quotas/{uuid.uuid4().hex}", 404, json={"limit": 1})


@_of("plugins")
def plugins_come_in_pages(subject: Subject) -> None:
    names = [plugin["name"] for plugin in _plugins(subject)]
    _expect(len(names) == len(set(names)) > 0, "each plugin once", names)
    subject.ask("GET", f"/v1/plugins/{uuid.uuid4().hex}", 404)


@_of("plugins")
def a_plugin_is_changed_at_the_revision_that_was_seen(subject: Subject) -> None:
    plugin = next(_plugins(subject))
    path = f"/v1/plugins/{plugin['name']}"
    who = {"person": "conformance", "reason": "to see whether it can be"}
    patch = {**who, "revision": plugin["revision"], "scopes": plugin["scopes"]}
    key = {"Idempotency-Key": uuid.uuid4().hex}
    said = subject.ask("PATCH", path, json=patch, headers=key)
    _expect(said["revision"] > plugin["revision"], "a later revision", said["revision"])
    subject.ask("PATCH", path, 409, json=patch)
    beyond = {**who, "revision": said["revision"], "scopes": [uuid.uuid4().hex]}
    subject.ask("PATCH", path, 422, json=beyond)
    now = subject.ask("GET", path)
    _expect(now["scopes"] == plugin["scopes"], "scopes as they were", now["scopes"])


def _plugins(subject: Subject) -> Iterator[Any]:
    cursor: str | None = None
    while True:
        more = {"cursor": cursor} if cursor else {}
        page = subject.ask("GET", "/v1/plugins", params={"limit": 2, **more})
        yield from page["plugins"]
        if (cursor := page["next"]) is None:
            return


@_of("debugger")
def a_step_is_given_its_output_by_a_person(subject: Subject) -> None:
    correlation_id = subject.failed()
    step = subject.ask("GET", f"/v1/workflows/{correlation_id}")["failure"]["stage"]
    path = f"/v1/workflows/{correlation_id}/debug"
    request = {"step": step, "output": {"by": "hand"}, "person": "conformance", "reason": "to go on"}
    key = subject.ask("POST", path, 202, json=request)["key"]
    _expect(subject.outcome(key) == "succeeded", "it goes on from there and succeeds", "failed")
    state = subject.ask("GET", f"/v1/workflows/{correlation_id}")
    outputs = [found["output"] for found in state["steps"] if found["name"] == step]
    _expect(outputs == [{"by": "hand"}], "the output that was given", outputs)
    people = [override["person"] for override in state.get("overrides", [])]
    _expect(people == ["conformance"], "who gave it", people)
    subject.ask("POST", path, 409, json=request)
    subject.ask("POST", f"/v1/workflows/{uuid.uuid4().hex}/debug", 404, json=request)


@_of("faults")
def a_fault_is_set_and_ended(subject: Subject) -> None:
    name, step = f"conformance-{uuid.uuid4().hex}", subject.workflow["steps"][0]
    fault = {"plugin": step["plugin"], "error": "TransientNetwork", "share": 0, "seconds": 60}

    def names() -> list[str]:
        return [found["name"] for found in subject.ask("GET", "/v1/faults")["faults"]]

    subject.ask("PUT", f"/v1/faults/{name}", json=fault)
    _expect(name in names(), "a fault that is listed", names())
    subject.ask("DELETE", f"/v1/faults/{name}", 204)
    _expect(name not in names(), "a fault that has ended", names())
    subject.ask("PUT", f"/v1/faults/{name}", json={**fault, "seconds": 0.2})
    subject.until("a fault ends by itself", lambda: name not in names())


def conformance(subject: Subject, levels: frozenset[str] | None = None) -> Iterator[Result]:
    """Try what is announced, of these levels only if any are given.

    :raises Wrong: it announces nothing that could be tried.
    """
    announced = subject.ask("GET", "/capabilities")
    version = str(announced.get("version", ""))
    _expect(version.split(".")[0] == _MAJOR, f"version {_MAJOR} of the contract", version)
    for level, check in CHECKS:
        name = check.__name__.replace("_", " ")
        if levels is not None and level not in levels:
            continue
        if level != "every" and level not in announced["levels"]:
            yield Result(level, name, "skipped", "the level is not announced")
            continue
        try:
            check(subject)
        except Wrong as error:
            yield Result(level, name, "failed", str(error))
        except httpx.HTTPError as error:
            yield Result(level, name, "failed", f"no answer ({type(error).__name__})")
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            yield Result(level, name, "failed", f"a field is missing or of another kind: {error!r}")
        else:
            yield Result(level, name, "passed")


def main() -> int:
    arguments = _arguments()
    subject = Subject(
        arguments.url, arguments.token, arguments.workflow, arguments.failing, arguments.deadline
    )
    levels = frozenset((*arguments.level, "every")) if arguments.level else None
    failed = 0
    try:
        for result in conformance(subject, levels):
            failed += result.state == "failed"
            line = f"{result.state:<8} {result.level:<9} {result.check}"
            print(
                json.dumps(vars(result))
                if arguments.json
                else line + (f": {result.why}" if result.why else "")
            )
    except (Wrong, httpx.HTTPError, httpx.InvalidURL) as error:
        print(f"conformance: {arguments.url}: {str(error) or type(error).__name__}", file=sys.stderr)
        return 2
    return 1 if failed else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dlq_orchestrator.conformance",
        description="Tries whether an orchestrator keeps the levels of the contract that it announces. Runs real"
        " workflows. Exit status 1: it doesn't keep one; 2: it could not be tried.",
    )
    add = parser.add_argument
    add("url", metavar="URL", help="its address, as http://host:port")
    add("token", metavar="TOKEN", help="its bearer token")
    add("--level", action="append", metavar="LEVEL", help="try this level only; may be repeated")
    add(
        "--workflow",
        type=_document,
        default=WORKFLOW,
        metavar="FILE",
        help="JSON of a workflow that succeeds",
    )
    add(
        "--failing",
        type=_document,
        default=FAILING,
        metavar="FILE",
        help="JSON of one that fails when it is first run, and succeeds as a replay",
    )
    add(
        "--deadline",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="for a workflow (default: %(default)g)",
    )
    add("--json", action="store_true", help="a line of JSON for each check")
    return parser.parse_args()


def _document(name: str) -> dict[str, Any]:
    try:
        document = json.loads(Path(name).read_text())
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{name}: {error}") from None
    if not isinstance(document, dict) or not document.get("steps"):
        raise argparse.ArgumentTypeError(f"{name}: no workflow: an object with `workflow` and `steps`")
    return document


if __name__ == "__main__":
    sys.exit(main())
