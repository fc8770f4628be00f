"""Draw held-out captions with the pipeline as it is and with a trained adapter, beside the true pictures: one sheet.

    python draw.py --adapter output/emoji-lokr/pytorch_lora_weights.safetensors --out sheet.png

Three rows: the true pictures, which no training has seen; the pipeline; the pipeline with the adapter, from the same
noise. The adapter's lycoris_config.json lies beside it, as SimpleTuner leaves it.
"""

import argparse
import io
import json
import sys
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline
from emoji_set import EmojiSet
from lycoris import LycorisNetwork, create_lycoris
from PIL import Image, ImageDraw

HERE = Path(__file__).parent
SIDE = 128
STEPS, GUIDANCE = 28, 4.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--pipeline", type=Path, default=HERE / "pipeline")
    parser.add_argument("--data", type=Path, default=HERE / "pictures.npz")
    parser.add_argument("--style", default="fluent")
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("sheet.png"))
    options = parser.parse_args()
    captions, true = held_out(options.data, options.style, options.count)
    pipeline = StableDiffusion3Pipeline.from_pretrained(options.pipeline, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    before = draw(pipeline, captions, options.seed)
    apply(options.adapter, pipeline.transformer)
    after = draw(pipeline, captions, options.seed)
    sheet({"true": true, "before": before, "after": after}).save(options.out)
    print(f"{options.out}: {len(captions)} captions that no training has seen; true pictures, before, after")


def apply(adapter: Path, transformer: torch.nn.Module) -> None:
    """Put the adapter onto the transformer.

    The network is built from its config: from the file alone LyCORIS 4.1.3 cannot tell the factors of a LoKr whose w1
    is not square.
    """
    config = json.loads((adapter.parent / "lycoris_config.json").read_text(encoding="utf-8"))
    LycorisNetwork.apply_preset(config.pop("apply_preset"))
    first = [config.pop(name) for name in ("multiplier", "linear_dim", "linear_alpha")]
    network = create_lycoris(transformer, *first, **config)
    network.apply_to()
    loaded = network.load_weights(str(adapter))
    if loaded:
        raise SystemExit(f"{adapter} is not of this config: {str(loaded)[:200]}")


def held_out(data: Path, style: str, count: int) -> tuple[list[str], list[Image.Image]]:
    """Captions of middle length and pictures, spread over all that were held out of this style."""
    pictures = EmojiSet.load(data)
    numbers = [n for n, emoji in enumerate(pictures.emojis) if emoji.style == style and pictures.is_held_out(n)]
    numbers = numbers[:: max(1, len(numbers) // count)][:count]
    images = [Image.open(io.BytesIO(pictures.images[n])).convert("RGB") for n in numbers]
    captions = [pictures.emojis[n].captions()[1] for n in numbers]
    return captions, [image.resize((SIDE, SIDE), Image.Resampling.BICUBIC) for image in images]


def draw(pipeline: StableDiffusion3Pipeline, captions: list[str], seed: int) -> list[Image.Image]:
    return pipeline(
        captions,
        height=SIDE,
        width=SIDE,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        max_sequence_length=77,
        generator=torch.Generator().manual_seed(seed),
    ).images


def sheet(rows: dict[str, list[Image.Image]]) -> Image.Image:
    """The pictures of each row side by side, its name in front."""
    label = 60
    made = Image.new("RGB", (label + SIDE * max(map(len, rows.values())), SIDE * len(rows)), "white")
    for y, (name, pictures) in enumerate(rows.items()):
        ImageDraw.Draw(made).text((8, y * SIDE + SIDE // 2 - 6), name, fill="black")
        for x, picture in enumerate(pictures):
            made.paste(picture, (label + x * SIDE, y * SIDE))
    return made


if __name__ == "__main__":
    sys.exit(main())
