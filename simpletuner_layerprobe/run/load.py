"""A run as arrays: the way in which everything that analyses a run reads it.

Shape letters: N samples, C columns (a stream's L blocks, or fewer for a reading over several blocks in a row).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from simpletuner_layerprobe.counts import samples_text
from simpletuner_layerprobe.errors import RunError
from simpletuner_layerprobe.readings import WHOLE
from simpletuner_layerprobe.run.article_lines import article_manifest, read_records
from simpletuner_layerprobe.run.folder import RunPath
from simpletuner_layerprobe.run.manifest import Manifest, read_manifest, run_folder
from simpletuner_layerprobe.run.records import read_columns
from simpletuner_layerprobe.run.rows import FACTS, UNKNOWN, Rows, column_name
from simpletuner_layerprobe.run.stream_file import StreamFile

if TYPE_CHECKING:
    import pandas

MAX_LOADED_BYTES = 8 * 1024**3  # of samples that `load_article` holds
_PANDAS = dict.fromkeys(FACTS, "Int32") | {"image": "UInt64", "dropped": "boolean", "backend": "string"}


class RunData:
    """The samples of a run as they were when it was loaded, also if a training goes on writing it.

    path: the folder or the file. manifest: what it was recorded from. files: its stream files, () for an article file.
    sigma: (N,) float64 in [0, 1]. loss: (N,) float32, NaN if unknown. facts: name of FACTS -> (N,). The arrays are
    read-only. Made by `load_run`.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        columns: Mapping[str, NDArray[Any]],
        files: tuple[StreamFile, ...] = (),
    ) -> None:
        self.path = path
        self.manifest = manifest
        self.files = files
        self._columns = dict(columns)
        for column in self._columns.values():
            column.setflags(write=False)
        self.sigma: NDArray[np.float64] = self._columns["sigma"]
        self.loss: NDArray[np.float32] = self._columns["loss"]
        self.facts: dict[str, NDArray[Any]] = {name: self._columns[name] for name in FACTS}

    @property
    def samples(self) -> int:
        """The number of samples N."""
        return len(self.sigma)

    @property
    def images(self) -> int | None:
        """How many different images there are; None if that is not known of every sample, or there is none."""
        image_N = self.facts["image"]
        return len(np.unique(image_N)) if len(image_N) and image_N.all() else None

    @property
    def counted(self) -> str:
        """ "2,000 samples of 60 images"."""
        return samples_text(self.samples, self.images)

    @property
    def streams(self) -> dict[str, tuple[str, ...]]:
        """Stream -> the paths of its L blocks, the image stream first."""
        ordered = sorted(self.manifest.streams, key=lambda stream: stream.name != "image")
        return {stream.name: stream.blocks for stream in ordered}

    @property
    def readings(self) -> tuple[str, ...]:
        """The names of the readings that the run has."""
        return self.manifest.readings

    def distances(self, stream: str, reading: str = "last") -> NDArray[Any]:
        """(N, C) of one stream in one reading, float32, or float64 where an import needed it to keep its numbers.

        Read at the first call, for all streams at once, and kept. NaN and infinity are what the model gave. An ablation
        of whole blocks is under the stream name "block", and has NaN where a sample was taken without it.
        Raises RunError for a stream or a reading that the run does not have, and for damaged files.
        """
        key = (stream if stream == WHOLE else self.manifest.stream(stream).name, reading)
        if key not in self.manifest.columns():
            raise RunError(
                f"{self.path} has no reading {reading!r:.80} of {stream}; it has: {', '.join(self.readings)}"
            )
        name = column_name(*key)
        if name not in self._columns:
            wanted = [column_name(*other) for other in self.manifest.columns() if other[1] == reading]
            _, columns = read_columns(self.path, self.manifest, wanted, self.files)
            for column in columns.values():
                column.setflags(write=False)
            self._columns |= columns
        return self._columns[name]

    def to_pandas(self) -> pandas.DataFrame:
        """One row per sample: sigma, loss, the facts, and a column per stream, reading and block.

        Those are called "image.last.transformer_blocks.0", a reading over several blocks after the first of them.
        A fact that is not known is missing (NA); distances that are not finite stay what they are.
        """
        import pandas as pd

        columns: dict[str, Any] = {"sigma": self.sigma, "loss": self.loss}
        for name, fact_N in self.facts.items():
            columns[name] = pd.array(fact_N == 1 if name == "dropped" else fact_N, dtype=_PANDAS[name])
            columns[name][fact_N == UNKNOWN[name]] = pd.NA
        for (stream, reading), blocks in self.manifest.columns().items():
            for (first, _), distance_N in zip(blocks, self.distances(stream, reading).T, strict=True):
                columns[f"{column_name(stream, reading)}.{first}"] = distance_N
        return pd.DataFrame(columns)


def load_run(path: RunPath, tokens: str = "last") -> RunData:
    """The run in a folder, or the records of an article file (.jsonl, plain, gzip or bz2; nothing is written).

    path: also the output_dir that the run's folder lies in. tokens: the reading that an article file's distances are
    of, "last" or "mean".
    Raises RunError if there is no such run, it is damaged, or a file has over 8 GiB of them.
    """
    if os.path.isfile(path):
        return load_article(path, tokens)
    folder = run_folder(path)
    manifest = read_manifest(folder)
    files, columns = read_columns(folder, manifest, ("sigma", "loss", *FACTS))
    return RunData(folder, manifest, columns, files)


def load_article(source: RunPath, tokens: str = "last") -> RunData:
    """The records of a file, in memory alone. Raises RunError as `import_article` does, and for over 8 GiB of them."""
    path = Path(source)
    parts: list[Rows] = []
    held_bytes = 0
    for rows in read_records(path, tokens):
        parts.append(rows)
        held_bytes += sum(column.nbytes for column in rows.columns().values())
        if held_bytes > MAX_LOADED_BYTES:
            raise RunError(f"{source} has over {MAX_LOADED_BYTES} bytes of samples; import it into a run folder")
    rows = Rows.concat(parts)
    return RunData(path, article_manifest(rows, path, tokens), rows.columns())
