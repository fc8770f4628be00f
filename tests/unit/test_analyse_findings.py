"""Findings: what is planted is shown, with its numbers and words; what is too little is said."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from failing import fails
from numpy.typing import NDArray

from simpletuner_layerprobe.analyse.contribution import critical_blocks
from simpletuner_layerprobe.analyse.findings import (
    ALPHA,
    KIND_ALPHA,
    KINDS,
    TITLES,
    Finding,
    Section,
    as_json,
    findings,
    numbered,
    sureness,
    words,
)
from simpletuner_layerprobe.analyse.heatmap import heatmaps
from simpletuner_layerprobe.analyse.samples import Samples
from simpletuner_layerprobe.analyse.shapes import ranges

SD35_LARGE = {"image": 38, "text": 37}
SIGMAS = {
    "uniform": lambda random, samples: random.random(samples),
    # SD3's own logit-normal schedule: many samples in the middle bins, few at the ends.
    "training": lambda random, samples: 1 / (1 + np.exp(-random.standard_normal(samples))),
}


def made(
    seed: int = 0,
    *,
    critical: dict[str, list[int]] | None = None,
    islands: dict[str, list[tuple[int, int]]] | None = None,
    gradients: dict[str, dict[int, int]] | None = None,
    two_ended: dict[str, list[int]] | None = None,
    least: dict[str, list[int]] | None = None,
    samples: int = 2000,
    images: int = 200,
    blocks: dict[str, int] | None = None,
    sigmas: str = "uniform",
    island: float = 1.5,
) -> Samples:
    """A run with plants: stream -> block numbers. Blocks differ by 8%, images by 20%, samples by 50% of a level."""
    random = np.random.default_rng(seed)
    sigma_N = SIGMAS[sigmas](random, samples)
    image_N = np.arange(samples) % images
    distances: dict[str, NDArray[np.float64]] = {}
    for name, L in (blocks or SD35_LARGE).items():
        level_L = 0.1 * (1 + 0.08 * random.standard_normal(L))
        for first, last in (islands or {}).get(name, []):
            level_L[first : last + 1] *= island
        level_L[(critical or {}).get(name, [])] *= 5
        level_L[(least or {}).get(name, [])] = 0.02
        level_NL = np.tile(level_L, (samples, 1))
        for number, sign in (gradients or {}).get(name, {}).items():
            level_NL[:, number] *= 1 + sign * 0.5 * (sigma_N - 0.5)
        ends_N = (sigma_N < 0.2) | (sigma_N > 0.8)
        level_NL[:, (two_ended or {}).get(name, [])] *= np.where(ends_N, 1.4, 1.0)[:, None]
        image_UL = 0.2 * random.standard_normal((images, 1)) * np.ones(L)
        noise_NL = math.sqrt(0.3) * random.standard_normal((samples, 1)) + math.sqrt(0.7) * random.standard_normal(
            (samples, L)
        )
        distances[name] = level_NL * np.exp(image_UL[image_N] + 0.47 * noise_NL - 0.13)
    paths = {name: tuple(f"b.{i}" for i in range(len(values_NL.T))) for name, values_NL in distances.items()}
    return Samples(sigma_N, (image_N + 1).astype(np.uint64), paths, distances)


def section(samples: Samples, kind: str, stream: str = "image") -> Section:
    return next(part for part in findings(samples) if (part.kind, part.stream) == (kind, stream))


def shown(samples: Samples) -> set[tuple[str, str, tuple[int, ...]]]:
    return {
        (finding.kind, finding.stream, numbered(finding, samples.blocks))
        for part in findings(samples)
        for finding in part.findings
    }


PLANTS: dict[str, dict[str, Any]] = {
    "critical": {"image": [0, 35], "text": [31]},
    "gradients": {"image": {33: 1, 34: 1}, "text": {11: 1, 12: 1, 21: -1, 30: 1}},
    "two_ended": {"image": [2, 13, 18, 19, 36], "text": [5]},
    "least": {"image": [7], "text": [7, 20]},
    "islands": {"image": [(5, 9), (33, 37)], "text": [(19, 31)]},
}


@pytest.mark.parametrize("plant", PLANTS)
def test_what_is_planted_is_shown_and_nothing_else(plant: str) -> None:
    right = wrong = missed = 0
    for seed in range(10):
        seen = shown(made(seed, **{plant: PLANTS[plant]}))
        expected = {
            (plant.replace("_", "-"), name, tuple(range(at[0], at[1] + 1)) if isinstance(at, tuple) else (at,))
            for name, places in PLANTS[plant].items()
            for at in places
        }
        right, wrong, missed = right + len(seen & expected), wrong + len(seen - expected), missed + len(expected - seen)
    # A block beside an island that lies 15% above the median by itself belongs to it: its ends are not always exact.
    least = 0.85 if plant == "islands" else 0.95
    assert right / (right + wrong) >= least and right / (right + missed) >= least, (right, wrong, missed)


def test_a_stream_like_the_articles_shows_its_islands() -> None:
    """Text blocks 19 to 31 and image blocks 33 to 37, with critical blocks at their ends and inside."""
    peaks = {"text": [0, 31], "image": [0, 35]}
    samples = made(4, islands={"text": [(19, 31)], "image": [(33, 37)]}, critical=peaks, island=1.6)
    seen = {(name, numbers) for kind, name, numbers in shown(samples) if kind == "islands"}
    assert seen == {("text", tuple(range(19, 32))), ("image", tuple(range(33, 38)))}
    (text,) = section(samples, "islands", "text").findings
    assert text.p is None and text.share is not None and text.share >= 0.8
    assert sureness(text) == f"in {text.share:.0%} of the replicates"
    assert text.low < text.effect < text.high and words(text).endswith(f"themselves at {text.level:.3g}")


@pytest.mark.parametrize("blocks", [24, 57])
@pytest.mark.parametrize("place", ["start", "middle", "end"])
def test_an_island_is_shown_at_any_place(blocks: int, place: str) -> None:
    first = {"start": 0, "middle": 9, "end": blocks - 5}[place]
    samples = made(1, blocks={"image": blocks}, islands={"image": [(first, first + 4)]}, island=1.8)
    assert ("islands", "image", tuple(range(first, first + 5))) in shown(samples)


def test_a_valley_or_two_neighbours_are_no_island() -> None:
    assert not section(made(0, islands={"image": [(10, 16)]}, island=0.4), "islands").findings
    assert not section(made(0, islands={"image": [(10, 11)]}, island=3.0), "islands").findings


def test_ranges_of_true() -> None:
    assert ranges(np.array([False, True, True, False, True])) == ((1, 2), (4, 4))
    assert ranges(np.zeros(3, dtype=bool)) == ()


def test_the_critical_blocks_are_those_of_the_contribution_rule() -> None:
    samples = made(5, critical={"image": [0, 35], "text": [31]})
    for name, numbers in critical_blocks(heatmaps(samples)).items():
        assert {samples.blocks[name].index(f.blocks[0]) for f in section(samples, "critical", name).findings} == {
            *numbers
        }


def test_a_training_schedule_has_its_two_ended_blocks() -> None:
    samples = made(1, two_ended={"image": [2, 18]}, samples=8000, sigmas="training")
    assert {finding.blocks[0] for finding in section(samples, "two-ended").findings} == {"b.2", "b.18"}


# Too little


def test_too_few_samples_images_and_blocks_are_said_and_nothing_is_shown() -> None:
    few = made(0, gradients={"image": {3: 1}}, samples=60, images=30)
    assert section(few, "critical").missing == "not enough samples: no sigma bin has 20"
    samples = made(0, samples=1000, images=4)
    for kind in ("critical", "islands", "gradients", "two-ended", "least"):
        assert section(samples, kind).missing == "not enough images: 4, at least 5 are needed"
    small = made(0, blocks={"image": 5})
    for kind in ("critical", "islands", "least"):
        assert section(small, kind).missing == "not enough blocks: 5, at least 8 are needed"
    ends = made(0)
    middle = Samples(0.5 + 0.3 * (ends.sigma_N - 0.5), ends.image_N, ends.blocks, ends.distances)
    assert section(middle, "gradients").missing == "not enough samples: 4 sigma bins have 20 or more, 5 must"
    upper = Samples(0.3 + 0.7 * ends.sigma_N, ends.image_N, ends.blocks, ends.distances)
    assert (
        section(upper, "two-ended").missing
        == "not enough samples: below sigma 0.2, above 0.8 and between, a bin needs 20"
    )
    assert not any(part.findings for part in findings(few))


def test_a_stream_without_finite_distances_says_so_and_leaves_the_others() -> None:
    samples = made(0, critical={"image": [3]})
    samples.distances["text"][:, 0] = np.nan
    assert section(samples, "critical", "text").missing == "no sample with finite distances"
    assert [finding.blocks for finding in section(samples, "critical").findings] == [("b.3",)]


def test_no_samples_and_readings_that_lack_numbers_are_refused() -> None:
    samples = made(0, samples=100)
    with fails("update_cosine_mean may lack numbers"):
        findings(Samples(samples.sigma_N, samples.image_N, samples.blocks, samples.distances, "update_cosine_mean"))
    empty = {name: values_NL[:0] for name, values_NL in samples.distances.items()}
    with fails("there are no samples yet"):
        findings(Samples(samples.sigma_N[:0], samples.image_N[:0], samples.blocks, empty))


# Words and numbers


def test_every_finding_has_its_numbers_and_words() -> None:
    samples = made(3, critical={"image": [35]}, gradients={"image": {3: -1, 4: 1}}, least={"image": [9]})
    (critical,) = section(samples, "critical").findings
    assert critical.blocks == ("b.35",) and critical.low < critical.effect < critical.high
    assert 0.4 < critical.effect < 0.6 and critical.samples == 2000 and critical.p is not None
    assert critical.share == 1 and sureness(critical).startswith("p ")
    gradients = {finding.blocks[0]: finding for finding in section(samples, "gradients").findings}
    assert words(gradients["b.3"]).startswith("falls from clean to noise by 0.0")
    assert words(gradients["b.4"]).startswith("rises from clean to noise by 0.0")
    (least,) = section(samples, "least").findings
    assert "of what the median block does" in words(least) and 0.15 < least.effect < 0.25
    assert section(samples, "least").notes[0].startswith("the lowest block is b.9, mean 0.0")


@pytest.mark.parametrize("kind", [*KINDS, "needed", "hardly"])
def test_every_kind_has_a_title_and_words(kind: str) -> None:
    finding = Finding(kind, "image", ("b.1",), 0, 1, 0.2, 0.1, 0.3, "", 1e-9, 1.0, 0.1, 100, "photos")
    assert TITLES[kind] and "0.2" in words(finding).replace("20%", "0.2")
    assert sureness(finding) == "p < 1e-6"


def test_the_json_is_strict_and_complete() -> None:
    told = as_json(findings(made(1, critical={"image": [0]}, islands={"text": [(3, 8)]})))
    again = json.loads(json.dumps(told, allow_nan=False))
    assert {part["kind"] for part in again["sections"]} == set(KINDS)
    assert (
        again["alpha"] == ALPHA >= sum(again["kind_alpha"].values()) and again["kind_alpha"].keys() == KIND_ALPHA.keys()
    )
    assert any(part["findings"] for part in again["sections"])
    bare = Section("least", "image", (Finding("least", "image", (), 0, 1, math.nan, 0, 1, "", 0.1, 1.0, 0.1, 1),), 1)
    assert as_json([bare])["sections"][0]["findings"][0]["effect"] is None
