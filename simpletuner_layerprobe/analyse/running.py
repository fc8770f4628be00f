"""The tally of a run that is being recorded, kept up to date for everybody who looks at it meanwhile."""

from __future__ import annotations

from pathlib import Path

from simpletuner_layerprobe.analyse.bootstrap import Tally
from simpletuner_layerprobe.run.records import Pieces, open_run


class RunningTally:
    """The distances of a run folder, of all ranks and earlier starts. Each shard is read once and kept as sums."""

    def __init__(self, directory: str | Path, *, bins: int = 10) -> None:
        self.directory = Path(directory)
        self.bins = bins
        self._tally: Tally | None = None
        self._read: Pieces = {}

    @property
    def samples(self) -> int:
        """The samples read so far."""
        return self._tally.samples if self._tally is not None else 0

    def waiting(self) -> int:
        """How many samples there are besides those read, from the headers of the new shards. Raises ProbeError for a
        shard that cannot be read."""
        return open_run(self.directory).sample_count(self._read)

    def read(self) -> Tally:
        """The tally after the new shards were read too. Raises ProbeError as `waiting` does."""
        run = open_run(self.directory)
        if self._tally is None:
            self._tally = Tally(run.manifest, bins=self.bins)
        for rows in run.rows(self._read):
            self._tally.add(rows)
        return self._tally
