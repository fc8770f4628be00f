"""--model has what SimpleTuner trains: its own classes, family by family, and what LyCORIS builds on them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from simpletuner_layerprobe.probe.families import FAMILIES

SCRIPT = Path(__file__).parent / "families" / "tables.py"
NAMES = sorted({family.name for family in FAMILIES})


@pytest.fixture(scope="module")
def cases() -> dict[str, list[dict]]:
    """What tables.py says of each family's cases."""
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True)
    said: dict[str, list[dict]] = {}
    for line in done.stdout.splitlines():
        said.setdefault(json.loads(line)["family"], []).append(json.loads(line))
    assert said, done.stderr[-4000:]
    return said


@pytest.mark.parametrize("name", NAMES)
def test_the_table_and_the_networks_are_those_of_simpletuners_class(cases, name):
    for case in cases[name]:
        assert "error" not in case, case["error"]
        assert case["tables"] == [] and case["light"], case
        assert not any(case["networks"].values()), case["networks"]


def test_every_entry_of_the_table_was_built(cases):
    classes = {(name, case["class"]) for name, known in cases.items() for case in known}
    assert classes == {(family.name, family.source.partition(":")[2]) for family in FAMILIES}
