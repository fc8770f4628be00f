"""Paired comparison: what changed from run A to run B sample by sample, in the loss and in the angles.

Two runs with one noise seed have the same sigma, noise and caption for every (image, repeat): what an image, a noise
and a sigma bring along drops out of the difference. Images remain what was drawn: each with all of its pairs. See
docs/compare.md.

Shape letters: P pairs, T bins, L blocks, C columns side by side, G units (images, or groups of some), R replicates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simpletuner_layerprobe.analyse.chances import Z95, above, holm, scores, student95
from simpletuner_layerprobe.analyse.change import ALPHA, BIN_SAMPLES, Change, require_same_blocks, sigma_text
from simpletuner_layerprobe.analyse.samples import Samples
from simpletuner_layerprobe.analyse.units import bin_index, grouped, sums
from simpletuner_layerprobe.errors import ProbeError
from simpletuner_layerprobe.readings import ANGLE, parse_reading

REPLICATES = 2000
MIN_IMAGES = 5
"""Images that must be in both runs before anything is said."""
MOST_UNITS = 2048
ROUNDING = 1e-6
"""Of the mean: other batch sizes or devices move a float32 result by so much, so a smaller change is none."""
SIGMA_ROUNDING = 2.0**-8
"""By so much the same sigma may differ where one run mixes noise in bfloat16."""


@dataclass(frozen=True)
class Paired:
    """What the pairs of two runs show; changes are B minus A, with 95% intervals of other images.

    reading: what `angles` are, (L,) means over all pairs by stream. images, pairs: in both runs. left_a, left_b:
    samples of A and of B that have no partner. bins: T. loss: (1,) over all pairs, NaN where too few have one.
    loss_T: (T,) by sigma. counts_T: pairs with a loss. blocks: stream -> paths. nonfinite: stream -> pairs left out.
    """

    reading: str
    images: int
    pairs: int
    left_a: int
    left_b: int
    bins: int
    loss: Change
    loss_T: Change
    counts_T: NDArray[np.int64]
    angles: Mapping[str, Change]
    blocks: Mapping[str, tuple[str, ...]]
    nonfinite: Mapping[str, int]


def paired(
    a: Samples, b: Samples, loss_a_N: NDArray[np.floating], loss_b_N: NDArray[np.floating], bins: int = 10
) -> Paired:
    """Compare two runs pair by pair, by the facts `image` and `repeat`; loss: (N,) of each.

    Raises ProbeError for other streams or blocks, if fewer than MIN_IMAGES images are in both, and if pairs do not have
    the same sigma.
    """
    require_same_blocks(a, b)
    at_a, at_b = _pairs(a, b)
    image_P = a.image_N[at_a]
    images, unit_P = np.unique(image_P, return_inverse=True)
    if len(images) < MIN_IMAGES:
        raise ProbeError(
            f"{len(images)} images are in both runs with the same repeats, at least {MIN_IMAGES} are needed"
        )
    sigma_P = np.asarray(a.sigma_N[at_a], np.float64)
    if np.abs(sigma_P - b.sigma_N[at_b]).max() > SIGMA_ROUNDING:
        raise ProbeError("the same repeats of the same images have other sigmas in B")
    unit_P = grouped(unit_P, len(images), MOST_UNITS)
    draw = _Draws(unit_P, min(len(images), MOST_UNITS))
    bin_P = bin_index(sigma_P, bins)
    loss_a_P, loss_b_P = (np.asarray(loss_N, np.float64)[at] for loss_N, at in ((loss_a_N, at_a), (loss_b_N, at_b)))
    known_P1 = (np.isfinite(loss_a_P) & np.isfinite(loss_b_P))[:, None]
    in_bin_PT = known_P1 & (bin_P[:, None] == np.arange(bins))
    counts_T = in_bin_PT.sum(axis=0)
    angles, nonfinite, parts = {}, {}, []
    for name, distance_a_NC in a.distances.items():
        a_PC = np.asarray(distance_a_NC, np.float64)[at_a]
        b_PC = np.asarray(b.distances[name], np.float64)[at_b]
        finite_PC = np.isfinite(a_PC) & np.isfinite(b_PC)
        finite_PC &= finite_PC.all(axis=1, keepdims=True) if a.kind.complete else True
        nonfinite[name] = int((~finite_PC.any(axis=1)).sum())
        parts.append((a_PC, b_PC, finite_PC))
    a_PC, b_PC, finite_PC = (np.concatenate(part, axis=1) for part in zip(*parts, strict=True))
    columns = draw.change(a_PC, b_PC, finite_PC)
    first = 0
    for name, (a_PC, _, _) in zip(a.distances, parts, strict=True):
        angles[name] = columns.columns(slice(first, first + a_PC.shape[1]))
        first += a_PC.shape[1]
    loss = (loss_a_P[:, None], loss_b_P[:, None])
    return Paired(
        reading=a.reading,
        images=len(images),
        pairs=len(at_a),
        left_a=a.samples - len(at_a),
        left_b=b.samples - len(at_b),
        bins=bins,
        loss=draw.change(*loss, known_P1),
        loss_T=draw.change(np.repeat(loss[0], bins, axis=1), np.repeat(loss[1], bins, axis=1), in_bin_PT),
        counts_T=counts_T,
        angles=angles,
        blocks=a.blocks,
        nonfinite=nonfinite,
    )


def _pairs(a: Samples, b: Samples) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """(P,) the numbers of the samples of A, and of B, that are of the same image and repeat; of several the first."""
    places = []
    for samples in (a, b):
        repeat_N = samples.facts.get("repeat", np.full(samples.samples, -1))
        known = np.flatnonzero((samples.image_N != 0) & (repeat_N >= 0))
        place = np.empty(len(known), dtype=[("image", np.uint64), ("repeat", np.int64)])
        place["image"], place["repeat"] = samples.image_N[known], repeat_N[known]
        place, first = np.unique(place, return_index=True)
        places.append((place, known[first]))
    _, in_a, in_b = np.intersect1d(places[0][0], places[1][0], assume_unique=True, return_indices=True)
    return places[0][1][in_a], places[1][1][in_b]


class _Draws:
    """REPLICATES draws of the units with replacement, the same for all that is asked."""

    def __init__(self, unit_P: NDArray[np.intp], units: int) -> None:
        self._over_units = sums(unit_P, units)
        self._weight_RG = (
            np.random.default_rng(0).multinomial(units, np.full(units, 1 / units), REPLICATES).astype(float)
        )

    def change(self, a_PC: NDArray[np.float64], b_PC: NDArray[np.float64], kept_PC: NDArray[np.bool_]) -> Change:
        """The means over the kept pairs of each column, and their change with its interval and chance, (C,) each.

        An interval goes from the 2.5% to the 97.5% point of the replicates, their deviations widened to Student's for
        as few units as there are. The chances are corrected for all columns; NaN for a column with too few.
        """
        a_PC, b_PC = (np.where(kept_PC, value_PC, 0.0) for value_PC in (a_PC, b_PC))
        count_GC = self._over_units @ kept_PC.astype(np.float64)
        total_GC = self._over_units @ (b_PC - a_PC)
        count_C = count_GC.sum(axis=0)
        with np.errstate(invalid="ignore", divide="ignore"):
            mean_a_C, mean_b_C = a_PC.sum(axis=0) / count_C, b_PC.sum(axis=0) / count_C
            difference_C = total_GC.sum(axis=0) / count_C
            deviation_RC = (self._weight_RG @ total_GC) / (self._weight_RG @ count_GC) - difference_C
            freedom_C = (
                np.nan_to_num(count_C**2 / (count_GC**2).sum(axis=0)) - 1
            )  # Kish's number of units, less the mean
        tested_C = (count_C >= BIN_SAMPLES) & ((count_GC > 0).sum(axis=0) >= MIN_IMAGES) & (freedom_C > 0)
        freedom_C = np.maximum(freedom_C, 1e-3)
        scale_C = np.sqrt((freedom_C + 1) / freedom_C)  # units about their own mean lie too near to it
        finest_C = ROUNDING * np.maximum(np.abs(mean_a_C), np.abs(mean_b_C))
        low_C, high_C = np.full((2, len(count_C)), np.nan)
        error_C = np.full(len(count_C), np.nan)
        if tested_C.any():
            drawn_RC = deviation_RC[:, tested_C]
            error_C[tested_C] = np.nanstd(drawn_RC, axis=0, ddof=1)
            low_C[tested_C], high_C[tested_C] = np.nanquantile(drawn_RC, (0.025, 0.975), axis=0)
        error_C = np.fmax(error_C * scale_C, finest_C)
        widened_C = scale_C * student95(freedom_C) / Z95
        p_C = np.where(tested_C, 2 * above(np.abs(scores(difference_C, error_C)), freedom_C), np.nan)
        return Change(
            mean_a_C,
            mean_b_C,
            np.where(tested_C, difference_C, np.nan),
            difference_C + np.minimum(widened_C * low_C, -finest_C),
            difference_C + np.maximum(widened_C * high_C, finest_C),
            holm(p_C),
        )


# In words


def clear(change: Change) -> NDArray[np.bool_]:
    """Where there is a change beyond chance, corrected for all numbers of its kind. The same shape, bool."""
    beyond: NDArray[np.bool_] = np.nan_to_num(change.p, nan=1.0) <= ALPHA
    return beyond


def paired_text(made: Paired, number: Mapping[str, int]) -> str:
    """All of it in one sentence. number: block path -> its number in the model."""
    return "; ".join(part for part in (loss_text(made), *_blocks_text(made, number)) if part)


def loss_text(made: Paired) -> str:
    """ "B lowers the loss on these 120 images by 0.012 [0.010, 0.014], most at sigma 0.1 to 0.4"."""
    on = f"on these {made.images:,} images"
    change, low, high = (float(part[0]) for part in (made.loss.difference, made.loss.low, made.loss.high))
    if np.isnan(change):
        return f"too few pairs have a loss in both runs to say anything {on}"
    if low <= 0 <= high:
        return f"no change of the loss beyond chance {on}: {change:+.3g} [{low:+.3g}, {high:+.3g}]"
    down = change < 0
    size, least, most = (-change, -high, -low) if down else (change, low, high)
    said = f"B {'lowers' if down else 'raises'} the loss {on} by {size:.3g} [{least:.3g}, {most:.3g}]"
    with_T = clear(made.loss_T) & ((made.loss_T.difference < 0) == down)
    with_T &= np.abs(made.loss_T.difference) >= 0.5 * np.abs(made.loss_T.difference[with_T]).max(initial=0.0)
    elsewhere_T = ~np.isnan(made.loss_T.difference) & ~with_T
    return f"{said}, most at sigma {sigma_text(with_T)}" if with_T.any() and elsewhere_T.any() else said


def _blocks_text(made: Paired, number: Mapping[str, int]) -> list[str]:
    is_angle = parse_reading(made.reading).kind == ANGLE
    further, less = ("turn further", "turn less far") if is_angle else ("have more of it", "have less of it")
    parts = []
    for name, change in made.angles.items():
        of_stream = f" ({name} stream)" if len(made.angles) > 1 else ""
        for moved_L, verb in ((change.difference > 0, further), (change.difference < 0, less)):
            numbers = [number[made.blocks[name][i]] for i in np.flatnonzero(clear(change) & moved_L)]
            if numbers:
                parts.append(f"{_numbers_text(numbers, len(made.blocks[name]), verb)}{of_stream}")
    return parts or ["no block changed beyond chance"]


def _numbers_text(numbers: list[int], blocks: int, verb: str) -> str:
    if len(numbers) == blocks and blocks > 2:
        return f"all {blocks} blocks {verb}"
    if len(numbers) > 12:
        return f"{len(numbers)} of {blocks} blocks {verb}"
    if len(numbers) == 1:
        return f"block {numbers[0]} {verb.replace('turn', 'turns').replace('have', 'has')}"
    return f"blocks {', '.join(map(str, numbers[:-1]))} and {numbers[-1]} {verb}"
