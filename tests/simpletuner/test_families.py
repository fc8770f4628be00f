"""Every model family of SimpleTuner: exact under its own model_predict, or refused by name with the reason."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from simpletuner_layerprobe.probe.families import FAMILIES, REFUSED

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
NAMES = sorted({family.name for family in FAMILIES})
RUNS = {("float32", False), ("bfloat16", False), ("float32", True)}
# Between their blocks the states change their size.
WITH_SEAMS = {"deepfloyd", "kolors", "sd1x", "sdxl", "stable_cascade"}
# Cases in which the noise cannot be checked: the batch does not keep its noise, or has no video.
UNCHECKED = {("ace_step", "base"), ("ltxvideo2", "dev, audio alone")}
# Cases that draw in another way than for single samples, or in their forward: no noise seed can fix that.
NOT_FIXED = {
    ("ace_step", "base"): "dropout in its forward",
    ("infinitetalk", "single-14b-480p"): "randn of shape (1, 9, 2, 16) while it prepares a batch",
    ("ltxvideo2", "dev, first frame given"): "rand in its forward",
    ("ltxvideo2", "dev, still image given as first frame"): "rand in its forward",
    ("ltxvideo2", "dev, still image given as prefix"): "rand in its forward",
    ("stable_cascade", "stage-c"): "dropout in its forward",
    ("wan", "ti2v-5b-2.2"): "randn in its forward",
    ("wan", "ti2v-5b-2.2, all given"): "randn in its forward",
}


@pytest.fixture(scope="module")
def lines(simpletuner) -> list[dict]:
    import families_table

    done = simpletuner.script(families_table.RUNNER)
    assert done.stdout, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def outcomes(lines) -> dict[str, list[dict]]:
    families: dict[str, list[dict]] = {}
    for line in lines:
        if "family" in line:
            families.setdefault(line["family"], []).append(line)
    return families


def test_every_family_is_supported_or_refused_with_a_reason(lines):
    registry = next(line["registry"] for line in lines if "registry" in line)
    assert sorted({*NAMES, *REFUSED}) == registry
    assert not set(NAMES) & set(REFUSED)
    assert len(NAMES) >= 40
    assert all(len(reason) > 20 for reason in REFUSED.values())


@pytest.mark.parametrize("name", NAMES)
def test_a_family_is_exact(outcomes, name):
    runs = outcomes[name]
    assert {(run["dtype"], run["checkpointing"]) for run in runs} == RUNS
    for run in runs:
        assert "error" not in run, (run["label"], run["error"])
        assert run["deviation"] and max(run["deviation"].values()) <= 2e-6, run
        assert max(run["extra_deviation"].values()) <= 2e-6, run
        assert (run["seams"] > 0) == (name in WITH_SEAMS), run
        assert run["sigma_deviation"] <= 1e-6, run
        # a batch in bfloat16 may hold its sigmas in bfloat16
        assert (run["prescribed_deviation"] or 0) <= (4e-3 if run["dtype"] == "bfloat16" else 1e-6), run
        assert (run["noise_difference"] is None) == ((name, run["label"]) in UNCHECKED), run
        if (run["dtype"], run["checkpointing"]) == ("float32", False):
            assert run["ablation"]["ablation_deviation"] <= 1e-6, run
        assert run["adapted"] > 0 and run["wrong"] == 0 and run["unmatched"] == 0, run


def test_with_a_noise_seed_every_draw_is_fixed_or_the_family_refused(outcomes):
    told = {(run["family"], run["label"]): run["fixed"] for runs in outcomes.values() for run in runs if "fixed" in run}
    assert {family for family, _ in told} == set(NAMES)
    assert {case: one["different"] for case, one in told.items() if one.get("different")} == {}
    assert {case: one["error"] for case, one in told.items() if "error" in one} == {
        (family, label): f"model family {family!r} draws by {what}, which no seed of a sample can fix; leave "
        f"layerprobe_noise_seed out for this family"
        for (family, label), what in NOT_FIXED.items()
    }


def test_every_denoiser_of_the_table_was_run(outcomes):
    for family in FAMILIES:
        if family.denoisers:
            assert {run["denoiser"] for run in outcomes[family.name]} & set(family.denoisers), family.name


def test_the_page_of_families_is_the_tests_own(lines):
    import families_table

    page = families_table.PAGE.read_text(encoding="utf-8")
    assert families_table.table(lines) in page, "the table is stale: run `make families`"
