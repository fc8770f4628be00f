"""The readers of this package, each with valid inputs, a way to change them, and the call that reads one."""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
from fuzz import mutate
from synthetic_run import manifest, read_rows, rows, sd3_modules

from simpletuner_layerprobe.errors import ProbeError
from simpletuner_layerprobe.run import article_lines
from simpletuner_layerprobe.run.article import import_article
from simpletuner_layerprobe.run.load import load_article, load_run
from simpletuner_layerprobe.run.manifest import Manifest, create_run, read_manifest
from simpletuner_layerprobe.run.records import RecordWriter
from simpletuner_layerprobe.run.rows import Rows
from simpletuner_layerprobe.run.stream_file import file_name
from simpletuner_layerprobe.training.options import OPTIONS, ProbeSettings

BLOCKS = {"image": ("b.0", "b.1", "b.2"), "text": ("b.0", "b.1")}
MANIFEST = manifest(BLOCKS, run_id="0123456789abcdef")


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
    distances = {key: random.random((count, len(blocks))).astype(dtype) for key, blocks in MANIFEST.columns().items()}
    backends = np.array(["photographs", "ü", ""], object)[random.integers(0, 3, count)]
    return rows(random.random(count), distances, {"backend": backends, "image": random.integers(0, 9, count)})


def nothing(folder: Path) -> None:
    """No preparation."""


# Manifest


def manifests() -> list[bytes]:
    plain = manifest(BLOCKS, modules=sd3_modules(2))
    further = replace(plain, readings=("mean", "update_norm_mean", "pair2_last"), settings={"sigmas": "uniform"})
    manifests = (plain, replace(plain, modules=(), targets=()), further)
    return [json.dumps(value.to_json()).encode() for value in manifests]


def read_one_manifest(folder: Path, data: bytes) -> None:
    (folder / "manifest.json").write_bytes(data)
    run = read_manifest(folder)
    run.identity()
    Manifest.from_json(run.to_json())


# Stream file


def prepare_run(folder: Path) -> None:
    create_run(folder / "run", MANIFEST)


def stream_bytes() -> list[bytes]:
    files = []
    for counts, dtype, close in (((1, 3), np.float32, True), ((2, 1, 4), np.float32, False), ((7,), np.float64, True)):
        with tempfile.TemporaryDirectory() as folder:
            prepare_run(Path(folder))
            writer = RecordWriter(Path(folder, "run"), MANIFEST, rank=0)
            for count in counts:
                writer.write(small_rows(count, dtype), {"noise": "0.001"})
            if close:
                writer.close()
            assert writer.path is not None
            files.append(writer.path.read_bytes())
    return files


def read_one_stream_file(folder: Path, data: bytes) -> None:
    (folder / "run" / file_name(0, "20260101T000000.000000Z-00000000")).write_bytes(data)
    run = load_run(folder / "run")
    assert len(run.distances("text", "mean")) == len(run.distances("image")) == run.samples
    assert ((run.sigma >= 0) & (run.sigma <= 1)).all()
    assert len(read_rows(run.path, run.manifest)) == run.samples
    run.to_pandas()


# Records


def record_files() -> list[bytes]:
    lines = [
        json.dumps({"timestep": i / 5, "encoder_hidden_states": [0.1, 0.25], "hidden_states": [0.5, 1e-3, 0.75]})
        for i in range(6)
    ]
    facts = {"image": "a.png", "caption_words": 7, "width": 8, "height": 9, "backend": "p", "dropped": True, "loss": 1}
    further = [json.dumps(json.loads(line) | facts) for line in lines]
    numbers = [json.dumps(json.loads(line) | {"image": i, "prompt": "x"}) for i, line in enumerate(lines)]
    return ["\n".join(texts).encode() for texts in (lines, [lines[0], "", ""], further, numbers)]


def read_records(folder: Path, data: bytes) -> None:
    (folder / "records").write_bytes(data)
    try:
        run = import_article(folder / "records", folder / "run")
        loaded = load_article(folder / "records")
        # What Arrow makes of them is what json makes of them.
        with mock.patch.object(article_lines, "_parsed_by_arrow", return_value=None):
            try:
                by_line = load_article(folder / "records")
            except ProbeError as error:
                if "Exceeds the limit" in str(error):  # thousands of digits in a key that is ignored
                    return
                raise AssertionError("Arrow takes what json refuses") from error
        for other in (loaded, by_line):
            assert other.sigma.tolist() == run.sigma.tolist()
            for name, fact_N in run.facts.items():
                assert other.facts[name].tolist() == fact_N.tolist()
            for stream in run.streams:
                np.testing.assert_array_equal(other.distances(stream), run.distances(stream))
        assert ((run.distances("image") >= 0) & (run.distances("image") <= 1)).all()
    finally:
        names = sorted(os.listdir(folder))
        shutil.rmtree(folder / "run", ignore_errors=True)
        assert names in (["records"], ["records", "run"]), names


# LyCORIS config


def lycoris_configs() -> list[bytes]:
    factors = {"transformer_blocks.0.ff*": {"factor": 2}, "transformer_blocks.*": {"factor": 4, "algo": "lokr"}}
    names = {"use_fnmatch": True, "target_module": [], "name_algo_map": factors}
    classes = {"target_module": ["JointTransformerBlock"], "module_algo_map": {"Part": {"factor": 8}}}
    classes |= {"target_name": ["proj_.*"], "exclude_name": ["context.*"], "enable_conv": True}
    settings = {"algo": "lokr", "multiplier": 1.0, "linear_dim": 10000, "linear_alpha": 1, "factor": 1}
    return [
        json.dumps(config).encode()
        for config in (
            settings | {"full_matrix": True, "apply_preset": names},
            settings | {"apply_preset": classes},
            settings | {"algo": "loha", "linear_dim": 4, "apply_preset": names, "dropout": 0.1},
            settings | {"algo": "lora", "linear_dim": 4, "preset": "attn-mlp", "train_norm": True},
        )
    ]


MODEL = manifest(BLOCKS, modules=sd3_modules(2, width=8))


def read_lycoris_config(folder: Path, data: bytes) -> None:
    from simpletuner_layerprobe.commands.output import quiet
    from simpletuner_layerprobe.lokr.proof import check_config

    path = folder / "config.json"
    path.write_bytes(data)
    with quiet():
        check = check_config(path, MODEL)
    assert all("\n" not in line for line in (*map(str, check.rows), *check.unmatched, *check.notes))


# SimpleTuner's options, in a run folder


def options_files() -> list[bytes]:
    plain = {"model_type": "full", "output_dir": "output/probe", "layerprobe": True, "seed": 3, "resolution": 1024}
    dashes = {f"--{name}": value for name, value in plain.items()} | {"--lora_type": "standard", "--x": [1, 2]}
    return [json.dumps(options).encode() for options in (plain, dashes)]


class Trained:
    """What an environment is written for."""

    def files(self) -> dict[str, bytes]:
        return {"lycoris_config.json": b"{}"}

    def options(self, folder: str) -> dict[str, Any]:
        return {"model_type": "lora", "lora_type": "lycoris", "lycoris_config": f"{folder}/lycoris_config.json"}


def read_run_options(folder: Path, data: bytes) -> None:
    from simpletuner_layerprobe.training.environment import environment, read_options

    (folder / "run" / "config.json").write_bytes(data)
    options = read_options(folder / "run")
    try:
        environment("new", options, Trained(), config_dir=folder / "config")
    finally:
        names = sorted(os.listdir(folder / "config")) if (folder / "config").exists() else []
        shutil.rmtree(folder / "config", ignore_errors=True)
        assert names in ([], ["new"]) and sorted(os.listdir(folder)) == ["run"]


# Settings


def settings_values() -> list[bytes]:
    known = {option.name: option.default for option in OPTIONS}
    known |= {"layerprobe": True, "layerprobe_dir": None, "layerprobe_samples": 10, "output_dir": "output"}
    return [json.dumps(known).encode(), json.dumps({name: str(value) for name, value in known.items()}).encode()]


def settings_file(data: bytes, others: list[bytes], draw: random.Random) -> bytes:
    """The values of the options alone: SimpleTuner's parser makes their names."""
    values = json.loads(data)
    for name in draw.sample([name for name in sorted(values) if name.startswith("layerprobe")], draw.choice((1, 2, 3))):
        values[name] = draw.choice([value for value in mutate.NASTY if not isinstance(value, mutate.Raw)])
    return json.dumps(values).encode()


def read_settings(folder: Path, data: bytes) -> None:
    settings = ProbeSettings.from_config(SimpleNamespace(**json.loads(data)))
    assert settings is None or (settings.directory and settings.flush_seconds > 0 and settings.samples >= 0)


READERS = {
    "manifest": Reader(manifests, mutate.json_file, nothing, read_one_manifest),
    "stream file": Reader(stream_bytes, mutate.stream_file, prepare_run, read_one_stream_file),
    "records": Reader(record_files, mutate.json_lines, nothing, read_records),
    "settings": Reader(settings_values, settings_file, nothing, read_settings),
    "run options": Reader(options_files, mutate.json_file, prepare_run, read_run_options),
    "LyCORIS config": Reader(lycoris_configs, mutate.json_file, nothing, read_lycoris_config),
}
