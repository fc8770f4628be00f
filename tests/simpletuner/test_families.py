"""Every model family of SimpleTuner: exact under its own model_predict, or refused by name with the reason."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from simpletuner_layerprobe.probe.families import FAMILIES, REFUSED

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))
NAMES = sorted({family.name for family in FAMILIES})
# Between their blocks the states change their size.
WITH_SEAMS = {"deepfloyd", "kolors", "sd1x", "sdxl", "stable_cascade"}


@pytest.fixture(scope="module")
def lines() -> list[dict]:
    import families_table

    return families_table.run()


@pytest.fixture(scope="module")
def outcomes(lines) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for line in lines:
        if "family" in line:
            found.setdefault(line["family"], []).append(line)
    return found


def test_every_family_is_supported_or_refused_with_a_reason(lines):
    registry = next(line["registry"] for line in lines if "registry" in line)
    assert sorted({*NAMES, *REFUSED}) == registry
    assert not set(NAMES) & set(REFUSED)
    assert len(NAMES) >= 40
    assert all(len(reason) > 20 for reason in REFUSED.values())


@pytest.mark.parametrize("name", NAMES)
def test_a_family_is_exact(outcomes, name):
    runs = outcomes[name]
    assert {(run["dtype"], run["checkpointing"]) for run in runs} == {
        ("float32", False),
        ("bfloat16", False),
        ("float32", True),
    }
    for run in runs:
        assert "error" not in run, run["error"]
        assert run["deviation"], run
        for reading, deviation in run["deviation"].items():
            assert deviation <= 2e-6, (reading, run)
        for reading, deviation in run["extra_deviation"].items():
            assert deviation <= 2e-6, (reading, run)
        assert (run["seams"] > 0) == (name in WITH_SEAMS), run
        assert run["sigma_deviation"] <= 1e-6, run
        # a batch in bfloat16 may hold its sigmas in bfloat16
        assert (run["prescribed_deviation"] or 0) <= (4e-3 if run["dtype"] == "bfloat16" else 1e-6), run
        assert run["adapted"] > 0 and run["wrong"] == 0 and run["unmatched"] == 0, run


def test_every_denoiser_of_the_table_was_run(outcomes):
    for family in FAMILIES:
        if family.denoisers:
            assert {run["denoiser"] for run in outcomes[family.name]} & set(family.denoisers), family.name


def test_the_readmes_table_is_the_tests_own(lines):
    import families_table

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert families_table.table(lines) in readme, "the table is stale: run `make families`"


def test_a_line_is_json_in_a_process_of_its_own():
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "run_families.py"), "no-such-family"], capture_output=True, text=True
    )
    assert done.returncode != 0 and all(json.loads(line) for line in done.stdout.splitlines())
