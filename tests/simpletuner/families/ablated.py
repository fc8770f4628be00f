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
    that is above 1. forwards: of a sample with whole blocks left out, in runs of blocks. naive_forwards: without reuse.
    """
    denoiser = model.get_trained_component()
    with Observer(denoiser, entry) as observer:
        whole = ablated(observer, "blocks", model, prepared)
        text = ablated(observer, "text", model, prepared) if "text" in case.streams else {}
    torch.manual_seed(SEED)
    plain_batch = dict(prepared)
    plain = model.model_predict(plain_batch)
    drawn = torch.get_rng_state()
    blocks = len(observer.blocks) * (BATCH if entry.forwards == "per sample" else 1)
    assert whole["runs"] == (len(observer.blocks) + 1) / 2 * blocks
    plain_loss = losses(case, model, plain_batch, plain)
    worst = 0.0
    for stream, made in (("", whole), ("text", text)):
        if not made:
            continue
        assert torch.equal(plain["model_prediction"], made["output"]), "the plain forward is another one"
        assert torch.equal(made["drawn"], drawn), "random numbers are not as a plain forward leaves them"
        (_, increase_BL), (_, change_BL) = sorted(made["values"].items())
        for number, path in enumerate(columns(case, stream)):
            torch.manual_seed(SEED)
            batch = dict(prepared)
            with left_out(case, denoiser, path, stream):
                other = model.model_predict(batch)
            expected = losses(case, model, batch, other) - plain_loss
            worst = max(worst, off(increase_BL[:, number].double().mean(), expected))
            for b in range(BATCH):
                worst = max(worst, off(change_BL[b, number].double(), relative_change(case, batch, plain, other, b)))
    naive = float(len(observer.blocks) + 1)
    return {"ablation_deviation": worst, "forwards": whole["runs"] / blocks, "naive_forwards": naive}


def ablated(observer: Observer, mode: str, model: Any, prepared: dict[str, Any]) -> dict[str, Any]:
    step = StepAblation(observer, mode, torch.device("cpu"))
    batch = dict(prepared)
    observer.begin(batch, text_mask(batch, BATCH))
    torch.manual_seed(SEED)
    output, _, values = step.run(model, batch, model.model_predict, observer.finish)
    return {
        "output": output["model_prediction"],
        "values": {name: value for (_, name), value in values.items() if name.startswith("ablation")},
        "drawn": torch.get_rng_state(),
        "runs": step.ablation.runs,
    }


def columns(case: Case, stream: str) -> tuple[str, ...]:
    """The blocks in the order of the recorded columns: all, the image's first, or those with this stream."""
    paths = {name: tuple(path for part in parts for path in part.paths) for name, parts in case.streams.items()}
    if stream:
        return paths[stream]
    return all_blocks([paths["image"], *(paths[name] for name in paths if name != "image")])


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
