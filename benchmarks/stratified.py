"""How many fewer samples stratified sigmas need than uniform ones for the same certainty.

    python benchmarks/stratified.py                         # made-up models, fixed seeds
    python benchmarks/stratified.py UNIFORM STRATIFIED      # two recorded runs of the same config

Both kinds of runs are cut into stretches of 100 samples in the order in which they were drawn. The variance of a
contribution over the stretches, uniform by stratified, is the number of times the samples that uniform sigmas need for
the same standard error; the gain is 1 - 1 / that. Recorded runs must come from one rank.

The gain is what sigma explains of the scatter within a bin, so it is large where the distances follow sigma closely and
images differ little. Writes results/stratified.json; a recorded pair stays in it until another is measured.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from measure import RESULTS, load, machine, save

from simpletuner_layerprobe.analyse.contribution import article_averages
from simpletuner_layerprobe.record.sigmas import stratified_sigmas
from simpletuner_layerprobe.run.shards import open_run

STRETCH = 100
BINS = 10
BLOCKS = 12


def averages(sigma_N: np.ndarray, distances: dict[str, np.ndarray], blocks: dict[str, tuple[str, ...]]) -> np.ndarray:
    """The article's average distance of each block in each stretch. Returns (stretches, C)."""
    found = []
    for start in range(0, len(sigma_N) - STRETCH + 1, STRETCH):
        inside = slice(start, start + STRETCH)
        bin_N = np.minimum((sigma_N[inside] * BINS).astype(int), BINS - 1)
        means = {
            stream: np.stack([distance_NL[inside][bin_N == t].mean(axis=0) for t in range(BINS) if (bin_N == t).any()])
            for stream, distance_NL in distances.items()
        }
        found.append(article_averages({stream: mean_TL[None] for stream, mean_TL in means.items()}, blocks)[0])
    return np.array(found)


def gain(uniform: np.ndarray, stratified: np.ndarray) -> dict[str, Any]:
    """How many times the samples uniform sigmas need (median over the blocks), with its 95% bootstrap interval."""

    def times(one: np.ndarray, other: np.ndarray) -> float:
        return float(np.median(one.var(axis=0, ddof=1) / other.var(axis=0, ddof=1)))

    random = np.random.default_rng(0)
    drawn = [
        times(*(part[random.integers(len(part), size=len(part))] for part in (uniform, stratified)))
        for _ in range(1000)
    ]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return {
        "times": round(times(uniform, stratified), 3),
        "interval": [round(float(low), 3), round(float(high), 3)],
        "stretches": [len(uniform), len(stratified)],
    }


def made_up(sigma_N: np.ndarray, slope: float, seed: int) -> np.ndarray:
    """Distances that go down to 1 - slope of their value as sigma rises from 0 to 1, with noise of a tenth."""
    random = np.random.default_rng(seed)
    level_L = np.linspace(0.05, 0.3, BLOCKS)
    noise_NL = 1 + 0.1 * random.standard_normal((len(sigma_N), BLOCKS))
    distance_NL = level_L * (1 - slope * sigma_N[:, None]) * noise_NL
    return averages(sigma_N, {"image": distance_NL}, {"image": tuple(map(str, range(BLOCKS)))})


def recorded(path: Path) -> np.ndarray:
    run = open_run(path)
    if set(run.samples_per_rank()) != {0}:
        raise SystemExit(f"{path} was recorded by several ranks; its order of drawing is not known")
    every = list(run.rows())
    distances = {
        stream.name: np.concatenate([rows.distances[stream.name, "last"] for rows in every]).astype(np.float64)
        for stream in run.manifest.streams
    }
    blocks = {stream.name: stream.blocks for stream in run.manifest.streams}
    return averages(np.concatenate([rows.sigma_N for rows in every]), distances, blocks)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "runs", nargs="*", type=Path, metavar="RUN", help="one with uniform sigmas, one with stratified"
    )
    parser.add_argument("--what", default="recorded", help="what the two runs are, for the table")
    parser.add_argument("--samples", type=int, default=40_000, help="of a made-up model")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for stratified.json")
    options = parser.parse_args(arguments)
    if len(options.runs) not in (0, 2):
        parser.error(f"{len(options.runs)} runs; expected none, or one with uniform and one with stratified sigmas")
    before = load("stratified", options.out) or {}
    result: dict[str, Any] = {"machine": machine(), "recorded": before.get("recorded"), "made_up": {}}
    if options.runs:
        found = gain(*(recorded(path) for path in options.runs))
        result["recorded"] = {"what": options.what, "date": result["machine"]["date"]} | found
    uniform_N = np.random.default_rng(0).random(options.samples)
    stratified_N = stratified_sigmas(np.arange(options.samples), seed=0)
    for slope in (0.0, 0.25, 0.5, 0.9):
        found = gain(made_up(uniform_N, slope, seed=1), made_up(stratified_N, slope, seed=2))
        result["made_up"][str(slope)] = found
        print(f"  made up, slope {slope:<4}: {found['times']} times", flush=True)
    save("stratified", result, options.out)


if __name__ == "__main__":
    main()
