"""Targets: where the program writes, and what it never writes over. One policy for every command and for the API.

A file is written where there is nothing yet or a plain file of the program's own, which says so itself (MARKS), and in
place of any other plain file only by force. Never, by force or without: inside a run folder, but for the report's own
place; in place of what is no plain file (a folder, a link, a pipe, a device); under a name that says something else.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from simpletuner_layerprobe.errors import ConfigError

PathLike = str | os.PathLike[str]

MAKER = "simpletuner-layerprobe"
ARCHIVE_COMMENT = f"made by {MAKER}".encode()
PAGE = (".html", ".htm")
CONFIG = (".json",)
_PAGE_MARK = f'<meta name="generator" content="{MAKER}'.encode()
MARKS = {
    ".html": _PAGE_MARK,
    ".htm": _PAGE_MARK,
    ".png": f"Software\0{MAKER}".encode(),
    ".svg": f"<dc:title>{MAKER}</dc:title>".encode(),
    ".npz": ARCHIVE_COMMENT,
}
"""Ending -> what a file of the program's own has near its start or end.

Configs and exports have nothing: LyCORIS and SimpleTuner would read it, and the format of the records is the article's.
"""
_MARKED_BYTES = 4096
_FILES = (*MARKS, *CONFIG, ".jsonl", ".csv", ".parquet", ".gz", ".bz2", ".txt", ".pdf")
"""Endings of names that are meant for files."""
_MANIFEST_NAME = "manifest.json"
_MANIFEST_KEYS = (b'"run_id"', b'"streams"', b'"readings"')
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFLNK: "a link",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def require_file(
    path: PathLike, endings: tuple[str, ...] = (), *, force: bool = False, place: Path | None = None
) -> Path:
    """The path of a file that may be written. Raises ConfigError, which names it as it was given, where it may not.

    endings: those that its name may have, () for any. place: the one file in a run folder that may be written.
    """
    target, status = _named(path, "file"), _status(path)
    if status is not None and not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise ConfigError(f"{path} is {kind}, and only a plain file is ever replaced; choose another name")
    if place is None or os.path.realpath(target) != os.path.realpath(place):
        _require_outside_of_runs(path)
    if endings and not target.name.lower().endswith(endings):
        raise ConfigError(f"{path} would not be what its name says: expected a name that ends in {_listed(endings)}")
    if status is not None and not force and not is_own(target):
        raise ConfigError(f"{path} exists already; it is not overwritten without --force")
    return target


def require_folder(path: PathLike) -> Path:
    """The path of a folder that is there, or may be made, for files to be written into. Raises ConfigError else."""
    target, status = _named(path, "folder"), _status(path)
    if status is None and target.name.lower().endswith(_FILES):
        raise ConfigError(f"{path} has the name of a file; expected one for a folder")
    if status is not None and not target.is_dir():
        raise ConfigError(f"{path} is no folder, and stays as it is; choose another name")
    _require_outside_of_runs(path)
    return target


def require_new_folder(path: PathLike) -> Path:
    """The path, without links, of a folder to make: there is none, or an empty one. Raises ConfigError else."""
    target = _named(path, "folder")
    try:
        taken = target.is_dir() and any(target.iterdir())
    except OSError as error:
        raise ConfigError(f"cannot look into {path}: {error.strerror}") from None
    if taken:
        raise ConfigError(f"{path} exists already and is not an empty folder; choose a new one")
    return require_folder(path).resolve()


def is_own(path: Path) -> bool:
    """Whether the file is one of the program's own that the ending of its name promises; see MARKS."""
    mark = MARKS.get(path.suffix.lower())
    if mark is None:
        return False
    try:
        with open(path, "rb") as file:
            start = file.read(_MARKED_BYTES)
            file.seek(max(0, os.fstat(file.fileno()).st_size - _MARKED_BYTES))
            return mark in start or mark in file.read(_MARKED_BYTES)
    except OSError:
        return False


def _named(path: PathLike, kind: str) -> Path:
    if os.fspath(path) in ("", "-"):
        raise ConfigError(f"{os.fspath(path)!r} is no name of a {kind}; give one")
    return Path(path)


def _status(path: PathLike) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from None


def _require_outside_of_runs(path: PathLike) -> None:
    """Raise ConfigError if a path is a run folder or lies in one, also through links and ".."."""
    real = Path(os.path.realpath(path))
    for folder in (real, *real.parents):
        if _is_run(folder):
            where = "is a run folder" if folder == real else f"lies in the run folder {folder}"
            raise ConfigError(f"{path} {where}, which nothing is written into but its report; choose another place")


def _is_run(folder: Path) -> bool:
    """By its manifest, also one that can no longer be read as such."""
    manifest = folder / _MANIFEST_NAME
    try:
        if not stat.S_ISREG(os.lstat(manifest).st_mode):
            return False
        data = manifest.read_bytes()
    except OSError:
        return False
    return all(key in data for key in _MANIFEST_KEYS)


def _listed(endings: tuple[str, ...]) -> str:
    return f"{', '.join(endings[:-1])} or {endings[-1]}" if len(endings) > 1 else endings[0]
