"""Models for the tests of plans: module tables, and a count of LoKr's numbers that knows no code of ours.

Model(modules, targets, streams, model_class)     what a plan needs to know, as a Manifest or an Architecture has it
sd3_table(blocks, width), sd3_model(blocks, width)     the linear layers of an SD3 denoiser's blocks
SMALL_TARGETS, small_model(blocks)     blocks of a feed-forward, an attention, a gate and a 3 x 3 convolution
wavy(count)     contributions of `count` blocks, 0 and 1 among them
contribution(blocks, value_L, critical=())     as a run gives them
split(dimension, factor), numbers(group, factor), monotone(groups, factors, value_L)
ARTICLE_FACTORS     the 38 factors of the article's published peft_config.json
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

import numpy as np
from synthetic_run import SD3_TARGETS

from simpletuner_layerprobe.analyse.contribution import Contribution
from simpletuner_layerprobe.lokr.groups import Group
from simpletuner_layerprobe.run.manifest import Module, Stream, Target

ARTICLE_FACTORS = [1, 4, 6, 11, 9, 10, 10, 11, 12, 11, 11, 11, 11, 11, 10, 9, 10, 9, 8]
ARTICLE_FACTORS += [6, 7, 6, 7, 6, 6, 6, 6, 5, 6, 5, 4, 1, 6, 4, 4, 1, 4, 4]
SMALL_TARGETS = (Target("blocks.*", ("ff*",), ("*",)),)


@dataclass(frozen=True)
class Model:
    modules: tuple[Module, ...]
    targets: tuple[Target, ...] = SD3_TARGETS
    streams: tuple[Stream, ...] = ()
    model_class: str = ""


def sd3_table(blocks: int, width: int) -> tuple[Module, ...]:
    """The last block does not update the text."""
    table = []
    for number in range(blocks):
        last = number == blocks - 1
        attention = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj"]
        attention += [] if last else ["to_add_out"]
        shapes = {"norm1.linear": (6 * width, width), "norm1_context.linear": ((2 if last else 6) * width, width)}
        shapes |= {f"attn.{name}": (width, width) for name in attention}
        for name in ("ff",) if last else ("ff", "ff_context"):
            shapes |= {f"{name}.net.0.proj": (4 * width, width), f"{name}.net.2": (width, 4 * width)}
        table += [Module(f"transformer_blocks.{number}.{name}", "Linear", shape) for name, shape in shapes.items()]
    return tuple(table)


@cache
def sd3_model(blocks: int, width: int) -> Model:
    paths = sd3_blocks(blocks)
    return Model(sd3_table(blocks, width), SD3_TARGETS, (Stream("image", paths), Stream("text", paths[:-1])))


def sd3_blocks(count: int) -> tuple[str, ...]:
    return tuple(f"transformer_blocks.{number}" for number in range(count))


def small_blocks(count: int) -> tuple[str, ...]:
    return tuple(f"blocks.{number}" for number in range(count))


def small_model(count: int) -> Model:
    modules = [Module("blocks", "ModuleList", ())]
    for block in small_blocks(count):
        modules += [
            Module(block, "Block", ()),
            Module(f"{block}.ff", "Linear", (12, 30)),
            Module(f"{block}.attn", "Linear", (12, 12)),
            Module(f"{block}.gate", "Linear", (3, 12)),
            Module(f"{block}.mix", "Conv2d", (8, 4, 3, 3)),
        ]
    return Model(tuple(modules), SMALL_TARGETS, (Stream("image", small_blocks(count)),))


def wavy(count: int) -> np.ndarray:
    value_L = np.sin(np.arange(count) / 2.3) + np.linspace(0, 0.1, count)
    return (value_L - value_L.min()) / (value_L.max() - value_L.min())


def contribution(blocks: Sequence[str], value_L: Any, critical: tuple[int, ...] = ()) -> Contribution:
    return Contribution(tuple(blocks), np.asarray(value_L), np.ones(len(blocks), dtype=bool), {"image": critical})


@cache
def split(dimension: int, factor: int) -> tuple[int, int]:
    """LyCORIS's split, by trying: the larger the small part, the better, up to the factor and the middle."""
    if dimension % factor == 0:
        small = min(factor, dimension // factor)
    else:
        small = max(d for d in range(1, factor + 1) if dimension % d == 0 and d * d <= dimension)
    return small, dimension // small


def numbers(group: Group, factor: int) -> int:
    total = 0
    for module in group.modules:
        (a, b), (c, d) = (split(size, factor) for size in module.shape[:2])
        total += a * c + b * d * prod(module.shape[2:])
    return total


def monotone(groups: Sequence[Group], given: Sequence[int], value_L: np.ndarray) -> bool:
    """Whether more contribution never has the larger number, in all chains."""
    pairs = list(zip(groups, given, strict=True))
    return all(
        mine <= other
        for one, mine in pairs
        for two, other in pairs
        if one.chain == two.chain and value_L[one.number] > value_L[two.number]
    )
