"""Stability: whether the factors of a run that is being recorded are settled, asked now and then."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from simpletuner_layerprobe.analyse.confidence import MIN_SAMPLES, Tally, article_decision, confidence
from simpletuner_layerprobe.lokr.factors import article_factors
from simpletuner_layerprobe.run.shards import open_run

BINS = 10
GROWTH = 1.1
"""The samples must have grown by so much since the last judgement before the next one."""
COST = 0.01
"""Judging may take at most this part of the time, from the second judgement on."""
REPLICATES = 400


class Stability:
    """Watches a run folder for the preset `article` with its defaults, over all ranks and earlier starts.

    Each shard is read once and kept as sums, so that a judgement costs what was recorded since the last one.
    share: the share of bootstrap replicates that must agree with every factor.
    """

    def __init__(self, directory: str | Path, share: float) -> None:
        self.directory = Path(directory)
        self.share = share
        self._tally: Tally | None = None
        self._read: set[Path] = set()
        self._next_samples = float(MIN_SAMPLES * BINS)
        self._next_time = 0.0

    @property
    def samples(self) -> int:
        """The samples that the last judgement went by."""
        return self._tally.samples if self._tally is not None else 0

    def settled(self) -> bool:
        """Whether all factors are settled now; False at once if it is too early to ask again.

        No factor is settled while a bin has fewer than MIN_SAMPLES samples. Raises ProbeError for a shard that cannot
        be read.
        """
        started = time.monotonic()
        if started < self._next_time:
            return False
        run = open_run(self.directory)
        new = tuple(path for path in run.shards if path not in self._read)
        if self.samples + replace(run, shards=new).sample_count() < self._next_samples:
            # Counting reads the new shards' headers, which is cheap and still not free.
            self._next_time = started + (time.monotonic() - started) / COST
            return False
        if self._tally is None:
            self._tally = Tally(run.manifest, bins=BINS)
        for rows in replace(run, shards=new).rows():
            self._tally.add(rows)
        self._read.update(new)
        bootstrap = self._tally.bootstrap(replicates=REPLICATES)
        decide = article_decision(bootstrap.blocks, bootstrap.count_T, article_factors)
        everywhere = all(count_T.min() >= MIN_SAMPLES for count_T in bootstrap.count_T.values())
        found = everywhere and not confidence(bootstrap, decide).unsettled(self.share)
        self._next_samples = GROWTH * self._tally.samples
        self._next_time = time.monotonic() + (time.monotonic() - started) / COST
        return found
