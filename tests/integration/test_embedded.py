"""The embedded services do what the demo and every other test rely on, and leave nothing behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest
from confluent_kafka import Consumer, Producer
from confluent_kafka.admin import AdminClient, ConfigResource

from dlq_demo import jars, loopback
from dlq_demo.airflow import AirflowStandalone
from dlq_demo.broker import Broker, create_topic
from dlq_demo.elasticmq import ElasticMq, arn
from dlq_demo.process import Process, ServiceError, Unavailable


def wait_until(condition: Callable[[], bool], what: str, *, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.02)


def processes_with(marker: str, among: Iterable[psutil.Process] | None = None) -> list[psutil.Process]:
    """Processes that carry ``marker`` in their command line or environment, whoever their parent is now."""
    found = []
    for process in psutil.process_iter() if among is None else among:
        try:
            if process.pid != os.getpid() and (
                any(marker in part for part in process.cmdline())
                or any(marker in value for value in process.environ().values())
            ):
                found.append(process)
        except psutil.Error:  # gone meanwhile, a zombie, or another user's
            continue
    return found


# Processes on a leash


def test_a_process_that_left_its_group_is_stopped_too(tmp_path: Path) -> None:
    marker = tmp_path / "escaped"
    program = f"""
        import os, time
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                open({str(marker)!r}, "w").write(str(os.getpid()))
                time.sleep(600)
            os._exit(0)
        time.sleep(600)
    """
    running = Process("sleeper", [sys.executable, "-c", textwrap.dedent(program)], log=tmp_path / "log")
    wait_until(lambda: marker.exists() and marker.read_text() != "", "the escaped process")
    escaped = psutil.Process(int(marker.read_text()))
    assert escaped.is_running()

    running.stop()

    assert not escaped.is_running()
    assert not running.alive


def test_services_die_with_an_owner_that_is_killed(tmp_path: Path) -> None:
    program = f"""
        import sys, time
        from pathlib import Path
        from dlq_demo.process import Process
        Process("sleeper", ["sleep", "600.125"], log=Path({str(tmp_path / "log")!r}))
        print("started", flush=True)
        time.sleep(600)
    """
    environment = {**os.environ, "MARKER": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, env=environment
    ) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"started\n"
        wait_until(lambda: len(processes_with(str(tmp_path))) == 3, "owner, leash and sleeper")
        owner.send_signal(signal.SIGKILL)

    wait_until(lambda: not processes_with(str(tmp_path)), "the end of all")


def test_a_command_that_ignores_the_signal_is_killed_after_its_grace(tmp_path: Path) -> None:
    program = (
        "import signal, time; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
    )
    running = Process("deaf", [sys.executable, "-c", program], log=tmp_path / "log", grace=0.2)
    wait_until(lambda: "deaf" in (tmp_path / "log").read_text(), "the program")

    running.stop()

    assert not running.alive


def test_a_service_that_ends_while_starting_shows_its_last_words(tmp_path: Path) -> None:
    running = Process("echo", ["sh", "-c", "echo no such luck; exit 3"], log=tmp_path / "log")
    with pytest.raises(ServiceError, match=r"(?s)echo ended by itself, exit status 3\..*no such luck"):
        running.wait_until(lambda: False, seconds=20)
    running.stop()


# Jars


@pytest.fixture
def cold_cache(tmp_path: Path, broker: Broker, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the jar cache (by links) on a machine without a network; returns the repository."""
    warm, cold = jars.cache() / "maven", tmp_path / "maven"
    for jar in jars.locked("kafka"):
        jar.path(cold).parent.mkdir(parents=True)
        jar.path(cold).symlink_to(jar.path(warm))
    monkeypatch.setenv("DLQ_CACHE", str(tmp_path))
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, f"http://{loopback.HOST}:{loopback.free_ports(1)[0]}")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    return cold


def test_a_warm_cache_needs_no_network(cold_cache: Path) -> None:
    assert len(jars.classpath("kafka").split(os.pathsep)) == len(jars.locked("kafka"))


def test_a_download_that_fails_names_the_jar_and_the_way_out(cold_cache: Path) -> None:
    jar = jars.locked("kafka")[0]
    jar.path(cold_cache).unlink()
    with pytest.raises(Unavailable, match=rf"{jar.artifact}:{jar.version}.*(?s:.*)HTTPS_PROXY.*"):
        jars.classpath("kafka")


def test_a_damaged_jar_is_never_used(cold_cache: Path) -> None:
    jar = jars.locked("kafka")[0]
    path = jar.path(cold_cache)
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(Unavailable, match=jar.artifact):
        jars.classpath("kafka")
    assert not path.exists()


# The broker


@pytest.mark.slow
def test_a_killed_broker_comes_back_with_its_data_on_its_port(tmp_path: Path, broker: Broker) -> None:
    with Broker(tmp_path / "kafka", properties={"offsets.retention.minutes": "1"}) as ours:
        bootstrap = ours.bootstrap
        create_topic(bootstrap, "kept", partitions=2)
        producer = Producer({"bootstrap.servers": bootstrap, "acks": "all"})
        producer.produce("kept", b"value", partition=1)
        assert producer.flush(10) == 0
        resource = ConfigResource(ConfigResource.Type.BROKER, "1")
        admin = AdminClient({"bootstrap.servers": bootstrap})
        settings = admin.describe_configs([resource])[resource].result(10)
        assert settings["offsets.retention.minutes"].value == "1"

        ours.kill()
        assert not ours.alive
        ours.start()

        assert ours.bootstrap == bootstrap
        consumer = Consumer(
            {"bootstrap.servers": bootstrap, "group.id": "reader", "auto.offset.reset": "earliest"}
        )
        consumer.subscribe(["kept"])
        message = consumer.poll(20)
        consumer.close()
        assert message is not None
        assert (message.partition(), message.value()) == (1, b"value")
    assert loopback.is_free(ours.port)
    assert not processes_with(str(tmp_path / "kafka"))


def test_a_taken_port_is_named_with_its_holder(tmp_path: Path, broker: Broker) -> None:
    with socket.socket() as holder:
        holder.bind((loopback.HOST, 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(ServiceError, match=rf"port {port} is taken by process {os.getpid()} "):
            Broker(tmp_path, port=port).start()


def test_a_broker_runs_in_the_foreground_until_it_is_ended(tmp_path: Path, broker: Broker) -> None:
    command = [sys.executable, "-m", "dlq_demo.broker", "--folder", tmp_path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as foreground:
        assert foreground.stdout is not None
        bootstrap = foreground.stdout.readline().strip()
        assert AdminClient({"bootstrap.servers": bootstrap}).list_topics(timeout=10).brokers
        foreground.terminate()
        assert foreground.wait(30) == 0
    assert not processes_with(str(tmp_path))


# The SQS server


@pytest.mark.slow
def test_a_killed_sqs_server_comes_back_with_its_messages_on_its_port(
    tmp_path: Path, elasticmq: ElasticMq
) -> None:
    with ElasticMq(tmp_path / "sqs") as ours:
        sqs, endpoint = ours.client(), ours.endpoint
        letters = ours.create_queue("kept-dlq")
        queue = ours.create_queue("kept", dead_letters="kept-dlq", receives=1, visibility=0)
        attributes = {"bytes": {"DataType": "Binary", "BinaryValue": b"\x00\xff"}}
        sent = sqs.send_message(QueueUrl=queue, MessageBody="value", MessageAttributes=attributes)
        (first,) = sqs.receive_message(QueueUrl=queue)["Messages"]
        assert first["MessageId"] == sent["MessageId"]

        ours.kill()
        assert not ours.alive
        ours.start()

        assert ours.endpoint == endpoint
        assert sqs.get_queue_url(QueueName="kept")["QueueUrl"] == queue
        assert not sqs.receive_message(QueueUrl=queue).get("Messages")  # the second receive moves it
        (moved,) = sqs.receive_message(
            QueueUrl=letters,
            WaitTimeSeconds=10,
            MessageAttributeNames=["All"],
            MessageSystemAttributeNames=["DeadLetterQueueSourceArn"],
        )["Messages"]
    assert (moved["MessageId"], moved["Body"]) == (sent["MessageId"], "value")
    assert moved["MessageAttributes"] == attributes
    assert moved["Attributes"] == {"DeadLetterQueueSourceArn": arn("kept")}
    assert loopback.is_free(ours.port)
    assert not processes_with(str(tmp_path / "sqs"))


def test_an_sqs_server_runs_in_the_foreground_until_it_is_ended(tmp_path: Path, elasticmq: ElasticMq) -> None:
    command = [sys.executable, "-m", "dlq_demo.elasticmq", "--folder", tmp_path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as foreground:
        assert foreground.stdout is not None
        assert foreground.stdout.readline().startswith(f"http://{loopback.HOST}:")
        foreground.terminate()
        assert foreground.wait(30) == 0
    assert not processes_with(str(tmp_path))


# Airflow

DAG = """
from __future__ import annotations

from pathlib import Path

from airflow.providers.standard.operators.hitl import HITLOperator
from airflow.sdk import dag, task


@dag(schedule=None, params={"word": "hello"})
def embedded():
    @task(pool="dlq")
    def say(**context):
        print("the word is", context["params"]["word"])
        return {"said": context["params"]["word"]}

    ask = HITLOperator(task_id="ask", subject="Go on?", options=["Yes", "No"], retries=1)
    say() >> ask


@dag(schedule=None)
def endless():
    @task
    def wait(**context):
        import time

        Path(__file__).with_suffix(".running").touch()
        time.sleep(600)

    wait()


@dag(schedule=None)
def broken():
    @task
    def fail(**context):
        raise ValueError("it broke")

    fail()


embedded()
endless()
broken()
"""


@pytest.fixture(scope="module")
def airflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AirflowStandalone]:
    folder = tmp_path_factory.mktemp("airflow")
    dags = folder / "dags"
    dags.mkdir()
    (dags / "embedded.py").write_text(DAG)
    with AirflowStandalone(folder / "home", dags=dags) as running:
        yield running
        children = psutil.Process().children(recursive=True)
        # A worker's title, which takes the place of its environment, and all the others' AIRFLOW_HOME.
        started = [
            *processes_with("worker -- LocalExecutor", children),
            *processes_with(str(folder), children),
        ]
    assert len(started) > 10  # four leashes, four components, eight workers
    assert not any(process.is_running() for process in started)
    assert loopback.is_free(running.port)


@pytest.mark.airflow
def test_airflow_runs_a_dag_and_asks_a_person(airflow: AirflowStandalone) -> None:
    airflow.wait_for_dag("embedded")
    api = airflow.api
    api.trigger("embedded", "first", {"word": "goodbye"})
    api.trigger("embedded", "first", {"word": "goodbye"})  # as a caller does whose answer got lost
    wait_until(lambda: bool(api.questions("embedded", "first")), "the question", seconds=60)
    [question] = api.questions("embedded", "first")
    assert question["subject"] == "Go on?"
    assert api.task_states("embedded", "first") == {"say": "success", "ask": "awaiting_input"}
    may_be_answered = datetime.fromisoformat(question["created_at"]) + timedelta(seconds=8)
    wait_until(lambda: datetime.now(UTC) > may_be_answered, "the time in which an answer can get lost")
    api.answer(question, ["Yes"])

    assert api.wait_for_run("embedded", "first", seconds=60) == "success"
    assert api.xcom("embedded", "first", "say") == {"said": "goodbye"}
    assert api.xcom("embedded", "first", "ask")["chosen_options"] == ["Yes"]
    assert "the word is goodbye" in api.log("embedded", "first", "say").splitlines()
    assert api.run("embedded", "first")["conf"] == {"word": "goodbye"}


@pytest.mark.airflow
def test_the_log_of_a_task_that_failed_says_why(airflow: AirflowStandalone) -> None:
    airflow.wait_for_dag("broken")
    airflow.api.trigger("broken", "first")
    assert airflow.api.wait_for_run("broken", "first", seconds=60) == "failed"
    assert "ValueError: it broke" in airflow.api.log("broken", "first", "fail").splitlines()


@pytest.mark.airflow
def test_the_password_file_lets_the_admin_in_and_others_cannot_read_it(airflow: AirflowStandalone) -> None:
    file = airflow.home / "simple_auth_manager_passwords.json"
    assert json.loads(file.read_text()) == {"admin": airflow.password}
    assert file.stat().st_mode & 0o077 == 0


@pytest.mark.airflow
def test_a_killed_scheduler_takes_its_tasks_along_and_starts_again(airflow: AirflowStandalone) -> None:
    airflow.wait_for_dag("endless")
    running = airflow.home.parent / "dags" / "embedded.running"
    airflow.api.trigger("endless", "killed")
    wait_until(running.exists, "the task", seconds=60)
    tasks = processes_with("worker -- LocalExecutor", among=psutil.Process().children(recursive=True))
    assert tasks

    airflow.kill_scheduler()

    assert not any(process.is_running() for process in tasks)
    airflow.start_scheduler()
    airflow.api.trigger("embedded", "after")
    wait_until(
        lambda: bool(airflow.api.questions("embedded", "after")), "the next run's question", seconds=60
    )
