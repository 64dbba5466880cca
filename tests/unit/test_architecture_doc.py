"""docs/architecture.md: every module of the core is in it, and what it names is there."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text()
CORE = ROOT / "include" / "dlq"
ROOMS = PAGE[PAGE.index("### The core's rooms") : PAGE.index("## From a runbook line to its code")]
TASKS = PAGE[PAGE.index("## From a runbook line to its code") : PAGE.index("## What holds it together")]


def named(text: str) -> set[str]:
    """What is in backticks, without the function behind a module's name."""
    return {name.partition(".")[0] for name in re.findall(r"`([a-z_.]+)`", text)}


def first_cells(text: str) -> set[str]:
    return {name for line in text.splitlines() for name in re.findall(r"^\| `([a-z_]+)` \|", line)}


PACKAGES = {folder.name for folder in CORE.iterdir() if (folder / "__init__.py").exists()}
MODULES = {file.stem for file in CORE.glob("*.py") if not file.stem.startswith("__")}


def test_every_package_has_its_line() -> None:
    assert first_cells(ROOMS) == PACKAGES


def test_every_module_is_named() -> None:
    assert named(ROOMS) | named(TASKS) >= MODULES


def test_what_is_named_as_a_room_s_module_is_there() -> None:
    rows = ROOMS[ROOMS.index("| what for |") :]
    assert named(rows) <= MODULES


def test_the_packages_stand_in_the_order_of_the_layers() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = [each["layers"] for each in contracts if each["type"] == "layers"]
    order = [name.strip() for layer in layers for name in layer.split("|") if name.strip() in PACKAGES]
    assert re.findall(r"^\| `([a-z_]+)` \|", ROOMS, re.M) == order
