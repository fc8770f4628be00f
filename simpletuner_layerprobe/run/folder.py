"""Files and folders: complete, or not there at all, and never in place of something else.

A run folder holds no links: what lies in it as a link could point anywhere.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from simpletuner_layerprobe.errors import RunError
from simpletuner_layerprobe.targets import require_new_folder

RunPath = str | os.PathLike[str]

_TEMPORARY = re.compile(r"\.layerprobe-[0-9a-f]+\.tmp")


def temporary_name() -> str:
    """A new name for something that is not complete yet."""
    return f".layerprobe-{secrets.token_hex(8)}.tmp"


def is_temporary(name: str) -> bool:
    """Whether `name` is one that `temporary_name` gives (left over if the machine went down)."""
    return _TEMPORARY.fullmatch(name) is not None


def plain_file_size(path: Path) -> int:
    """Size in bytes of the regular file at `path`. Raises RunError for a link, a pipe, a folder, nothing."""
    try:
        status = os.lstat(path)
    except OSError:
        status = None
    if status is None or not stat.S_ISREG(status.st_mode):
        raise RunError(f"{path} is not a plain file; a run folder holds no links: put the file itself there")
    return status.st_size


def write_new_file(path: Path, write: Callable[[BinaryIO], object], *, replace: bool = False) -> None:
    """Create the file `path` from what `write` puts into a temporary file beside it: complete, or not at all.

    Raises FileExistsError if `path` exists (it is left as it is, unless `replace`) and RunError if the system refuses;
    the temporary file is gone in either case.
    """
    temporary = path.with_name(temporary_name())
    if os.path.lexists(path) and not replace:  # said before the work is done; _publish has the last word
        raise FileExistsError(f"{path} exists")
    try:
        try:
            with open(temporary, "xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            (os.replace if replace else _publish)(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)
    except FileExistsError:
        raise
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from None


def sync_folder(folder: Path) -> None:
    """Make the folder's new entry last through a power cut; only POSIX lets a folder be opened for that."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def new_folder(run_dir: RunPath) -> Iterator[Path]:
    """A temporary folder beside `run_dir`, which becomes it, or goes after an error.

    Raises ConfigError, before anything is done, where no folder may be made (`require_new_folder`). An error's text
    names `run_dir` where it named the temporary folder.
    """
    target = require_new_folder(run_dir)
    missing_parents = [parent for parent in target.parents if not os.path.exists(parent)]
    staging = target.with_name(temporary_name())
    try:
        try:
            staging.mkdir(parents=True)
            yield staging
            os.rename(staging, target)  # takes the place of an empty folder, refuses any other
            sync_folder(target.parent)
        except RunError as error:
            raise RunError(str(error).replace(str(staging), str(run_dir))) from None
        except OSError as error:
            raise RunError(f"cannot make the run folder {run_dir}: {error.strerror}") from None
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        for parent in missing_parents:  # the deepest first
            with suppress(OSError):  # never made, or somebody else uses it by now
                parent.rmdir()
        raise


def _publish(temporary: Path, path: Path) -> None:
    """Give the file its final name; FileExistsError if that is taken (rename alone would replace it)."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:
        # No hard links here (exFAT, some network mounts): look, then rename.
        if os.path.lexists(path):
            raise FileExistsError(f"{path} exists") from None
        os.rename(temporary, path)
