"""Stability: whether the factors of a run that is being recorded are settled, asked now and then."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from simpletuner_layerprobe.analyse.bootstrap import MIN_SAMPLES, Bootstrap, Decide, confidence
from simpletuner_layerprobe.analyse.running import RunningTally
from simpletuner_layerprobe.run.manifest import Manifest

BINS = 10
GROWTH = 1.1
"""The samples must have grown by so much since the last judgement before the next one."""
COST = 0.01
"""Judging may take at most this part of the time, from the second judgement on."""
REPLICATES = 400

DecideOf = Callable[[Manifest], Callable[[Bootstrap], Decide]]


class Stability:
    """Watches a run folder for the factors of one preset, over all ranks and earlier starts.

    share: the share of bootstrap replicates that must agree with every factor. decide_of: what gives these for a run,
    see `lokr.decision.of_preset`. tally: the run's sums, if others look at them too. A judgement costs what was
    recorded since they were last read.
    """

    def __init__(
        self, directory: str | Path, share: float, decide_of: DecideOf, tally: RunningTally | None = None
    ) -> None:
        self.share = share
        self.samples = 0
        """The samples that the last judgement went by."""
        self.settled_share = 0.0
        """The part of the factors that were settled at the last judgement, 0 while a bin has too few samples."""
        self._decide_of = decide_of
        self._tally = tally or RunningTally(directory, bins=BINS)
        self._next_samples = float(MIN_SAMPLES * BINS)
        self._next_time = 0.0

    def settled(self) -> bool:
        """Whether all factors are settled now; False at once if it is too early to ask again.

        No factor is settled while a bin has fewer than MIN_SAMPLES samples. Raises ProbeError for a shard that cannot
        be read.
        """
        started = time.monotonic()
        if started < self._next_time:
            return False
        if self._tally.samples + self._tally.waiting() < self._next_samples:
            # Counting reads the new shards' headers, which is cheap and still not free.
            self._next_time = started + (time.monotonic() - started) / COST
            return False
        tally = self._tally.read()
        bootstrap = tally.bootstrap(replicates=REPLICATES)
        decide = self._decide_of(tally.manifest)(bootstrap)
        everywhere = all(count_T.min() >= MIN_SAMPLES for count_T in bootstrap.count_T.values())
        found = confidence(bootstrap, decide)
        self.settled_share = 1 - len(found.unsettled(self.share)) / len(found.agreement_K) if everywhere else 0.0
        self.samples = tally.samples
        self._next_samples = GROWTH * tally.samples
        self._next_time = time.monotonic() + (time.monotonic() - started) / COST
        return self.settled_share == 1
