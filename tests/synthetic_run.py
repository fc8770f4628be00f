"""Small run folders with made-up distances, written by the package's own writer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simpletuner_layerprobe.readings import UPDATE_COSINE, extra_readings
from simpletuner_layerprobe.run.manifest import EXTRA_SCHEMA, SCHEMA_VERSION, Manifest, Module, Stream
from simpletuner_layerprobe.run.records import Rows, Run, ShardWriter, create_run, open_run

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


def manifest(
    blocks: Mapping[str, tuple[str, ...]],
    *,
    tokens: tuple[str, ...] = ("last", "mean"),
    family: str = "sd3",
    flavour: str = "large",
    modules: Sequence[Module] = (),
) -> Manifest:
    return Manifest(
        schema=SCHEMA_VERSION,
        family=family,
        flavour=flavour,
        model_class="SD3Transformer2DModel" if family == "sd3" else "",
        streams=tuple(Stream(name, paths) for name, paths in blocks.items()),
        tokens=tokens,
        modules=tuple(modules),
        versions={},
        settings={},
        fingerprint="",
        created="2026-01-01T00:00:00+00:00",
        source="probe",
    )


def rows(
    sigmas: Sequence[float] | NDArray[np.float64],
    distances: dict[tuple[str, str], Any],
    backends: tuple[str, ...] = (),
) -> Rows:
    count = len(sigmas)
    return Rows(
        sigma_N=np.asarray(sigmas, dtype=np.float64),
        loss_N=np.full(count, 0.5, dtype=np.float32),
        width_N=np.full(count, 1024, dtype=np.int32),
        height_N=np.full(count, 1024, dtype=np.int32),
        text_tokens_N=np.full(count, 77, dtype=np.int32),
        caption_dropped_N=np.zeros(count, dtype=np.int8),
        backend_N=np.full(count, len(backends) - 1, dtype=np.int16),
        backends=backends,
        distances={key: np.asarray(value) for key, value in distances.items()},
    )


def write_run(
    folder: Path,
    blocks: Mapping[str, tuple[str, ...]],
    samples: int,
    *,
    seed: int = 0,
    shards: int = 3,
    tokens: tuple[str, ...] = ("last", "mean"),
    peaks: Sequence[tuple[str, int]] = (),
    sigmas: Sequence[float] | None = None,
    **facts: Any,
) -> Run:
    """A run of `samples` rows in `shards` shards: a wavy level per block, sigma and noise on top, and `peaks`
    ((stream, block number) pairs) far above the rest."""
    random = np.random.default_rng(seed)
    sigma_N = np.asarray(sigmas if sigmas is not None else random.random(samples))
    assert len(sigma_N) == samples
    distances = {}
    for name, paths in blocks.items():
        for reading in tokens:
            level_L = 0.05 + 0.03 * np.sin(np.arange(len(paths)) / 2.3 + (name == "text"))
            for stream, number in peaks:
                if stream == name:
                    level_L[number] += 0.4
            distance_NL = level_L * (0.7 + 0.6 * sigma_N[:, None] * random.random((samples, len(paths))))
            distances[name, reading] = distance_NL.astype(np.float32)
    what = manifest(blocks, tokens=tokens, **facts)
    create_run(folder, what)
    for part, index_N in enumerate(np.array_split(np.arange(samples), shards)):
        ShardWriter(folder, what, rank=part % 2).write(
            rows(
                sigma_N[index_N],
                {key: value_NL[index_N] for key, value_NL in distances.items()},
                backends=("photos",),
            )
        )
    return open_run(folder)


def write_extra_run(
    folder: Path, blocks: Mapping[str, tuple[str, ...]], samples: int, *, pairs: int = 4, seam: int | None = None
) -> Run:
    """A run with the further readings: updates, and pairs up to `pairs` blocks, none over the seam before a block."""
    random = np.random.default_rng(1)
    what = manifest(blocks)
    what = replace(what, schema=EXTRA_SCHEMA, extra=extra_readings(True, pairs))
    sigma_N = random.random(samples)
    values = {}
    for stream in what.streams:
        for reading in what.readings(stream):
            columns = len(reading.columns(stream.blocks))
            value_NC = random.random((samples, columns)).astype(np.float32) * 0.2 * reading.span
            if reading.kind == UPDATE_COSINE:
                value_NC = value_NC * 5 - 0.7
                value_NC[::3, 1] = np.nan  # an update of zero
            if reading.span > 1 and seam is not None:
                value_NC[:, max(0, seam - reading.span + 1) : seam] = np.nan
            values[stream.name, reading.name] = value_NC
    create_run(folder, what)
    ShardWriter(folder, what, rank=0).write(rows(sigma_N, values))
    return open_run(folder)


def records(run: Run, tokens: str) -> list[dict[str, Any]]:
    """The run as the article's list of records: timestep, encoder_hidden_states, hidden_states."""
    found = []
    for part in run.rows():
        for i, sigma in enumerate(part.sigma_N):
            record = {"timestep": float(sigma), "hidden_states": part.distances["image", tokens][i].tolist()}
            if ("text", tokens) in part.distances:
                record["encoder_hidden_states"] = part.distances["text", tokens][i].tolist()
            found.append(record)
    return found


def sd3_modules(blocks: int, width: int = 64) -> tuple[Module, ...]:
    """The module table of a small SD3-shaped denoiser: `blocks` blocks, the last without a text output."""
    found = [
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
        found.append(Module(block, "JointTransformerBlock", ()))
        for name, shape in linears.items():
            parts = name.split(".")
            for depth in range(1, len(parts)):
                parent = Module(f"{block}.{'.'.join(parts[:depth])}", "Part", ())
                if parent not in found:
                    found.append(parent)
            found.append(Module(f"{block}.{name}", "Linear", shape))
    return (*found, Module("proj_out", "Linear", (64, width)))
