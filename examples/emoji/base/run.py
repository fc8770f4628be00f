"""A whole training, from the pictures to the sheet of samples."""

import json
import random
from dataclasses import asdict

import diffusers
import torch
import transformers
from emoji_set import EmojiSet
from torch import Tensor

from base.model import TextToVelocity
from base.pictures import Pictures
from base.pipeline import draw, load_pipeline, sample_sheet, save_pipeline
from base.settings import Settings
from base.timing import Clock
from base.training import Training
from base.vae import Latents, new_vae, train_vae
from base.vocabulary import Captions, new_clip_tokenizer, new_t5_tokenizer

UNSEEN_STYLE = "fluent"
SAMPLES = 12  # of trained captions, and as many of held-out ones


def prepare_torch(settings: Settings) -> torch.device:
    torch.manual_seed(settings.seed)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
    if settings.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(settings.device)


def run(settings: Settings, start: float) -> None:
    settings.out.mkdir(parents=True, exist_ok=True)
    folder = settings.out / "pipeline"
    clock = Clock(start, settings.deadline, settings.out / "train.log")
    device = prepare_torch(settings)
    card = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    versions = {module.__name__: str(module.__version__) for module in (torch, diffusers, transformers)}
    clock.log(card, versions, "deadline", settings.deadline)

    data = EmojiSet.load(settings.data)
    if settings.limit:
        data = data.take(range(settings.limit))
    pictures, count = Pictures(data.pixels(), device), len(data.emojis)
    seen = [number for number in range(count) if data.emojis[number].style != UNSEEN_STYLE]
    train = [number for number in seen if not data.is_held_out(number)]
    held_out = [number for number in seen if data.is_held_out(number)]
    for_vae = [number for number in range(count) if not data.is_held_out(number)]
    clock.log(f"{count} images, {len(train)} to train on, {len(held_out)} held out")

    texts = [caption for emoji in data.emojis for caption in emoji.captions()]
    clip, t5 = new_clip_tokenizer(texts), new_t5_tokenizer(texts)
    captions = Captions([data.emojis[number] for number in train + held_out], clip, t5, device)
    vae, model = new_vae().to(device), TextToVelocity(clip, t5).to(device)
    parts = {"vae": vae, **dict(model.named_children())}
    millions = {name: round(sum(p.numel() for p in part.parameters()) / 1e6, 2) for name, part in parts.items()}
    clock.log(f"tokens: CLIP {len(clip)}, T5 {len(t5)}; parameters in millions: {millions}")

    numbers = {
        "card": card,
        "versions": versions,
        "data": data.sources,
        "millions": millions,
        "settings": {name: value for name, value in asdict(settings).items() if name not in ("data", "out")},
        "train": len(train),
        "held_out": len(held_out),
        "held_out_names": sorted(data.held_out),
    }

    def save(weights: list[Tensor], **more: object) -> None:
        save_pipeline(folder, model, weights, vae, clip, t5)
        numbers.update(more, wall_seconds=round(clock.seconds(), 1))
        (settings.out / "train.json").write_text(json.dumps(numbers, indent=1) + "\n")
        clock.log("saved")

    # A rehearsal of the end: what cannot be saved, loaded or drawn shall fail now and not in nine minutes.
    save([parameter.detach() for parameter in model.parameters()], finished=False)
    draw(load_pipeline(folder, device), texts[1:2], steps=1)
    clock.log("rehearsed")

    numbers["vae"] = train_vae(vae, pictures, torch.tensor(for_vae, device=device), settings, clock)
    clock.log("VAE:", numbers["vae"])
    train_index, held_out_index = (torch.tensor(index, device=device) for index in (train, held_out))
    latents = Latents(vae, pictures, train_index, held_out_index, settings.variants, settings.seed)
    numbers["latent_std"] = round(latents.std_VNCHW.float().mean().item(), 4)
    clock.log(f"latents: shift {latents.shift:.4f}, scale {latents.scale:.4f}, each with std {numbers['latent_std']}")

    training = Training(model, latents, captions, len(train), settings)
    trained = training.run(settings, clock, lambda so_far: save(training.mean_weights, transformer=so_far))
    save(training.mean_weights, transformer=trained, finished=True)

    choice = random.Random(3)
    shown = choice.sample(train, min(SAMPLES, len(train))) + choice.sample(held_out, min(SAMPLES, len(held_out)))
    prompts = [data.emojis[number].captions()[1] for number in shown]
    sheet = sample_sheet(load_pipeline(folder, device), pictures, shown, prompts, settings.guidance_steps)
    sheet.save(settings.out / "samples.png")
    clock.log("samples.png, from left to right, in each half:", "; ".join(prompts))
