"""How many fewer samples stratified sigmas need than uniform ones for the same certainty.

    python benchmarks/stratified.py                         # made-up models, fixed seeds
    python benchmarks/stratified.py UNIFORM STRATIFIED      # two recorded runs of the same config

Both kinds of runs are cut into stretches of 100 samples in the order in which they were drawn. The variance of a
contribution over the stretches, uniform by stratified, is the number of times the samples that uniform sigmas need for
the same standard error; the gain is 1 - 1 / that. Recorded runs must come from one rank.

The gain is what sigma explains of the scatter within a bin, so it is large where the distances follow sigma closely and
images differ little. Recorded runs are also cut into stretches that each end when all factors of the article's recipe
are settled, as a probe with layerprobe_stop_when_stable judges. Writes results/stratified.json; a recorded pair stays
in it until another is measured.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from measure import RESULTS, load, machine, save

from simpletuner_layerprobe.analyse.bootstrap import MIN_SAMPLES, Tally, confidence
from simpletuner_layerprobe.analyse.contribution import article_averages
from simpletuner_layerprobe.analyse.heatmap import bin_index
from simpletuner_layerprobe.analyse.settled import GROWTH, REPLICATES
from simpletuner_layerprobe.lokr.decision import of_preset
from simpletuner_layerprobe.run.records import Run, open_run
from simpletuner_layerprobe.training.sigmas import stratified_sigmas

STRETCH = 100
STEP = 10
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


def until_settled(run: Run) -> list[int]:
    """The lengths of a run's consecutive stretches, of which each ends when all factors are settled.

    Judged by the rules of `Stability`: every bin has its samples, and 95% of the replicates agree with every factor of
    the recipe; asked again whenever the samples of the stretch have grown by a tenth. The rest of the run, in which
    they do not settle, is left out, so that a long stretch is missed a little more easily than a short one.
    """
    decide_of = of_preset(run.manifest, None)
    found = []
    tally, next_samples = Tally(run.manifest, bins=BINS), float(STRETCH)
    for rows in run.rows():
        for start in range(0, len(rows), STEP):
            tally.add(rows.where(slice(start, start + STEP)))
            if tally.samples < next_samples:
                continue
            next_samples = GROWTH * tally.samples
            bootstrap = tally.bootstrap(replicates=REPLICATES)
            everywhere = all(count_T.min() >= MIN_SAMPLES for count_T in bootstrap.count_T.values())
            if everywhere and not confidence(bootstrap, decide_of(bootstrap)).unsettled():
                found.append(tally.samples)
                tally, next_samples = Tally(run.manifest, bins=BINS), float(STRETCH)
    return found


def until_filled(run: Run) -> list[int]:
    """The lengths of consecutive stretches that each end when every bin has the samples that a judgement needs."""
    found = []
    count_T, length = np.zeros(BINS, dtype=int), 0
    for bin_t in np.concatenate([bin_index(rows.sigma_N, BINS) for rows in run.rows()]):
        count_T[bin_t] += 1
        length += 1
        if count_T.min() >= MIN_SAMPLES:
            found.append(length)
            count_T, length = np.zeros(BINS, dtype=int), 0
    return found


def recorded(run: Run) -> np.ndarray:
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
        runs = [open_run(path) for path in options.runs]
        for run in runs:
            if set(run.samples_per_rank()) != {0}:
                parser.error(f"{run.path} was recorded by several ranks; its order of drawing is not known")
        found = gain(*map(recorded, runs))
        settled = {
            name: {"settled": until_settled(run), "filled": until_filled(run)}
            for name, run in zip(("uniform", "stratified"), runs, strict=True)
        }
        result["recorded"] = {
            "what": options.what,
            "date": result["machine"]["date"],
            "samples": [run.sample_count() for run in runs],
            "until_settled": settled,
        } | found
    uniform_N = np.random.default_rng(0).random(options.samples)
    stratified_N = stratified_sigmas(np.arange(options.samples), seed=0)
    for slope in (0.0, 0.25, 0.5, 0.9):
        found = gain(made_up(uniform_N, slope, seed=1), made_up(stratified_N, slope, seed=2))
        result["made_up"][str(slope)] = found
        print(f"  made up, slope {slope:<4}: {found['times']} times", flush=True)
    save("stratified", result, options.out)


if __name__ == "__main__":
    main()
