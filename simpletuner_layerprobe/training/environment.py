"""The SimpleTuner environment that trains a plan: the probe run's own options, and the files of the plan.

Imports neither torch nor SimpleTuner, and no plan: anything with its `files` and `options` is taken.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from simpletuner_layerprobe.errors import ConfigError
from simpletuner_layerprobe.files import json_bytes, read_object, write_files
from simpletuner_layerprobe.targets import require_file, require_folder

OPTIONS_NAME = "config.json"
DEFAULT_OUTPUT_PARENT = "output"
PROGRAM_OPTIONS = ("post_checkpoint_script", "post_upload_script", "validation_external_script", "disk_low_script")
GUARD = "layerprobe_guard"
"""The one option of this package that a training has."""

# SimpleTuner looks for an environment in config/NAME, but takes a name with a dot in it for a file and
# "default" for config/config.json itself.
_ENVIRONMENT_NAME = re.compile(r"\w[\w+-]*")
_RESERVED_NAMES = ("default",)
_OTHER_OPTIONS_NAMES = ("config.toml", "config.env")


class Trained(Protocol):
    """What is to be trained: a Plan."""

    def files(self) -> Mapping[str, bytes]: ...
    def options(self, folder: str) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class Environment:
    """An environment for `simpletuner train env=NAME`. written: its files, config.json first."""

    name: str
    folder: Path
    output_dir: str
    written: tuple[Path, ...]


def read_options(run_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """The SimpleTuner options that a probe run was started with. Raises ConfigError if the run has none."""
    path = Path(run_dir) / OPTIONS_NAME
    if not os.path.lexists(path):
        raise ConfigError(
            f"{path} does not exist, so the options of the probe run are not known "
            "(an imported run has none); write the LyCORIS config alone, with --out"
        )
    if path.is_symlink() or not path.is_file():
        raise ConfigError(f"{path} is not a plain file; a run folder holds no links: put the file itself there")
    return read_object(path, "SimpleTuner's options")


def programs(options: Mapping[str, Any]) -> list[str]:
    """Names of the options that start a program, which no environment takes over: a run may come from somebody else."""
    return [_bare(key) for key, value in options.items() if _bare(key) in PROGRAM_OPTIONS and value]


def environment(
    name: str,
    options: Mapping[str, Any],
    trained: Trained,
    *,
    config_dir: str | os.PathLike[str] = "config",
    force: bool = False,
    dry_run: bool = False,
) -> Environment:
    """Write CONFIG_DIR/NAME: config.json, the probe's with the options that train the plan, and the plan's files.

    options: the probe run's own (`read_options`), keys with or without leading dashes. The probe's and those that start
    programs go; those of the plan and output_dir (beside the probe's, called NAME) are set; all else stays. All
    files are written or none. dry_run: write nothing. Raises ConfigError for a name that SimpleTuner does not find, for
    files that exist (unless `force`), and if the output_dir would be the probe's own.
    """
    folder = free_environment(name, config_dir, force=force)
    output_dir = _sibling_output_dir(options, name)
    own = {**trained.options(folder.as_posix()), "output_dir": output_dir}
    # config.json last: without it the folder is no environment, so one that was cut short is not trained with.
    contents = {**trained.files(), OPTIONS_NAME: json_bytes(changed_options(options, own))}
    made = Environment(name, folder, output_dir, tuple(folder / file for file in reversed(contents)))
    for path in made.written:
        require_file(path, force=force)
    if not dry_run:
        write_files({folder / file: data for file, data in contents.items()}, force=force)
    return made


def free_environment(name: str, config_dir: str | os.PathLike[str] = "config", *, force: bool = False) -> Path:
    """The folder of a new environment.

    Raises ConfigError for a name or a folder that SimpleTuner would not read, for one that has a config.json (unless
    `force`), and for one that may not be written (`require_folder`).
    """
    if not _ENVIRONMENT_NAME.fullmatch(name) or name in _RESERVED_NAMES:
        raise ConfigError(
            f"{name!r} cannot name a SimpleTuner environment; use letters, digits, '-', '_' and '+', "
            "no leading '-' or '+', and not 'default' (SimpleTuner takes a name with a dot for a file)"
        )
    folder = require_folder(Path(config_dir) / name)
    require_file(folder / OPTIONS_NAME, force=force)
    for other in _OTHER_OPTIONS_NAMES:
        if (folder / other).exists() and not force:
            raise ConfigError(
                f"{folder / other} exists already, and SimpleTuner would read {OPTIONS_NAME} in its place; "
                "choose another name or use --force"
            )
    return folder


def _sibling_output_dir(options: Mapping[str, Any], name: str) -> str:
    """The folder NAME beside the probe's output_dir; in `output` if that has no parent folder.

    Not in the working folder itself: SimpleTuner looks for the environment there before it looks in config.
    """
    probed = option(options, "output_dir")
    parent = PurePosixPath(str(probed)).parent if probed else PurePosixPath()
    if parent == PurePosixPath():
        parent = PurePosixPath(DEFAULT_OUTPUT_PARENT)
    output_dir = parent / name
    if probed and PurePosixPath(str(probed)) == output_dir:
        raise ConfigError(
            f"the environment {name!r} would train into {probed}, the probe run's own output_dir; choose another name"
        )
    return str(output_dir)


def option(options: Mapping[str, Any], name: str) -> Any:
    """What an option is set to, however it is spelled; None if it is not there."""
    return next((value for key, value in options.items() if _bare(key) == name), None)


def changed_options(options: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The options without the probe's, and with `own` in the place and spelling that the user gave them; None goes."""
    written: dict[str, Any] = {}
    left = dict(own)
    for key, value in options.items():
        bare = _bare(key)
        if (bare.startswith("layerprobe") and bare != GUARD) or bare in PROGRAM_OPTIONS:
            continue
        if bare not in own:
            written[key] = value
        elif bare in left:
            written[key] = left.pop(bare)
    dashes = "--" if any(key.strip().startswith("--") for key in options) else ""
    written |= {dashes + key: value for key, value in left.items()}
    return {key: value for key, value in written.items() if _bare(key) not in own or value is not None}


def _bare(key: str) -> str:
    return key.strip().lstrip("-")
