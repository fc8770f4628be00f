"""Bootstrap: heatmaps that other images of the same kind could have given.

Images are drawn with replacement, each with all of its samples, so that what an image brings along to every sample of
it counts as chance (the pairs cluster bootstrap: Cameron, Gelbach and Miller 2008, Review of Economics and Statistics
90). Where images are not known, samples are drawn, and what is said holds for these images.

Shape letters: T bins, L blocks, D columns of all streams side by side, G units (images or samples), R replicates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simpletuner_layerprobe.analyse.chances import Z95, student95
from simpletuner_layerprobe.analyse.samples import Samples
from simpletuner_layerprobe.analyse.units import unit_means
from simpletuner_layerprobe.errors import ProbeError
from simpletuner_layerprobe.readings import all_blocks

MIN_SAMPLES = 10
"""Samples that every bin must have before anything can count as settled: fewer say too little of their spread."""
MIN_UNITS = 5
"""Images (or samples) that there must be before anything can count as settled."""


@dataclass(frozen=True)
class Bootstrap:
    """Replicates of a run's heatmaps. A stream without a sample of finite distances is left out.

    blocks: stream -> its L blocks. mean_TL: stream -> (T, L) float64, 0 where there is no sample. counts_T: stream ->
    (T,) samples. deviation_RTL: stream -> (R, T, L), each replicate minus the mean. unit: what was drawn, "image" or
    "sample", and how many (units). images: how many there are, None if not all are known. samples: how many there are.
    freedom: stream -> degrees of freedom that so many units of such sizes leave.
    """

    blocks: Mapping[str, tuple[str, ...]]
    mean_TL: Mapping[str, NDArray[np.float64]]
    counts_T: Mapping[str, NDArray[np.int64]]
    deviation_RTL: Mapping[str, NDArray[np.float64]]
    reading: str
    unit: str
    units: int
    images: int | None
    samples: int
    freedom: Mapping[str, float]

    @classmethod
    def of(cls, samples: Samples, bins: int = 10, replicates: int = 400, seed: int = 0) -> Bootstrap:
        """Draw the replicates; the same samples and seed give the same.

        Deviations are widened from the normal to Student's 95% interval, as so few units as there are in a bin say
        little of their spread. Raises ProbeError without samples, without a finite one, and for a reading that may
        lack a number.
        """
        if not samples.kind.complete:
            raise ProbeError(f"the reading {samples.reading} may lack numbers, so nothing is decided by it")
        means = unit_means(samples, bins)
        measured = [name for name, columns in means.columns.items() if means.count_TD[:, columns].any()]
        if not measured:
            raise ProbeError(
                f"no stream ({', '.join(samples.blocks)}) has a sample with finite distances; "
                "probe the model again in a precision that does not overflow"
            )
        G = len(means.influence_GTD)
        widening_TD = np.where(means.freedom_TD > 0, student95(np.maximum(means.freedom_TD, 1.0)) / Z95, 0.0)
        drawn_RG = np.random.default_rng(seed).integers(G, size=(replicates, G)) + G * np.arange(replicates)[:, None]
        times_RG = np.bincount(drawn_RG.ravel(), minlength=replicates * G).reshape(replicates, G)
        deviation_RTD = ((times_RG - 1.0) @ means.influence_GTD.reshape(G, -1)).reshape(replicates, *widening_TD.shape)
        deviation_RTD = (deviation_RTD - deviation_RTD.mean(axis=0)) * widening_TD  # the draw's own shift is no bias
        return cls(
            blocks={name: samples.blocks[name] for name in measured},
            mean_TL={name: np.nan_to_num(means.mean_TD[:, means.columns[name]]) for name in measured},
            counts_T={name: means.count_TD[:, means.columns[name]].max(axis=1) for name in measured},
            deviation_RTL={name: deviation_RTD[:, :, means.columns[name]] for name in measured},
            reading=samples.reading,
            unit=means.unit,
            units=means.units,
            images=samples.images,
            samples=samples.samples,
            freedom={name: float(means.freedom_D[means.columns[name]].min()) for name in measured},
        )

    @property
    def names(self) -> tuple[str, ...]:
        """All blocks, in the model's order."""
        return all_blocks(list(self.blocks.values()))

    @property
    def enough(self) -> bool:
        """Whether there are MIN_UNITS units, and every bin of every stream has MIN_SAMPLES samples or none at all."""
        counts = np.concatenate(list(self.counts_T.values()))
        return self.units >= MIN_UNITS and bool(((counts == 0) | (counts >= MIN_SAMPLES)).all())

    def replicates(self, times: float = 1.0) -> dict[str, NDArray[np.float64]]:
        """stream -> (R, T, L) means, as `times` times the units would scatter around the same truth."""
        shrink = 1 / math.sqrt(times)
        return {name: self.mean_TL[name] + shrink * self.deviation_RTL[name] for name in self.blocks}
