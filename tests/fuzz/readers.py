"""The readers of this package, each with valid inputs, a way to change them, and the call that reads one."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from fuzz import mutate
from synthetic_run import manifest, rows, sd3_modules

from simpletuner_layerprobe.run.article import import_jsonl
from simpletuner_layerprobe.run.manifest import Manifest, read_manifest
from simpletuner_layerprobe.run.records import Rows, ShardWriter, create_run, open_run
from simpletuner_layerprobe.training.options import ProbeSettings

BLOCKS = {"image": ("b.0", "b.1", "b.2"), "text": ("b.0", "b.1")}


@dataclass(frozen=True)
class Reader:
    """seeds: valid inputs. prepare: makes what `read` needs in an empty folder. read: (the folder, one input); may
    raise ProbeError and nothing else."""

    seeds: Callable[[], list[bytes]]
    mutate: mutate.Mutator
    prepare: Callable[[Path], None]
    read: Callable[[Path, bytes], None]


def small_rows(count: int, dtype: type = np.float32) -> Rows:
    random = np.random.default_rng(count)
    return rows(
        random.random(count),
        {
            (name, tokens): random.random((count, len(BLOCKS[name]))).astype(dtype)
            for name in BLOCKS
            for tokens in TOKENS
        },
        backends=("photographs", "ü"),
    )


TOKENS = ("last", "mean")


def nothing(folder: Path) -> None:
    """No preparation."""


# Manifest


def manifests() -> list[bytes]:
    plain = manifest(BLOCKS, modules=sd3_modules(2))
    further = replace(plain, schema=2, extra=("update_norm_mean", "pair2_last"))
    return [json.dumps(one.to_json()).encode() for one in (plain, replace(plain, modules=()), further)]


def read_one_manifest(folder: Path, data: bytes) -> None:
    (folder / "manifest.json").write_bytes(data)
    run = read_manifest(folder)
    run.identity()
    Manifest.from_json(run.to_json())


# Shard


def prepare_run(folder: Path) -> None:
    create_run(folder / "run", manifest(BLOCKS))


def shard_bytes() -> list[bytes]:
    import tempfile

    found = []
    for count, dtype in ((1, np.float32), (7, np.float64)):
        with tempfile.TemporaryDirectory() as folder:
            prepare_run(Path(folder))
            path = ShardWriter(Path(folder, "run"), manifest(BLOCKS), rank=0).write(small_rows(count, dtype))
            assert path is not None
            found.append(path.read_bytes())
    return found


def read_one_shard(folder: Path, data: bytes) -> None:
    (folder / "run" / "shards" / "rank00000-000000.safetensors").write_bytes(data)
    run = open_run(folder / "run")
    counted = run.sample_count()
    assert sum(map(len, run.rows())) == counted
    assert sum(len(sigma_N) for sigma_N, _ in run.distances("mean")) == counted


# Records


def record_files() -> list[bytes]:
    lines = [
        json.dumps({"timestep": i / 5, "encoder_hidden_states": [0.1, 0.25], "hidden_states": [0.5, 1e-3, 0.75]})
        for i in range(6)
    ]
    return ["\n".join(lines).encode(), (lines[0] + "\n\n").encode()]


def read_records(folder: Path, data: bytes) -> None:
    (folder / "records").write_bytes(data)
    try:
        import_jsonl(folder / "records", folder / "run").sample_count()
    finally:
        names = sorted(os.listdir(folder))
        shutil.rmtree(folder / "run", ignore_errors=True)
        assert names in (["records"], ["records", "run"]), names


# LyCORIS config


def lycoris_configs() -> list[bytes]:
    names = {
        "use_fnmatch": True,
        "target_module": [],
        "name_algo_map": {
            "transformer_blocks.0.ff*": {"factor": 2},
            "transformer_blocks.*": {"factor": 4, "algo": "lokr"},
        },
    }
    classes = {
        "target_module": ["JointTransformerBlock"],
        "module_algo_map": {"Part": {"factor": 8}},
        "target_name": ["proj_.*"],
        "exclude_name": ["context.*"],
        "enable_conv": True,
    }
    settings = {"algo": "lokr", "multiplier": 1.0, "linear_dim": 10000, "linear_alpha": 1, "factor": 1}
    return [
        json.dumps(one).encode()
        for one in (
            settings | {"full_matrix": True, "apply_preset": names},
            settings | {"apply_preset": classes},
            settings | {"algo": "loha", "linear_dim": 4, "apply_preset": names, "dropout": 0.1},
            settings | {"algo": "lora", "linear_dim": 4, "preset": "attn-mlp", "train_norm": True},
        )
    ]


MODULES = sd3_modules(2, width=8)


def read_lycoris_config(folder: Path, data: bytes) -> None:
    from simpletuner_layerprobe.commands.output import quiet
    from simpletuner_layerprobe.lokr.config import read_config
    from simpletuner_layerprobe.lokr.proof import check_config

    path = folder / "config.json"
    path.write_bytes(data)
    config = read_config(path)
    with quiet():
        check = check_config(config, MODULES, model_class="SD3Transformer2DModel", where="the config")
    assert all("\n" not in line for line in (*map(str, check.rows), *check.unmatched, *check.notes))


# SimpleTuner's options, in a run folder


def options_files() -> list[bytes]:
    plain = {"model_type": "full", "output_dir": "output/probe", "layerprobe": True, "seed": 3, "resolution": 1024}
    dashes = {f"--{name}": value for name, value in plain.items()} | {"--lora_type": "standard", "--x": [1, 2]}
    return [json.dumps(one).encode() for one in (plain, dashes)]


def read_run_options(folder: Path, data: bytes) -> None:
    from simpletuner_layerprobe.lokr.config import environment, read_options

    (folder / "run" / "config.json").write_bytes(data)
    options = read_options(folder / "run")
    try:
        environment("new", options, {"algo": "lokr"}, config_dir=folder / "config")
    finally:
        names = sorted(os.listdir(folder / "config")) if (folder / "config").exists() else []
        shutil.rmtree(folder / "config", ignore_errors=True)
        assert names in ([], ["new"]) and sorted(os.listdir(folder)) == ["run"]


# Settings


SETTINGS: dict[str, Any] = {
    "layerprobe": True,
    "layerprobe_dir": None,
    "layerprobe_sigmas": "uniform",
    "layerprobe_samples": 10,
    "layerprobe_stop_when_stable": 0.0,
    "layerprobe_discover": False,
    "layerprobe_flush_seconds": 30.0,
    "output_dir": "output",
}


def settings_values() -> list[bytes]:
    from simpletuner_layerprobe.training.options import OPTIONS

    known = {option.name: option.default for option in OPTIONS} | SETTINGS
    return [json.dumps(known).encode(), json.dumps({name: str(value) for name, value in known.items()}).encode()]


def settings_file(data: bytes, others: list[bytes], draw: random.Random) -> bytes:
    """The values of the options alone: SimpleTuner's parser makes their names."""
    values = json.loads(data)
    for name in draw.sample([name for name in sorted(values) if name.startswith("layerprobe")], draw.choice((1, 2, 3))):
        values[name] = draw.choice([one for one in mutate.NASTY if not isinstance(one, mutate.Raw)])
    return json.dumps(values).encode()


def read_settings(folder: Path, data: bytes) -> None:
    settings = ProbeSettings.from_config(SimpleNamespace(**json.loads(data)))
    assert settings is None or (settings.directory and settings.flush_seconds > 0 and settings.samples >= 0)


READERS = {
    "manifest": Reader(manifests, mutate.json_file, nothing, read_one_manifest),
    "shard": Reader(shard_bytes, mutate.shard_file, prepare_run, read_one_shard),
    "records": Reader(record_files, mutate.json_lines, nothing, read_records),
    "settings": Reader(settings_values, settings_file, nothing, read_settings),
    "run options": Reader(options_files, mutate.json_file, prepare_run, read_run_options),
    "LyCORIS config": Reader(lycoris_configs, mutate.json_file, nothing, read_lycoris_config),
}
