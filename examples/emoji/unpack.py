"""Unpack pictures.npz into folders that SimpleTuner reads: for each emoji a PNG and a .txt with its captions.

    python unpack.py          # writes datasets/fluent, fluent-held-out, noto, twemoji beside this file

Each .txt has three captions, short to long, one a line: SimpleTuner draws one of them for every step.
"""

import argparse
import io
import sys
from collections import Counter
from pathlib import Path

from emoji_set import EmojiSet
from PIL import Image

HERE = Path(__file__).parent
RESOLUTION = 128  # what the pipeline was trained at, by the same interpolation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=HERE / "pictures.npz")
    parser.add_argument("--out", type=Path, default=HERE / "datasets")
    options = parser.parse_args()
    pictures = EmojiSet.load(options.data)
    counts: Counter[str] = Counter()
    for number, (emoji, image) in enumerate(zip(pictures.emojis, pictures.images, strict=True)):
        folder = f"{emoji.style}-held-out" if pictures.is_held_out(number) else emoji.style
        counts[folder] += 1
        path = options.out / folder / emoji.file
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = Image.open(io.BytesIO(image)).convert("RGB")
        picture.resize((RESOLUTION, RESOLUTION), Image.Resampling.BICUBIC).save(path)
        path.with_suffix(".txt").write_text("\n".join(emoji.captions()) + "\n", encoding="utf-8")
    for folder, count in sorted(counts.items()):
        print(f"{options.out / folder}: {count} pictures")


if __name__ == "__main__":
    sys.exit(main())
