"""The engine on this device: precision, the faster attention, compiled blocks that do the same as uncompiled ones."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from weighting.arm import Arm, Training
from weighting.block import attention
from weighting.engine import Engine
from weighting.task import BATCH, Task, load_transformer, read_json

REHEARSED, SAME = 12, 0.01
HARMLESS = 1e-4


def memory() -> str:
    return f", {torch.cuda.max_memory_allocated() / 1e9:.0f} GB" if torch.cuda.is_available() else ""


def set_precision(name: str) -> None:
    """tf32: products of float32 matrices with ten bits of the mantissa on a GPU. highest: all. bf16: see Engine."""
    torch.set_float32_matmul_precision("highest" if name == "highest" else "high")
    torch.backends.cudnn.allow_tf32 = name != "highest"


def faster_attention(engine: Engine, trainings: int, tokens: int) -> str:
    """fused or plain, whichever is faster in float32 for as many trainings."""
    if engine.device.type != "cuda":
        return "fused"
    times = {}
    width = engine.model.config.attention_head_dim
    shape = (trainings * BATCH, engine.heads, tokens, width)
    for how in ("fused", "plain"):
        q, k, v = (torch.randn(shape, device=engine.device, requires_grad=True) for _ in range(3))
        for _ in range(2):
            torch.cuda.synchronize()
            begin = time.monotonic()
            attention(q, k, v, how).sum().backward()
            torch.cuda.synchronize()
            times[how] = time.monotonic() - begin
        del q, k, v
    torch.cuda.empty_cache()
    said = ", ".join(f"{how} {seconds * 1e3:.1f} ms" for how, seconds in times.items())
    print(f"attention of a block, {trainings} trainings: {said}", flush=True)
    return min(times, key=lambda how: times[how])


def checked_attention(by_way: Mapping[str, Mapping[str, float]]) -> str:
    """bf16 if it changes no difference between arms by more than HARMLESS against full float32, else auto."""
    full, half = by_way["highest, attention fused"], by_way["tf32, attention bf16"]
    change = max(abs(full[name] - half[name]) for name in full if name.endswith("- uniform"))
    print(f"attention in bf16 changes a difference between arms by {change:.1e} at most", flush=True)
    return "bf16" if change <= HARMLESS else "auto"


def make_engine(folder: Path, options: argparse.Namespace, task: Task, arm: Arm) -> Engine:
    """The engine, its blocks compiled if that works."""
    model, trainings = load_transformer(folder, options.device), options.trainings
    engine = Engine(model, compiled=options.compile, attention=options.attention, mixed=options.precision == "bf16")
    if options.attention == "checked":
        engine.attention = checked_attention(read_json(options.check)["precision"])
    if engine.attention == "auto":
        image_tokens = (task.train.clean.shape[-1] // model.config.patch_size) ** 2
        engine.attention = faster_attention(engine, trainings, image_tokens + task.train.text.shape[2])
    if not options.compile:
        return engine
    plain = Engine(model, attention=engine.attention, mixed=engine.mixed)
    begin = time.monotonic()
    try:
        found = rehearsal(engine, task, arm, trainings)
        print(f"blocks compiled in {time.monotonic() - begin:.0f} s", flush=True)
        difference = (found / rehearsal(plain, task, arm, trainings) - 1).abs().max().item()
        print(f"compiled and not, {REHEARSED} steps: losses differ by {difference:.1e} at most", flush=True)
        if difference < SAME:
            return engine
    except Exception as error:
        print(f"not compiled: {str(error)[:500]}", flush=True)
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    return plain


def rehearsal(engine: Engine, task: Task, arm: Arm, trainings: int) -> torch.Tensor:
    """Losses of a short training and a small judgement."""
    filled = [Training(arm, 0, 4e-3)] * trainings
    stack, loss_TE = engine.train(filled, task.batches([0], REHEARSED), REHEARSED)
    return torch.cat([loss_TE.flatten(), engine.judge(stack, task.judge_samples([0, 1])).flatten()])


def machine(options: argparse.Namespace, seconds: float) -> dict[str, object]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {
        "device": device,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "seconds": round(seconds),
        "steps": options.steps,
        "trainings_at_once": options.trainings,
        "precision": options.precision,
        "compiled": options.compile,
    }
