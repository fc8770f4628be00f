"""A run as a table in a file, one row per sample: CSV and Parquet. docs/run-folder.md says what the columns are."""

from __future__ import annotations

from typing import BinaryIO

from simpletuner_layerprobe.errors import RunError
from simpletuner_layerprobe.run.article import compressed, write_export
from simpletuner_layerprobe.run.folder import RunPath
from simpletuner_layerprobe.run.load import RunData
from simpletuner_layerprobe.targets import require_file

CSV = (".csv", ".csv.gz", ".csv.bz2")
PARQUET = (".parquet",)
FORMULA = ("=", "+", "-", "@", "\t", "\r", "'")
"""What a text must not begin with in a CSV file, because spreadsheets may run it; "'" so that it can be undone."""


def is_table(file: RunPath) -> bool:
    """Whether `export_table` knows the ending of this name."""
    return str(file).lower().endswith((*CSV, *PARQUET))


def export_table(run: RunData, file: RunPath, *, force: bool = False) -> int:
    """Write `run.to_pandas()` into a file whose name ends in .csv, .csv.gz, .csv.bz2 or .parquet.

    Returns the samples written. Facts that are not known are empty (null). In CSV a distance of NaN is empty too, and a
    backend that begins with one of FORMULA has a "'" put before it.
    Raises RunError if the run has no samples, ConfigError for a name that may not be written (`require_file`); the
    file is complete or absent.
    """
    path = require_file(file, (*CSV, *PARQUET), force=force)
    if not run.samples:
        raise RunError(f"{run.path} has no samples; let the probe run record some, or import a file")
    table = run.to_pandas()

    def write(raw: BinaryIO) -> None:
        if path.name.lower().endswith(PARQUET):
            table.to_parquet(raw, compression="zstd", index=False)
            return
        risky = table["backend"].str.startswith(FORMULA).fillna(False)
        table["backend"] = table["backend"].mask(risky, "'" + table["backend"])
        with compressed(raw, path) as out:
            table.to_csv(out, index=False, lineterminator="\n")

    write_export(path, write, force=force)
    return run.samples
