"""How often intervals hold the truth and findings are false, in the made-up runs of worlds.py.

    python tests/statistics/study.py [RUNS]     prints the tables of docs/confidence.md and docs/findings.md

Every number is a mean over runs; a run is one independent number, however many blocks it has.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray
from worlds import World

from simpletuner_layerprobe.analyse.bootstrap import Bootstrap
from simpletuner_layerprobe.analyse.chances import student95
from simpletuner_layerprobe.analyse.compare import CHANGED, compare
from simpletuner_layerprobe.analyse.conditions import CAPTION, CONDITIONS, Effect, conditions, effect
from simpletuner_layerprobe.analyse.contribution import TUKEY_FAR_OUT, article_values
from simpletuner_layerprobe.analyse.findings import KIND_ALPHA, Finding, findings
from simpletuner_layerprobe.analyse.samples import Samples
from simpletuner_layerprobe.analyse.settled import Decide, article_decide, confidence
from simpletuner_layerprobe.analyse.shapes import LEAST, SHAPE_FLOOR
from simpletuner_layerprobe.analyse.units import unit_means

IMAGES = (20, 50, 200, 1000)
SAMPLES = 2000
WORLDS = {"lognormal": World(0), "bimodal": World(0, images="bimodal"), "heavy": World(0, images="heavy")}
Numbers = dict[str, NDArray[np.float64]]


def article(bootstrap: Bootstrap) -> Decide:
    return article_decide(bootstrap, lambda value_N: np.clip(np.rint((1 - value_N) * 11 + 1), 1, 12).astype(np.int64))


def repeated(runs: int, once: Callable[[int], dict[str, float]]) -> Numbers:
    """name -> (runs,) what `once` gives for the seeds 0, 1, ..."""
    every = [once(seed) for seed in range(runs)]
    return {name: np.array([numbers[name] for numbers in every]) for name in every[0]}


def like(world: World, seed: int, **other: object) -> World:
    """The same kind of world with other levels."""
    names = ("blocks", "spread", "critical", "image", "noise", "alike", "tilt", "images", "effect")
    return World(seed, **({name: getattr(world, name) for name in names} | other))  # type: ignore[arg-type]


def joined(table: dict[str, NDArray[np.float64]]) -> NDArray[np.float64]:
    return np.concatenate(list(table.values()), axis=-1)


# Intervals


def coverage(world: World, images: int, runs: int, **drawn: object) -> Numbers:
    """The part of the cells, block levels and contributions (but 0 and 1) whose 95% interval holds the truth."""

    def once(seed: int) -> dict[str, float]:
        made = like(world, seed % 20)
        samples = made.samples(seed, SAMPLES, images, **drawn)  # type: ignore[arg-type]
        means, truth = unit_means(samples), made.truth()
        cells = np.abs(means.mean_TD - joined(truth)) <= student95(means.freedom_TD) * means.error_TD
        level_D, error_D, freedom_D = means.levels(np.full(means.mean_TD.shape, 0.1))
        levels = np.abs(level_D - joined(truth).mean(axis=0)) <= student95(freedom_D) * error_D
        bootstrap = Bootstrap.of(samples, seed=seed)
        sure = confidence(bootstrap, article(bootstrap))
        value_L = article_values({name: mean_TL[None] for name, mean_TL in truth.items()}, made.paths)[0]
        inner_L = (value_L > 0) & (value_L < 1)
        values = ((sure.low_L <= value_L) & (value_L <= sure.high_L))[inner_L]
        return {"cells": cells.mean(), "block levels": levels.mean(), "contributions": values.mean()}

    return repeated(runs, once)


def settled_factors(world: World, images: int, runs: int) -> Numbers:
    """The part of the article's factors that is settled, and of those that are the part that is the true factor."""

    def once(seed: int) -> dict[str, float]:
        made = like(world, seed)
        bootstrap = Bootstrap.of(made.samples(seed, SAMPLES, images))
        decide = article(bootstrap)
        sure = confidence(bootstrap, decide)
        true_K = decide({name: mean_TL[None] for name, mean_TL in made.truth().items()})[1][0]
        right_K = sure.factor_K == true_K
        right = right_K[sure.settled_K].mean() if sure.settled_K.any() else 1.0
        return {"settled": sure.settled_K.mean(), "true if settled": right}

    return repeated(runs, once)


def differences(world: World, images: int, runs: int) -> Numbers:
    """The same of the differences of two runs of one truth, and whether any of them, or any factor, is a change."""

    def once(seed: int) -> dict[str, float]:
        made = like(world, seed % 20)
        pair = [made.samples(2 * seed + side, SAMPLES, images) for side in (0, 1)]
        told = compare(pair[0], pair[1], article)
        assert told.factors is not None
        parts = {
            "cells": [stream.cells for stream in told.streams.values()],
            "block levels": [stream.levels for stream in told.streams.values()],
            "contributions": [told.factors.values],
        }
        held = {
            name: np.mean([((part.low <= 0) & (part.high >= 0))[~np.isnan(part.p)].mean() for part in every])
            for name, every in parts.items()
        }
        changed = any(part.significant.any() for every in parts.values() for part in every)
        return {**held, "any change": float(changed or CHANGED in told.factors.verdict_K)}

    return repeated(runs, once)


# Findings


def false_findings(world: World, images: int, runs: int, **drawn: object) -> Numbers:
    """Whether a run shows anything that is not true: of conditions (there is none), and of blocks."""

    def once(seed: int) -> dict[str, float]:
        made = like(world, seed)
        samples = made.samples(seed, SAMPLES, images, **drawn)  # type: ignore[arg-type]
        shown = [finding for section in findings(samples) for finding in section.findings if finding.kind != "islands"]
        of_conditions = any(finding.kind in CONDITIONS for finding in shown)
        of_blocks = any(finding.kind not in CONDITIONS and not true(made, finding) for finding in shown)
        either = of_conditions or of_blocks
        return {"conditions": float(of_conditions), "blocks": float(of_blocks), "any": float(either)}

    return repeated(runs, once)


def true(world: World, finding: Finding) -> bool:
    """Whether the definition of the finding's kind holds for what infinitely many images would give."""
    mean_TL = world.truth()[finding.stream]
    level_L = mean_TL.mean(axis=0)
    i = world.paths[finding.stream].index(finding.blocks[0])
    first, third = np.percentile(level_L, [25, 75])
    slope = 10 / 9 * (mean_TL[-1, i] - mean_TL[0, i])
    return {
        "critical": level_L[i] > third + TUKEY_FAR_OUT * (third - first),
        "least": level_L[i] < LEAST * np.median(level_L),
        "gradients": abs(slope) > SHAPE_FLOOR * level_L[i] and np.sign(slope) == np.sign(finding.effect),
        "two-ended": False,
    }[finding.kind]


def power(world: World, images: int, runs: int, size: float) -> Numbers:
    """Whether an effect of caption length of this size on every block is found, and in which part of the blocks."""

    def once(seed: int) -> dict[str, float]:
        samples = like(world, seed, effect=size).samples(seed, SAMPLES, images)
        told = caption_effect(samples)
        shown_D = (told.p_D <= KIND_ALPHA[CAPTION]) & (np.abs(told.effect_D) >= 0.05)
        return {"found": float(shown_D.any()), "blocks": shown_D.mean()}

    return repeated(runs, once)


def caption_effect(samples: Samples) -> Effect:
    told = effect(samples, next(condition for condition in conditions(samples) if condition.name == CAPTION))
    assert isinstance(told, Effect)
    return told


# Tables


def table(title: str, rows: Iterable[tuple[str, Numbers]]) -> None:
    print(f"\n{title}")
    for i, (name, numbers) in enumerate(rows):
        if not i:
            print(f"| | {' | '.join(numbers)} |\n|{'---|' * (len(numbers) + 1)}")
        cells = (f"{100 * value.mean():.1f}%" for value in numbers.values())
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main(runs: int) -> None:
    for name, world in WORLDS.items():
        table(f"coverage, {name} images", ((f"{n:,} images", coverage(world, n, runs)) for n in IMAGES))
    more = {"rows taken for independent": {"known": False}, "stratified sigmas": {"stratified": True}}
    for name, drawn in more.items():
        table(f"coverage, {name}", ((f"{n:,} images", coverage(World(0), n, runs, **drawn)) for n in IMAGES))
    table("settled", ((f"{n:,} images", settled_factors(World(0, spread=0.6), n, runs)) for n in IMAGES))
    table("differences of two runs", ((f"{n:,} images each", differences(World(0), n, runs)) for n in IMAGES))
    for name, world in {**WORLDS, "flat": World(0, spread=0, critical=False, tilt=0)}.items():
        table(f"false findings, {name}", ((f"{n:,} images", false_findings(world, n, runs)) for n in IMAGES))
    sizes = [(n, size) for n in (50, 200, 1000) for size in (0.2, 0.3)]
    table("power", ((f"{n:,} images, {size:.0%}", power(World(0), n, runs, size)) for n, size in sizes))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 500)
