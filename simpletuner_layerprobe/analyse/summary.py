"""What a run holds: counts of its samples, for `layerprobe status`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from simpletuner_layerprobe.analyse.heatmap import bin_index
from simpletuner_layerprobe.readings import parse_reading

if TYPE_CHECKING:
    from simpletuner_layerprobe.run.records import Run


@dataclass(frozen=True)
class Summary:
    """Counts over a whole run.

    samples: rank -> samples. count_T: (T,) int64, samples per sigma bin. nonfinite: (stream, reading) ->
    samples with a distance that is NaN or infinite, only where there are any; not of readings that may lack a number
    (`Reading.complete`). backends: data backend id -> samples, "" for those whose backend is not known.
    """

    samples: dict[int, int]
    count_T: NDArray[np.int64]
    nonfinite: dict[tuple[str, str], int]
    backends: dict[str, int]


def summary(run: Run, *, bins: int = 10) -> Summary:
    """Count a run's samples in one pass over its shards. Raises ProbeError if it has none."""
    run.require_samples()
    count_T = np.zeros(bins, dtype=np.int64)
    nonfinite: Counter[tuple[str, str]] = Counter()
    backends: Counter[str] = Counter()
    for rows in run.rows():
        count_T += np.bincount(bin_index(rows.sigma_N, bins), minlength=bins)
        for key, distance_NL in rows.distances.items():
            if not parse_reading(key[1]).complete:
                continue
            nonfinite[key] += int(np.count_nonzero(~np.isfinite(distance_NL).all(axis=1)))
        for index, count in zip(*np.unique(rows.backend_N, return_counts=True), strict=True):
            backends[rows.backends[index] if index >= 0 else ""] += int(count)
    return Summary(
        samples=dict(sorted(run.samples_per_rank().items())),
        count_T=count_T,
        nonfinite={key: count for key, count in nonfinite.items() if count},
        backends=dict(sorted(backends.items())),
    )
