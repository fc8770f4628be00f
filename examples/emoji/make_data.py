"""Make emoji.npz, the data that the example is trained on, from three npm packages (fetched by `npm pack`).

    python make_data.py --out emoji.npz

6,603 pictures of 64 x 64 pixels on white: every emoji in the styles noto and twemoji, those that exist in the style
fluent too, and of every emoji with skin tones one tone beside the neutral one. Takes a minute; fetches 150 MB.
"""

import argparse
import io
import json
import random
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from emoji_set import SIZE, Emoji, EmojiSet, tenth
from PIL import Image

NOTO = "emoji-datasource-google", "16.0.0", "package/img/google/64/{stem}.png"
TWEMOJI = "emoji-datasource-twitter", "16.0.0", "package/img/twitter/64/{stem}.png"
FLUENT = "@lobehub/fluent-emoji-3d", "1.1.0", "package/assets/{stem}.webp"
PACKAGES = {"noto": NOTO, "twemoji": TWEMOJI, "fluent": FLUENT}  # style -> name, version, where a picture lies in it
SKIN_TONES = {
    "1F3FB": "light skin",
    "1F3FC": "medium-light skin",
    "1F3FD": "medium skin",
    "1F3FE": "medium-dark skin",
    "1F3FF": "dark skin",
}


def fetch(name: str, version: str, folder: Path) -> dict[str, bytes]:
    """The package's files by their paths in it."""
    command = ["npm", "pack", "--silent", "--pack-destination", str(folder), f"{name}@{version}"]
    packed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]
    with tarfile.open(folder / packed) as archive:
        members = (member for member in archive if member.isfile() and "/sheets" not in member.name)
        return {member.name: archive.extractfile(member).read() for member in members}


def emojis_of(entries: list[dict]) -> list[tuple[str, str, str, str, str]]:
    """Name, short names, category, subcategory, file of every emoji, and of one skin tone where there are some."""
    tone_choice, emojis = random.Random(0), []
    for entry in entries:
        name = (entry["name"] or entry["short_name"]).lower()
        short_names = " ".join(entry["short_names"]).replace("-", " ").replace("_", " ")
        group = entry["category"], entry["subcategory"]
        emojis.append((name, short_names, *group, entry["image"]))
        tones = [tone for tone in entry.get("skin_variations", {}) if tone in SKIN_TONES]  # not pairs of two tones
        if tones:
            tone = tone_choice.choice(tones)
            image = entry["skin_variations"][tone]["image"]
            emojis.append((f"{name}, {SKIN_TONES[tone]}", short_names, *group, image))
    return emojis


def on_white(picture: bytes) -> bytes:
    """The picture as 64 x 64 lossless webp, its transparent parts white."""
    image = Image.open(io.BytesIO(picture)).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    flat = Image.alpha_composite(white, image).convert("RGB")
    flat.thumbnail((SIZE, SIZE), Image.Resampling.LANCZOS)
    square = Image.new("RGB", (SIZE, SIZE), "white")  # three of the fluent pictures are higher than wide
    square.paste(flat, ((SIZE - flat.width) // 2, (SIZE - flat.height) // 2))
    buffer = io.BytesIO()
    square.save(buffer, "webp", lossless=True)
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("emoji.npz"))
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as folder:
        files = {style: fetch(name, version, Path(folder)) for style, (name, version, _) in PACKAGES.items()}
    emojis, images = [], []
    for name, short_names, category, subcategory, file in emojis_of(json.loads(files["noto"]["package/emoji.json"])):
        stem = file.removesuffix(".png")
        for style, (_, _, path) in PACKAGES.items():
            paths = [path.format(stem=spelling) for spelling in {stem, stem.replace("-fe0f", "")}]
            picture = next((files[style][path] for path in sorted(paths) if path in files[style]), None)
            if picture is not None:
                emojis.append(Emoji(style, name, short_names, category, subcategory, file))
                images.append(on_white(picture))
    sources = {name: version for name, version, _ in PACKAGES.values()}
    EmojiSet(emojis, images, frozenset(tenth(emojis)), sources).save(out)
    counts = {style: sum(emoji.style == style for emoji in emojis) for style in PACKAGES}
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB, {counts}")


if __name__ == "__main__":
    sys.exit(main())
