"""Processes forked from a server that has imported everything: a start costs milliseconds, not seconds of imports."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from typing import Any, Self

import pytest

from dlq.expectations import QUIET, Expectations, Frames, validate

os.environ.update(QUIET)  # what is forked has it from the start
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "pytest",
        "pandas",  # pyarrow imports it where it is installed
        "great_expectations.expectations",
        "dlq.cli.main",
        "tests.integration.worker",
    ]
)


class Here(Expectations):
    """Great Expectations in this process, which was forked with it."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing was started."""

    def check(self, frames: Frames) -> list[dict[str, Any]]:
        return validate(frames)


class Forked(Here):
    """Great Expectations in a process forked for it: its own start imports for seconds, in dozens of tests.

    That start is tried by tests/unit/test_second_review.py and in a real Airflow.
    """

    def check(self, frames: Frames) -> list[dict[str, Any]]:
        with ProcessPoolExecutor(1, FORKS) as pool:
            return pool.submit(validate, frames).result()


@pytest.fixture(autouse=True)
def forked_expectations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the folders whose conftest imports it: every proof is checked in a forked process."""
    from dlq import conservation

    monkeypatch.setattr(conservation, "Expectations", Forked)
