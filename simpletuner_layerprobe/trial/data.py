"""The data of a trial: which backends are trained on, which are held out, and that no image is in both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simpletuner_layerprobe.errors import ConfigError
from simpletuner_layerprobe.files import MAX_JSON_BYTES

Backend = Mapping[str, Any]
SUPPORT = ("text_embeds", "image_embeds", "conditioning_image_embeds", "distillation_cache")
"""Backends without samples of their own, which training and judging share."""
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jxl", ".heic"})
VIDEOS = frozenset({".mp4", ".mov", ".mkv", ".webm", ".avi"})
REPEATS = 9
"""Further samples of each held-out image: with the first one, one in each tenth of sigma."""


@dataclass(frozen=True)
class Data:
    """train, held_out: lists of backends as SimpleTuner reads them. held_out_ids: of those with samples.

    images: how many are held out, None where they are not in folders of this machine. notes: what could not be checked.
    """

    train: tuple[Backend, ...]
    held_out: tuple[Backend, ...]
    held_out_ids: tuple[str, ...]
    images: int | None
    notes: tuple[str, ...] = ()


def split_data(config: Path, held_out: str) -> Data:
    """config: the run's data_backend_config. held_out: the id of a backend in it, or another such file.

    Raises ConfigError if there is no such backend, if nothing is left to train on, and if an image is in both.
    """
    backends = read_backends(config)
    sampled = {str(each.get("id")): each for each in backends if _has_samples(each)}
    if held_out in sampled:
        chosen = [sampled[held_out]]
    elif Path(held_out).is_file():
        chosen = [each for each in read_backends(Path(held_out)) if _has_samples(each)]
    else:
        raise ConfigError(
            f"there is no held-out backend {held_out!r}: it is neither a file nor one of those in {config}: "
            f"{', '.join(sampled) or 'none with images'}"
        )
    if not chosen:
        raise ConfigError(f"{held_out} has no backend with images")
    ids = tuple(str(each.get("id")) for each in chosen)
    train = tuple(each for each in backends if not (_has_samples(each) and str(each.get("id")) in ids))
    trained = [each for each in train if _has_samples(each) and not each.get("disabled")]
    if not trained:
        raise ConfigError(f"{config} has no backend left to train on beside {', '.join(ids)}")
    images, notes = compare_images(trained, chosen)
    shared = [each for each in train if not _has_samples(each)]
    judged = [{**each, "disabled": False, "repeats": REPEATS} for each in chosen]
    return Data(train, (*judged, *shared), ids, images, notes)


def read_backends(path: Path) -> tuple[Backend, ...]:
    """A data_backend_config, a JSON list. Raises ConfigError if it is none."""
    try:
        data = path.read_bytes()[: MAX_JSON_BYTES + 1]
        value = json.loads(data)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; expected SimpleTuner's data backends") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}); expected SimpleTuner's data backends") from None
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise ConfigError(f"{path} is not a list of data backends")
    return tuple(value)


def compare_images(trained: Sequence[Backend], held_out: Sequence[Backend]) -> tuple[int | None, tuple[str, ...]]:
    """How many images are held out, and notes. Raises ConfigError, naming one, if a picture of them is trained on.

    Pictures are compared by their pixels, so that another file name or format of the same ones does not hide them.
    """
    remote = [str(each.get("id")) for each in (*trained, *held_out) if _folder(each) is None]
    notes = (f"not in a folder of this machine, so not compared image by image: {', '.join(remote)}",) if remote else ()
    known = dict(_pictures(trained))
    judged = _pictures(held_out)
    for key, path in judged:
        if key in known:
            raise ConfigError(
                f"the held-out image {path} is trained on too, as {known[key]}: a loss on it says nothing of new "
                "images. Take it out of one of the two folders"
            )
    return (None if any(_folder(each) is None for each in held_out) else len(judged)), notes


def _has_samples(backend: Backend) -> bool:
    return str(backend.get("dataset_type", "image")) not in SUPPORT


def _folder(backend: Backend) -> Path | None:
    """Where its files lie, None if that is not on this machine."""
    folder = backend.get("instance_data_dir")
    if backend.get("type", "local") != "local" or not folder:
        return None
    path = Path(str(folder)).expanduser()
    if not path.is_dir():
        raise ConfigError(f"the backend {backend.get('id')!r} has no folder {path}; start from where its training does")
    return path


def _pictures(backends: Sequence[Backend]) -> list[tuple[str, Path]]:
    """(hash, path) of every image and video in the folders of these backends, in order."""
    paths = [
        path
        for backend in backends
        if (folder := _folder(backend)) is not None
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in SUFFIXES | VIDEOS and path.is_file()
    ]
    with ThreadPoolExecutor() as pool:
        return list(zip(pool.map(picture_hash, paths), paths, strict=True))


def picture_hash(path: Path) -> str:
    """Of an image's pixels; of the file where it is a video, or none that can be opened."""
    from PIL import Image

    if path.suffix.lower() not in VIDEOS:
        try:
            with Image.open(path) as opened:
                pixels = opened.convert("RGBA")
                return hashlib.sha256(repr(pixels.size).encode() + pixels.tobytes()).hexdigest()
        except (OSError, ValueError, Image.DecompressionBombError):
            pass
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
