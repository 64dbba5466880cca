"""Great Expectations over the proof's accounts, in a process of its own: its import takes seconds and much memory.

``python -m dlq.expectations`` reads frames as JSON from its standard input and writes what held as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any, Self

from dlq.errors import DlqError

Frames = dict[str, list[dict[str, Any]]]
"""Small tables by name: ``accounts``, ``ranges``, ``jobs`` and ``open``."""

QUIET = {"GX_ANALYTICS_ENABLED": "false", "TQDM_DISABLE": "1"}
"""The environment in which Great Expectations is imported: it sends nothing home and draws no bars."""

_TIMEOUT_S = 180


class Expectations:
    """The checking process: started on entry, so that it imports while the witnesses are read."""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "dlq.expectations"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **QUIET},
        )
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()

    def check(self, frames: Frames) -> list[dict[str, Any]]:
        """Every expectation with whether it held: ``{"frame", "expectation", "success", "found"}``."""
        try:
            out, err = self._process.communicate(json.dumps(frames), timeout=_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise DlqError(
                f"Great Expectations did not answer in {_TIMEOUT_S} s; clear verify_conservation to try again"
            ) from None
        if self._process.returncode != 0:
            raise DlqError(
                f"Great Expectations failed: {err.strip().splitlines()[-1] if err.strip() else 'no message'}; "
                "is great-expectations installed?"
            )
        found: list[dict[str, Any]] = json.loads(out)
        return found


def _suites() -> dict[str, list[Any]]:
    import great_expectations.expectations as gxe

    from dlq.ledger.schema import UNSETTLED

    return {
        "accounts": [
            gxe.ExpectColumnValuesToBeBetween(
                column="balance", min_value=0, max_value=0, description="before + taken = settled + unsettled"
            ),
            gxe.ExpectColumnValuesToBeBetween(
                column="broken_laws",
                min_value=0,
                max_value=0,
                description="no witness contradicts the ledger",
            ),
        ],
        "ranges": [
            gxe.ExpectColumnValuesToBeBetween(
                column="short_of_cutoff",
                min_value=0,
                max_value=0,
                description="every partition was read to its cut-off",
            ),
            gxe.ExpectColumnPairValuesAToBeGreaterThanB(
                column_A="to_pos", column_B="from_pos", or_equal=True, description="no position went back"
            ),
        ],
        "jobs": [
            gxe.ExpectColumnPairValuesToBeEqual(
                column_A="sent",
                column_B="delivered",
                description="each replay settled as sent is once on the target",
            ),
            gxe.ExpectColumnPairValuesAToBeGreaterThanB(
                column_A="size",
                column_B="cursor",
                or_equal=True,
                description="no cursor passed its job's end",
            ),
        ],
        "open": [
            gxe.ExpectColumnValuesToBeInSet(
                column="state",
                value_set=[s for s in UNSETTLED if s in ("open", "ambiguous")],
                description="nothing is planned or being sent",
            ),
            gxe.ExpectColumnValuesToNotBeNull(column="owner", description="every open entry has an owner"),
            gxe.ExpectColumnValuesToNotBeInSet(
                column="reason", value_set=["new", ""], description="every open entry says why"
            ),
        ],
    }


def validate(frames: Frames) -> list[dict[str, Any]]:
    """What :meth:`Expectations.check` returns, found in this process."""
    import great_expectations as gx
    import pandas as pd

    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False}  # type: ignore[assignment]
    source = context.data_sources.add_pandas("accounts")
    told = []
    for name, suite in _suites().items():
        rows = frames.get(name, [])
        if not rows:
            continue
        batch = (
            source.add_dataframe_asset(name)
            .add_batch_definition_whole_dataframe("all")
            .get_batch({"dataframe": pd.DataFrame(rows)})
        )
        for expectation in suite:
            result = batch.validate(expectation)
            told.append(
                {
                    "frame": name,
                    "expectation": expectation.description,
                    "success": bool(result.success),
                    "found": str(result.result.get("partial_unexpected_list", ""))[:200]
                    if not result.success
                    else "",
                }
            )
    return told


if __name__ == "__main__":
    json.dump(validate(json.load(sys.stdin)), sys.stdout)
