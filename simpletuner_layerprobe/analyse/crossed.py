"""The mean of a table of differences whose rows and columns are both drawn: seeds of a training, and held-out images.

Another seed would have trained another adapter, and other images would have been harder or easier: both move the mean,
and every image is judged with every seed (crossed random effects; Searle, Casella and McCulloch 1992, Variance
Components, chapter 4).

Shape letters: S seeds, Q images; 3 ways to take the error: of both, of the seeds alone, of the images alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.special
from numpy.typing import NDArray

from simpletuner_layerprobe.analyse.chances import above, scores

LEVEL = 0.05
"""What an interval leaves outside: 95% intervals."""


@dataclass(frozen=True)
class Crossed:
    """The mean over S seeds and Q images, and how sure it is.

    error_3, freedom_3: (3,) standard errors of the mean and their degrees of freedom, of both seeds and images, of the
    seeds alone and of the images alone. NaN with one seed or one image, which cannot tell how another would have moved
    the mean.
    """

    mean: float
    error_3: NDArray[np.float64]
    freedom_3: NDArray[np.float64]
    seeds: int
    images: int

    @property
    def known(self) -> bool:
        """Whether there is an interval: two seeds and two images at least."""
        return self.seeds > 1 and self.images > 1

    @property
    def p(self) -> float:
        """Two-sided chance of a mean as far from 0 if it were 0. The largest of the three; NaN if not known."""
        if not self.known:
            return np.nan
        score_3 = np.abs(scores(np.full(3, self.mean), self.error_3))
        return min(1.0, 2 * float(above(score_3, self.freedom_3).max()))

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        """The ends of the interval that leaves `level` outside, the widest of the three. NaN if not known."""
        half = self.half(level)
        return self.mean - half, self.mean + half

    def half(self, level: float = LEVEL) -> float:
        """Half the width of the interval. It does not hold 0 exactly where p is below `level`."""
        return float((scipy.special.stdtrit(self.freedom_3, 1 - level / 2) * self.error_3).max())


def crossed(change_SQ: NDArray[np.floating], least_error: float = 0.0) -> Crossed:
    """The mean of the table, with errors that hold for other seeds and other images.

    The variance of the mean of both is (MS_seed + MS_image - MS_rest) / (S Q), but no less than the larger of MS_seed
    and MS_image alone gives; its degrees of freedom are Satterthwaite's (1946, Biometrics Bulletin 2). With two or
    three seeds MS_seed often is small by chance, and that interval too narrow with it: where mostly the seeds move the
    mean, two of them hold the truth 87% of the time and not 95%. So the interval is never narrower than Student's of
    the S means of the seeds either, which makes it wide with two seeds and changes hardly anything from four on.

    change_SQ: differences, all finite. least_error: what rounding may do to the mean; no error is taken to be less.
    """
    value_SQ: NDArray[np.float64] = np.asarray(change_SQ, dtype=np.float64)
    S, Q = value_SQ.shape
    mean = float(value_SQ.mean())
    if S < 2 or Q < 2:
        return Crossed(mean, np.full(3, np.nan), np.full(3, np.nan), S, Q)
    square_3 = mean_squares(value_SQ)
    seed, image, rest = square_3.tolist()
    freedom_3 = np.array([S - 1.0, Q - 1.0, (S - 1.0) * (Q - 1.0)])
    both = seed + image - rest
    if both >= max(seed, image) > 0:
        share_3 = square_3 / both  # squares of small numbers would underflow
        freedom = 1 / float((share_3**2 / freedom_3).sum())
    else:
        both, freedom = max((seed, S - 1.0), (image, Q - 1.0))
    error_3 = np.sqrt(np.array([both, seed, image]) / (S * Q))
    return Crossed(mean, np.maximum(error_3, least_error), np.array([freedom, S - 1.0, Q - 1.0]), S, Q)


def mean_squares(change_SQ: NDArray[np.float64]) -> NDArray[np.float64]:
    """(3,) the mean squares of the seeds, of the images and of the rest, of a table of two or more of each."""
    S, Q = change_SQ.shape
    seed_S = change_SQ.mean(axis=1) - change_SQ.mean()
    image_Q = change_SQ.mean(axis=0) - change_SQ.mean()
    rest_SQ = change_SQ - change_SQ.mean() - seed_S[:, None] - image_Q
    seed, image, rest = (float((part**2).sum()) for part in (seed_S, image_Q, rest_SQ))
    return np.array([Q * seed / (S - 1), S * image / (Q - 1), rest / ((S - 1) * (Q - 1))])
