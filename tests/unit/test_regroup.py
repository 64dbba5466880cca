"""Groups that people merge and split: written down, honoured for what comes and for what is open."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from tests.memory_rig import MemoryRig, failure

from dlq import regroup
from dlq.cli.main import commands
from dlq.drain import Drain, dry
from dlq.entry import Headers
from dlq.errors import ConfigError
from dlq.ports import Connection
from dlq.triage import assign, categorize, choose_remedies

WHO = {"who": "ann", "why": "seen together"}


def saying(number: int, error_type: str, message: str) -> Headers:
    return tuple(
        (name, message.encode() if name == "wf-error-message" else value)
        for name, value in failure(number, error_type)
    )


def by_group(queue: MemoryRig) -> dict[int, int]:
    return dict(queue.rows("SELECT grp, COUNT(*) FROM entry GROUP BY grp"))


def taken(queue: MemoryRig, run: str) -> Drain:
    drain = queue.open(run)
    queue.take(drain)
    assign(drain)
    return drain


@pytest.fixture
def two(queue: MemoryRig) -> MemoryRig:
    """A queue with group 1 (three that a retry helps) and group 2 (two that wait for a person)."""
    for number, (error_type, message) in enumerate(
        [("TransientNetwork", "read failed")] * 3
        + [("NobodyKnowsThis", "odd a"), ("NobodyKnowsThis", "odd a")]
    ):
        queue.put(1, headers=saying(number, error_type, message))
    queue.release(taken(queue, "r1"))
    assert by_group(queue) == {1: 3, 2: 2}
    assert queue.reasons() == {"ready": 3, "waiting_for_person": 2}
    return queue


def test_merged_entries_in_custody_and_to_come_are_handled_as_the_other_group(two: MemoryRig) -> None:
    regroup.merge(two.ledger, two.config.name, 2, 1, **WHO)
    assert by_group(two) == {1: 3, 2: 2}, "only a holder of the lease moves entries"
    two.put(1, headers=saying(9, "NobodyKnowsThis", "odd a"))
    two.release(taken(two, "r2"))
    assert by_group(two) == {1: 6}
    assert two.reasons() == {"ready": 6}
    assert two.rows("SELECT DISTINCT owner FROM entry") == two.rows("SELECT owner FROM grp WHERE id = 1")


def test_a_dry_run_shows_what_is_in_custody_and_to_come_as_it_was_merged(two: MemoryRig) -> None:
    regroup.merge(two.ledger, two.config.name, 2, 1, **WHO)
    two.put(1, headers=saying(9, "NobodyKnowsThis", "odd a"))
    two.put(1, headers=saying(10, "TransientNetwork", "read failed"))
    with dry(two.config, run_id="look", connections=Connection) as look:
        (group,) = categorize(look)["groups"]
        assert (group["error_type"], group["remedy"], group["count"]) == ("TransientNetwork", "retry", 7)
        assert choose_remedies(look)["why"] == {"retry_transient": 7}
    assert by_group(two) == {1: 3, 2: 2}, "a dry run moves nothing"


def test_a_split_takes_by_the_message_out_of_custody_and_of_what_comes(two: MemoryRig) -> None:
    two.put(1, headers=saying(7, "NobodyKnowsThis", "odd a"))
    regroup.split(two.ledger, two.config.name, 1, r"read f\w+d", **WHO)
    two.put(1, headers=saying(8, "TransientNetwork", "read failed"))
    drain = taken(two, "r2")
    split_off = two.one("SELECT id FROM grp WHERE fingerprint LIKE '%/%'")
    assert by_group(two) == {2: 3, split_off: 4}
    noted = drain.noted("regroup")
    assert noted is not None
    assert noted["moved"] == 3
    two.release(drain)
    two.check()


def test_a_decision_is_applied_once(two: MemoryRig) -> None:
    regroup.merge(two.ledger, two.config.name, 2, 1, **WHO)
    drain = taken(two, "r2")
    assert regroup.apply(drain) == 0
    assert two.one("SELECT COUNT(*) FROM event WHERE stage = 'regroup'") == 1


def test_what_is_planned_or_settled_stays(two: MemoryRig) -> None:
    one = "(SELECT MIN(id) FROM entry WHERE grp = 2)"
    two.write(f"UPDATE entry SET state = 'discarded', settled_drain = taken_drain WHERE id = {one}")
    regroup.merge(two.ledger, two.config.name, 2, 1, **WHO)
    two.release(taken(two, "r2"))
    assert by_group(two) == {1: 4, 2: 1}


def test_a_decision_says_who_saw_what_and_chose_what(two: MemoryRig) -> None:
    regroup.merge(two.ledger, two.config.name, 2, 1, **WHO)
    regroup.split(two.ledger, two.config.name, 1, "x", **WHO)
    (merged, split) = two.rows("SELECT who, kind, subject, saw, choice FROM decision ORDER BY id")
    assert merged[:3] == ("ann", "merge", "group 2")
    assert "NobodyKnowsThis" in merged[3]
    assert "unknown, manual" in merged[3]
    assert merged[3].endswith("seen together")
    assert merged[4] == "group 1"
    assert (*split[:3], split[4]) == ("ann", "split", "group 1", "x")


def test_a_decision_is_taken_back_for_what_comes(two: MemoryRig) -> None:
    regroup.merge(two.ledger, two.config.name, 2, 1, **WHO)
    regroup.keep(two.ledger, two.config.name, 2, **WHO)
    two.put(1, headers=saying(9, "NobodyKnowsThis", "odd a"))
    two.release(taken(two, "r2"))
    assert by_group(two) == {1: 3, 2: 3}


@pytest.mark.parametrize(("number", "into"), [(1, 1), (1, 2)])
def test_no_group_goes_into_itself(two: MemoryRig, number: int, into: int) -> None:
    regroup.merge(two.ledger, two.config.name, 2, 1, **WHO)
    with pytest.raises(ConfigError, match="into itself"):
        regroup.merge(two.ledger, two.config.name, number, into, **WHO)


def test_what_cannot_be_done_is_said(two: MemoryRig) -> None:
    with pytest.raises(ConfigError, match="no group 17"):
        regroup.merge(two.ledger, two.config.name, 1, 17, **WHO)
    with pytest.raises(ConfigError, match="no group 17"):
        regroup.split(two.ledger, two.config.name, 17, "x", **WHO)
    with pytest.raises(ConfigError, match="no group 17"):
        regroup.keep(two.ledger, two.config.name, 17, **WHO)
    with pytest.raises(ConfigError, match="not a regular expression"):
        regroup.split(two.ledger, two.config.name, 1, "(", **WHO)
    with pytest.raises(ConfigError, match="1 to 500"):
        regroup.split(two.ledger, two.config.name, 1, "", **WHO)
    assert two.one("SELECT COUNT(*) FROM decision") == 0


def test_the_commands_write_decisions_down(
    two: MemoryRig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "queues").mkdir()
    about = two.config.model_dump(mode="json", exclude={"name"}, exclude_defaults=True)
    (tmp_path / "queues" / f"{two.config.name}.yaml").write_text(yaml.safe_dump(about))
    monkeypatch.setenv("DLQ_CONFIG", str(tmp_path))
    for words in (["merge", "2", "1"], ["split", "1", "read f.*"], ["keep", "2"]):
        given = ["group", words[0], two.config.name, *words[1:], "--who", "ann", "--why", "seen"]
        commands.main(given, standalone_mode=False)
    assert [row[0] for row in two.rows("SELECT kind FROM decision ORDER BY id")] == ["merge", "split", "keep"]
    assert "group 2 goes into group 1" in capsys.readouterr().out
