"""Small run folders with made-up distances, written by the package's own writer.

manifest(blocks, readings=("last", "mean"), family="sd3", flavour="large", modules=(), targets=SD3_TARGETS,
         **fields) -> Manifest     `blocks`: {stream: block paths}; `fields`: others of Manifest, such as settings
rows(sigmas, distances, facts={}) -> Rows     `distances`: {(stream, reading): (N, C)}; size and loss are made up
rows_at(rows, kept) -> Rows     by mask, numbers or slice
read_rows(folder, manifest) -> Rows     all that is in a run
write_rows(folder, manifest, rows, files=1) -> RunData     the rows split over stream files of rank 0, 1, 0 ...
write_run(folder, blocks, samples, seed=0, files=3, readings=..., peaks=(), sigmas=None, images=0, facts={},
          **fields) -> RunData     a wavy level per block; `images`: so many different images, 0: unknown
write_extra_run(folder, blocks, samples, pairs=4, seam=None) -> RunData     all further readings
write_ablated_run(folder, blocks, samples, needed, images=20, ablated=..., text_share=..., spread=...) -> RunData
          with ablation of every third sample; `needed`: the loss increase of every block
records(run, tokens) -> list of dicts     the run as the article's records
sd3_modules(blocks, width=64) -> tuple of Module
SD35_LARGE, FLUX_DEV: {stream: block paths}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simpletuner_layerprobe.readings import UPDATE_COSINE, ablation_readings, extra_readings, parse_reading
from simpletuner_layerprobe.run.load import RunData, load_run
from simpletuner_layerprobe.run.manifest import SCHEMA, Manifest, Module, Stream, Target, create_run, new_run_id
from simpletuner_layerprobe.run.records import RecordWriter, read_columns
from simpletuner_layerprobe.run.rows import FACTS, Rows, column_name

SD35_LARGE = {
    "image": tuple(f"transformer_blocks.{i}" for i in range(38)),
    "text": tuple(f"transformer_blocks.{i}" for i in range(37)),
}
FLUX_DEV = {
    stream: tuple(
        [f"transformer_blocks.{i}" for i in range(19)] + [f"single_transformer_blocks.{i}" for i in range(38)]
    )
    for stream in ("image", "text")
}
SD3_TARGETS = (Target("transformer_blocks.*", ("norm1*", "norm1_context*", "ff*"), ("*",)),)


def manifest(
    blocks: Mapping[str, tuple[str, ...]],
    *,
    readings: tuple[str, ...] = ("last", "mean"),
    family: str = "sd3",
    flavour: str = "large",
    modules: Sequence[Module] = (),
    targets: Sequence[Target] = SD3_TARGETS,
    **fields: Any,
) -> Manifest:
    values: dict[str, Any] = {
        "schema": SCHEMA,
        "run_id": new_run_id(),
        "family": family,
        "flavour": flavour,
        "model_class": "SD3Transformer2DModel" if family == "sd3" else "",
        "streams": tuple(Stream(name, paths) for name, paths in blocks.items()),
        "targets": tuple(targets),
        "readings": readings,
        "modules": tuple(modules),
        "versions": {},
        "settings": {},
        "fingerprint": "",
        "created": "2026-01-01T00:00:00+00:00",
        "source": "probe",
    }
    return Manifest(**values | fields)


def rows(
    sigmas: Sequence[float] | NDArray[np.float64],
    distances: Mapping[tuple[str, str], Any],
    facts: Mapping[str, Any] | None = None,
) -> Rows:
    count = len(sigmas)
    known: dict[str, Any] = {
        "width": np.full(count, 1024),
        "height": np.full(count, 1024),
        "text_tokens": np.full(count, 77),
        "dropped": np.zeros(count),
        "backend": np.full(count, "photos", object),
    }
    return Rows(
        sigma_N=np.asarray(sigmas, dtype=np.float64),
        loss_N=np.full(count, 0.5, dtype=np.float32),
        facts=known | dict(facts or {}),
        distances={key: np.asarray(value) for key, value in distances.items()},
    )


def rows_at(rows: Rows, kept: NDArray[Any] | slice) -> Rows:
    return Rows(
        rows.sigma_N[kept],
        rows.loss_N[kept],
        {name: fact_N[kept] for name, fact_N in rows.facts.items()},
        {key: distance_NC[kept] for key, distance_NC in rows.distances.items()},
    )


def read_rows(folder: Path, manifest: Manifest) -> Rows:
    names = {key: column_name(*key) for key in manifest.columns()}
    _, columns = read_columns(folder, manifest, ("sigma", "loss", *FACTS, *names.values()))
    distances = {key: columns[name] for key, name in names.items()}
    return Rows(columns["sigma"], columns["loss"], {name: columns[name] for name in FACTS}, distances)


def write_rows(folder: Path, manifest: Manifest, rows: Rows, files: int = 1) -> RunData:
    """The run with these rows, in `files` stream files of the ranks 0 and 1 in turn (read by rank, then file)."""
    create_run(folder, manifest)
    for part, index_N in enumerate(np.array_split(np.arange(len(rows)), files)):
        with RecordWriter(folder, manifest, rank=part % 2) as writer:
            writer.write(rows_at(rows, index_N))
    return load_run(folder)


def write_run(
    folder: Path,
    blocks: Mapping[str, tuple[str, ...]],
    samples: int,
    *,
    seed: int = 0,
    files: int = 3,
    readings: tuple[str, ...] = ("last", "mean"),
    peaks: Sequence[tuple[str, int]] = (),
    sigmas: Sequence[float] | None = None,
    images: int = 0,
    facts: Mapping[str, Any] | None = None,
    **fields: Any,
) -> RunData:
    """A run of `samples` rows: a wavy level per block, sigma and noise on top, and `peaks` ((stream, block number)
    pairs) far above the rest. `fields`: as for `manifest`."""
    random = np.random.default_rng(seed)
    sigma_N = np.asarray(sigmas if sigmas is not None else random.random(samples))
    assert len(sigma_N) == samples
    distances = {}
    for name, paths in blocks.items():
        for reading in readings:
            level_L = 0.05 + 0.03 * np.sin(np.arange(len(paths)) / 2.3 + (name == "text"))
            for stream, number in peaks:
                if stream == name:
                    level_L[number] += 0.4
            distance_NL = level_L * (0.7 + 0.6 * sigma_N[:, None] * random.random((samples, len(paths))))
            distances[name, reading] = distance_NL.astype(np.float32)
    known = dict(facts or {})
    if images:
        known.setdefault("image", np.arange(samples) % images + 1)
        known.setdefault("repeat", np.arange(samples) // images)
    return write_rows(folder, manifest(blocks, readings=readings, **fields), rows(sigma_N, distances, known), files)


def write_extra_run(
    folder: Path, blocks: Mapping[str, tuple[str, ...]], samples: int, *, pairs: int = 4, seam: int | None = None
) -> RunData:
    """A run with the further readings: updates, and pairs up to `pairs` blocks, none over the seam before a block."""
    random = np.random.default_rng(1)
    what = manifest(blocks, readings=("last", "mean", *extra_readings(True, pairs)))
    sigma_N = random.random(samples)
    values = {}
    for (stream, name), columns in what.columns().items():
        reading = parse_reading(name)
        value_NC = random.random((samples, len(columns))).astype(np.float32) * np.float32(0.2 * reading.span)
        if reading.kind == UPDATE_COSINE:
            value_NC = value_NC * 5 - np.float32(0.7)
            value_NC[::3, 1] = np.nan  # an update of zero
        if reading.span > 1 and seam is not None:
            value_NC[:, max(0, seam - reading.span + 1) : seam] = np.nan
        values[stream, name] = value_NC
    return write_rows(folder, what, rows(sigma_N, values))


def write_ablated_run(
    folder: Path,
    blocks: Mapping[str, tuple[str, ...]],
    samples: int,
    needed: Sequence[float],
    *,
    images: int = 20,
    ablated: slice = slice(None, None, 3),
    text_share: float = 0.3,
    spread: float = 0.3,
    angles: Sequence[float] | None = None,
    seed: int = 2,
    **fields: Any,
) -> RunData:
    """A run with whole blocks and text updates left out in the samples `ablated`.

    needed: the mean loss increase of every block of the run, over uniform sigma, growing with it. An image is harder or
    easier in all its samples, and each loss increase has noise of its own, both of relative size `spread`. angles: the
    mean angle of every block, as `needed` if not given.
    """
    random = np.random.default_rng(seed)
    readings = ("last", "mean", *ablation_readings(blocks=True, text="text" in blocks))
    what = manifest(blocks, readings=readings, **fields)
    sigma_N = random.random(samples)
    image_N = np.arange(samples) % images + 1
    of_block = dict(zip(what.blocks, np.asarray(needed, float), strict=True))
    angle = dict(zip(what.blocks, np.asarray(needed if angles is None else angles, float), strict=True))
    harder_N = 1 + spread * random.standard_normal(images)[image_N - 1]
    values = {}
    for (stream, name), columns in what.columns().items():
        reading = parse_reading(name)
        level_C = np.array([(of_block if reading.ablation else angle)[first] for first, _ in columns])
        noise_NC = 1 + spread * random.standard_normal((samples, len(columns)))
        value_NC = level_C * (0.5 + sigma_N[:, None]) * harder_N[:, None] * noise_NC
        if reading.ablation:
            value_NC *= text_share if reading.stream == "text" else 1
            kept_NC = value_NC[ablated].copy()
            value_NC[:] = np.nan
            value_NC[ablated] = kept_NC
        values[stream, name] = (value_NC if reading.ablation else np.clip(value_NC, 0, 1)).astype(np.float32)
    return write_rows(folder, what, rows(sigma_N, values, {"image": image_N, "repeat": np.arange(samples) // images}))


def records(run: RunData, tokens: str) -> list[dict[str, Any]]:
    """The run as the article's list of records: timestep, encoder_hidden_states, hidden_states."""
    keys = {"image": "hidden_states", "text": "encoder_hidden_states"}
    values = {keys[stream]: run.distances(stream, tokens).tolist() for stream in run.streams}
    return [
        {"timestep": sigma, **{key: distances[i] for key, distances in values.items()}}
        for i, sigma in enumerate(run.sigma.tolist())
    ]


def sd3_modules(blocks: int, width: int = 64) -> tuple[Module, ...]:
    """The module table of a small SD3-shaped denoiser: `blocks` blocks, the last without a text output."""
    modules = [
        Module("context_embedder", "Linear", (width, 32)),
        Module("transformer_blocks", "ModuleList", ()),
    ]
    for number in range(blocks):
        last = number == blocks - 1
        linears = {
            "norm1.linear": (6 * width, width),
            "norm1_context.linear": ((2 if last else 6) * width, width),
            "attn.to_q": (width, width),
            "attn.to_out.0": (width, width),
            "ff.net.0.proj": (4 * width, width),
            "ff.net.2": (width, 4 * width),
        }
        if not last:
            linears["ff_context.net.2"] = (width, 4 * width)
        block = f"transformer_blocks.{number}"
        modules.append(Module(block, "JointTransformerBlock", ()))
        for name, shape in linears.items():
            parts = name.split(".")
            for depth in range(1, len(parts)):
                parent = Module(f"{block}.{'.'.join(parts[:depth])}", "Part", ())
                if parent not in modules:
                    modules.append(parent)
            modules.append(Module(f"{block}.{name}", "Linear", shape))
    return (*modules, Module("proj_out", "Linear", (64, width)))
