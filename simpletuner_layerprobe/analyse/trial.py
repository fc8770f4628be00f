"""A trial judged: arms of one size, trained with several seeds and judged on the same held-out images, sigmas, noises.

What an arm differs from the reference is paired by seed and sample; seeds and images are both taken for drawn. See the
statistics in docs/study-weighting.md.

Shape letters: S seeds, Q images, P held-out samples, T bins.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from simpletuner_layerprobe.analyse.chances import holm
from simpletuner_layerprobe.analyse.crossed import LEVEL, Crossed, crossed
from simpletuner_layerprobe.analyse.paired import MIN_IMAGES, ROUNDING
from simpletuner_layerprobe.analyse.units import bin_index, sums
from simpletuner_layerprobe.errors import ProbeError

BETTER, WORSE, SAME, OPEN, DIVERGED = "better", "worse", "no different", "open", "diverged"
LARGER_SIZE = 1.1
"""The larger plan's parameters, of the reference's."""


@dataclass(frozen=True)
class BySigma:
    """Differences to the reference by sigma bin, (T,) each, with 95% intervals that are not corrected for their number.

    NaN where a bin has samples of fewer than MIN_IMAGES images.
    """

    mean_T: NDArray[np.float64]
    low_T: NDArray[np.float64]
    high_T: NDArray[np.float64]


@dataclass(frozen=True)
class Judged:
    """An arm, judged.

    loss: the mean over seeds and images, inf if a training diverged. loss_S: (S,) by seed, inf for those that did.
    difference: to the reference, less is better; None for the reference and if it or the arm diverged. p: corrected for
    all arms that are tested, NaN for others. verdict: BETTER, WORSE, SAME, OPEN or DIVERGED; "" for arms that are not
    tested: the reference, the larger plan, shuffles. size: the equal plan with this loss, 1 for the reference's size,
    by the means alone; None where that is not known.
    """

    loss: float
    loss_S: NDArray[np.float64]
    difference: Crossed | None = None
    by_sigma: BySigma | None = None
    p: float = math.nan
    verdict: str = ""
    size: float | None = None


@dataclass(frozen=True)
class Place:
    """Where the plan lies among its shuffles. better_than: so many of them, `of` all that were trained.

    p: the chance of as good a place for a plan that is itself no more than a shuffle.
    """

    better_than: int
    of: int
    p: float


@dataclass(frozen=True)
class Judgement:
    """A trial, judged.

    arms: by name, as they were given. tested: those that have a verdict. seeds: S. images: Q. bins: T. counts_T: held-
    out samples by sigma. margin: what the larger equal plan gains over the reference; None where `no_margin` says why
    nothing can be set beside it. smallest: half the width of the middle one of the tested arms' intervals; NaN without.
    """

    arms: Mapping[str, Judged]
    reference: str
    larger: str
    plan: str
    shuffles: tuple[str, ...]
    tested: tuple[str, ...]
    seeds: int
    images: int
    bins: int
    counts_T: NDArray[np.int64]
    margin: float | None
    no_margin: str
    place: Place | None
    smallest: float


@dataclass(frozen=True)
class TrialFacts:
    """What is shown beside a judgement.

    parameters: arm -> trainable parameters. rate: arm -> learning rate, None if its config's own. tuning: arm ->
    learning rate -> loss on the images that rates are chosen by, empty for an arm without a sweep. steps: of a
    training. seeds: their numbers. held_out: what the arms are judged on, in words. model: its name.
    """

    parameters: Mapping[str, int]
    rate: Mapping[str, float | None]
    tuning: Mapping[str, Mapping[float, float]]
    steps: int
    seeds: Sequence[int]
    held_out: str
    model: str


def judge(
    loss: Mapping[str, NDArray[np.floating]],
    image_P: NDArray[np.integer],
    sigma_P: NDArray[np.floating],
    *,
    reference: str = "uniform",
    larger: str = "uniform-110",
    plan: str = "plan",
    shuffles: Sequence[str] = (),
    bins: int = 10,
) -> Judgement:
    """Judge the arms of a trial. Larger and plan need not be among them.

    loss: arm -> (S, P) losses of the same samples and seeds for every arm; an arm with any that is not finite diverged.
    image_P: the image of each sample, any numbers. sigma_P: in [0, 1].
    Raises ProbeError for fewer than MIN_IMAGES images, without the reference, and for losses of other shapes.
    """
    sigmas_P: NDArray[np.float64] = np.asarray(sigma_P, np.float64)
    losses: dict[str, NDArray[np.float64]] = {name: np.asarray(loss_SP, np.float64) for name, loss_SP in loss.items()}
    S, Q = _require(losses, image_P, sigmas_P, reference)
    pairing = _Pairing(losses, image_P, sigmas_P, reference, bins)
    arms = {name: pairing.judged(name) for name in losses}
    margin, no_margin = _margin(arms, reference, larger)
    tested = tuple(name for name in arms if name not in (reference, larger, *shuffles))
    p = dict(zip(tested, holm(np.array([_p(arms[name].difference) for name in tested])).tolist(), strict=True))
    for name, arm in arms.items():
        word = verdict(arm.difference, p[name], margin or 0.0) if name in tested else ""
        finite = math.isfinite(arm.loss)
        arms[name] = replace(
            arm,
            p=p.get(name, math.nan),
            verdict=word if finite else DIVERGED,
            size=_size(arm.loss, arms[reference].loss, margin) if finite else None,
        )
    halves = [made.half() for name in tested if (made := arms[name].difference) and made.known]
    return Judgement(
        arms=arms,
        reference=reference,
        larger=larger,
        plan=plan,
        shuffles=tuple(name for name in shuffles if name in arms),
        tested=tested,
        seeds=S,
        images=Q,
        bins=bins,
        counts_T=np.bincount(bin_index(sigma_P, bins), minlength=bins),
        margin=margin,
        no_margin=no_margin,
        place=_place({name: arm.loss for name, arm in arms.items()}, plan, shuffles),
        smallest=float(np.median(halves)) if halves else math.nan,
    )


def verdict(difference: Crossed | None, p: float, margin: float) -> str:
    """BETTER or WORSE by the corrected chance p; SAME if the 95% interval lies within the margin; else OPEN."""
    if difference is None or not difference.known:
        return OPEN
    if p <= LEVEL:
        return BETTER if difference.mean < 0 else WORSE
    low, high = difference.interval()
    return SAME if margin > 0 and -margin <= low and high <= margin else OPEN


class _Pairing:
    """The losses of all arms beside the reference's."""

    def __init__(
        self,
        losses: Mapping[str, NDArray[np.float64]],
        image_P: NDArray[np.integer],
        sigma_P: NDArray[np.float64],
        reference: str,
        bins: int,
    ) -> None:
        self.losses, self.reference, self.bins = losses, reference, bins
        self.base_SP = losses[reference]
        images, self.unit_P = np.unique(image_P, return_inverse=True)
        self.images = len(images)
        self.bin_P = bin_index(sigma_P, bins)
        self.least_error = ROUNDING * abs(float(self.base_SP.mean())) if np.isfinite(self.base_SP).all() else 0.0

    def judged(self, name: str) -> Judged:
        """The arm without what depends on other arms."""
        loss_SP = self.losses[name]
        finite_S = np.isfinite(loss_SP).all(axis=1)
        loss_S = np.full(len(loss_SP), np.inf)
        loss_S[finite_S] = self.by_image(loss_SP[finite_S]).mean(axis=1)
        loss = float(loss_S.mean())
        if name == self.reference or not (finite_S.all() and np.isfinite(self.base_SP).all()):
            return Judged(loss, loss_S)
        change_SP = loss_SP - self.base_SP
        return Judged(loss, loss_S, crossed(self.by_image(change_SP), self.least_error), self.by_sigma(change_SP))

    def by_image(self, value_SP: NDArray[np.float64], kept_P: NDArray[np.bool_] | None = None) -> NDArray[np.float64]:
        """(S, Q) means over the samples of each image, of those that have any kept."""
        kept_P = np.ones(len(self.unit_P), bool) if kept_P is None else kept_P
        over_QP = sums(self.unit_P[kept_P], self.images)
        count_Q = over_QP.sum(axis=1)
        total_SQ = (over_QP @ value_SP[:, kept_P].T).T
        means_SQ: NDArray[np.float64] = total_SQ[:, count_Q > 0] / count_Q[count_Q > 0]
        return means_SQ

    def by_sigma(self, change_SP: NDArray[np.float64]) -> BySigma:
        made = BySigma(*np.full((3, self.bins), np.nan))
        for t in range(self.bins):
            change_SQ = self.by_image(change_SP, self.bin_P == t)
            if change_SQ.shape[1] >= MIN_IMAGES:
                of_bin = crossed(change_SQ, self.least_error)
                made.mean_T[t], (made.low_T[t], made.high_T[t]) = of_bin.mean, of_bin.interval()
        return made


def _require(
    losses: Mapping[str, NDArray[np.float64]],
    image_P: NDArray[np.integer],
    sigma_P: NDArray[np.float64],
    reference: str,
) -> tuple[int, int]:
    """The numbers of seeds and images. Raises ProbeError where nothing can be judged."""
    if reference not in losses:
        raise ProbeError(f"the trial has no arm {reference!r}, which the others are judged against")
    S = len(losses[reference])
    for name, loss_SP in losses.items():
        if loss_SP.shape != (S, len(image_P)) or not S:
            raise ProbeError(
                f"arm {name!r} has losses of shape {loss_SP.shape}, expected {(max(S, 1), len(image_P))}: "
                "every arm needs the same seeds and held-out samples"
            )
    if len(sigma_P) != len(image_P):
        raise ProbeError(f"{len(sigma_P):,} sigmas for {len(image_P):,} held-out samples")
    images = len(np.unique(image_P))
    if images < MIN_IMAGES:
        raise ProbeError(f"the trial holds out {images} images, at least {MIN_IMAGES} are needed to judge by")
    return S, images


def _p(difference: Crossed | None) -> float:
    return math.nan if difference is None else difference.p


def _margin(arms: Mapping[str, Judged], reference: str, larger: str) -> tuple[float | None, str]:
    """What the larger plan gains, or why that is no measure."""
    if larger not in arms:
        return None, f"the trial has no arm {larger}"
    made = arms[larger].difference
    if made is None:
        return None, f"{larger if math.isfinite(arms[reference].loss) else reference} diverged"
    if not made.known:
        return None, "one seed cannot tell what more parameters gain"
    if made.interval()[1] >= 0:
        return None, f"{larger} is not clearly better than {reference}"
    return -made.mean, ""


def _size(loss: float, reference: float, margin: float | None) -> float | None:
    """The equal plan's size with this loss: the loss is taken to fall with the logarithm of the parameters."""
    if margin is None:
        return None
    with np.errstate(over="ignore"):
        return float(np.exp(np.log(LARGER_SIZE) * (reference - loss) / margin))


def _place(loss: Mapping[str, float], plan: str, shuffles: Sequence[str]) -> Place | None:
    trained = [loss[name] for name in shuffles if name in loss]
    if plan not in loss or not trained:
        return None
    better = sum(loss[plan] < other for other in trained)
    return Place(better, len(trained), (1 + len(trained) - better) / (len(trained) + 1))
