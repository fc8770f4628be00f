"""Factors to a LyCORIS config that takes effect as written, and to a SimpleTuner environment that uses it.

The config names modules only. With `target_module` LyCORIS 4.1.3 builds whole blocks before it looks at the
names, and a name's factor then leaks into the next block; left out, a default list of classes comes back. An
empty list leaves the names alone to decide.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path, PurePosixPath
from typing import Any

from simpletuner_layerprobe.errors import ProbeError
from simpletuner_layerprobe.probe.families import Target, lies_at
from simpletuner_layerprobe.run.manifest import Module, plain_file_size

PROGRAM_OPTIONS = ("post_checkpoint_script", "post_upload_script", "validation_external_script", "disk_low_script")
LYCORIS_CONFIG_NAME = "lycoris_config.json"
OPTIONS_NAME = "config.json"
DEFAULT_OUTPUT_PARENT = "output"
MAX_CONFIG_BYTES = 32 * 1024 * 1024
MAX_DEPTH = 50  # of lists and objects in each other

# SimpleTuner looks for an environment in config/NAME, but takes a name with a dot in it for a file and
# "default" for config/config.json itself.
_ENVIRONMENT_NAME = re.compile(r"\w[\w+-]*")
_RESERVED_NAMES = ("default",)
_OTHER_OPTIONS_NAMES = ("config.toml", "config.env")
_CONV = re.compile(r"Conv([123])d")

NOT_ADAPTED = frozenset(
    {
        "CPUBouncingLinear",  # RamTorch
        "CPUBouncingFp8Linear",
        "Fp8NativeLinear",
        "SVDQW4A4Linear",  # Nunchaku
        "AWQW4A16Linear",
    }
)
"""Linear layers of SimpleTuner 4.10.1 and diffusers 0.42.1 that LyCORIS skips: no subclasses of torch's."""


@dataclass(frozen=True)
class Planned:
    """One module of the plan: its name and weight shape in the denoiser, and the factor it is to get."""

    name: str
    shape: tuple[int, ...]
    factor: int


@dataclass(frozen=True)
class Environment:
    """The two files of a SimpleTuner environment, for `simpletuner train env=NAME`."""

    name: str
    options: Path
    lycoris_config: Path
    output_dir: str


def layer_kind(module: Module) -> str:
    """What LyCORIS sees in a module of the table: "linear", "conv", "weight" (of another kind), or "".

    Goes by the class name and the weight's shape, which is all that the table has: quantised linear layers
    are subclasses of torch's with "Linear" in their name, those that are not are listed in NOT_ADAPTED.
    Source: LyCORIS 4.1.3, modules/base.py, `is_supported_linear_module`.
    """
    conv = _CONV.search(module.type)
    if conv and "Transpose" not in module.type and len(module.shape) == 2 + int(conv.group(1)):
        return "conv"
    if "Linear" in module.type and module.type not in NOT_ADAPTED and len(module.shape) == 2:
        return "linear"
    return "weight" if module.shape else ""


def article_config(blocks: Sequence[str], factors: Sequence[int], targets: Sequence[Target]) -> dict[str, Any]:
    """The LyCORIS config of the article: per block its factor f for some modules and 2f for the rest.

    blocks: block paths in the denoiser. factors: one factor per block, 1 or more. targets: the family's
    rules; a block belongs to the target whose block list it lies in. Patterns are fnmatch patterns over the
    whole module name; the first in the order of the file decides. The same input gives the same file, byte
    for byte. Raises ProbeError if the numbers differ, a factor is below 1, a block is named twice or has no
    target.
    """
    name_algo_map = {
        f"{escape(block)}.{pattern}": {"factor": factor * level}
        for block, factor, target in _block_targets(blocks, factors, targets)
        for level, pattern in _levels(target)
    }
    return {
        "algo": "lokr",
        "multiplier": 1.0,
        "linear_dim": 1000000,
        "linear_alpha": 1,
        "full_matrix": True,
        "factor": 1,
        "apply_preset": {"use_fnmatch": True, "target_module": [], "name_algo_map": name_algo_map},
    }


def article_plan(
    blocks: Sequence[str], factors: Sequence[int], targets: Sequence[Target], modules: Sequence[Module]
) -> tuple[Planned, ...]:
    """The factor that each module is meant to get, from the rules and the module table alone.

    Nothing of LyCORIS or of the written config takes part, so that both can be proved against it. Covers the
    linear layers and convolutions of the blocks, in the table's order. Raises ProbeError as `article_config`
    does, and for a block without a module that LyCORIS can adapt.
    """
    by_block = {block: (factor, target) for block, factor, target in _block_targets(blocks, factors, targets)}
    planned = []
    without = set(by_block)
    for module in modules:
        if layer_kind(module) not in ("linear", "conv"):
            continue
        block = next((path for path in _parents(module.name) if path in by_block), None)
        if block is None:
            continue
        factor, target = by_block[block]
        inside = module.name[len(block) + 1 :]
        level = next((level for level, pattern in _levels(target) if fnmatchcase(inside, pattern)), None)
        if level is not None:
            planned.append(Planned(module.name, module.shape, factor * level))
            without.discard(block)
    if without:
        block = next(path for path in blocks if path in without)
        raise ProbeError(
            f"the module table has no linear layer or convolution that LyCORIS can adapt in block {block!r}; "
            "the run and the model do not fit together"
        )
    return tuple(planned)


def planned_config(planned: Sequence[Planned], blocks: Sequence[str], targets: Sequence[Target]) -> dict[str, Any]:
    """The LyCORIS config that gives every planned module its own factor, and nothing else an adapter.

    Written with the family's patterns, as the article's config is, where all modules that a pattern decides for
    share a factor; else module by module. planned: modules of these blocks; a block without any is left out. The same
    input gives the same file, byte for byte. Raises ProbeError as `article_config` does.
    """
    by_block: dict[str, list[Planned]] = {}
    for one in planned:
        block = next((path for path in _parents(one.name) if path in blocks), None)
        if block is not None:
            by_block.setdefault(block, []).append(one)
    name_algo_map: dict[str, dict[str, int]] = {}
    for block, _, target in _block_targets(blocks, [1] * len(blocks), targets):
        left = by_block.get(block, [])
        for _, pattern in _levels(target):
            matched = [one for one in left if fnmatchcase(one.name[len(block) + 1 :], pattern)]
            left = [one for one in left if one not in matched]
            if len({one.factor for one in matched}) == 1:
                name_algo_map[f"{escape(block)}.{pattern}"] = {"factor": matched[0].factor}
            else:
                name_algo_map |= {escape(one.name): {"factor": one.factor} for one in matched}
    return article_config((), (), ()) | {
        "apply_preset": {"use_fnmatch": True, "target_module": [], "name_algo_map": name_algo_map}
    }


def config_bytes(config: Mapping[str, Any] | list[str]) -> bytes:
    """A config as the bytes of its JSON file."""
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The LyCORIS config in the file `path`. Raises ProbeError if it is not there or not a JSON object."""
    return _read_object(Path(path), "a LyCORIS config")


def read_options(run_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """The SimpleTuner options that a probe run was started with. Raises ProbeError if the run has none."""
    path = Path(run_dir) / OPTIONS_NAME
    if not os.path.lexists(path):
        raise ProbeError(
            f"{path} does not exist, so the options of the probe run are not known "
            "(an imported run has none); write the LyCORIS config alone, with --out"
        )
    plain_file_size(path)
    return _read_object(path, "SimpleTuner's options")


def write_config(path: str | os.PathLike[str], config: Mapping[str, Any], *, force: bool = False) -> None:
    """Write a LyCORIS config, complete or not at all. Raises ProbeError if it exists, unless `force`."""
    _write_files({Path(path): config_bytes(config)}, force=force)


def check_environment_name(name: str) -> None:
    """Raise ProbeError unless `simpletuner train env=NAME` finds the folder config/NAME by this name."""
    if not _ENVIRONMENT_NAME.fullmatch(name) or name in _RESERVED_NAMES:
        raise ProbeError(
            f"{name!r} cannot name a SimpleTuner environment; use letters, digits, '-', '_' and '+', "
            "no leading '-' or '+', and not 'default' (SimpleTuner takes a name with a dot for a file)"
        )


def environment(
    name: str,
    options: Mapping[str, Any],
    lycoris_config: Mapping[str, Any],
    *,
    config_dir: str | os.PathLike[str] = "config",
    force: bool = False,
) -> Environment:
    """Write CONFIG_DIR/NAME/config.json and lycoris_config.json: the probe's config, now with weighted LoKr.

    options: the probe run's own options, keys with or without leading dashes. Every layerprobe option goes;
    model_type, lora_type, lycoris_config and output_dir (beside the probe's, called NAME) are set; options that start
    programs (`programs`) are left out, since a run may come from somebody else; all else stays. Both files are written
    or neither. Raises ProbeError for a name that SimpleTuner does not find, for files that exist (unless `force`), and
    if the output_dir would be the probe's own.
    """
    lycoris_path = Path(config_dir) / name / LYCORIS_CONFIG_NAME
    own = {"model_type": "lora", "lora_type": "lycoris", "lycoris_config": lycoris_path.as_posix()}
    path, output_dir = environment_of(
        name, options, own, {LYCORIS_CONFIG_NAME: config_bytes(lycoris_config)}, config_dir=config_dir, force=force
    )
    return Environment(name, path, lycoris_path, output_dir)


def environment_of(
    name: str,
    options: Mapping[str, Any],
    own: Mapping[str, Any],
    files: Mapping[str, bytes],
    *,
    config_dir: str | os.PathLike[str] = "config",
    force: bool = False,
) -> tuple[Path, str]:
    """Write CONFIG_DIR/NAME/config.json with the options `own` in the probe's, and `files` beside it, by name.

    As `environment` does it, for other adapters; an option that is None in `own` goes. Returns the path of config.json
    and the output_dir.
    """
    folder = _free_folder(name, config_dir, force)
    output_dir = _sibling_output_dir(options, name)
    follow_up = _follow_up_options(options, {**own, "output_dir": output_dir})
    # config.json last: without it the folder is no environment, so one that was cut short is not trained with.
    contents = {**files, OPTIONS_NAME: config_bytes(follow_up)}
    _write_files({folder / file: data for file, data in contents.items()}, force=force)
    return folder / OPTIONS_NAME, output_dir


def plan_environment(
    name: str,
    options: Mapping[str, Any],
    *,
    config_dir: str | os.PathLike[str] = "config",
    force: bool = False,
) -> Environment:
    """What `environment` makes of the same arguments. Writes nothing; raises ProbeError where that would refuse."""
    folder = _free_folder(name, config_dir, force)
    made = Environment(name, folder / OPTIONS_NAME, folder / LYCORIS_CONFIG_NAME, _sibling_output_dir(options, name))
    require_free([made.options, made.lycoris_config], force=force)
    return made


def require_free(paths: Iterable[str | os.PathLike[str]], *, force: bool = False) -> None:
    """Raise ProbeError if one of these files exists, unless `force`."""
    for path in paths:
        if os.path.lexists(path) and not force:
            raise ProbeError(f"{path} exists already; it is not overwritten without --force")


def _free_folder(name: str, config_dir: str | os.PathLike[str], force: bool) -> Path:
    """The folder of a new environment. Raises ProbeError for a name or a folder that SimpleTuner would not read."""
    check_environment_name(name)
    folder = Path(config_dir) / name
    for other in _OTHER_OPTIONS_NAMES:
        if (folder / other).exists() and not force:
            raise ProbeError(
                f"{folder / other} exists already, and SimpleTuner would read {OPTIONS_NAME} in its place; "
                "choose another name or use --force"
            )
    return folder


def _levels(target: Target) -> list[tuple[int, str]]:
    """The patterns inside one block, in order, each with the multiple of the block's factor it gives."""
    return [(1, pattern) for pattern in target.at_factor] + [(2, pattern) for pattern in target.at_double]


def _block_targets(
    blocks: Sequence[str], factors: Sequence[int], targets: Sequence[Target]
) -> list[tuple[str, int, Target]]:
    if len(blocks) != len(factors):
        raise ProbeError(f"there are {len(blocks)} blocks and {len(factors)} factors; expected one for each")
    if len(set(blocks)) != len(blocks):
        twice = next(block for number, block in enumerate(blocks) if block in blocks[:number])
        raise ProbeError(f"block {twice!r} is named twice; expected each block once")
    found = []
    for block, factor in zip(blocks, factors, strict=True):
        if factor < 1:
            raise ProbeError(f"the factor of block {block!r} is {factor}; expected 1 or more")
        target = next((one for one in targets if lies_at(block, one.blocks)), None)
        if target is None:
            raise ProbeError(
                f"block {block!r} lies in none of the block lists that the config has rules for: "
                f"{', '.join(one.blocks for one in targets) or 'none'}"
            )
        found.append((block, int(factor), target))
    return found


def _parents(name: str) -> list[str]:
    """The paths of the modules that hold `name`, the nearest first."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1)]


def _read_object(path: Path, what: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
        if len(data) > MAX_CONFIG_BYTES:
            raise ProbeError(f"{path} takes over {MAX_CONFIG_BYTES} bytes; expected {what}")
        value = json.loads(data)
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is JSON, and no text
        _check_depth(value, MAX_DEPTH)
    except OSError as error:
        raise ProbeError(f"cannot read {path}: {error.strerror}; expected {what}") from None
    except (ValueError, RecursionError) as error:
        raise ProbeError(f"{path} is not JSON ({error}); expected {what}") from None
    if not isinstance(value, dict):
        raise ProbeError(f"{path} holds a JSON {type(value).__name__}; expected {what}, a JSON object")
    return value


def _check_depth(value: object, left: int) -> None:
    """Raise ValueError if lists and objects are in each other deeper than `left`."""
    if isinstance(value, dict | list):
        if not left:
            raise ValueError(f"over {MAX_DEPTH} lists and objects in each other")
        for inner in value.values() if isinstance(value, dict) else value:
            _check_depth(inner, left - 1)


def _bare(key: str) -> str:
    return key.strip().lstrip("-")


def _sibling_output_dir(options: Mapping[str, Any], name: str) -> str:
    """The folder NAME beside the probe's output_dir; in `output` if that has no parent folder.

    Not in the working folder itself: SimpleTuner looks for the environment there before it looks in config.
    """
    probed = next((value for key, value in options.items() if _bare(key) == "output_dir"), None)
    parent = PurePosixPath(str(probed)).parent if probed else PurePosixPath()
    if parent == PurePosixPath():
        parent = PurePosixPath(DEFAULT_OUTPUT_PARENT)
    output_dir = parent / name
    if probed and PurePosixPath(str(probed)) == output_dir:
        raise ProbeError(
            f"the environment {name!r} would train into {probed}, the probe run's own output_dir; choose another name"
        )
    return str(output_dir)


def programs(options: Mapping[str, Any]) -> list[str]:
    """Names of the options that start a program, which no follow-up takes over."""
    return [_bare(key) for key, value in options.items() if _bare(key) in PROGRAM_OPTIONS and value]


def _follow_up_options(options: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The options without layerprobe's, and with `own` in the place and spelling that the user gave them."""
    written: dict[str, Any] = {}
    left = dict(own)
    for key, value in options.items():
        bare = _bare(key)
        if bare.startswith("layerprobe") or bare in PROGRAM_OPTIONS:
            continue
        if bare not in own:
            written[key] = value
        elif bare in left:
            written[key] = left.pop(bare)
    dashes = "--" if any(key.strip().startswith("--") for key in options) else ""
    written |= {dashes + key: value for key, value in left.items()}
    return {key: value for key, value in written.items() if _bare(key) not in own or value is not None}


def _write_files(contents: Mapping[Path, bytes], *, force: bool) -> None:
    """Write all of these files of one folder or none of them; each is complete or absent at any time.

    Raises ProbeError if one exists and `force` is off, or if the system refuses.
    """
    require_free(contents, force=force)
    taken = [path for path in contents if os.path.lexists(path)]
    folder = next(iter(contents)).parent
    made_folder = not folder.exists()
    temporary = {path: path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp") for path in contents}
    replaced: list[Path] = []
    before: dict[Path, bytes] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        before = {path: path.read_bytes() for path in taken}
        for path, data in contents.items():
            with open(temporary[path], "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for path in contents:
            os.replace(temporary[path], path)
            replaced.append(path)
    except OSError as error:
        for path in replaced:
            if path in before:
                path.write_bytes(before[path])
            else:
                path.unlink()
        _remove(temporary.values())
        if made_folder and folder.is_dir():
            folder.rmdir()
        raise ProbeError(f"cannot write {error.filename2 or error.filename}: {error.strerror}") from None
    except BaseException:
        _remove(temporary.values())
        raise


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.exists():
            path.unlink()
