"""Runs below a folder, for who leaves out which."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from simpletuner_layerprobe.errors import RunError
from simpletuner_layerprobe.run.folder import RunPath
from simpletuner_layerprobe.run.manifest import MANIFEST_NAME, read_manifest

DEEPEST = 4
"""So many folders deep runs are looked for: output/NAME/layerprobe is three."""
MOST_FOLDERS = 5_000


def runs_below(folder: RunPath) -> list[tuple[float, Path]]:
    """The runs in and below a folder, the newest first: when it was last written to, and its path.

    Hidden folders, links and what is in a run are not looked into. Raises RunError where there are more than
    MOST_FOLDERS folders.
    """
    runs = []
    for seen, (path, folders, files) in enumerate(os.walk(folder)):
        if seen >= MOST_FOLDERS:
            raise RunError(f"there are more than {MOST_FOLDERS:,} folders here to look for a run in; name the run")
        here = Path(path)
        depth = len(here.relative_to(folder).parts)
        folders[:] = [name for name in folders if depth < DEEPEST and not name.startswith(".")]
        if MANIFEST_NAME in files:
            with suppress(RunError):
                read_manifest(here)
                folders[:] = []
                runs.append(
                    (
                        max(
                            os.lstat(here / name).st_mtime
                            for name in files
                            if name == MANIFEST_NAME or name.endswith(".arrows")
                        ),
                        here,
                    )
                )
    return sorted(runs, key=lambda run: (-run[0], run[1]))
