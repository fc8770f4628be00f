"""Pictures of emoji with their names and captions, in one .npz file.

`blob` holds the pictures (lossless webp, 64 x 64 pixels, on white) one behind the other, `off` where each begins and
the last one ends; `meta` (JSON) has style, name, short names, category, subcategory and file name of each, `held_out`
(JSON) the file names of the emoji that nothing is trained on, `sources` (JSON) the packages and their versions.
"""

from __future__ import annotations

import io
import itertools
import json
import random
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 64
STYLES = {"noto": "noto", "twemoji": "twemoji", "fluent": "fluent 3d"}  # as the captions call them


@dataclass(frozen=True)
class Emoji:
    """What is known of one picture. The same emoji has the same `file` in every style."""

    style: str
    name: str
    short_names: str
    category: str
    subcategory: str
    file: str

    def captions(self) -> tuple[str, str, str]:
        """The same in three lengths: a name, a phrase, a sentence."""
        style = STYLES[self.style]
        group = f"{self.category.lower()}, {self.subcategory.replace('-', ' ')}"
        return (
            self.name,
            f"a {style} emoji of {self.name}",
            f"an emoji in the {style} style that shows {self.name}, also called {self.short_names}, "
            f"from the group {group}, on a white background",
        )


@dataclass(frozen=True)
class EmojiSet:
    emojis: list[Emoji]
    images: list[bytes]
    held_out: frozenset[str]
    sources: dict[str, str]

    @classmethod
    def load(cls, path: Path | str) -> EmojiSet:
        with np.load(path) as archive:
            emojis = [Emoji(*row) for row in json.loads(str(archive["meta"]))]
            blob, ends = archive["blob"].tobytes(), archive["off"].tolist()
            images = [blob[start:end] for start, end in itertools.pairwise(ends)]
            held_out = json.loads(str(archive["held_out"])) if "held_out" in archive else tenth(emojis)
            sources = json.loads(str(archive["sources"])) if "sources" in archive else {}
        return cls(emojis, images, frozenset(held_out), sources)

    def save(self, path: Path | str) -> None:
        np.savez(
            path,
            blob=np.frombuffer(b"".join(self.images), dtype=np.uint8),
            off=np.cumsum([0, *map(len, self.images)]).astype(np.int64),
            meta=json.dumps([astuple(emoji) for emoji in self.emojis]),
            held_out=json.dumps(sorted(self.held_out)),
            sources=json.dumps(self.sources),
        )

    def take(self, numbers: Iterable[int]) -> EmojiSet:
        chosen = list(numbers)
        emojis, images = [self.emojis[number] for number in chosen], [self.images[number] for number in chosen]
        return EmojiSet(emojis, images, self.held_out, self.sources)

    def is_held_out(self, number: int) -> bool:
        return self.emojis[number].file in self.held_out

    def pixels(self) -> np.ndarray:
        """(N, 64, 64, 3) uint8."""

        def decode(image: bytes) -> np.ndarray:
            return np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))

        with ThreadPoolExecutor() as threads:
            return np.stack(list(threads.map(decode, self.images)))


def tenth(emojis: list[Emoji]) -> list[str]:
    """File names of a random tenth of the emoji: the same choice every time, and one for all styles."""
    files = sorted({emoji.file for emoji in emojis})
    return random.Random(1).sample(files, len(files) // 10)
