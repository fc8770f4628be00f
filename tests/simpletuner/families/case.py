"""One model family under test: SimpleTuner's own model class and `model_predict` on a tiny random denoiser.

A case (table.py) builds the denoiser and a raw batch; the family's own `prepare_batch` and `model_predict` run under
the probe's Observer and a tape (reference.py), and both must tell the same.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ablated
import numpy as np
import torch
from batches import BATCH, Batch
from models import Denoiser, Prepare
from noise import FLOW, Noise
from proof import prove
from reference import Streams, Tape, readings, steps_of, taped
from torch import nn

from simpletuner_layerprobe.errors import SeamError
from simpletuner_layerprobe.probe import families
from simpletuner_layerprobe.probe.modules import module_table
from simpletuner_layerprobe.probe.observer import Observer
from simpletuner_layerprobe.training.facts import text_mask
from simpletuner_layerprobe.training.noise import RULES, sigma_of
from simpletuner_layerprobe.training.noise_check import NoiseCheck

LONGEST = 4  # blocks in a row whose distance is compared
SIGMAS = torch.tensor([0.8125, 0.25])  # prescribed


@dataclass(frozen=True)
class Case:
    """A denoiser of a family, a batch for it, and what the probe must say of it.

    denoiser(): a tiny random denoiser. batch(dtype): the batch as the collate function returns it. streams: which
    tokens of which state are whose. noise: the family's own formula. options: SimpleTuner's, beside the defaults.
    prepare: functions of SimpleTuner's model object, before the step. tape: what tapes the blocks. adds: where
    SimpleTuner bypasses the blocks, stream -> the layers of a block whose outputs it adds to the stream. absent:
    stream -> samples of the batch that do not have it; their readings must be NaN. label: if the flavour does not tell
    the case. repositories: of which the model class loads the scheduler by name, whatever the options say.
    """

    family: str
    flavour: str
    denoiser: Denoiser
    batch: Batch
    streams: Streams
    noise: Noise = FLOW
    options: Mapping[str, Any] = field(default_factory=dict)
    prepare: Sequence[Prepare] = ()
    tape: Callable[[nn.Module, Streams], AbstractContextManager[Tape]] = taped
    adds: Mapping[str, Sequence[str]] = field(default_factory=dict)
    absent: Mapping[str, Sequence[int]] = field(default_factory=dict)
    label: str = ""
    repositories: Sequence[str] = ()

    @property
    def name(self) -> str:
        return self.label or self.flavour


@dataclass
class Outcome:
    """What a case showed in one run. deviation: stream.reading -> largest absolute difference.

    extra_deviation: the same of the further readings; that of a value above 1 is relative. seams: pairs of blocks
    without a distance. prescribed_deviation: None in a family that chooses its noise itself. noise_difference: between
    sigma and the noise in the latents, by the probe's own check; None where it cannot tell. adapted, wrong, unmatched:
    modules and patterns of the LoKr config (proof.py). ablation: see ablated.py; {} in runs without it.
    """

    family: str
    label: str
    denoiser: str
    blocks: dict[str, int]
    sigma_deviation: float
    prescribed_deviation: float | None
    noise_difference: float | None
    deviation: dict[str, float]
    extra_deviation: dict[str, float]
    seams: int
    adapted: int
    wrong: int
    unmatched: int
    ablation: dict[str, float]


def run_case(case: Case, dtype: torch.dtype, checkpointing: bool = False, ablation: bool = False) -> Outcome:
    """One training step's forward of the family under the observer and the tape. Raises AssertionError.

    ablation: also leave out every block.
    """
    torch.manual_seed(0)
    denoiser = case.denoiser().to(dtype).train()
    if checkpointing and getattr(denoiser, "_supports_gradient_checkpointing", False):
        denoiser.enable_gradient_checkpointing()  # as Trainer does
    elif checkpointing and hasattr(denoiser, "gradient_checkpointing"):
        denoiser.gradient_checkpointing = True
    model = make_model(case, dtype, denoiser)
    entry = families.family(case.family, type(denoiser).__name__)
    with torch.no_grad():
        prepared, noise = prepared_batch(case, entry, model, dtype)
        again = dict(prepared)
        before = {name: value.clone() for name, value in denoiser.state_dict().items() if torch.is_tensor(value)}
        with (
            Observer(denoiser, entry, residual=True, pairs=LONGEST) as observer,
            case.tape(denoiser, case.streams) as tape,
        ):
            observer.begin(prepared, text_mask(prepared, BATCH))
            model.model_predict(prepared)
            distances = observer.finish()
        left_out = ablated.compare(case, entry, model, again) if ablation else {}
        after = denoiser.state_dict()
        assert all(torch.equal(value, after[name]) for name, value in before.items()), "the weights changed"
    paths = {stream: tuple(path for part in parts for path in part.paths) for stream, parts in case.streams.items()}
    assert observer.streams == paths, f"not the blocks of the case: {observer.streams}"
    assert {stream for stream, _ in distances} == set(paths)
    comparison = Comparison()
    for stream in paths:
        values = {reading: value.double().numpy() for (key, reading), value in distances.items() if key == stream}
        comparison.add(
            stream, values, readings(steps_of(tape, case.streams[stream]), LONGEST), case.absent.get(stream, ())
        )
    return Outcome(
        family=case.family,
        label=case.name,
        denoiser=type(denoiser).__name__,
        blocks={stream: len(blocks) for stream, blocks in paths.items()},
        **noise,
        **vars(comparison),
        ablation=left_out,
        **prove(type(denoiser).__name__, entry, tuple(paths.items()), tuple(module_table(denoiser))),
    )


def prepared_batch(case: Case, entry: families.Family, model: Any, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """The batch after `prepare_batch`, and what its noise shows: three fields of Outcome.

    The probe's own check of the noise must let these sigmas pass, and none that are off by a tenth.
    """
    rule = RULES[entry.noise]
    prescribed = rule.prescribe(model, lambda count: SIGMAS[:count].clone()) if rule.prescribe else nullcontext()
    with prescribed:
        prepared = model.prepare_batch(case.batch(dtype), {"global_step": 0})
    sigma_B = sigma_of(rule, model, prepared)
    assert sigma_B.shape == (BATCH,), f"sigma of shape {tuple(sigma_B.shape)}"
    differences = []
    for claimed_B in (sigma_B, sigma_B + 0.1):
        check = NoiseCheck(rule, case.family)
        check.add(model, prepared, claimed_B)
        differences.append(worst_difference(check))
    assert differences[0] != math.inf and differences[1] in (math.inf, None), differences
    shown = {
        "sigma_deviation": float((sigma_B - case.noise.sigma(prepared)).abs().max()),
        "prescribed_deviation": float((sigma_B - case.noise.drawn_as(SIGMAS)).abs().max()) if rule.prescribe else None,
        "noise_difference": differences[0],
    }
    return prepared, shown


def worst_difference(check: NoiseCheck) -> float | None:
    """Infinite if the check refuses the sigmas; None if it cannot tell."""
    try:
        return check.require()
    except SeamError:
        return math.inf


@dataclass
class Comparison:
    """The probe's readings beside the reference's, over all streams; see Outcome."""

    deviation: dict[str, float] = field(default_factory=dict)
    extra_deviation: dict[str, float] = field(default_factory=dict)
    seams: int = 0

    def add(
        self, stream: str, values: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray], absent: Sequence[int]
    ) -> None:
        """values, expected: reading -> (B, C). absent: samples without the stream."""
        assert set(values) == set(expected)
        present = [b for b in range(BATCH) if b not in absent]
        for reading, expected_BC in expected.items():
            name, values_BC = f"{stream}.{reading}", values[reading]
            assert values_BC.shape == expected_BC.shape, f"{name}: {values_BC.shape}, not {expected_BC.shape}"
            assert np.isnan(np.delete(values_BC, present, axis=0)).all(), f"{name} of an absent sample"
            plain = reading in ("last", "mean")
            if plain:
                assert np.isfinite(expected_BC).all() and (expected["mean"] > 0)[present].all(), (
                    "a degenerate reference"
                )
            values_BC, expected_BC = values_BC[present], expected_BC[present]
            assert np.array_equal(np.isnan(values_BC), np.isnan(expected_BC)), f"{name}: not the same pairs"
            off_BC = np.abs(values_BC - expected_BC) / np.maximum(1, np.abs(expected_BC))
            (self.deviation if plain else self.extra_deviation)[name] = float(np.nanmax(off_BC, initial=0))
            self.seams += int(np.isnan(expected_BC).any(axis=0).sum())


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
    (pipeline / "scheduler" / "scheduler_config.json").write_text(json.dumps(dict(case.noise.scheduler)))
    for repository in case.repositories:  # diffusers takes a folder of that name in the working directory first
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
    for prepare in case.prepare:
        prepare(model)
    return model


def make_config(case: Case, dtype: torch.dtype, pipeline: Path) -> Any:
    """SimpleTuner's own options for a family, as its parser and their checks give them; the case's replace some."""
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
    for name, value in {"weight_dtype": dtype, "base_weight_dtype": dtype, **case.options}.items():
        setattr(config, name, value)
    return config
