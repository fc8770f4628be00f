"""A run as a table, one row per sample: CSV and Parquet, for pandas and its like. See docs/pandas.md.

The columns are sigma, loss, width, height, text_tokens, caption_dropped and backend, then one per stream, reading and
block, such as `image.last.transformer_blocks.0`; with a reading over several blocks in a row the first of them.
What is not known is null.
"""

from __future__ import annotations

import codecs
import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from simpletuner_layerprobe.errors import ProbeError
from simpletuner_layerprobe.readings import parse_reading
from simpletuner_layerprobe.run.article import compressed
from simpletuner_layerprobe.run.manifest import Manifest, RunPath, write_new_file
from simpletuner_layerprobe.run.records import Rows, Run, stream_sizes

if TYPE_CHECKING:
    import pyarrow

CSV_VALUES = 100_000  # numbers that are held as text at once
GROUP_ROWS = 8192  # a Parquet row group; many small shards share one
FORMULA = ("=", "+", "-", "@", "\t", "\r", "'")
"""What a text must not begin with in a CSV file, because spreadsheets may run it; "'" so that it can be undone."""


def distance_columns(manifest: Manifest) -> dict[tuple[str, str], tuple[str, ...]]:
    """(stream, reading) -> the names of its columns, for everything that a run with this manifest has."""
    blocks = {stream.name: stream.blocks for stream in manifest.streams}
    return {
        (stream, reading): tuple(
            f"{stream}.{reading}.{first}" for first, _ in parse_reading(reading).columns(blocks[stream])
        )
        for stream, reading in stream_sizes(manifest)
    }


def export_csv(run: Run, file: RunPath) -> int:
    """Write the run as a CSV file (RFC 4180, UTF-8, lines end in \\n); returns the samples written.

    file: a name that is free; one that ends in .gz or .bz2 is compressed. Every number is the shortest text that gives
    the same number back in the precision that the run has it in. Unknown values are empty, distances that are not
    finite are nan, inf or -inf. A backend that begins with one of FORMULA has a "'" put before it.
    Raises ProbeError if the run has no samples or `file` exists; the file is complete or absent.
    """
    path = Path(file)
    names = distance_columns(run.manifest)
    run.require_samples()
    written = 0

    def write(raw: BinaryIO) -> None:
        nonlocal written
        with compressed(raw, path.suffix) as out:
            writer = csv.writer(codecs.getwriter("utf-8")(out, "backslashreplace"), lineterminator="\n")
            writer.writerow([*_FACTS, *(name for columns in names.values() for name in columns)])
            step = max(1, CSV_VALUES // sum(map(len, names.values())))
            for rows in _parts(run, step):
                writer.writerows(_csv_rows(rows, list(names)))
                written += len(rows)

    _write_new(path, write)
    return written


def export_parquet(run: Run, file: RunPath) -> int:
    """Write the run as a Parquet file; returns the samples written.

    Distances are float32, a reading's float64 where the run has any of it in float64. Unknown values are null,
    distances that are not finite stay what they are. Raises ProbeError as `export_csv` does, and if pyarrow is not
    installed.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ProbeError(
            "Parquet files need pyarrow, which is not installed; pip install pyarrow, or export to a .csv file"
        ) from None
    names = distance_columns(run.manifest)
    run.require_samples()
    dtypes = run.distance_dtypes()
    facts = {
        "sigma": pyarrow.float64(),
        "loss": pyarrow.float32(),
        "width": pyarrow.int32(),
        "height": pyarrow.int32(),
        "text_tokens": pyarrow.int32(),
        "caption_dropped": pyarrow.bool_(),
        "backend": pyarrow.string(),
    }
    schema = pyarrow.schema(
        [*facts.items()]
        + [(name, pyarrow.from_numpy_dtype(dtypes[key])) for key, columns in names.items() for name in columns]
    )
    written = 0

    def write(raw: BinaryIO) -> None:
        nonlocal written
        # Neighbouring samples share nothing, so a dictionary of distances would only be tried and thrown away.
        with parquet.ParquetWriter(raw, schema, compression="zstd", use_dictionary=list(facts)) as writer:
            waiting: list[Any] = []
            for rows in _parts(run, GROUP_ROWS):
                if waiting and sum(map(len, waiting)) + len(rows) > GROUP_ROWS:
                    writer.write_table(pyarrow.concat_tables(waiting))
                    waiting = []
                waiting.append(_arrow_table(rows, schema, list(names)))
                written += len(rows)
            writer.write_table(pyarrow.concat_tables(waiting))

    _write_new(Path(file), write)
    return written


_FACTS = ("sigma", "loss", "width", "height", "text_tokens", "caption_dropped", "backend")


def _parts(run: Run, count: int) -> Iterator[Rows]:
    """The run's rows, at most `count` at a time."""
    for rows in run.rows():
        for start in range(0, len(rows), count):
            yield rows.where(slice(start, start + count))


def _unknown(rows: Rows) -> dict[str, NDArray[np.bool_]]:
    """Which samples' facts are not known, by column."""
    return {
        "loss": np.isnan(rows.loss_N),
        "width": rows.width_N == 0,
        "height": rows.height_N == 0,
        "text_tokens": rows.text_tokens_N < 0,
        "caption_dropped": rows.caption_dropped_N < 0,
        "backend": rows.backend_N < 0,
    }


def _csv_rows(rows: Rows, keys: list[tuple[str, str]]) -> Iterator[list[str]]:
    unknown = _unknown(rows)
    backends = np.array([*(f"'{name}" if name.startswith(FORMULA) else name for name in rows.backends), ""], object)
    texts: dict[str, NDArray[Any]] = {
        name: values_N.astype(str).astype(object) for name, values_N in rows.columns().items()
    }
    texts["caption_dropped"] = np.where(rows.caption_dropped_N == 1, "true", "false").astype(object)
    texts["backend"] = backends[rows.backend_N]
    for name, unknown_N in unknown.items():
        texts[name][unknown_N] = ""
    facts = zip(*(texts[name] for name in _FACTS), strict=True)
    distances = zip(*(rows.distances[key].astype(str).tolist() for key in keys), strict=True)
    for fact, several in zip(facts, distances, strict=True):
        yield [*fact, *(text for one in several for text in one)]


def _arrow_table(rows: Rows, schema: pyarrow.Schema, keys: list[tuple[str, str]]) -> Any:
    import pyarrow

    unknown = _unknown(rows)
    backends = np.array([*(_encodable(name) for name in rows.backends), ""], object)
    facts: dict[str, NDArray[Any]] = dict(rows.columns())
    facts["caption_dropped"] = rows.caption_dropped_N == 1
    facts["backend"] = backends[rows.backend_N]
    arrays = [pyarrow.array(facts[name], type=schema.field(name).type, mask=unknown.get(name)) for name in _FACTS]
    for key in keys:
        # A row of the transpose is one block's distances of all samples, side by side in memory.
        for distance_N in np.ascontiguousarray(rows.distances[key].T):
            kind = schema.field(len(arrays)).type
            arrays.append(pyarrow.array(distance_N.astype(kind.to_pandas_dtype()), type=kind, from_pandas=False))
    return pyarrow.Table.from_arrays(arrays, schema=schema)


def _encodable(text: str) -> str:
    """Half a surrogate pair, which UTF-8 cannot hold, becomes what Python would print for it."""
    return text.encode(errors="backslashreplace").decode()


def _write_new(path: Path, write: Callable[[BinaryIO], object]) -> None:
    try:
        write_new_file(path, write)
    except FileExistsError:
        raise ProbeError(f"{path} exists already; export to another name") from None
