"""A real SQS server (ElasticMQ) on loopback, from nothing but Python packages and Maven Central.

``python -m dlq_demo.elasticmq`` runs one in the foreground and prints its endpoint.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from dlq_demo import jars, loopback
from dlq_demo.java import java
from dlq_demo.process import Process, ServiceError

REGION = "eu-north-1"
ACCOUNT = "000000000000"
# It checks no signature, but a client must sign.
ACCESS_KEY = SECRET_KEY = "any"

_START_SECONDS = 60.0

_SETTINGS = """\
include classpath("application.conf")
node-address {{ protocol = http, host = "{host}", port = {port} }}
rest-sqs {{ enabled = true, bind-hostname = "{host}", bind-port = {port}, sqs-limits = strict }}
aws {{ region = "{region}", accountId = "{account}" }}
pekko.loglevel = INFO
"""
_STORAGE = """\
messages-storage {{ enabled = true, driver-class = "org.h2.Driver", uri = {uri}, username = "", password = "" }}
"""


class ElasticMq:
    """One server and its data; a context manager that starts and stops it.

    :param folder: where data, settings and the log lie; kept. Queues and acknowledged messages outlive SIGKILL
        with their ids, attributes and receive counts (but for one that is just being moved to a dead-letter
        queue: ElasticMQ deletes it here and writes it there apart). By default all is in memory, twice as
        fast, and gone with ``stop()``.
    :param port: by default a free one, the same one over restarts.
    :param long_lived: see :func:`dlq_demo.java.java`; for benchmarks.
    :raises Unavailable: when Java or the jars can't be had.
    :raises ServiceError: when the port is taken or the server doesn't start.
    """

    def __init__(
        self, folder: Path | None = None, *, port: int | None = None, long_lived: bool = False
    ) -> None:
        self._temporary = folder is None
        self.folder = Path(tempfile.mkdtemp(prefix="dlq-sqs-")) if folder is None else folder.resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.port = port or loopback.free_ports(1)[0]
        self._long_lived = long_lived
        self._process: Process | None = None

    @property
    def endpoint(self) -> str:
        """For ``endpoint_url``."""
        return f"http://{loopback.HOST}:{self.port}"

    @property
    def connection(self) -> dict[str, Any]:
        """An Airflow Connection to it, as JSON has it."""
        extra = {"endpoint_url": self.endpoint, "region_name": REGION}
        return {"conn_type": "aws", "login": ACCESS_KEY, "password": SECRET_KEY, "extra": extra}

    @property
    def log(self) -> Path:
        """What the server wrote."""
        return self.folder / "elasticmq.log"

    @property
    def alive(self) -> bool:
        """Whether the server's process runs."""
        return self._process is not None and self._process.alive

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
        """Start it and wait until it answers a client. What an earlier start left in its folder is there again."""
        loopback.require_free(self.port, "the embedded SQS server")
        program: list[str | Path] = [
            *java("the embedded SQS server", long_lived=self._long_lived),
            *("-cp", jars.classpath("elasticmq")),
        ]
        settings = self._write_settings()
        stored = self._stored_queues(program)
        already = self._times_restored()
        self._process = Process(
            "the embedded SQS server",
            [
                *program,
                *("-Xmx512m", f"-Dconfig.file={settings}", "org.elasticmq.server.Main"),
            ],
            log=self.log,
            cwd=self.folder,
        )
        # it answers before it has what it stored: a queue would seem not to exist, or to be empty
        self._process.wait_until(
            lambda: self._times_restored() - already >= stored and self._answers(), seconds=_START_SECONDS
        )

    def stop(self) -> None:
        """End it; a temporary folder goes with it. Stopping twice is fine."""
        if self._process is not None:
            self._process.stop()
        if self._temporary:
            shutil.rmtree(self.folder, ignore_errors=True)

    def kill(self) -> None:
        """SIGKILL it, wherever it is."""
        assert self._process is not None, "start it first"
        self._process.kill()

    def restart(self) -> None:
        """End it if it runs, and start it again in the same folder and on the same port."""
        if self._process is not None:
            self._process.stop()
        self.start()

    def client(self, **settings: Any) -> Any:
        """A boto3 SQS client; ``settings`` are those of ``botocore.config.Config``."""
        return boto3.client(
            "sqs",
            endpoint_url=self.endpoint,
            region_name=REGION,
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            config=Config(**settings),
        )

    def create_queue(
        self,
        name: str,
        *,
        dead_letters: str | None = None,
        receives: int = 3,
        visibility: int = 30,
        **attributes: str,
    ) -> str:
        """Create a queue and return its URL. A name that ends in ``.fifo`` makes a FIFO queue.

        :param dead_letters: name of an existing queue that takes what was received ``receives`` times in vain.
        :param visibility: seconds a received message stays hidden.
        :param attributes: more of SQS's attributes, such as ``ContentBasedDeduplication="true"``.
        """
        attributes["VisibilityTimeout"] = str(visibility)
        if name.endswith(".fifo"):
            attributes["FifoQueue"] = "true"
        if dead_letters is not None:
            policy = {"deadLetterTargetArn": arn(dead_letters), "maxReceiveCount": receives}
            attributes["RedrivePolicy"] = json.dumps(policy)
        url: str = self.client().create_queue(QueueName=name, Attributes=attributes)["QueueUrl"]
        return url

    def _answers(self) -> bool:
        try:
            self.client(retries={"total_max_attempts": 1}, connect_timeout=1, read_timeout=1).list_queues()
        except (BotoCoreError, ClientError):
            return False
        return True

    def _times_restored(self) -> int:
        return self.log.read_text().count(" - Restored ") if self.log.exists() else 0

    def _stored_queues(self, program: list[str | Path]) -> int:
        """How many queues an earlier start left in this folder."""
        if not self.folder.joinpath("messages.mv.db").exists():
            return 0
        tool = ["org.h2.tools.Shell", "-url", self._storage, "-user", "", "-password", "", "-sql"]
        done = subprocess.run(
            [*program, *tool, "SELECT count(*) FROM queue"], capture_output=True, text=True, check=False
        )
        count = re.search(r"^(\d+)$", done.stdout, re.M)
        if count is None:
            raise ServiceError(
                f"the embedded SQS server's storage in {self.folder} could not be read. Is another server at "
                f"work in it? It said:\n{done.stdout}{done.stderr}"
            )
        return int(count[1])

    @property
    def _storage(self) -> str:
        # H2's own default is to write what was committed up to half a second later: a killed server would
        # lose messages it had acknowledged
        return f"jdbc:h2:file:{self.folder / 'messages'};WRITE_DELAY=0"

    def _write_settings(self) -> Path:
        path = self.folder / "elasticmq.conf"
        text = _SETTINGS.format(host=loopback.HOST, port=self.port, region=REGION, account=ACCOUNT)
        if not self._temporary:
            text += _STORAGE.format(uri=json.dumps(self._storage))  # JSON is HOCON
        path.write_text(text)
        return path


def arn(queue: str) -> str:
    """The ARN of an embedded server's queue."""
    return f"arn:aws:sqs:{REGION}:{ACCOUNT}:{queue}"


def main() -> None:
    """Run a server until Ctrl-C or SIGTERM."""
    parser = argparse.ArgumentParser(
        prog="python -m dlq_demo.elasticmq", description="A real SQS server on loopback."
    )
    parser.add_argument("--folder", type=Path, help="keep data here (default: a temporary folder)")
    parser.add_argument("--port", type=int, help="to listen on (default: a free one)")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        with ElasticMq(arguments.folder, port=arguments.port) as server:
            print(server.endpoint, flush=True)
            while server.alive:
                time.sleep(0.5)
            raise ServiceError(f"the server ended by itself; see {server.log}")
    except KeyboardInterrupt:
        return
    except ServiceError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
