"""Confidence: how far other samples of the same kind would have moved the contributions and the factors.

The samples of a sigma bin are independent draws, so the spread of the bin's mean shows in the samples themselves.
They are summed in groups as they are read, which bounds the memory; the bootstrap then draws groups with
replacement, bin by bin, so that the bins weigh equally in every replicate as they do in the contributions.

Shape letters: N samples, T bins, L blocks, G groups of samples, R replicates, D distances of a sample (all streams side
by side), K things that are decided: one factor per block in the article's recipe, one per group of modules in a plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from simpletuner_layerprobe.analyse.contribution import article_values, far_out
from simpletuner_layerprobe.analyse.heatmap import all_blocks, bin_index
from simpletuner_layerprobe.errors import ProbeError

if TYPE_CHECKING:
    from simpletuner_layerprobe.run.manifest import Manifest
    from simpletuner_layerprobe.run.records import Rows, Run

INTERVAL = 0.95
"""The part of the replicates that an interval holds."""
SHARE = 0.95
"""A factor counts as settled if at least this share of the replicates agrees, unless asked otherwise."""
MIN_SAMPLES = 10
"""Samples that every bin must have before a factor can count as settled: fewer say too little of their spread."""
STRATA = 10  # so many consecutive samples of a bin fill equal parts of it if stratified, see record/sigmas.py
MIN_GROUPS = 20  # at least so many groups of STRATA samples make them worth it
_AT_ONCE = 50  # replicates, where a few may tell
MOST_TIMES = 1e4  # no word on what more than so many times the samples would settle

Decide = Callable[[Mapping[str, NDArray[np.float64]]], tuple[NDArray[np.float64], NDArray[np.int64]]]
"""What is done with heatmaps: stream -> (R, T, L) means in, (R, L) contributions and (R, K) factors or ranks out.

Two replicates agree where these numbers are equal, so what trains alike should have the same number."""
Factors = Callable[[NDArray[np.float64]], NDArray[np.int64]]
"""A recipe: contributions (N,) in [0, 1] -> factors (N,), each by itself."""


class Tally:
    """The distances of one reading, summed per bin in groups of consecutive samples.

    A group holds one sample at first. A bin that fills all its groups joins them in pairs, again and again: the memory
    stays the same however many samples come. Equal rows in the same order give equal groups, however they are cut
    into shards. Raises ProbeError if the run was not recorded with this reading.
    """

    def __init__(self, manifest: Manifest, *, tokens: str = "last", bins: int = 10) -> None:
        if tokens not in manifest.tokens:
            raise ProbeError(f"the run has no reading {tokens!r}; it has: {', '.join(manifest.tokens)}")
        streams = sorted(manifest.streams, key=lambda stream: stream.name != "image")
        self.manifest = manifest
        self.tokens = tokens
        self.bins = bins
        self.blocks = {stream.name: stream.blocks for stream in streams}
        self._groups = max(32, 2 ** int(math.log2(8192 / bins)))  # even, as pairs are joined
        self._stratified = manifest.settings.get("sigmas") == "stratified"
        self._size_T = np.ones(bins, dtype=np.int64)
        self._rows_T = np.zeros(bins, dtype=np.int64)
        self._sum_TGD = np.zeros((bins, self._groups, sum(len(blocks) for blocks in self.blocks.values())))
        self._count_TGS = np.zeros((bins, self._groups, len(self.blocks)), dtype=np.int64)

    @property
    def samples(self) -> int:
        """The samples added so far."""
        return int(self._rows_T.sum())

    def add(self, rows: Rows) -> None:
        """Add the rows of one shard. A row that is not finite in a stream is left out of that stream."""
        bin_N = bin_index(rows.sigma_N, self.bins)
        distances = [rows.distances[name, self.tokens] for name in self.blocks]
        finite_NS = np.stack([np.isfinite(distance_NL).all(axis=1) for distance_NL in distances], axis=1)
        value_ND = np.concatenate(
            [np.where(finite_N[:, None], part, 0.0) for part, finite_N in zip(distances, finite_NS.T, strict=True)],
            axis=1,
            dtype=np.float64,
        )
        for t in np.unique(bin_N):
            inside_N = bin_N == t
            self._add_to_bin(int(t), value_ND[inside_N], finite_NS[inside_N])

    def _add_to_bin(self, t: int, value_ND: NDArray[np.float64], finite_NS: NDArray[np.bool_]) -> None:
        position_N = self._rows_T[t] + np.arange(len(value_ND))
        while position_N[-1] // self._size_T[t] >= self._groups:
            self._join_pairs(t)
        group_N = position_N // self._size_T[t]
        starts = np.flatnonzero(np.diff(group_N, prepend=-1))
        self._sum_TGD[t, group_N[starts]] += np.add.reduceat(value_ND, starts, axis=0)
        self._count_TGS[t, group_N[starts]] += np.add.reduceat(finite_NS.astype(np.int64), starts, axis=0)
        self._rows_T[t] += len(value_ND)

    def _join_pairs(self, t: int) -> None:
        half = self._groups // 2
        for table_G in (self._sum_TGD[t], self._count_TGS[t]):
            table_G[:half] = table_G[0::2] + table_G[1::2]
            table_G[half:] = 0
        self._size_T[t] *= 2

    def means(self) -> dict[str, tuple[NDArray[np.float64], NDArray[np.int64]]]:
        """stream -> ((T, L) mean distances, 0 where there is no sample, (T,) samples)."""
        counts_TS = self._count_TGS.sum(axis=1)
        stops = np.cumsum([len(blocks) for blocks in self.blocks.values()])[:-1]
        sums = np.split(self._sum_TGD.sum(axis=1), stops, axis=1)
        return {
            name: (sum_TL / np.maximum(count_T, 1)[:, None], count_T)
            for name, sum_TL, count_T in zip(self.blocks, sums, counts_TS.T, strict=True)
        }

    def bootstrap(self, *, replicates: int | None = None, seed: int = 0) -> Bootstrap:
        """Replicates of the heatmaps by drawing groups with replacement, each bin as many as it has.

        replicates: by default 1000, fewer (at least 200) for more than 20 bins. The deviations from the mean are
        widened by sqrt(G / (G - 1)), since the spread of G draws is that much too small. With stratified sigmas, STRATA
        consecutive samples of a bin are drawn together where there are enough of them: their mean scatters less than
        that of independent ones. The same tally and seed give the same replicates. A stream without a finite sample is
        left out, as in the contributions. Raises ProbeError without samples.
        """
        counts_TS = self._count_TGS.sum(axis=1)
        measured = [name for s, name in enumerate(self.blocks) if counts_TS[:, s].any()]
        if not measured:
            raise ProbeError("there are no samples to judge by")
        R = replicates or min(1000, max(200, 20_000 // self.bins))
        random = np.random.default_rng(seed)
        names = list(self.blocks)
        column_stream_D = np.repeat(np.arange(len(names)), [len(blocks) for blocks in self.blocks.values()])
        D = len(column_stream_D)
        mean_TD, error_TD = np.zeros((self.bins, D)), np.full((self.bins, D), np.inf)
        deviation_RTD = np.zeros((R, self.bins, D))
        groups_T = np.zeros(self.bins, dtype=np.int64)
        for t in np.flatnonzero(self._rows_T):
            sum_GD, count_GS = self._groups_of(int(t))
            groups_T[t] = G = len(sum_GD)
            total_D = np.maximum(count_GS.sum(axis=0), 1)[column_stream_D]
            mean_TD[t] = sum_GD.sum(axis=0) / total_D
            if G < 2:
                continue
            widening = math.sqrt(G / (G - 1))
            residual_GD = sum_GD - mean_TD[t] * count_GS[:, column_stream_D]
            error_TD[t] = widening * np.sqrt((residual_GD**2).sum(axis=0)) / total_D
            drawn_RG = random.integers(G, size=(R, G)) + G * np.arange(R)[:, None]
            times_RG = np.bincount(drawn_RG.ravel(), minlength=R * G).reshape(R, G).astype(np.float64)
            drawn_RD = np.maximum(times_RG @ count_GS, 1)[:, column_stream_D]
            deviation_RTD[:, t] = widening * (times_RG @ residual_GD) / drawn_RD
        stops = np.cumsum([len(blocks) for blocks in self.blocks.values()])[:-1]
        means = dict(zip(names, np.split(mean_TD, stops, axis=1), strict=True))
        errors = dict(zip(names, np.split(error_TD, stops, axis=1), strict=True))
        deviations = dict(zip(names, np.split(deviation_RTD, stops, axis=2), strict=True))
        return Bootstrap(
            blocks={name: self.blocks[name] for name in measured},
            samples=self.samples,
            groups_T=groups_T,
            count_T={name: counts_TS[:, names.index(name)] for name in measured},
            mean_TL={name: means[name] for name in measured},
            error_TL={name: errors[name] for name in measured},
            deviation_RTL={name: deviations[name] for name in measured},
        )

    def _groups_of(self, t: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """The groups of a bin that are drawn together: (G, D) sums and (G, S) counts."""
        G = -(-int(self._rows_T[t]) // int(self._size_T[t]))
        joined = -(-STRATA // int(self._size_T[t])) if self._stratified else 1
        if joined * MIN_GROUPS > G:
            joined = 1
        starts = np.arange(0, G, joined)
        return (
            np.add.reduceat(self._sum_TGD[t, :G], starts, axis=0),
            np.add.reduceat(self._count_TGS[t, :G], starts, axis=0),
        )


@dataclass(frozen=True)
class Bootstrap:
    """Heatmaps that other samples of the same kind could have given.

    Per stream: count_T samples with finite distances, mean_TL (0 where there is none), error_TL standard errors of
    the means (infinite where one group cannot tell), deviation_RTL of each replicate from the mean. groups_T: how many
    groups of samples the errors of a bin come from.
    """

    blocks: Mapping[str, tuple[str, ...]]
    samples: int
    groups_T: NDArray[np.int64]
    count_T: Mapping[str, NDArray[np.int64]]
    mean_TL: Mapping[str, NDArray[np.float64]]
    error_TL: Mapping[str, NDArray[np.float64]]
    deviation_RTL: Mapping[str, NDArray[np.float64]]

    @property
    def names(self) -> tuple[str, ...]:
        """All blocks, in the model's order."""
        return all_blocks(list(self.blocks.values()))

    @property
    def enough(self) -> bool:
        """Whether every bin of every stream has the samples that a judgement needs, or none at all."""
        return all(bool(((count_T == 0) | (count_T >= MIN_SAMPLES)).all()) for count_T in self.count_T.values())

    def replicates(self, times: float = 1.0) -> dict[str, NDArray[np.float64]]:
        """stream -> (R, T, L) means, as `times` times the samples would scatter around the same truth."""
        shrink = 1 / math.sqrt(times)
        return {name: self.mean_TL[name] + shrink * self.deviation_RTL[name] for name in self.blocks}


@dataclass(frozen=True)
class Confidence:
    """How sure the contributions and the factors of a run are.

    blocks: all, in the model's order. low_L, high_L: the interval that holds the middle INTERVAL of the replicates'
    contributions. factor_K: what the run itself decides, as the `Decide` gives it. agreement_K: share of the replicates
    that decide the same. replicates: how many there are. enough: whether all bins have MIN_SAMPLES. samples: how many
    there are.
    """

    blocks: tuple[str, ...]
    low_L: NDArray[np.float64]
    high_L: NDArray[np.float64]
    factor_K: NDArray[np.int64]
    agreement_K: NDArray[np.float64]
    replicates: int
    enough: bool
    samples: int

    def unsettled(self, share: float = SHARE) -> tuple[int, ...]:
        """Places of the factors that fewer than `share` of the replicates agree with; all if not `enough`."""
        return tuple(int(i) for i in np.flatnonzero((self.agreement_K < share) | (not self.enough)))

    @property
    def share_error(self) -> float:
        """The largest standard error that a share of so many replicates has: 0.5 / sqrt(replicates)."""
        return 0.5 / math.sqrt(self.replicates)


def tally(run: Run, *, tokens: str = "last", bins: int = 10) -> Tally:
    """The sums of a whole run in one pass over its shards. Raises ProbeError without samples."""
    run.require_samples()
    found = Tally(run.manifest, tokens=tokens, bins=bins)
    for rows in run.rows():
        found.add(rows)
    return found


def article_decision(
    blocks: Mapping[str, tuple[str, ...]],
    count_T: Mapping[str, NDArray[np.int64]],
    factors: Factors,
    *,
    critical: tuple[int, ...] | None = None,
    alike: Callable[[NDArray[np.int64]], NDArray[np.int64]] | None = None,
    **weighting: float,
) -> Decide:
    """The article's recipe for many heatmaps at once.

    critical: the blocks that get factor 1, None to find them anew in every replicate. alike: (R, L) factors -> (R, K)
    numbers that are equal where what trains is the same; None to compare the factors by name, which is all that can be
    done without a module table. weighting: as `article_contributions` takes it.
    """
    names = all_blocks(list(blocks.values()))
    filled_T = {name: count_T[name] > 0 for name in blocks}
    number_L = {name: [names.index(block) for block in blocks[name]] for name in blocks}

    def decide(mean_RTL: Mapping[str, NDArray[np.float64]]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        value_RL = article_values(mean_RTL, blocks, **weighting)
        factor_RL = factors(value_RL.ravel()).reshape(value_RL.shape)
        critical_RL = np.zeros(value_RL.shape, dtype=bool)
        if critical is not None:
            critical_RL[:, list(critical)] = True
        else:
            for name, values_RTL in mean_RTL.items():
                if filled_T[name].any():
                    critical_RL[:, number_L[name]] |= far_out(values_RTL[:, filled_T[name]].mean(axis=1))
        factor_RL = np.where(critical_RL, 1, factor_RL)
        return value_RL, factor_RL if alike is None else alike(factor_RL)

    return decide


def interval(value_RL: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(L,) low and (L,) high: what holds the middle INTERVAL of the replicates.

    Weibull's positions: with R replicates the plain quantiles would hold about 1 / R too little on either side.
    """
    low_L, high_L = np.quantile(value_RL, [(1 - INTERVAL) / 2, (1 + INTERVAL) / 2], axis=0, method="weibull")
    return low_L, high_L


def confidence(bootstrap: Bootstrap, decide: Decide, *, times: float = 1.0) -> Confidence:
    """Intervals and agreement of the replicates with what `decide` makes of the run itself.

    times: judge as if there were so many times the samples, scattered as these are around the means found.
    """
    _, factor_1K = decide({name: mean_TL[None] for name, mean_TL in bootstrap.mean_TL.items()})
    value_RL, factor_RK = decide(bootstrap.replicates(times))
    low_L, high_L = interval(value_RL)
    return Confidence(
        blocks=all_blocks(list(bootstrap.blocks.values())),
        low_L=low_L,
        high_L=high_L,
        factor_K=factor_1K[0],
        agreement_K=(factor_RK == factor_1K).mean(axis=0),
        replicates=len(factor_RK),
        enough=bootstrap.enough,
        samples=bootstrap.samples,
    )


def more_samples(
    bootstrap: Bootstrap, decide: Decide, *, share: float = SHARE, sure: Confidence | None = None
) -> int | None:
    """About how many more samples would settle every factor: 0 if all are settled, None if beyond MOST_TIMES as many.

    It draws the replicates in towards the means found, as more samples would, and looks for the first multiple that
    settles all factors. The means found are taken for the truth, so it is a rough estimate that moves as samples
    come: in 40 made-up runs of 1,000 samples half of the answers lay between 0.8 and 4.2 times what was needed, one in
    twenty was below 0.3 times and one in twenty above 100 times.

    sure: what `confidence` says of the same bootstrap and decision, if that is known already.
    """
    fullest = max(int(count_T.max()) for count_T in bootstrap.count_T.values())
    scarcest = min(int(count_T[count_T > 0].min(initial=fullest)) for count_T in bootstrap.count_T.values())
    least = max(1.0, MIN_SAMPLES / max(scarcest, 1))
    now = sure or confidence(bootstrap, decide)
    R = now.replicates
    deviations_R = np.zeros(R, dtype=np.int64)

    def settled(times: float) -> bool:
        if times == 1:
            return bool((now.agreement_K >= share).all())
        mean_RTL = bootstrap.replicates(times)
        against_K = np.zeros(len(now.factor_K), dtype=np.int64)
        order_R = np.argsort(-deviations_R, kind="stable")  # those first that decided otherwise before
        for first in range(0, R, _AT_ONCE):
            some = order_R[first : first + _AT_ONCE]
            _, factor_RK = decide({name: values[some] for name, values in mean_RTL.items()})
            against_RK = factor_RK != now.factor_K
            against_K += against_RK.sum(axis=0)
            deviations_R[some] += against_RK.any(axis=1)
            if ((R - against_K) / R < share).any():
                return False  # whatever the others decide
        return True

    if settled(least):
        return math.ceil(bootstrap.samples * (least - 1))
    if not settled(MOST_TIMES):
        return None
    low, high = math.log(least), math.log(MOST_TIMES)
    while high - low > 0.02:
        middle = (low + high) / 2
        low, high = (low, middle) if settled(math.exp(middle)) else (middle, high)
    return math.ceil(bootstrap.samples * (math.exp(high) - 1))
