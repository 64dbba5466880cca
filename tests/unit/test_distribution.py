"""What is locked, and what a wheel of this checkout brings along."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
LOCK = (ROOT / "requirements.lock").read_text()


def requirements(text: str) -> list[Requirement]:
    return [Requirement(line) for line in text.splitlines() if line and not line.startswith("#")]


def test_the_lock_names_no_index_and_has_a_hash_for_all() -> None:
    assert "://" not in LOCK
    pins = re.findall(r"^[a-z0-9._-]+(?:\[[a-z,]+\])?==.*$", LOCK, re.MULTILINE)
    assert pins
    assert all(pin.endswith("\\") for pin in pins), "a pin without a hash below it"


def test_the_lock_lies_within_the_ranges() -> None:
    locked = dict(re.findall(r"^([a-z0-9._-]+)==([^ ;\\]+)", LOCK, re.MULTILINE))
    for wanted in requirements((ROOT / "requirements.txt").read_text()):
        version = locked[canonicalize_name(wanted.name)]
        assert wanted.specifier.contains(version), f"{wanted} but locked {version}: make lock"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    [built] = folder.glob("dlq_runbook-*.whl")
    return zipfile.ZipFile(built)


def test_the_wheel_has_the_three_packages_with_their_data_and_not_the_demo(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {
        "dlq",
        "dlq_orchestrator",
        "dlq_runbook",
    }
    for folder in ("include/dlq", "include/dlq_orchestrator", "plugins/dlq_runbook"):
        for file in (ROOT / folder).rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts:
                assert file.relative_to((ROOT / folder).parent).as_posix() in names


def test_the_wheel_asks_for_the_ranges_of_requirements_txt(wheel: zipfile.ZipFile) -> None:
    [metadata] = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    asked = Parser().parsestr(wheel.read(metadata).decode()).get_all("Requires-Dist") or []
    ours = {str(one).lower() for one in map(Requirement, asked) if not one.marker}
    assert ours == {str(one).lower() for one in requirements((ROOT / "requirements.txt").read_text())}
