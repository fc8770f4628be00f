from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from synthetic_run import SD35_LARGE, manifest, write_run

from simpletuner_layerprobe.analyse.conditions import Observation, Sums, observe
from simpletuner_layerprobe.analyse.contribution import critical_blocks
from simpletuner_layerprobe.analyse.findings import (
    ALPHA,
    ISLAND_ALPHA,
    KINDS,
    SAMPLES,
    Section,
    _shift,
    as_json,
    findings,
    islands,
    shortest_island,
    words,
)
from simpletuner_layerprobe.analyse.heatmap import heatmaps
from simpletuner_layerprobe.errors import ProbeError
from simpletuner_layerprobe.run.manifest import Manifest
from simpletuner_layerprobe.run.records import Rows

RUNS = 60
NOISE = 0.5  # standard deviation of one sample's distance, in parts of its block's level


@dataclass
class Plant:
    """What is put into a run: stream -> block numbers (a range of them for islands)."""

    critical: dict[str, list[int]] = field(default_factory=dict)
    islands: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    gradients: dict[str, dict[int, int]] = field(default_factory=dict)
    two_ended: dict[str, list[int]] = field(default_factory=dict)
    least: dict[str, list[int]] = field(default_factory=dict)
    conditions: dict[str, dict[str, list[int]]] = field(default_factory=dict)

    def expected(self) -> Counter[tuple[str, str, tuple[int, ...]]]:
        found: Counter[tuple[str, str, tuple[int, ...]]] = Counter()
        for kind, numbers in (("critical", self.critical), ("two-ended", self.two_ended), ("least", self.least)):
            found.update((kind, name, (i,)) for name, those in numbers.items() for i in those)
        found.update(("gradients", name, (i,)) for name, those in self.gradients.items() for i in those)
        found.update(
            ("islands", name, tuple(range(a, b + 1))) for name, those in self.islands.items() for a, b in those
        )
        for kind, streams in self.conditions.items():
            found.update((kind, name, (i,)) for name, those in streams.items() for i in those)
        return found


def uniform(random: np.random.Generator, samples: int) -> NDArray[np.float64]:
    return random.random(samples)


def stratified(random: np.random.Generator, samples: int) -> NDArray[np.float64]:
    """As even as can be: one sample in every one of `samples` equal parts."""
    return (random.permutation(samples) + random.random(samples)) / samples


def training(random: np.random.Generator, samples: int) -> NDArray[np.float64]:
    """SD3's own logit-normal schedule: many samples in the middle bins, few at the ends."""
    return 1 / (1 + np.exp(-random.standard_normal(samples)))


SIGMAS = {"uniform": uniform, "stratified": stratified, "training": training}


def made(
    plant: Plant,
    seed: int,
    *,
    samples: int = SAMPLES,
    what: Manifest | None = None,
    shared: float = 0.3,
    sigmas: str = "uniform",
    island: float = 1.5,
    uneven: float = 0.08,
) -> Observation:
    """A run in sums, of SD3.5 Large's shape unless `what` is another.

    shared: the part of the noise that all blocks of a sample share. sigmas: one of SIGMAS. island: the level inside
    an island, in parts of that outside. uneven: standard deviation of the blocks' levels, in parts of their mean.
    """
    random = np.random.default_rng(seed)
    what = what or manifest(SD35_LARGE, tokens=("last",))
    sigma_N = SIGMAS[sigmas](random, samples)
    facts: dict[str, NDArray[Any]] = {
        "caption length": random.integers(5, 200, samples),
        "size": random.choice([512, 768, 1024], samples),
        "aspect": random.choice([0.0, 0.25, 0.5, 1.0], samples),
        "captions dropped": (random.random(samples) < 0.1).astype(np.int64),
        "data backend": random.integers(0, 3, samples),
    }
    distances = {}
    for stream in what.streams:
        name, L = stream.name, len(stream.blocks)
        level_L = 0.1 * (1 + uneven * random.standard_normal(L))
        for first, last in plant.islands.get(name, []):
            level_L[first : last + 1] *= island
        level_L[plant.critical.get(name, [])] *= 5
        level_L[plant.least.get(name, [])] = 0.02
        level_NL = np.broadcast_to(level_L, (samples, L)).copy()
        for number, sign in plant.gradients.get(name, {}).items():
            level_NL[:, number] *= 1 + sign * 0.5 * (sigma_N - 0.5)
        ends_N = (sigma_N < 0.2) | (sigma_N > 0.8)
        level_NL[:, plant.two_ended.get(name, [])] *= np.where(ends_N, 1.4, 1.0)[:, None]
        for kind, streams in plant.conditions.items():
            x_N = facts[kind].astype(float)
            x_N = (facts[kind] == 1).astype(float) if kind == "data backend" else x_N
            scaled_N = x_N if kind in ("captions dropped", "data backend") else (x_N - x_N.mean()) / (2 * x_N.std())
            level_NL[:, streams.get(name, [])] *= 1 + 0.4 * scaled_N[:, None]
        noise_NL = math.sqrt(shared) * random.standard_normal((samples, 1))
        noise_NL = noise_NL + math.sqrt(1 - shared) * random.standard_normal((samples, L))
        # Skewed, as distances are: exp of the noise, brought to mean 1 and the spread NOISE.
        spread = math.sqrt(math.log(1 + NOISE**2))
        distances[name, "last"] = (level_NL * np.exp(spread * noise_NL - spread**2 / 2)).astype(np.float32)
    side_N = facts["size"]
    rows = Rows(
        sigma_N=sigma_N,
        loss_N=np.full(samples, np.nan, dtype=np.float32),
        width_N=np.round(side_N * 2 ** (facts["aspect"] / 2)).astype(np.int32),
        height_N=np.round(side_N * 2 ** (-facts["aspect"] / 2)).astype(np.int32),
        text_tokens_N=np.where(facts["captions dropped"] == 1, 0, facts["caption length"]).astype(np.int32),
        caption_dropped_N=facts["captions dropped"].astype(np.int8),
        backend_N=facts["data backend"].astype(np.int16),
        backends=("photos", "art", "scans"),
        distances=distances,
    )
    sums = Sums(what, "last", 10)
    sums.add(rows)
    return sums.observation()


def seen(observation: Observation) -> Counter[tuple[str, str, tuple[int, ...]]]:
    found: Counter[tuple[str, str, tuple[int, ...]]] = Counter()
    for section in findings(observation):
        blocks = observation.streams[section.stream].heatmap.blocks
        for one in section.findings:
            if one.kind != "data backend" or one.value == "art":
                found[section.kind, section.stream, tuple(blocks.index(block) for block in one.blocks)] += 1
    return found


PLANTS = {
    "critical": lambda: Plant(critical={"image": [0, 35], "text": [31]}),
    "gradients": lambda: Plant(gradients={"image": {33: 1, 34: 1}, "text": {11: 1, 12: 1, 21: -1, 30: 1}}),
    "two-ended": lambda: Plant(two_ended={"image": [2, 13, 18, 19, 36], "text": [5]}),
    "least": lambda: Plant(least={"image": [7], "text": [7, 20]}),
    "caption length": lambda: Plant(conditions={"caption length": {"text": [3, 9, 30], "image": [1]}}),
    "captions dropped": lambda: Plant(conditions={"captions dropped": {"text": [3, 9, 30], "image": [1]}}),
    "size": lambda: Plant(conditions={"size": {"image": [3, 9, 30]}}),
    "aspect": lambda: Plant(conditions={"aspect": {"image": [3, 9, 30]}}),
    "data backend": lambda: Plant(conditions={"data backend": {"image": [3, 9, 30]}}),
}


@pytest.mark.parametrize("kind", PLANTS)
def test_what_is_planted_is_found_and_nothing_else(kind: str) -> None:
    plant = PLANTS[kind]()
    right = wrong = missed = 0
    for seed in range(RUNS // 3):
        found, expected = seen(made(plant, seed)), plant.expected()
        right += (found & expected).total()
        wrong += (found - expected).total()
        missed += (expected - found).total()
    assert right / (right + wrong) >= 0.95 and right / (right + missed) >= 0.95, (right, wrong, missed)


def test_planted_islands_are_found_with_their_ends() -> None:
    """A found island counts if both of its ends are within one block of a planted one's."""
    plant = Plant(islands={"text": [(19, 31)], "image": [(5, 9), (33, 37)]}, critical={"image": [0]})
    right = wrong = missed = blocks_right = blocks_wrong = blocks_missed = 0
    for seed in range(RUNS // 3):
        found = [key for key in seen(made(plant, seed)) if key[0] == "islands"]
        left = [key for key in plant.expected() if key[0] == "islands"]
        cells = {(name, i) for _, name, those in found for i in those}
        planted = {(name, i) for _, name, those in left for i in those}
        blocks_right += len(cells & planted)
        blocks_wrong += len(cells - planted)
        blocks_missed += len(planted - cells)
        for _, name, those in found:
            match = next(
                (
                    key
                    for key in left
                    if key[1] == name and abs(key[2][0] - those[0]) <= 1 and abs(key[2][-1] - those[-1]) <= 1
                ),
                None,
            )
            right += match is not None
            wrong += match is None
            if match:
                left.remove(match)
        missed += len(left)
    assert right / (right + wrong) >= 0.95 and right / (right + missed) >= 0.95, (right, wrong, missed)
    assert blocks_right / (blocks_right + blocks_wrong) >= 0.95, (blocks_right, blocks_wrong)
    assert blocks_right / (blocks_right + blocks_missed) >= 0.95, (blocks_right, blocks_missed)


def shape(blocks: int, streams: tuple[str, ...] = ("image", "text")) -> Manifest:
    return manifest({name: tuple(f"b.{i}" for i in range(blocks)) for name in streams}, tokens=("last",))


MODELS = {"24": shape(24), "30, one stream": shape(30, ("image",)), "57": shape(57), "48, three": shape(48, (*"abc",))}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("strength", [1.5, 4.0])
def test_an_island_is_found_at_any_place_in_any_model(model: str, strength: float) -> None:
    """At the first and the last blocks and in the middle, also where each of its blocks is critical by itself."""
    what = MODELS[model]
    name, L = what.streams[0].name, len(what.streams[0].blocks)
    right = wrong = planted = 0
    for seed, width in enumerate((5, 8) * 3):
        first = (0, L - width, (L - width) // 2)[seed // 2]
        observation = made(Plant(islands={name: [(first, first + width - 1)]}), seed, what=what, island=strength)
        found = [those for kind, stream, those in seen(observation) if (kind, stream) == ("islands", name)]
        hits = [one for one in found if abs(one[0] - first) <= 1 and abs(one[-1] - first - width + 1) <= 1]
        right, wrong, planted = right + bool(hits), wrong + len(found) - len(hits), planted + 1
    assert (right, wrong) == (planted, 0)


def test_a_valley_is_no_island_and_a_critical_block_at_its_end_belongs_to_it() -> None:
    random = np.random.default_rng(0)
    level_L = 0.1 * (1 + 0.08 * random.standard_normal(38))
    valley_L = level_L.copy()
    valley_L[10:16] = 0.03
    assert islands(valley_L) == ()
    level_L[19:31] *= 1.5
    level_L[31] = 0.6
    (found,) = islands(level_L)
    assert (found.first, found.last) == (19, 31)
    # The one large block moves neither the difference nor its interval much.
    assert 0.03 < found.low < found.excess < found.high < 0.08


def test_the_shift_is_the_median_of_all_differences() -> None:
    random = np.random.default_rng(1)
    covered = 0
    for _ in range(300):
        inside_I, outside_O = 0.5 + random.standard_normal(8), random.standard_normal(25)
        excess, low, high = _shift(inside_I, outside_O)
        assert excess == pytest.approx(np.median([a - b for a in inside_I for b in outside_O]))
        covered += low <= 0.5 <= high
    assert 0.92 <= covered / 300 <= 0.99


def test_the_shortest_island_is_the_one_that_chance_seldom_makes() -> None:
    for blocks, shortest in ((24, 4), (38, 4), (57, 3)):
        assert shortest_island(blocks, ISLAND_ALPHA / 2) == shortest
        note = next(one for one in findings(made(Plant(), 0, what=shape(blocks))) if one.kind == "islands").notes[0]
        assert f"fewer than {shortest} side by side" in note
    assert shortest_island(10, ISLAND_ALPHA / 2) == 0
    few = section(made(Plant(), 0, what=shape(10)), "islands")
    assert few.missing == "not enough blocks: among 10, neighbours cannot be told from chance"


@pytest.mark.parametrize("kind", ["critical", "gradients", "two-ended", "captions dropped"])
@pytest.mark.parametrize("model", ["24", "57"])
def test_what_is_planted_is_found_in_other_models_with_stratified_sigmas(kind: str, model: str) -> None:
    what = MODELS[model]
    last = len(what.streams[0].blocks) - 1
    plant = {
        "critical": Plant(critical={"image": [0, last]}),
        "gradients": Plant(gradients={"image": {0: 1, 9: -1, last: 1}}),
        "two-ended": Plant(two_ended={"image": [1, last]}),
        "captions dropped": Plant(conditions={"captions dropped": {"image": [0, last]}}),
    }[kind]
    right = wrong = missed = 0
    for seed in range(6):
        found = Counter({key: 1 for key in seen(made(plant, seed, what=what, sigmas="stratified")) if key[0] == kind})
        right += (found & plant.expected()).total()
        wrong += (found - plant.expected()).total()
        missed += (plant.expected() - found).total()
    assert right / (right + wrong) >= 0.95 and right / (right + missed) >= 0.95, (right, wrong, missed)


def test_a_training_schedule_leaves_bins_that_hide_weaker_effects_and_says_so() -> None:
    notes = section(made(Plant(), 0, sigmas="training"), "gradients").notes
    assert "the emptiest sigma bin has" in notes[0] and "below 200 weaker effects are missed" in notes[0]
    assert section(made(Plant(), 0), "gradients").notes == ()
    observation = made(Plant(two_ended={"image": [2, 18]}), 1, samples=8000, sigmas="training")
    assert {one.blocks[0].rpartition(".")[2] for one in section(observation, "two-ended").findings} == {"2", "18"}


@pytest.mark.parametrize("samples", [300, SAMPLES])
def test_where_nothing_is_planted_nothing_is_found(samples: int) -> None:
    """At most one run in twenty shows anything at all, of any kind."""
    shown = [seed for seed in range(RUNS) if seen(made(Plant(), 1000 + seed, samples=samples))]
    assert len(shown) <= ALPHA * RUNS, shown


def section(observation: Observation, kind: str, stream: str = "image") -> Section:
    return next(one for one in findings(observation) if (one.kind, one.stream) == (kind, stream))


def test_too_few_samples_are_said_and_nothing_is_found() -> None:
    observation = made(Plant(gradients={"image": {3: 1}}, two_ended={"image": [5]}), 0, samples=60)
    for kind in ("gradients", "two-ended", "captions dropped"):
        found = section(observation, kind)
        assert not found.findings and found.missing.startswith("not enough samples"), found


def test_every_finding_has_its_numbers_and_words() -> None:
    plant = Plant(critical={"image": [35]}, gradients={"image": {3: -1}}, conditions={"data backend": {"image": [9]}})
    observation = made(plant, 3)
    (critical,) = section(observation, "critical").findings
    assert critical.blocks == ("transformer_blocks.35",) and critical.low < critical.effect < critical.high
    assert 0.45 < critical.effect < 0.6 and critical.samples == SAMPLES
    (gradient,) = section(observation, "gradients").findings
    assert gradient.low < -0.05 < gradient.high + 0.02 and words(gradient).startswith("falls from clean to noise")
    named = {one.value: one.effect for one in section(observation, "data backend").findings}
    assert named["art"] > 0.3 and "on art compared" in words(section(observation, "data backend").findings[0])


def test_the_json_is_strict_and_complete() -> None:
    sections = findings(made(Plant(critical={"image": [0]}), 1))
    text = json.dumps(as_json(sections), allow_nan=False)
    assert {one["kind"] for one in json.loads(text)["sections"]} == set(KINDS)


def test_the_critical_blocks_are_those_of_the_contribution_rule() -> None:
    observation = made(Plant(critical={"image": [0, 35], "text": [31]}), 5)
    rule = critical_blocks(observation.heatmaps())
    for name, numbers in rule.items():
        found = {one.blocks[0] for one in section(observation, "critical", name).findings}
        assert found == {observation.streams[name].heatmap.blocks[i] for i in numbers}


def test_the_sums_are_the_heatmaps_and_the_spread_of_the_samples(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", SD35_LARGE, 500, shards=7)
    observation = observe(run, tokens="mean", bins=6)
    sigma_N = np.concatenate([part.sigma_N for part in run.rows()])
    bin_N = np.minimum((sigma_N * 6).astype(int), 5)
    for name, heatmap in heatmaps(run, tokens="mean", bins=6).items():
        stream = observation.streams[name]
        np.testing.assert_allclose(stream.heatmap.mean_TL, heatmap.mean_TL, rtol=1e-9)
        assert stream.heatmap.count_T.tolist() == heatmap.count_T.tolist()
        distance_NL = np.concatenate([part.distances[name, "mean"] for part in run.rows()]).astype(np.float64)
        for t in range(6):
            np.testing.assert_allclose(stream.variance_TL[t], distance_NL[bin_N == t].var(axis=0, ddof=1), rtol=1e-6)
    assert observation.backends == {"photos": 500} and observation.samples == 500
    assert "one data backend" in section(observation, "data backend").missing
    assert "does not vary" in section(observation, "size").missing


def test_a_reading_that_was_not_recorded_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", SD35_LARGE, 5, tokens=("last",))
    with pytest.raises(ProbeError, match="no reading 'mean'"):
        observe(run, tokens="mean")


def test_islands_of_equal_blocks_and_of_few_are_none() -> None:
    assert islands(np.full(20, 0.1)) == ()
    assert islands(np.array([0.1, 0.2, 0.3])) == ()


def test_samples_that_are_not_finite_are_left_out_and_counted(tmp_path: Path) -> None:
    plain = made(Plant(), 0, samples=200)
    what = replace(manifest(SD35_LARGE, tokens=("last",)))
    sums = Sums(what, "last", 10)
    for part in write_run(tmp_path / "run", SD35_LARGE, 50, tokens=("last",)).rows():
        part.distances["image", "last"][0, 3] = np.nan
        sums.add(part)
    found = sums.observation().streams["image"].heatmap
    assert found.nonfinite == 3 and np.isfinite(found.mean_TL).all() and found.count_T.sum() == 47
    assert plain.streams["image"].heatmap.nonfinite == 0
