"""What the commands print and write, and how."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from simpletuner_layerprobe.analyse.heatmap import Heatmap
    from simpletuner_layerprobe.run.manifest import Manifest

OK = 0


@contextmanager
def quiet() -> Iterator[None]:
    """Keep torch, diffusers and LyCORIS from warning about themselves while they are imported and used."""
    import logging
    import warnings

    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def warn(message: str) -> None:
    print(f"layerprobe: warning: {message}", file=sys.stderr)


def print_json(result: Mapping[str, Any]) -> None:
    import json

    print(json.dumps(result, indent=2, allow_nan=False))


def model_name(manifest: Manifest) -> str:
    name = " ".join(part for part in (manifest.family, manifest.flavour) if part)
    return name or manifest.model_class


def counted(count: int, noun: str) -> str:
    """ "1 block", "1,455 blocks"."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def bin_labels(bins: int) -> list[str]:
    """The sigma range of each bin, in order: "0.1 - 0.2"."""
    edges = [f"{edge / bins:.3g}" for edge in range(bins + 1)]
    return [f"{low} - {high}" for low, high in pairwise(edges)]


def sample_warnings(streams: Mapping[str, Heatmap]) -> list[str]:
    """One line per stream for bins without samples, and for samples that were left out."""
    warnings = []
    for name, heatmap in streams.items():
        empty = heatmap.empty_bins()
        if empty:
            labels = bin_labels(heatmap.bins)
            shown = ", ".join(labels[t] for t in empty[:5]) + (", ..." if len(empty) > 5 else "")
            warnings.append(
                f"{len(empty)} of {heatmap.bins} sigma bins have no samples in the {name} stream ({shown}); "
                "they count as 0, as in the article: record more samples or use fewer --bins"
            )
        if heatmap.nonfinite:
            warnings.append(f"{heatmap.nonfinite:,} samples are left out of the {name} stream: distances not finite")
    return warnings


def size_text(size_bytes: int) -> str:
    """A size in decimal units, as disks and model pages give it: "1.53 GB"."""
    size = float(size_bytes)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def replace_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files into a folder, made if need be; files of the same name are replaced, each one as a whole.

    Nothing is replaced before all of them are on the disk under temporary names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    temporary = {name: folder / f".layerprobe-{secrets.token_hex(8)}.tmp" for name in files}
    try:
        for name, data in files.items():
            with open(temporary[name], "xb") as file:  # a folder from somebody else may hold links
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for name in files:
            os.replace(temporary[name], folder / name)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
