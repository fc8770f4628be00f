"""The ablation of a case beside naive forwards: all blocks run, and one of them is made to return what it got.

It shares nothing with probe/ablation.py: the `forward` of the block's class is replaced, or, where SimpleTuner bypasses
the block, hooks make zeros of what its last layers add (the case's `adds`). The loss is SimpleTuner's own.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from batches import BATCH
from streams import Part
from torch import nn

from simpletuner_layerprobe.probe.families import Family
from simpletuner_layerprobe.probe.observer import Observer
from simpletuner_layerprobe.readings import all_blocks
from simpletuner_layerprobe.training.ablation import StepAblation
from simpletuner_layerprobe.training.facts import text_mask

if TYPE_CHECKING:
    from case import Case

SEED = 7


def compare(case: Case, entry: Family, model: Any, prepared: dict[str, Any]) -> dict[str, float]:
    """ablation_deviation: the largest difference of a loss increase or a relative change, divided by what it is where
    that is above 1. block_runs: of a sample, in forwards. naive_runs: the same without reuse."""
    denoiser = model.get_trained_component()
    mode = "both" if "text" in case.streams else "blocks"
    with Observer(denoiser, entry) as observer:
        step = StepAblation(observer, mode, torch.device("cpu"))
        copy = dict(prepared)
        observer.begin(copy, text_mask(copy, BATCH))
        torch.manual_seed(SEED)
        output, values = step.run(model, copy, model.model_predict, observer.finish)
        drawn_after = torch.get_rng_state()
    torch.manual_seed(SEED)
    copy = dict(prepared)
    plain = model.model_predict(copy)
    assert torch.equal(plain["model_prediction"], output["model_prediction"]), "the plain forward is another one"
    assert torch.equal(torch.get_rng_state(), drawn_after), "random numbers are not as a plain forward leaves them"
    plain_loss = losses(case, model, copy, plain)
    worst, naive_runs = 0.0, 1
    for stream in ("block", "text") if mode == "both" else ("block",):
        paths = {name: [path for part in parts for path in part.paths] for name, parts in case.streams.items()}
        columns = all_blocks([paths["image"], *(paths[name] for name in paths if name != "image")])
        columns = tuple(paths["text"]) if stream == "text" else columns
        for number, path in enumerate(columns):
            torch.manual_seed(SEED)
            copy = dict(prepared)
            with left_out(case, denoiser, path, "" if stream == "block" else stream):
                other = model.model_predict(copy)
            naive_runs += 1
            suffix = "" if stream == "block" else "_text"
            increase_B = values[stream, f"ablation{suffix}"][:, number].double()
            change_B = values[stream, f"ablation{suffix}_change"][:, number].double()
            expected = losses(case, model, copy, other) - plain_loss
            worst = max(worst, off(increase_B.mean(), expected))
            for b in range(BATCH):
                worst = max(worst, off(change_B[b], relative_change(case, copy, plain, other, b)))
    blocks = len(observer.blocks) * (BATCH if entry.forwards == "per sample" else 1)
    if mode == "blocks":  # with the text alone it depends on when the model runs its blocks
        assert step.ablation.runs == (len(observer.blocks) + 1) / 2 * blocks, step.ablation.runs
    return {"ablation_deviation": worst, "block_runs": step.ablation.runs / blocks, "naive_runs": float(naive_runs)}


def off(value: torch.Tensor, expected: float) -> float:
    if math.isinf(expected):
        assert math.isinf(value)
        return 0.0
    return abs(float(value) - expected) / max(1.0, abs(expected))


def losses(case: Case, model: Any, batch: dict[str, Any], output: dict[str, Any]) -> float:
    """SimpleTuner's own loss of the batch; in float64 where SimpleTuner weights it, or fails."""
    value = output["model_prediction"].double()
    if case.family == "cosmos":  # weighted by sigma
        return float((value - batch["latents"].double()).square().mean())
    if case.family == "ace_step":  # weighted by the share of frames that count
        valid = batch["attention_mask"].bool()
        squares = (value - batch["latents"].double()).square()
        return float(sum(squares[b][..., valid[b]].mean() for b in range(BATCH)) / BATCH)
    if case.name == "one sample of sound alone":  # counts the video that is not there
        return float((value[0] - model.get_prediction_target(batch)[0].double()).square().mean() / BATCH)
    if case.name == "final, first frame given":  # fails: the target has a frame more
        return float((value - model.get_prediction_target(batch)[:, :, 1:].double()).square().mean())
    return float(model.loss(batch, output, apply_conditioning_mask=False))


def relative_change(case: Case, batch: dict[str, Any], plain: dict[str, Any], other: dict[str, Any], b: int) -> float:
    """Of what counts in sample b; infinite if nothing does."""
    squares = norm = 0.0
    for name in ("model_prediction", "audio_prediction", "audio_model_prediction"):
        has = batch.get("video_latent_mask" if name == "model_prediction" else "audio_latent_mask")
        if not torch.is_tensor(plain.get(name)) or (has is not None and not has[b]):
            continue
        before, after = plain[name][b].double(), other[name][b].double()
        counts = torch.ones_like(before)
        if case.family == "ace_step":
            counts *= batch["attention_mask"][b]
        if name == "model_prediction" and batch.get("vision_loss_mask") is not None:
            counts *= batch["vision_loss_mask"][b]
        if name == "model_prediction" and batch.get("video_loss_mask") is not None:
            counts *= batch["video_loss_mask"][b].reshape(1, *before.shape[1:])
        squares += float(((after - before) * counts).square().sum())
        norm += float((before * counts).square().sum())
    return (squares / norm) ** 0.5 if norm else math.inf


@contextmanager
def left_out(case: Case, denoiser: nn.Module, path: str, stream: str) -> Iterator[None]:
    """Inside, the block changes none of its states, or not this stream's tokens."""
    parts = [part for name, parts in case.streams.items() if stream in ("", name) for part in parts]
    parts = [part for part in parts if path in part.paths]
    block = denoiser.get_submodule(path)
    with ExitStack() as stack:
        if case.adds:
            names = [name for key, names in case.adds.items() if stream in ("", key) for name in names]
            for name in dict.fromkeys(names):
                layer = dict(block.named_modules()).get(name)
                if layer is not None:
                    stack.callback(layer.register_forward_hook(nothing_at(parts if stream else [])).remove)
        else:
            kind = type(block)
            stack.enter_context(mock.patch.object(kind, "forward", returning_inputs(kind, block, parts, stream)))
        yield


def nothing_at(parts: Sequence[Part]) -> Any:
    """A hook that makes zeros of what a layer gives for the tokens of these parts, for all without parts."""

    def hook(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        if parts and parts[0].at is not None and output.shape[1] == parts[0].of:
            output[:, list(parts[0].at)] = 0
        else:
            output.zero_()
        return output

    return hook


def returning_inputs(kind: type[nn.Module], block: nn.Module, parts: Sequence[Part], stream: str) -> Any:
    original = kind.forward
    signature = inspect.signature(original)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        given = {name: value.clone() for name, value in given.items() if torch.is_tensor(value)}
        output = original(self, *args, **kwargs)
        if self is not block:
            return output
        for part in parts:
            state = given[part.argument]
            if stream and part.at is not None:
                state = mixed(part, state, output if part.result is None else output[part.result])
            if part.result is None:
                output = state
            else:
                output = tuple(state if place == part.result else value for place, value in enumerate(output))
        return output

    forward.__signature__ = signature  # type: ignore[attr-defined]
    return forward


def mixed(part: Part, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """`after`, but for the part's tokens."""
    after = after.clone()
    rows, source = (after, before) if part.layout == "BSD" else (after.transpose(0, 1), before.transpose(0, 1))
    at = part.at if isinstance(part.at, tuple) else (part.at,) * BATCH
    for sample, places in enumerate(at):
        row = 0 if len(rows) == 1 else sample
        rows[row, list(places)] = source[row, list(places)]
    return after
