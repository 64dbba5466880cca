"""A real Airflow on loopback: API server, scheduler, Dag processor and triggerer, in a home of its own.

Not ``airflow standalone``: that leaves its children behind when it is ended, and its scheduler can't be
killed alone.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from base64 import urlsafe_b64encode
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from dlq_demo import loopback
from dlq_demo.airflow_api import AirflowApi
from dlq_demo.process import Process, ServiceError

USERNAME = "admin"
_START_SECONDS = 120.0
_COMMANDS = {
    "api-server": ["api-server"],
    # Logs are read from the shared disk: nobody needs the ports (8793, 8794) these would serve them on.
    "scheduler": ["scheduler", "--skip-serve-logs"],
    "triggerer": ["triggerer", "--skip-serve-logs"],
    "dag-processor": ["dag-processor"],
}
_BEATING = {"scheduler": "scheduler", "triggerer": "triggerer", "dag-processor": "dag_processor"}


class AirflowStandalone:
    """One Airflow; a context manager that starts and stops it.

    :param home: AIRFLOW_HOME; kept between runs (a second start needs no migration).
    :param dags: the folder of Dag files.
    :param plugins: the folder of plugins; none by default.
    :param port: of the API server and the UI; by default a free one.
    :param env: for all components, such as ``AIRFLOW_CONN_…``; what else this process has of ``AIRFLOW…`` is
        kept from them.
    :param database: SQLAlchemy URL of Airflow's own database; by default SQLite in ``home``, which bears one
        or two runs at a time.
    :param pools: slots by name of the pools to create.
    :param fresh: begin without the runs of an earlier start in this home, some of which may never have ended.
    :raises ServiceError: when the port is taken, or a component doesn't start.
    """

    def __init__(
        self,
        home: Path,
        *,
        dags: Path,
        plugins: Path | None = None,
        port: int | None = None,
        env: Mapping[str, str] | None = None,
        database: str | None = None,
        pools: Mapping[str, int] | None = None,
        fresh: bool = False,
    ) -> None:
        self.home = home.resolve()
        self.home.mkdir(parents=True, exist_ok=True)
        self.port = port or loopback.free_ports(1)[0]
        self._dags = dags.resolve()
        self._plugins = (plugins or self.home / "plugins").resolve()
        self._own_database = f"sqlite:///{self.home / 'airflow.db'}"
        self._database = database or self._own_database
        self._pools = {"dlq": 16} if pools is None else dict(pools)
        self._fresh = fresh
        self._secrets = self._load_secrets()
        self._env = self._environment(env or {})
        self._processes: dict[str, Process] = {}
        self.api = AirflowApi(self.url, USERNAME, self.password)

    @property
    def url(self) -> str:
        """Of the UI."""
        return f"http://{loopback.HOST}:{self.port}"

    @property
    def password(self) -> str:
        """Of the user ``admin``; it also stands in ``simple_auth_manager_passwords.json`` in the home."""
        return self._secrets["password"]

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start all components, wait until each has given a sign of life, and create the pools."""
        self.launch()
        self.wait_until_up()

    def launch(self) -> None:
        """Start all components, and don't wait: they take 20 s in which something else can be done."""
        loopback.require_free(self.port, "Airflow")
        self._migrate()
        self._launched = datetime.now(UTC)
        for component in _COMMANDS:
            self._launch(component)

    def wait_until_up(self) -> None:
        """Wait until each component has given a sign of life, and create the pools."""
        self._wait_for_beats(self._launched, list(_BEATING))
        for name, slots in self._pools.items():
            self.api.create_pool(name, slots)

    def require_alive(self) -> None:
        """Raise ServiceError with the end of its log if a component has ended."""
        for process in self._processes.values():
            process.require_alive()

    def wait_for_dag(self, dag_id: str, *, seconds: float = 60.0) -> None:
        """Wait until a Dag is parsed.

        :raises ServiceError: when it isn't by then; with the import errors there are.
        """
        deadline = time.monotonic() + seconds
        while not self.api.dag_is_known(dag_id):
            if time.monotonic() > deadline:
                errors = "".join(f"\n{file}:\n{trace}" for file, trace in self.api.import_errors().items())
                raise ServiceError(
                    f"Dag {dag_id} was not found in {self._dags} within {seconds:.0f} s. "
                    f"Import errors: {errors or 'none'}"
                )
            time.sleep(0.25)

    def kill_scheduler(self) -> None:
        """SIGKILL the scheduler and every task it runs, as if their machine had lost power."""
        self._processes["scheduler"].kill()

    def start_scheduler(self) -> None:
        """Start it again after a kill, and wait for its sign of life."""
        since = datetime.now(UTC)
        self._launch("scheduler")
        self._wait_for_beats(since, ["scheduler"])

    def stop(self) -> None:
        """End all components and whatever they started. Stopping twice is fine."""
        for process in self._processes.values():
            process.let_go()
        for process in self._processes.values():
            process.stop()
        self.api.close()

    def _launch(self, component: str) -> None:
        self._processes[component] = Process(
            f"Airflow's {component}",
            [sys.executable, "-m", "airflow", *_COMMANDS[component]],
            log=self.home / f"{component}.log",
            env=self._env,
            cwd=self.home,
            grace=3.0,  # its LocalExecutor often waits for a worker that has already let go
        )

    def _wait_for_beats(self, since: datetime, components: list[str]) -> None:
        def beats(component: str) -> bool:
            try:
                # A kept home still has the last run's heartbeats, which count as healthy for 30 s.
                beat = self.api.heartbeats().get(_BEATING[component])
            except httpx.HTTPError:
                return False
            finally:
                self.require_alive()
            return beat is not None and datetime.fromisoformat(beat) >= since

        for component in components:
            self._processes[component].wait_until(partial(beats, component), seconds=_START_SECONDS)

    def _migrate(self) -> None:
        """Create Airflow's tables. In SQLite once a version, and kept empty beside the rest: it costs 4 s."""
        marker, empty = self.home / "migrated", self.home / "empty.db"
        ours = self._database == self._own_database
        known = ours and empty.exists() and marker.exists()
        if known and marker.read_text() == version("apache-airflow-core"):
            if self._fresh:
                self._forget_runs(empty)
            return
        command = [sys.executable, "-m", "airflow", "db", "migrate"]
        result = subprocess.run(
            command, env=self._env, cwd=self.home, capture_output=True, text=True, check=False
        )
        if result.returncode:
            raise ServiceError(
                f"Airflow's database could not be set up in {self.home}. Delete the folder if another "
                f"version of Airflow made it. It said:\n{result.stdout[-2000:]}{result.stderr[-2000:]}"
            )
        if ours:
            shutil.copyfile(self.home / "airflow.db", empty)
            marker.write_text(version("apache-airflow-core"))

    def _forget_runs(self, empty: Path) -> None:
        for left in self.home.glob("airflow.db*"):  # with what SQLite keeps beside it
            left.unlink()
        shutil.copyfile(empty, self.home / "airflow.db")
        shutil.rmtree(self.home / "logs", ignore_errors=True)
        for component in _COMMANDS:
            (self.home / f"{component}.log").unlink(missing_ok=True)

    def _load_secrets(self) -> dict[str, str]:
        path = self.home / "secrets.json"
        if not path.exists():
            made = {name: secrets.token_urlsafe(32) for name in ("jwt", "session")}
            made["fernet"] = urlsafe_b64encode(secrets.token_bytes(32)).decode()
            made["password"] = secrets.token_urlsafe(12)
            _write_private(path, made)
            _write_private(self._password_file, {USERNAME: made["password"]})
        loaded: dict[str, str] = json.loads(path.read_text())
        return loaded

    @property
    def _password_file(self) -> Path:
        return self.home / "simple_auth_manager_passwords.json"

    def _environment(self, extra: Mapping[str, str]) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("AIRFLOW")}
        settings = {
            "CORE__DAGS_FOLDER": str(self._dags),
            "CORE__PLUGINS_FOLDER": str(self._plugins),
            "CORE__LOAD_EXAMPLES": "False",
            "CORE__DAGS_ARE_PAUSED_AT_CREATION": "False",
            "CORE__EXECUTOR": "LocalExecutor",
            "CORE__PARALLELISM": "8",  # each is a process of 130 MB; the default is 32
            "CORE__FERNET_KEY": self._secrets["fernet"],
            "CORE__HOSTNAME_CALLABLE": "socket.gethostname",  # the default asks the network's name server
            "CORE__EXECUTION_API_SERVER_URL": f"{self.url}/execution/",
            "CORE__SIMPLE_AUTH_MANAGER_USERS": f"{USERNAME}:admin",
            "CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": str(self._password_file),
            "DATABASE__SQL_ALCHEMY_CONN": self._database,
            "API__HOST": loopback.HOST,
            "API__PORT": str(self.port),
            "API__BASE_URL": self.url,
            "API__SECRET_KEY": self._secrets["session"],
            "API_AUTH__JWT_SECRET": self._secrets["jwt"],
            # After a kill, tasks wait for this sweep; the default is 5 minutes.
            "SCHEDULER__ORPHANED_TASKS_CHECK_INTERVAL": "30",
            "USAGE_DATA_COLLECTION__ENABLED": "False",
        }
        return {
            **inherited,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{inherited.get('PATH', '')}",
            "AIRFLOW_HOME": str(self.home),
            **{f"AIRFLOW__{name}": value for name, value in settings.items()},
            **extra,
        }


def _write_private(path: Path, content: Mapping[str, str]) -> None:
    path.touch(mode=0o600)
    path.write_text(json.dumps(content))
