"""Records: where runs come from and go to."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, BinaryIO

from simpletuner_layerprobe.api.plans import known_model
from simpletuner_layerprobe.api.run import Run
from simpletuner_layerprobe.errors import ConfigError, ModelError
from simpletuner_layerprobe.run.merge import merge
from simpletuner_layerprobe.run.newest import runs_below
from simpletuner_layerprobe.targets import require_file

if TYPE_CHECKING:
    from simpletuner_layerprobe.models import Architecture
    from simpletuner_layerprobe.run.manifest import Manifest

__all__ = ["export", "import_records", "load", "merge", "require_export", "runs_below"]

PathLike = str | os.PathLike[str]


def load(path: PathLike, *, model: Architecture | PathLike | None = None, tokens: str = "last") -> Run:
    """The run in a folder, or the records in an article file (.jsonl, plain, gzip or bz2); nothing is written.

    For a file of records, model: what they were recorded from, as `architecture` takes it ("sd35-large", the path
    of a config.json), or what that returns; without it nothing can be planned. tokens: the reading that
    the distances are of. Raises RunError if there is no such run or it is damaged, ModelError for another model.
    """
    from simpletuner_layerprobe.run.load import load_run

    run = Run(load_run(path, tokens))
    if model is not None:
        run.data.manifest = _with_model(run, known_model(model))
    return run


def import_records(
    file: PathLike, run_dir: PathLike, *, model: Architecture | PathLike | None = None, tokens: str = "last"
) -> Run:
    """Make a run folder of a file of the article's records; all of it, or nothing is left behind. Arguments: `load`.

    Raises RunError, with the line's number, for the first line that is not such a record.
    """
    from simpletuner_layerprobe.run.article import import_article

    known = {} if model is None else {**vars(known_model(model))}
    known.pop("precision", None)  # its layers are in the table
    return Run(import_article(file, run_dir, tokens=tokens, **known))


def export(
    run: Run, file: PathLike | BinaryIO, *, tokens: str | None = None, facts: bool = False, force: bool = False
) -> tuple[int, int]:
    """Write a run as a table or as the article's records.

    file: a name that ends in .csv, .csv.gz, .csv.bz2 or .parquet, or for records in .jsonl, .jsonl.gz or .jsonl.bz2; or
    an open binary file, which gets plain records. tokens: the reading of the records. facts: whether they keep what is
    known of each sample. force: whether a plain file of this name is replaced. Returns the samples written and those
    left out because a distance is not finite. Raises ConfigError for a name that may not be written, RunError if the
    run has nothing to write.
    """
    from simpletuner_layerprobe.run.article import export_article
    from simpletuner_layerprobe.run.table import export_table, is_table

    if not isinstance(file, str | os.PathLike) or not is_table(file):
        require_export(file, force=force)
        return export_article(run.data, file, tokens=tokens or run.reading, facts=facts, force=force)
    if tokens or facts:
        raise ConfigError(
            f"{file} is a table, which has all readings and facts in columns of their own: leave them out"
        )
    return export_table(run.data, file, force=force), 0


def require_export(file: PathLike | BinaryIO, *, force: bool = False) -> None:
    """Raises ConfigError for a name that `export` would not write."""
    from simpletuner_layerprobe.run.article import RECORDS
    from simpletuner_layerprobe.run.table import CSV, PARQUET

    if isinstance(file, str | os.PathLike):
        require_file(file, (*RECORDS, *CSV, *PARQUET), force=force)


def _with_model(run: Run, model: Architecture) -> Manifest:
    """The manifest of a file of records with the blocks and modules of a model."""
    if run.files or run.manifest.modules:
        raise ModelError(f"{run.path} is a run folder; a model can be named for a file of records: import it with one")
    streams = {stream.name: stream for stream in model.streams}
    for name, blocks in run.streams.items():
        there = len(streams[name].blocks) if name in streams else 0
        if there != len(blocks):
            raise ModelError(f"{run.path} has {len(blocks)} {name} distances; the model has {there}")
    return replace(
        run.manifest,
        family=model.family,
        flavour=model.flavour,
        model_class=model.model_class,
        streams=tuple(streams[stream.name] for stream in run.manifest.streams),
        targets=model.targets,
        modules=model.modules,
    )
