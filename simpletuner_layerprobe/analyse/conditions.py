"""What the findings and the report need of a run: means, spreads and conditioning sums, in one pass over its shards.

The memory grows with bins x blocks and with the number of data backends, never with the samples.

Shape letters: N samples, T bins, L blocks, S strata (ten equal parts of sigma), K columns of sums.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from simpletuner_layerprobe.analyse.heatmap import Heatmap, bin_index
from simpletuner_layerprobe.errors import ProbeError

if TYPE_CHECKING:
    from simpletuner_layerprobe.run.manifest import Manifest
    from simpletuner_layerprobe.run.records import Rows, Run

STRATA = 10
GATHERED = 4096
MAX_BACKENDS = 16
"""Data backends that get sums of their own; the samples of further ones count among "the others"."""
CONTINUOUS = ("caption length", "size", "aspect")
DROPPED = "captions dropped"
BACKEND = "data backend"


@dataclass(frozen=True)
class Condition:
    """Sums over the samples for which one conditioning fact x is known, per stratum of sigma.

    name: the fact. value: the backend, "" for the others. binary: x is 1 for the group and 0 for the rest; else it is a
    number. count_S, x_S, xx_S: samples, sum of x, sum of x squared. d_SL, dd_SL: sums of the distances and of their
    squares. xd_SL, xdd_SL: the same times x.
    """

    name: str
    value: str
    binary: bool
    count_S: NDArray[np.float64]
    x_S: NDArray[np.float64]
    xx_S: NDArray[np.float64]
    d_SL: NDArray[np.float64]
    dd_SL: NDArray[np.float64]
    xd_SL: NDArray[np.float64]
    xdd_SL: NDArray[np.float64]


@dataclass(frozen=True)
class StreamObservation:
    """One stream: its heatmap, variance_TL (T, L) of the distances of one sample (NaN below two), its conditions."""

    heatmap: Heatmap
    variance_TL: NDArray[np.float64]
    conditions: tuple[Condition, ...]

    def error_TL(self) -> NDArray[np.float64]:
        """Standard error of each cell's mean. (T, L) float64, infinite where there are fewer than two samples."""
        count_T1 = np.maximum(self.heatmap.count_T, 1)[:, None]
        return np.where(np.isnan(self.variance_TL), np.inf, np.sqrt(self.variance_TL / count_T1))


@dataclass(frozen=True)
class Observation:
    """A run in sums. samples: all of them. backends: data backend -> samples, "" where it is not known."""

    samples: int
    count_T: NDArray[np.int64]
    backends: Mapping[str, int]
    streams: Mapping[str, StreamObservation]

    def heatmaps(self) -> dict[str, Heatmap]:
        return {name: stream.heatmap for name, stream in self.streams.items()}


def observe(
    run: Run, *, tokens: str = "last", bins: int = 10, also: Sequence[Callable[[Rows], None]] = ()
) -> Observation:
    """Sum up a run in one pass, the image stream first. `also` is called with every shard's rows, too.

    A sample with a non-finite distance anywhere in a stream is left out of that stream and counted.
    Raises ProbeError if the run has no samples or was not recorded with this reading.
    """
    if tokens not in run.manifest.tokens:
        raise ProbeError(
            f"{run.path} has no reading {tokens!r}; it has: {', '.join(run.manifest.tokens)} (see --tokens)"
        )
    run.require_samples()
    sums = Sums(run.manifest, tokens, bins)
    for rows in run.rows():
        sums.add(rows)
        for other in also:
            other(rows)
    return sums.observation()


class Sums:
    """The sums of a run, shard by shard: `add` each, then `observation`."""

    def __init__(self, manifest: Manifest, tokens: str, bins: int) -> None:
        streams = sorted(manifest.streams, key=lambda stream: stream.name != "image")
        self._tokens, self._bins = tokens, bins
        self._blocks = {stream.name: stream.blocks for stream in streams}
        self._count_T = np.zeros(bins, dtype=np.int64)
        self._backends: dict[str, int] = {}
        self._columns = [part for name in CONTINUOUS for part in (name, f"{name} x")]
        self._columns += [DROPPED, f"{DROPPED} x", BACKEND]
        self._own_backends: list[str] = []
        self._waiting: list[tuple[NDArray[np.float64], NDArray[np.float64], dict[str, NDArray[Any]]]] = []
        self._gathered = 0
        self._streams = {name: _StreamSums(bins, len(self._columns), len(b)) for name, b in self._blocks.items()}

    def add(self, rows: Rows) -> None:
        """Add the rows of one shard. Shards may be small: they are summed up GATHERED rows or more at a time."""
        self._count_T += np.bincount(bin_index(rows.sigma_N, self._bins), minlength=self._bins)
        for index, count in zip(*np.unique(rows.backend_N, return_counts=True), strict=True):
            name = rows.backends[index] if index >= 0 else ""
            self._backends[name] = self._backends.get(name, 0) + int(count)
            if name and name not in self._own_backends and len(self._own_backends) < MAX_BACKENDS:
                self._flush()  # what waits has no column for it
                self._own_backends.append(name)
                for sums in self._streams.values():
                    sums.grow()
        distances = {name: rows.distances[name, self._tokens] for name in self._streams}
        self._waiting.append((rows.sigma_N, self._weights(rows), distances))
        self._gathered += len(rows)
        if self._gathered >= GATHERED:
            self._flush()

    def _flush(self) -> None:
        if not self._waiting:
            return
        sigmas, weights, distances = zip(*self._waiting, strict=True)
        self._waiting, self._gathered = [], 0
        sigma_N = np.concatenate(sigmas)
        order_N = np.argsort(sigma_N, kind="stable")
        bin_N, stratum_N = (bin_index(sigma_N, parts)[order_N] for parts in (self._bins, STRATA))
        weight_NK = np.concatenate(weights)[order_N]
        for name, sums in self._streams.items():
            sums.add(bin_N, stratum_N, weight_NK, np.concatenate([part[name] for part in distances])[order_N])

    def _weights(self, rows: Rows) -> NDArray[np.float64]:
        """(N, K): for each fact whether it is known, then its value where it is; then one column per backend."""
        sized_N = (rows.width_N > 0) & (rows.height_N > 0)
        log_width_N, log_height_N = (np.log2(np.maximum(side_N, 1)) for side_N in (rows.width_N, rows.height_N))
        facts = {
            # A dropped caption is no short one: it has an effect of its own.
            "caption length": ((rows.text_tokens_N >= 0) & (rows.caption_dropped_N != 1), rows.text_tokens_N),
            "size": (sized_N, log_width_N + log_height_N),
            "aspect": (sized_N, np.abs(log_width_N - log_height_N)),
            DROPPED: (rows.caption_dropped_N >= 0, rows.caption_dropped_N),
        }
        columns = [part for known_N, x_N in facts.values() for part in (known_N, np.where(known_N, x_N, 0))]
        columns.append(rows.backend_N >= 0)
        number = {name: i for i, name in enumerate(rows.backends)}
        columns += [rows.backend_N == number.get(name, -2) for name in self._own_backends]
        return np.stack(columns, axis=1).astype(np.float64)

    def observation(self) -> Observation:
        self._flush()
        streams = {}
        for name, sums in self._streams.items():
            count_T1 = np.maximum(sums.count_T, 1)[:, None]
            mean_TL = sums.d_TL / count_T1
            spread_TL = np.maximum(sums.dd_TL - mean_TL * sums.d_TL, 0) / np.maximum(count_T1 - 1, 1)
            spread_TL[sums.count_T < 2] = np.nan
            streams[name] = StreamObservation(
                Heatmap(name, self._tokens, self._blocks[name], mean_TL, sums.count_T, sums.nonfinite, self._bins),
                spread_TL,
                tuple(self._conditions(sums)),
            )
        return Observation(int(self._count_T.sum()), self._count_T, dict(sorted(self._backends.items())), streams)

    def _conditions(self, sums: _StreamSums) -> list[Condition]:
        found = []
        for position, name in enumerate((*CONTINUOUS, DROPPED)):
            found.append(sums.condition(name, "", name == DROPPED, 2 * position, 2 * position + 1))
        first = len(self._columns)
        for position, backend in enumerate(self._own_backends):
            found.append(sums.condition(BACKEND, backend, True, first - 1, first + position))
        return found


class _StreamSums:
    def __init__(self, bins: int, columns: int, blocks: int) -> None:
        self.count_T = np.zeros(bins, dtype=np.int64)
        self.d_TL, self.dd_TL = np.zeros((bins, blocks)), np.zeros((bins, blocks))
        self.nonfinite = 0
        self._weight_SK, self._squared_SK = np.zeros((STRATA, columns)), np.zeros((STRATA, columns))
        self._d_SKL, self._dd_SKL = (np.zeros((STRATA, columns, blocks)) for _ in range(2))

    def grow(self) -> None:
        """Room for one more column: what came before counts as 0 in it."""
        self._weight_SK, self._squared_SK, self._d_SKL, self._dd_SKL = (
            np.concatenate([table, np.zeros_like(table[:, :1])], axis=1)
            for table in (self._weight_SK, self._squared_SK, self._d_SKL, self._dd_SKL)
        )

    def add(
        self,
        bin_N: NDArray[np.int64],
        stratum_N: NDArray[np.int64],
        weight_NK: NDArray[np.float64],
        distance_NL: NDArray[np.floating],
    ) -> None:
        """Add rows in the order of their sigmas."""
        finite_N = np.isfinite(distance_NL).all(axis=1)
        if not finite_N.all():
            bin_N, stratum_N, weight_NK = bin_N[finite_N], stratum_N[finite_N], weight_NK[finite_N]
            self.nonfinite += int(np.count_nonzero(~finite_N))
        if not len(bin_N):
            return
        d_NL = distance_NL[finite_N].astype(np.float64)
        dd_NL = d_NL * d_NL
        self.count_T += np.bincount(bin_N, minlength=len(self.count_T))
        starts = np.flatnonzero(np.diff(bin_N, prepend=-1))
        self.d_TL[bin_N[starts]] += np.add.reduceat(d_NL, starts, axis=0)
        self.dd_TL[bin_N[starts]] += np.add.reduceat(dd_NL, starts, axis=0)
        edges = np.searchsorted(stratum_N, np.arange(STRATA + 1))
        for s in range(STRATA):
            inside = slice(edges[s], edges[s + 1])
            weight_KN = weight_NK[inside].T
            self._weight_SK[s] += weight_KN.sum(axis=1)
            self._squared_SK[s] += (weight_KN**2).sum(axis=1)
            self._d_SKL[s] += weight_KN @ d_NL[inside]
            self._dd_SKL[s] += weight_KN @ dd_NL[inside]

    def condition(self, name: str, value: str, binary: bool, known: int, x: int) -> Condition:
        return Condition(
            name,
            value,
            binary,
            count_S=self._weight_SK[:, known],
            x_S=self._weight_SK[:, x],
            xx_S=self._squared_SK[:, x],
            d_SL=self._d_SKL[:, known],
            dd_SL=self._dd_SKL[:, known],
            xd_SL=self._d_SKL[:, x],
            xdd_SL=self._dd_SKL[:, x],
        )
