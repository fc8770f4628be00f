"""A new run folder: complete, or not there at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from simpletuner_layerprobe.errors import ProbeError
from simpletuner_layerprobe.run.manifest import RunPath, temporary_name


def free_target(run_dir: RunPath, verb: str) -> Path:
    """Where `run_dir` is. Raises ProbeError ("... `verb` a new one") unless it is free or an empty folder."""
    target = Path(run_dir).resolve()
    try:
        taken = os.path.lexists(target) and (not target.is_dir() or bool(os.listdir(target)))
    except OSError as error:
        raise ProbeError(f"cannot look into {run_dir}: {error.strerror}") from None
    if taken:
        raise ProbeError(f"{run_dir} exists already and is not an empty folder; {verb} a new one")
    return target


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary path beside `target`: the folder made there becomes `target`, or goes after an error."""
    missing_parents = [parent for parent in target.parents if not os.path.exists(parent)]
    staging = target.with_name(temporary_name())
    try:
        yield staging
        try:
            os.rename(staging, target)  # takes the place of an empty folder, refuses any other
        except OSError as error:
            raise ProbeError(f"cannot make the run folder {target}: {error.strerror}") from None
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        for parent in missing_parents:  # the deepest first
            with suppress(OSError):  # never made, or somebody else uses it by now
                parent.rmdir()
        raise
