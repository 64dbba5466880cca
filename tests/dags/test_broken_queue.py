"""A broken file breaks its own queue's Dag, and says so; the other queues never notice."""

from __future__ import annotations

from typing import Any

import pytest
from airflow.sdk.exceptions import AirflowFailException
from airflow.serialization.serialized_objects import DagSerialization


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("source: {kind: kafka, connection: c, topic: t}", "start"),
        ("limits: {btach: 100}", "btach"),
        ("- just\n- a list", "mapping"),
        ("a: [", "not YAML"),
        ("ledger: ${DLQ_NOWHERE}", "DLQ_NOWHERE"),
    ],
)
@pytest.mark.parametrize("kind", ["drain", "review"])
def test_a_broken_file_fails_with_field_and_fix(
    queues: Any, context: Any, text: str, said: str, kind: str
) -> None:
    queues.write("orders")
    queues.write_text("broken", text)
    dags = queues.dags(f"dlq_{kind}.py")
    assert set(dags) == {f"dlq_{kind}__orders", f"dlq_{kind}__broken"}
    assert len(dags[f"dlq_{kind}__orders"].tasks) > 5
    [task] = dags[f"dlq_{kind}__broken"].tasks
    with pytest.raises(AirflowFailException, match=said):
        task.execute(context(task))
    assert said in (dags[f"dlq_{kind}__broken"].doc_md or "")


def test_a_schedule_that_is_no_schedule(queues: Any) -> None:
    queues.write("orders", schedule="every now and then")
    queues.write("billing")
    dags = queues.dags()
    assert len(dags["dlq_drain__orders"].tasks) == 1
    assert "every now and then" in (dags["dlq_drain__orders"].doc_md or "")
    assert len(dags["dlq_drain__billing"].tasks) > 20


def test_a_file_whose_name_is_no_name(queues: Any) -> None:
    queues.write("Not A Name")
    dags = queues.dags()
    assert set(dags) == {"dlq_drain__Not_A_Name"}
    DagSerialization.to_dict(dags["dlq_drain__Not_A_Name"])


def test_a_file_mended_meanwhile_says_to_wait(queues: Any, context: Any) -> None:
    queues.write_text("orders", "source: nowhere")
    [task] = queues.dag("orders").tasks
    queues.write("orders")
    with pytest.raises(AirflowFailException, match="reads well now"):
        task.execute(context(task))


def test_its_error_is_shown_as_text_only(queues: Any) -> None:
    queues.write_text("orders", '"![x](http://elsewhere/x.png)": 1\n"```": 2')
    doc = queues.dag("orders").doc_md or ""
    from markdown_it import MarkdownIt

    kinds = {t.type for token in MarkdownIt().parse(doc) for t in (token, *(token.children or ()))}
    assert "fence" in kinds
    assert "image" not in kinds
