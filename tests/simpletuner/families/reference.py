"""The reference of a case: states cloned at the block's boundary while a step runs, readings in float64 numpy.

It shares nothing with the observer: the `forward` of the blocks' class is replaced (`taped`), or hooks sit on norm
layers where SimpleTuner bypasses the block (bypassed.py), and the case itself states which tokens are whose.
Shapes: B batch, S tokens, D width, C columns (blocks, or pairs of blocks).
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from batches import BATCH
from streams import Part, Streams
from torch import nn


@dataclass
class Crossing:
    """One run of a block: its tensor arguments by name, and what came out; all tensors cloned."""

    arguments: dict[str, torch.Tensor]
    output: Any


Tape = dict[str, list[Crossing]]  # by the block's path


@contextmanager
def taped(denoiser: nn.Module, streams: Streams) -> Iterator[Tape]:
    """While the context lasts, the forward of the blocks' classes clones what goes in and what comes out."""
    tape: Tape = defaultdict(list)
    paths = {id(module): path for path, module in denoiser.named_modules()}
    blocks = [path for parts in streams.values() for part in parts for path in part.paths]
    with ExitStack() as stack:
        for kind in {type(denoiser.get_submodule(path)) for path in blocks}:
            stack.enter_context(mock.patch.object(kind, "forward", _taping(kind.forward, paths, tape)))
        yield tape


def _taping(original: Callable[..., Any], paths: Mapping[int, str], tape: Tape) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs).arguments
        arguments = {name: cloned(value) for name, value in bound.items() if torch.is_tensor(value)}
        output = original(self, *args, **kwargs)
        if id(self) in paths:
            tape[paths[id(self)]].append(Crossing(arguments, cloned(output)))
        return output

    forward.__signature__ = signature  # type: ignore[attr-defined]
    return forward


def cloned(value: Any) -> Any:
    if torch.is_tensor(value):
        return value.detach().clone()
    return tuple(map(cloned, value)) if isinstance(value, (tuple, list)) else value


@dataclass
class Step:
    """A stream of one sample in one block: its states before and after, (S, D) float64, and the tokens that count."""

    before: np.ndarray
    after: np.ndarray
    valid: np.ndarray


def steps_of(tape: Tape, parts: Sequence[Part]) -> list[list[Step]]:
    """Each block of a stream, and in it each sample."""
    return [_samples(part, *tape[path]) for part in parts for path in part.paths]


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "BSD": lambda state: state,
    "SBD": lambda state: state.transpose(0, 1),
    "BDHW": lambda state: state.flatten(2).transpose(1, 2),
}


def _samples(part: Part, crossing: Crossing) -> list[Step]:
    output = crossing.output if part.result is None else crossing.output[part.result]
    states = [LAYOUTS[part.layout](state).double().numpy() for state in (crossing.arguments[part.argument], output)]
    assert states[0].shape[1] == states[1].shape[1] == part.of, f"{part.argument} has {states[0].shape[1]} tokens"
    at = range(part.of) if part.at is None else part.at
    samples = []
    for b, places in enumerate(at if isinstance(at, tuple) else (at,) * BATCH):
        before, after = (state[0 if len(state) == 1 else b, list(places)] for state in states)
        samples.append(Step(before, after, np.ones(len(before), bool) if part.valid is None else part.valid[b]))
    return samples


def readings(blocks: list[list[Step]], longest: int) -> dict[str, np.ndarray]:
    """Every reading of one stream, name -> (B, C) float64; `last` is a stream's last token.

    A pair over n blocks is NaN where the stream does not keep its number of tokens and their width from the first block
    to the last.
    """
    columns: dict[str, list[float]] = defaultdict(list)

    def keep(name: str, values_S: np.ndarray, valid_S: np.ndarray) -> None:
        columns[f"{name}last"].append(values_S[-1])
        columns[f"{name}mean"].append(values_S[valid_S].mean())

    for number in range(len(blocks)):
        for span in range(1, min(longest, len(blocks) - number) + 1):
            for steps in zip(*blocks[number : number + span], strict=True):
                first, last = steps[0], steps[-1]
                if len({(step.before.shape, step.after.shape) for step in steps}) > 1:
                    angle_S = np.full(len(last.after), np.nan)
                else:
                    angle_S = np.arccos(np.clip(cosine(first.before, last.after), -1, 1)) / np.pi
                keep("" if span == 1 else f"pair{span}_", angle_S, last.valid)
                if span == 1:
                    update = last.after - last.before
                    norm_S = np.sqrt(np.square(update).sum(-1) / np.square(last.before).sum(-1))
                    keep("update_norm_", norm_S, last.valid)
                    keep("update_cosine_", cosine(update, last.before), last.valid & (norm_S > 0))
    return {name: np.reshape(values, (-1, BATCH)).T for name, values in columns.items()}


def cosine(u_SD: np.ndarray, v_SD: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return (u_SD * v_SD).sum(-1) / (np.sqrt((u_SD * u_SD).sum(-1)) * np.sqrt((v_SD * v_SD).sum(-1)))
