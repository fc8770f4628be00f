"""One model family under test: SimpleTuner's own model class and `model_predict` on a tiny random denoiser.

A case builds the denoiser from its real config class, makes a raw batch as SimpleTuner's collate function would, and
lets the family's own `prepare_batch` and `model_predict` run under the probe's Observer. The reference comes from
tensors cloned at the block boundary by another mechanism than the observer's hooks: the `forward` of the block's class
is replaced while the step runs (`Tape`), or hooks on norm layers where SimpleTuner bypasses the block. The distances
of the reference are taken in float64 numpy, token by token, from the token ranges that the case itself states.

This module and the cases in families/ import SimpleTuner; they run in a process of their own (run_families.py).
"""

from __future__ import annotations

import inspect
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from simpletuner_layerprobe.probe import families
from simpletuner_layerprobe.probe.observer import Observer
from simpletuner_layerprobe.training.noise import RULES, sigma_of
from simpletuner_layerprobe.training.trainer import text_mask

BATCH = 2  # samples, with different text lengths
LONGEST = 4  # blocks in a row whose distance is compared


@dataclass
class Crossing:
    """One run of a block: every argument by name, and what came out. All tensors cloned, float64 numpy on demand."""

    path: str
    arguments: dict[str, Any]
    output: Any


class Tape:
    """The block runs of one step, in order."""

    def __init__(self) -> None:
        self.crossings: list[Crossing] = []

    def of(self, path: str) -> list[Crossing]:
        return [crossing for crossing in self.crossings if crossing.path == path]


def cloned(value: Any) -> Any:
    if torch.is_tensor(value):
        return value.detach().clone()
    if isinstance(value, (list, tuple)):
        return type(value)(cloned(one) for one in value) if type(value) in (list, tuple) else value
    return value


@contextmanager
def taped_forwards(denoiser: nn.Module, kinds: Sequence[type], method: str = "forward") -> Iterator[Tape]:
    """Replace `method` of these classes by one that clones its arguments before and its output after the call."""
    tape = Tape()
    paths = {id(module): path for path, module in denoiser.named_modules()}
    originals = {kind: getattr(kind, method) for kind in kinds}

    def replacement(original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(self, *args, **kwargs).arguments
            arguments = {name: cloned(value) for name, value in bound.items() if name not in ("self", "kwargs")}
            output = original(self, *args, **kwargs)
            if id(self) in paths:
                tape.crossings.append(Crossing(paths[id(self)], arguments, cloned(output)))
            return output

        forward.__signature__ = signature  # type: ignore[attr-defined]
        return forward

    for kind, original in originals.items():
        setattr(kind, method, replacement(original))
    try:
        yield tape
    finally:
        for kind, original in originals.items():
            setattr(kind, method, original)


def angles(before: Any, after: Any) -> np.ndarray:
    """Everything of each token in float64, as records: `before` and `after` (..., D) give an array (...).

    angle: arccos(cos)/pi. norm: |after - before| / |before|. cosine: that of after - before and before. before, after:
    the states themselves.
    """
    u, v = (one.double().cpu().numpy() if torch.is_tensor(one) else one for one in (before, after))
    found = np.empty(u.shape[:-1], dtype=[*TOKEN, ("before", "f8", u.shape[-1:]), ("after", "f8", v.shape[-1:])])
    found["before"], found["after"] = u, v
    found["angle"] = np.arccos(np.clip(cosines(u, v), -1, 1)) / np.pi
    found["norm"] = np.sqrt(np.square(v - u).sum(-1) / np.square(u).sum(-1))
    found["cosine"] = cosines(v - u, u)
    return found


TOKEN = [("angle", "f8"), ("norm", "f8"), ("cosine", "f8")]


def cosines(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return (u * v).sum(-1) / (np.sqrt((u * u).sum(-1)) * np.sqrt((v * v).sum(-1)))


# The reference of one stream: for each block path in order, for each sample, the records of its tokens (`angles`) and
# which of them count for the mean (None: all). The last one is the `last` reading.
StreamReference = list[tuple[str, list[tuple[np.ndarray, np.ndarray | None]]]]


@dataclass
class Case:
    """What a family's file in families/ says of one of its denoisers.

    denoiser(): a tiny random denoiser. options: SimpleTuner options beside the defaults. raw_batch(dtype): the batch
    as the collate function returns it. tape(denoiser): the context that tapes the blocks. reference(tape, prepared,
    denoiser): stream -> StreamReference. blocks: the expected number of blocks of each stream. sigma(prepared): the
    expected sigma of each sample, by the family's own formula written out again. drawn_as(sigmas): what prescribed
    sigmas become in a family that cannot take each (DDPM has whole steps). absent: stream -> samples of the batch that
    do not have it; their readings must be NaN.
    """

    family: str
    flavour: str
    denoiser: Callable[[], nn.Module]
    raw_batch: Callable[[torch.dtype], dict[str, Any]]
    tape: Callable[[nn.Module], Any]
    reference: Callable[[Tape, Mapping[str, Any], nn.Module], dict[str, StreamReference]]
    blocks: dict[str, int]
    options: dict[str, Any] = field(default_factory=dict)
    sigma: Callable[[Mapping[str, Any]], Any] | None = None
    prepare_model: Callable[[Any], None] = lambda model: None
    drawn_as: Callable[[torch.Tensor], torch.Tensor] = lambda sigma_B: sigma_B
    absent: Mapping[str, Sequence[int]] = field(default_factory=dict)
    label: str = ""
    scheduler: Mapping[str, Any] = field(default_factory=lambda: FLOW_SCHEDULER)
    # Repositories of which the model class loads the scheduler by name, whatever the options say: they become folders
    # of that name in the working directory, which diffusers takes first.
    scheduler_repositories: Sequence[str] = ()


# What the model class reads from the pipeline folder when it is made.
FLOW_SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
DDPM_SCHEDULER = {"_class_name": "DDPMScheduler", "num_train_timesteps": 1000, "beta_schedule": "scaled_linear"}


def whole_steps(sigma_B: torch.Tensor, steps: int = 1000) -> torch.Tensor:
    """The sigmas of the DDPM steps in which these lie."""
    return (sigma_B * steps).floor() / (steps - 1)


def sigma_of_mix(prepared: Mapping[str, Any], betas: np.ndarray) -> np.ndarray:
    """The fraction of the DDPM steps at which the noise was really mixed in, found in the noisy latents alone."""
    kept_T = torch.from_numpy(np.cumprod(1 - betas)).unsqueeze(1)
    steps = []
    for latents, noise, noisy in zip(prepared["latents"], prepared["noise"], prepared["noisy_latents"], strict=True):
        mixed_TN = kept_T.sqrt() * latents.double().reshape(1, -1) + (1 - kept_T).sqrt() * noise.double().reshape(1, -1)
        off_T = (mixed_TN.to(noisy.dtype) - noisy.reshape(1, -1)).abs().sum(dim=1, dtype=torch.float64)
        steps.append(int(off_T.argmin()))
    return np.array(steps) / (len(betas) - 1)


def make_config(case: Case, dtype: torch.dtype, pipeline: Path) -> Any:
    """SimpleTuner's own options for a family, as its parser and their checks give them; `options` replace some."""
    from simpletuner.helpers.configuration.cmd_args import parse_cmdline_args

    arguments = {
        "model_family": case.family,
        "model_flavour": case.flavour,
        "model_type": "lora",
        "mixed_precision": "bf16",
        "data_backend_config": "unused",
        "output_dir": "unused",
        "pretrained_model_name_or_path": str(pipeline),
        "max_train_steps": 1,
        "num_train_epochs": "0",
        "optimizer": "adamw_bf16",
    }
    config = parse_cmdline_args([f"--{name}={value}" for name, value in arguments.items()], exit_on_error=True)
    added = {"weight_dtype": dtype, "base_weight_dtype": dtype}
    for name, value in {**added, **case.options}.items():
        setattr(config, name, value)
    return config


class Accelerator(SimpleNamespace):
    """The few things that SimpleTuner's model classes ask of accelerate's Accelerator on one CPU process."""

    def unwrap_model(self, model: Any, **_: Any) -> Any:
        return model


def make_model(case: Case, dtype: torch.dtype, denoiser: nn.Module) -> Any:
    """SimpleTuner's model object of the family, around the tiny denoiser."""
    from accelerate.utils import DistributedType
    from simpletuner.helpers.models.all import ModelRegistry
    from simpletuner.helpers.training.state_tracker import StateTracker

    pipeline = Path(tempfile.mkdtemp())
    (pipeline / "scheduler").mkdir()
    (pipeline / "scheduler" / "scheduler_config.json").write_text(json.dumps(dict(case.scheduler)))
    for repository in case.scheduler_repositories:
        shutil.copytree(pipeline / "scheduler", pipeline / repository / "scheduler")
        os.chdir(pipeline)
    config = make_config(case, dtype, pipeline)
    accelerator = Accelerator(
        device=torch.device("cpu"),
        num_processes=1,
        process_index=0,
        is_main_process=True,
        is_local_main_process=True,
        distributed_type=DistributedType.NO,
        state=SimpleNamespace(fsdp_plugin=None, deepspeed_plugin=None, parallelism_config=None),
    )
    StateTracker.set_args(config)
    model = ModelRegistry.model_families()[case.family](config, accelerator)
    StateTracker.set_model(model)
    model.check_user_config()
    config.flow_matching = model.PREDICTION_TYPE.is_flow_prediction  # as Trainer.init_noise_schedule sets it
    model.model = denoiser
    case.prepare_model(model)
    return model


@dataclass
class Outcome:
    """What one case showed in one dtype. deviation: stream.reading -> largest absolute difference.

    extra_deviation: the same of the further readings; that of a norm above 1 is relative. seams: pairs of blocks
    without a distance.
    """

    family: str
    label: str
    denoiser: str
    dtype: str
    blocks: dict[str, int]
    deviation: dict[str, float]
    extra_deviation: dict[str, float]
    seams: int
    sigma_deviation: float
    prescribed_deviation: float | None
    adapted: int
    wrong: int
    unmatched: int


def run_case(case: Case, dtype: torch.dtype, checkpointing: bool = False) -> Outcome:
    """One training step's forward of the family under the observer and the tape. Raises AssertionError."""
    torch.manual_seed(0)
    denoiser = case.denoiser().to(dtype).train()
    if checkpointing and getattr(denoiser, "_supports_gradient_checkpointing", False):
        denoiser.enable_gradient_checkpointing()  # as Trainer does
    elif checkpointing and hasattr(denoiser, "gradient_checkpointing"):
        denoiser.gradient_checkpointing = True
    model = make_model(case, dtype, denoiser)
    entry = families.family(case.family, type(denoiser).__name__)
    noise = RULES[entry.noise]
    sigmas = torch.tensor([0.8125, 0.25])
    with torch.no_grad():
        if noise.prescribe is None:
            prepared = model.prepare_batch(case.raw_batch(dtype), {"global_step": 0})
            prescribed_deviation = None
        else:
            with noise.prescribe(model, lambda count: sigmas[:count].clone()):
                prepared = model.prepare_batch(case.raw_batch(dtype), {"global_step": 0})
            prescribed_deviation = float((sigma_of(noise, model, prepared) - case.drawn_as(sigmas)).abs().max())
        sigma_B = sigma_of(noise, model, prepared)
        assert sigma_B.shape == (BATCH,), f"sigma of shape {tuple(sigma_B.shape)}"
        expected = sigma_B if case.sigma is None else torch.as_tensor(case.sigma(prepared)).reshape(BATCH)
        sigma_deviation = float((sigma_B - expected).abs().max())
        before = {name: value.clone() for name, value in denoiser.state_dict().items() if torch.is_tensor(value)}
        with Observer(denoiser, entry, residual=True, pairs=LONGEST) as observer, case.tape(denoiser) as tape:
            observer.begin(prepared, text_mask(prepared, BATCH))
            model.model_predict(prepared)
            found = observer.finish()
        after = denoiser.state_dict()
        assert all(torch.equal(value, after[name]) for name, value in before.items()), "the weights changed"
    reference = case.reference(tape, prepared, denoiser)
    assert {stream: len(paths) for stream, paths in observer.streams.items()} == case.blocks
    assert set(reference) == set(observer.streams), f"streams {set(observer.streams)}"
    deviation, extra_deviation, seams = {}, {}, 0
    for stream, blocks in reference.items():
        assert tuple(path for path, _ in blocks) == observer.streams[stream], "not the blocks of the reference"
        present = [b for b in range(BATCH) if b not in case.absent.get(stream, ())]
        last_BL = np.array([[samples[b][0]["angle"][-1] for _, samples in blocks] for b in range(BATCH)])
        mean_BL = np.array([[_mean(*samples[b]) for _, samples in blocks] for b in range(BATCH)])
        for reading, expected_BL in (("last", last_BL), ("mean", mean_BL)):
            values = found[stream, reading].double().numpy()
            assert values.shape == expected_BL.shape, f"{stream}.{reading}: {values.shape}, not {expected_BL.shape}"
            assert np.isfinite(expected_BL).all() and (mean_BL > 0)[present].all(), "the reference itself is degenerate"
            assert np.isnan(np.delete(values, present, axis=0)).all(), f"{stream}.{reading} of an absent sample"
            deviation[f"{stream}.{reading}"] = float(np.abs(values - expected_BL)[present].max(initial=0))
        expected = further_readings([samples for _, samples in blocks])
        assert {name for key, name in found if key == stream} == {"last", "mean", *expected}
        for reading, expected_BC in expected.items():
            values = found[stream, reading].double().numpy()
            assert values.shape == expected_BC.shape, f"{stream}.{reading}: {values.shape}, not {expected_BC.shape}"
            assert np.isnan(np.delete(values, present, axis=0)).all(), f"{stream}.{reading} of an absent sample"
            values, expected_BC = values[present], expected_BC[present]
            assert np.array_equal(np.isnan(values), np.isnan(expected_BC)), f"{stream}.{reading}: not the same pairs"
            off_BC = np.abs(values - expected_BC) / np.maximum(1, np.abs(expected_BC))
            extra_deviation[f"{stream}.{reading}"] = float(np.nanmax(off_BC, initial=0))
            seams += int(np.isnan(expected_BC).any(axis=0).sum())
    adapted, wrong, unmatched = prove_targets(denoiser, entry, observer.streams)
    return Outcome(
        family=case.family,
        label=case.label or case.flavour,
        denoiser=type(denoiser).__name__,
        dtype=str(dtype).removeprefix("torch."),
        blocks=case.blocks,
        deviation=deviation,
        extra_deviation=extra_deviation,
        seams=seams,
        sigma_deviation=sigma_deviation,
        prescribed_deviation=prescribed_deviation,
        adapted=adapted,
        wrong=wrong,
        unmatched=unmatched,
    )


def further_readings(blocks: list[list[tuple[np.ndarray, np.ndarray | None]]]) -> dict[str, np.ndarray]:
    """The further readings of one stream, name -> (B, columns), from the records of its tokens in each block.

    A pair is NaN where the stream does not keep its number of tokens and their width from the first block to the last.
    """
    columns: dict[str, list[float]] = {}
    for number in range(len(blocks)):
        for span in range(1, min(LONGEST, len(blocks) - number) + 1):
            for samples in zip(*blocks[number : number + span], strict=True):
                first, (last, valid) = samples[0][0], samples[-1]
                if span == 1:
                    moving = last["norm"] > 0
                    counted = moving if valid is None else moving & valid
                    columns.setdefault("update_norm_last", []).append(last["norm"][-1])
                    columns.setdefault("update_norm_mean", []).append(_mean(last, valid, "norm"))
                    columns.setdefault("update_cosine_last", []).append(last["cosine"][-1])
                    columns.setdefault("update_cosine_mean", []).append(last["cosine"][counted].mean())
                    continue
                same = {(len(tokens), tokens.dtype) for tokens, _ in samples}
                angle_S = np.full(len(last), np.nan)
                if len(same) == 1:
                    angle_S = np.arccos(np.clip(cosines(first["before"], last["after"]), -1, 1)) / np.pi
                columns.setdefault(f"pair{span}_last", []).append(angle_S[-1])
                columns.setdefault(f"pair{span}_mean", []).append((angle_S if valid is None else angle_S[valid]).mean())
    return {name: np.reshape(values, (-1, BATCH)).T for name, values in columns.items()}


def prove_targets(denoiser: nn.Module, entry: families.Family, streams: Mapping[str, Sequence[str]]) -> tuple[int, ...]:
    """The article's config for these blocks, built by LyCORIS: adapted modules, wrong ones, unmatched patterns.

    The planner's config for half of its parameters is built as well, and plans by ranks for LoHa, LoCon (LyCORIS) and
    LoRA (PEFT); each must be exactly what was counted. Budgets that are out of reach get the nearest end.
    """
    from simpletuner_layerprobe.lokr import plan as planner
    from simpletuner_layerprobe.lokr.config import article_config, article_plan, planned_config
    from simpletuner_layerprobe.lokr.lora import verify_lora
    from simpletuner_layerprobe.lokr.proof import verify
    from simpletuner_layerprobe.lokr.ranks import rank_config, rank_plan, ranks_for_budget
    from simpletuner_layerprobe.probe.modules import module_table

    blocks = list(dict.fromkeys(path for paths in streams.values() for path in paths))
    factors = [1 + index % 4 for index in range(len(blocks))]
    modules = module_table(denoiser)
    plan = article_plan(blocks, factors, entry.targets, modules)
    check = verify(article_config(blocks, factors, entry.targets), plan, modules, model_class=type(denoiser).__name__)
    groups = planner.module_groups(blocks, entry.targets, modules, streams=streams)
    value_L = np.linspace(1, 0, len(blocks))
    planned = planner.plan(groups, dict.fromkeys((planner.JOINT, *streams), value_L), check.parameters // 2)
    config = planned_config(planned.planned, blocks, entry.targets)
    proof = verify(config, planned.planned, modules, model_class=type(denoiser).__name__)
    proof.require()
    assert proof.parameters == planned.reached and not proof.unmatched, "the planner counts otherwise than LyCORIS"
    assert len(proof.rows) == len(check.rows)
    for budget in (1, 10**12):
        end = planner.plan(groups, dict.fromkeys((planner.JOINT, *streams), value_L), budget)
        assert end.reached == (end.least if budget == 1 else end.most) and abs(end.gap) == end.nearest
    for algo in ("loha", "locon", "lora"):
        least = sum(
            one.parameters for one in rank_plan(algo, blocks, np.ones((len(blocks), 2)), entry.targets, modules)
        )
        ranks = ranks_for_budget(algo, 12 - 11 * value_L, value_L, blocks, entry.targets, modules, 3 * least)
        by_rank = rank_plan(algo, blocks, ranks.rank_L2, entry.targets, modules)
        if algo == "lora":
            proof = verify_lora(by_rank, modules, model_class=type(denoiser).__name__)
        else:
            config = rank_config(algo, blocks, ranks.rank_L2, entry.targets, modules)
            proof = verify(config, by_rank, modules, model_class=type(denoiser).__name__)
        proof.require()
        assert proof.parameters == ranks.reached > least and not proof.unmatched, f"{algo} is counted otherwise"
    return len(check.rows), len(check.wrong), len(check.unmatched)


def randomised(model: nn.Module, deviation: float = 0.1) -> nn.Module:
    """The model with all parameters drawn anew, so that gates that start at zero do not hide the blocks."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, deviation)
    return model


def noise_share(prepared: Mapping[str, Any], frames: slice = slice(None)) -> torch.Tensor:
    """The sigma of each sample as the noised latents show it: noisy = (1 - sigma) * latents + sigma * noise."""
    noisy, latents, noise = (
        prepared[name].double()[:, :, frames].flatten(1) for name in ("noisy_latents", "latents", "noise")
    )
    return (((noisy - latents) * (noise - latents)).sum(1) / (noise - latents).square().sum(1)).float()


def _mean(tokens: np.ndarray, valid: np.ndarray | None, value: str = "angle") -> float:
    return float((tokens if valid is None else tokens[valid])[value].mean())


def separate(
    tape: Tape, paths: Sequence[str], argument: str, result: int | None, valid_BS: np.ndarray | None = None
) -> StreamReference:
    """The reference of a stream that is a tensor (B, S, D) of its own in each block."""
    blocks = []
    for path in paths:
        (crossing,) = tape.of(path)
        after = crossing.output if result is None else crossing.output[result]
        angle_BS = angles(crossing.arguments[argument], after)
        valid = [None] * BATCH if valid_BS is None else list(valid_BS)
        blocks.append((path, [(angle_BS[b], valid[b]) for b in range(BATCH)]))
    return blocks


def joint(
    tape: Tape,
    paths: Sequence[str],
    argument: str,
    ranges: Sequence[tuple[int, int]],
    valid_BS: Sequence[np.ndarray] | None = None,
    result: int | None = None,
) -> StreamReference:
    """The reference of a stream that is tokens ranges[b][0]:ranges[b][1] of a joint tensor (B, S, D)."""
    blocks = []
    for path in paths:
        (crossing,) = tape.of(path)
        after = crossing.output if result is None else crossing.output[result]
        angle_BS = angles(crossing.arguments[argument], after)
        samples = [
            (angle_BS[b, start:stop], None if valid_BS is None else valid_BS[b])
            for b, (start, stop) in enumerate(ranges)
        ]
        blocks.append((path, samples))
    return blocks
