"""The import rule: what runs offline imports neither torch nor SimpleTuner, and training imports no matplotlib."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import simpletuner_layerprobe

PACKAGE = Path(simpletuner_layerprobe.__file__).parent
HEAVY = ("torch", "simpletuner", "lycoris", "diffusers", "matplotlib")


def modules(*parts: str) -> list[str]:
    names = []
    for part in parts:
        if (PACKAGE / f"{part}.py").exists():
            names.append(f"simpletuner_layerprobe.{part}")
        else:
            prefix = f"simpletuner_layerprobe.{part}."
            names += [one.name for one in pkgutil.walk_packages([str(PACKAGE / part)], prefix)]
    return names


def imported(names: list[str]) -> set[str]:
    """Which of HEAVY a fresh interpreter has after it imported these modules."""
    code = (
        f"import sys\nfor name in {names!r}: __import__(name)\nprint([one for one in {HEAVY!r} if one in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(eval(done.stdout))


OFFLINE = ("run", "analyse", "lokr", "report", "commands", "cli", "families", "settings", "autoload")


@pytest.mark.parametrize("part", OFFLINE)
def test_the_offline_half_is_light(part):
    assert modules(part)
    assert imported(modules(part)) == set()


def test_training_draws_no_figures():
    assert imported(modules("record")) <= {"torch"}
