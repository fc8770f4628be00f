"""Tapes for the families of which SimpleTuner never calls a block: their states are what the norm layers get.

Each fills a Tape (reference.py) when the step is over, as if its blocks had been called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any

import torch
from batches import BATCH, TEXT
from reference import Crossing, Streams, Tape
from torch import nn


@contextmanager
def _inputs(*norms: nn.Module) -> Iterator[list[torch.Tensor]]:
    """What these modules get, cloned, in the order in which they run."""
    states: list[torch.Tensor] = []
    with ExitStack() as stack:
        for norm in norms:
            hook = norm.register_forward_pre_hook(lambda _, args: states.append(args[0].clone()))
            stack.callback(hook.remove)
        yield states


@contextmanager
def sd3(model: nn.Module, streams: Streams) -> Iterator[Tape]:
    """Each block has a norm for each stream; the last norm gets the image after the last block, which has no text."""
    tape: Tape = {}
    blocks = model.transformer_blocks
    with (
        _inputs(*(block.norm1.norm for block in blocks), model.norm_out.norm) as images,
        _inputs(*(block.norm1_context.norm for block in blocks)) as texts,
    ):
        yield tape
    for index, (before, after) in enumerate(pairwise(images)):
        text = texts[index : index + 2]
        crossing = Crossing({"image": before, "text": text[0]}, (after, text[-1]))
        tape[f"transformer_blocks.{index}"] = [crossing]
    assert len(tape) == len(blocks) == len(texts)


@contextmanager
def longcat_image(model: nn.Module, streams: Streams) -> Iterator[Tape]:
    """Double blocks have a norm for each stream, single ones a norm over [text | image].

    After the last block only the image is seen, by the last norm; the text after it is the residual of the block's last
    projection, which is added up here.
    """
    tape: Tape = {}
    double, single = model.transformer_blocks, model.single_transformer_blocks
    last = single[-1]
    with (
        _inputs(*(block.norm1.norm for block in double)) as images,
        _inputs(*(block.norm1_context.norm for block in double)) as texts,
        _inputs(*(block.norm.norm for block in single)) as joined,
        _inputs(model.norm_out.norm) as ends,
        _outputs(last.norm.linear, last.proj_out) as (modulation, projected),
    ):
        yield tape
    # With references there is a timestep for each token.
    gate = modulation[0].reshape(BATCH, -1, modulation[0].shape[-1]).chunk(3, dim=-1)[2]
    joined.append(joined[-1] + gate * projected[0])
    assert torch.equal(joined[-1][:, TEXT:], ends[0])
    states = [torch.cat(pair, dim=1) for pair in zip(texts, images, strict=True)] + joined
    paths = [f"transformer_blocks.{i}" for i in range(len(double))]
    paths += [f"single_transformer_blocks.{i}" for i in range(len(single))]
    for path, (before, after) in zip(paths, pairwise(states), strict=True):
        tape[path] = [Crossing({"hidden_states": before}, after)]


@contextmanager
def _outputs(*modules: nn.Module) -> Iterator[list[list[torch.Tensor]]]:
    """What each of these modules returns, in every run."""
    outputs: list[list[torch.Tensor]] = [[] for _ in modules]

    def keep(states: list[torch.Tensor]) -> Callable[..., None]:
        return lambda module, args, output: states.append(output.clone())

    with ExitStack() as stack:
        for module, states in zip(modules, outputs, strict=True):
            stack.callback(module.register_forward_hook(keep(states)).remove)
        yield outputs


@contextmanager
def cosmos3(model: Any, streams: Streams) -> Iterator[Tape]:
    """One forward for each sample, with states (S, D): before each block by its first norm, at the end by the last."""
    tape: Tape = {}
    with _inputs(*(layer.input_layernorm_moe_gen for layer in model.layers), model.norm_moe_gen) as states:
        yield tape
    forwards = [states[start : start + len(model.layers) + 1] for start in range(0, len(states), len(model.layers) + 1)]
    assert len(forwards) == BATCH
    for index, (before, after) in enumerate(pairwise(map(torch.stack, zip(*forwards, strict=True)))):
        tape[f"layers.{index}"] = [Crossing({"gen_seq": before}, after)]
