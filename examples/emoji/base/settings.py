"""What a training can be told."""

import argparse
from dataclasses import dataclass
from pathlib import Path

ONE_DAY = 24 * 60 * 60.0
TINY = {"limit": 90, "variants": 3, "vae_batch": 4, "batch": 8, "vae_seconds": 4.0, "seconds": 8.0, "guidance_steps": 2}


@dataclass(frozen=True)
class Settings:
    data: Path
    out: Path
    device: str
    seed: int
    vae_seconds: float
    seconds: float
    vae_steps: int
    steps: int
    vae_batch: int
    batch: int
    vae_learning_rate: float
    learning_rate: float
    weight_decay: float
    variants: int
    compile_seconds: float
    deadline: float
    limit: int | None
    guidance_steps: int


def read_settings(description: str) -> Settings:
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    add = parser.add_argument
    add("--data", type=Path, default=Path("emoji.npz"), help="made by make_data.py")
    add("--out", type=Path, required=True)
    add("--device", default="auto", help="cuda, cpu; auto: the GPU if there is one")
    add("--seed", type=int, default=0)
    add("--vae-seconds", type=float, default=75)
    add("--seconds", type=float, default=370, help="for the transformer, after its compilation")
    add("--vae-steps", type=int, default=0, help="instead of --vae-seconds: a number of steps")
    add("--steps", type=int, default=0, help="instead of --seconds: a number of steps")
    add("--vae-batch", type=int, default=64)
    add("--batch", type=int, default=512)
    add("--vae-learning-rate", type=float, default=1.5e-3)
    add("--learning-rate", type=float, default=1.2e-3)
    add("--weight-decay", type=float, default=0.02)
    add("--variants", type=int, default=24, help="of each training image, moved and resized")
    add("--compile-seconds", type=float, default=75, help="time that compiling the blocks may take; 0: not at all")
    add("--deadline", type=float, default=0, help="seconds after which the process ends whatever it is doing")
    add("--limit", type=int, help="read only so many images")
    add("--guidance-steps", type=int, default=28, help="steps for drawing the samples")
    add("--tiny", action="store_true", help="a few seconds on a CPU: few images, small batches")
    given = vars(parser.parse_args())
    if given.pop("tiny"):
        given |= TINY
    if not given["deadline"]:
        by_steps = given["vae_steps"] or given["steps"]
        planned = given["vae_seconds"] + given["seconds"] + given["compile_seconds"]
        given["deadline"] = ONE_DAY if by_steps else planned + 120
    return Settings(**given)
