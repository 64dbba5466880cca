"""What the demo and the tests ask of a running Airflow, through its public REST API, as its admin."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, cast

import httpx
import stamina

from dlq_demo.process import ServiceError

_FINISHED = {"success", "failed"}


def _worth_a_retry(error: Exception) -> bool:
    # With SQLite below it Airflow answers HTTP 500 now and then ("database is locked").
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code >= 500
    return isinstance(error, httpx.TransportError)


class AirflowApi:
    """A client that logs in with name and password; JSON objects come back as Airflow sends them.

    :raises httpx.HTTPStatusError: when Airflow refuses what is asked; its words are in the error's notes.
    """

    def __init__(self, url: str, username: str, password: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=30, trust_env=False)
        self._login = {"username": username, "password": password}

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    @stamina.retry(on=_worth_a_retry, attempts=8, timeout=45)
    def request(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        """Call ``/api/v2`` + ``path``; a server error is tried again, so a POST needs an id of its own."""
        if "Authorization" not in self._client.headers:
            token = self._client.post("/auth/token", json=self._login).raise_for_status().json()
            self._client.headers["Authorization"] = f"Bearer {token['access_token']}"
        answer = self._client.request(method, f"/api/v2{path}", **arguments)
        if answer.status_code == httpx.codes.UNAUTHORIZED:  # the token has expired
            del self._client.headers["Authorization"]
        try:
            return answer.raise_for_status()
        except httpx.HTTPStatusError as error:
            error.add_note(answer.text[:1000])
            raise

    def _get(self, path: str, **query: Any) -> dict[str, Any]:
        return cast(dict[str, Any], self.request("GET", path, params=query).json())

    def heartbeats(self) -> dict[str, str]:
        """The last sign of life (ISO 8601) of each component that gave one; one try, no login.

        :raises httpx.HTTPError: when the API server doesn't answer yet.
        """
        health = self._client.get("/api/v2/monitor/health", timeout=5).raise_for_status().json()
        beats = {name: (health.get(name) or {}).get(f"latest_{name}_heartbeat") for name in health}
        return {name: beat for name, beat in beats.items() if beat}

    def create_pool(self, name: str, slots: int) -> None:
        """Create a pool, or set its slots."""
        try:
            self.request("POST", "/pools", json={"name": name, "slots": slots})
        except httpx.HTTPStatusError as error:
            if error.response.status_code != httpx.codes.CONFLICT:
                raise
            body = {"pool": name, "slots": slots, "include_deferred": False}  # it wants them all
            self.request("PATCH", f"/pools/{name}", json=body)

    def dag_is_known(self, dag_id: str) -> bool:
        """Whether the Dag was parsed and is not stale."""
        try:
            return not self._get(f"/dags/{dag_id}")["is_stale"]
        except httpx.HTTPStatusError as error:
            if error.response.status_code == httpx.codes.NOT_FOUND:
                return False
            raise

    def import_errors(self) -> dict[str, str]:
        """Stack traces of Dag files that could not be imported, by file."""
        return {one["filename"]: one["stack_trace"] for one in self._get("/importErrors")["import_errors"]}

    def trigger(self, dag_id: str, run_id: str, conf: Mapping[str, Any] | None = None) -> None:
        """Start a run. One of that id that exists already is left as it is: an earlier try made it."""
        body = {"dag_run_id": run_id, "logical_date": None, "conf": dict(conf or {})}
        try:
            self.request("POST", f"/dags/{dag_id}/dagRuns", json=body)
        except httpx.HTTPStatusError as error:
            if error.response.status_code != httpx.codes.CONFLICT:
                raise

    def run(self, dag_id: str, run_id: str) -> dict[str, Any]:
        """The run: ``state``, ``start_date``, ``end_date``, ``conf`` and more."""
        return self._get(f"/dags/{dag_id}/dagRuns/{run_id}")

    def run_states(self, dag_id: str) -> list[str]:
        """The states of a Dag's newest runs, at most 1,000."""
        found: list[str] = []
        while len(found) < 1_000:
            page = self._get(f"/dags/{dag_id}/dagRuns", limit=100, offset=len(found), order_by="-run_after")
            found += [one["state"] for one in page["dag_runs"]]
            if len(page["dag_runs"]) < 100:
                break
        return found

    def wait_for_run(self, dag_id: str, run_id: str, *, seconds: float) -> str:
        """The state a run ended in: ``success`` or ``failed``.

        :raises ServiceError: when it has not ended by then; says which task is in which state.
        """
        deadline = time.monotonic() + seconds
        while (state := self.run(dag_id, run_id)["state"]) not in _FINISHED:
            if time.monotonic() > deadline:
                raise ServiceError(
                    f"run {run_id} of {dag_id} was still {state} after {seconds:.0f} s; its tasks: "
                    f"{self.task_states(dag_id, run_id)}"
                )
            time.sleep(0.5)
        return cast(str, state)

    def task_instances(self, dag_id: str, run_id: str) -> list[dict[str, Any]]:
        """The run's task instances: ``task_id``, ``map_index``, ``state``, ``try_number`` and more."""
        page = self._get(f"/dags/{dag_id}/dagRuns/{run_id}/taskInstances", limit=1000)
        return cast(list[dict[str, Any]], page["task_instances"])

    def task_states(self, dag_id: str, run_id: str) -> dict[str, str | None]:
        """State by task id; a mapped task's instances as ``task_id[index]``."""
        states: dict[str, str | None] = {}
        for one in self.task_instances(dag_id, run_id):
            index = "" if one["map_index"] < 0 else f"[{one['map_index']}]"
            states[f"{one['task_id']}{index}"] = one["state"]
        return states

    def xcom(
        self, dag_id: str, run_id: str, task_id: str, key: str = "return_value", map_index: int = -1
    ) -> Any:
        """What a task returned or pushed."""
        path = f"/dags/{dag_id}/dagRuns/{run_id}/taskInstances/{task_id}/xcomEntries/{key}"
        return self._get(path, map_index=map_index, deserialize=True)["value"]

    def log(self, dag_id: str, run_id: str, task_id: str, try_number: int = 1, map_index: int = -1) -> str:
        """The log of one try as a person reads it: one event a line, exceptions without their frames."""
        path = f"/dags/{dag_id}/dagRuns/{run_id}/taskInstances/{task_id}/logs/{try_number}"
        lines = self._get(path, map_index=map_index, full_content=True)["content"]
        text: list[str] = []
        for line in lines:
            text.append(line if isinstance(line, str) else line["event"])
            for error in [] if isinstance(line, str) else line.get("error_detail") or []:
                text.append(f"{error['exc_type']}: {error['exc_value']}")
        return "\n".join(text)

    def questions(self, dag_id: str = "~", run_id: str = "~") -> list[dict[str, Any]]:
        """What waits for a person: ``subject``, ``body``, ``options``, ``params``, ``task_instance``."""
        page = self._get(f"/dags/{dag_id}/dagRuns/{run_id}/hitlDetails", response_received=False, limit=100)
        return cast(list[dict[str, Any]], page["hitl_details"])

    def answer(
        self,
        question: Mapping[str, Any],
        options: Sequence[str],
        form: Mapping[str, Any] | None = None,
    ) -> None:
        """Answer one of ``questions()``.

        An answer in the first seconds after the task parked can get lost in Airflow 3.3 (its issues 66374,
        71580, 72716): let it stand a moment.
        """
        task = question["task_instance"]
        self.request(
            "PATCH",
            f"/dags/{task['dag_id']}/dagRuns/{task['dag_run_id']}/taskInstances/{task['task_id']}"
            f"/{task['map_index']}/hitlDetails",
            json={"chosen_options": list(options), "params_input": dict(form or {})},
        )
