"""The ablation of a training step: its forward again for every block that is left out, with everything else the same.

Shape letters: B samples of the batch, L blocks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch

from simpletuner_layerprobe.errors import ConfigError, ModelError
from simpletuner_layerprobe.probe.ablation import Ablation
from simpletuner_layerprobe.probe.draws import Draws, restored
from simpletuner_layerprobe.probe.observer import Observer
from simpletuner_layerprobe.readings import WHOLE, ablation_readings, all_blocks, parse_reading
from simpletuner_layerprobe.training.losses import Prediction, predictions, relative_changes, sample_losses

Predict = Callable[[dict[str, Any]], Any]
Distances = dict[tuple[str, str], torch.Tensor]
"""(stream, reading) -> (B, L)."""

SHARE_OF_FREE = 0.6
"""How much of the free memory the kept states may take; the rest is for what a block needs while it runs."""


class StepAblation:
    """Leaves the blocks of a model out, one after the other, in one training step after the other.

    mode: of training/options.py. readings: what it gives, by name. ablation: what the last step kept and ran.
    Raises ConfigError if text updates are asked for of a model without a text stream.
    """

    def __init__(self, observer: Observer, mode: str, device: torch.device) -> None:
        self._observer = observer
        self._rule = observer.family.target
        blocks, text = mode in ("blocks", "both"), mode in ("text", "both")
        if text and "text" not in observer.streams:
            raise ConfigError(
                f"layerprobe_ablation is {mode!r}, but no block of {type(observer.denoiser).__name__} updates a text "
                f"stream; set it to 'blocks'"
            )
        self.readings = ablation_readings(blocks, text)
        self.ablation = Ablation(observer.blocks, SHARE_OF_FREE * free_bytes(device))
        self._said = False
        every = all_blocks(list(observer.streams.values()))
        self._left_out = {
            stream: every if stream == WHOLE else observer.streams["text"]
            for stream in dict.fromkeys(parse_reading(name).stream for name in self.readings)
        }

    @property
    def forwards(self) -> float:
        """How many forwards a step with it takes, in runs of blocks; more where the kept states have no room."""
        place = {block.path: number for number, block in enumerate(self._observer.blocks)}
        runs = sum(len(place) - 1 - place[path] for paths in self._left_out.values() for path in paths)
        return 1 + runs / len(place)

    def run(
        self, model: Any, batch: dict[str, Any], predict: Predict, seen: Callable[[], Distances]
    ) -> tuple[Any, torch.Tensor, Distances]:
        """(what `predict` gives for this batch, its losses (B,), (stream, reading) -> (B, L) float32) of a step.

        seen: gives the distances of the plain forward, and ends their taking; they are in the result too. Random
        numbers and the batch are those of the plain forward in all of them, and as it left them afterwards. A number
        that is not finite is given as infinite. Raises ModelError for a model that cannot be run without its blocks.
        """
        draws, same = Draws(), _Snapshot(batch)
        with self.ablation.keep(self._observer.part):
            output = predict(batch)
        distances = dict(seen())
        same.check()
        plain = self._predictions(model, batch, output)
        loss_B = sample_losses(plain)
        with restored():
            for stream, paths in self._left_out.items():
                increases, changes = [], []
                for path in paths:
                    draws.restore()
                    again = same.copy()
                    with self.ablation.without(path, "" if stream == WHOLE else stream):
                        other = self._predictions(model, again, predict(again))
                    increases.append(sample_losses(other) - loss_B)
                    changes.append(relative_changes(plain, other))
                names = [name for name in self.readings if parse_reading(name).stream == stream]
                for name, columns in zip(names, (increases, changes), strict=True):
                    value_BL = torch.stack(columns, dim=1)
                    distances[stream, name] = torch.where(value_BL.isfinite(), value_BL, torch.inf)
        self._say_what_had_no_room()
        self.ablation.forget()
        return output, loss_B, distances

    def _say_what_had_no_room(self) -> None:
        """Once: a step with it takes longer than it need."""
        if self.ablation.missing and not self._said:
            self._said = True
            blocks, kept = len(self._observer.blocks), self.ablation.kept_bytes / 2**20
            print(
                f"layerprobe: warning: the states of {self.ablation.missing} of {blocks} blocks have no room beside "
                f"the model ({kept:,.0f} MiB of the others are kept), so these blocks run again each time: "
                f"{self.ablation.runs / blocks:.1f} forwards for a sample with blocks left out, not "
                f"{self.forwards:.1f}; a smaller train_batch_size makes room",
                flush=True,
            )

    def _predictions(self, model: Any, batch: Mapping[str, Any], output: Any) -> list[Prediction]:
        made = predictions(self._rule, model, batch, output)
        if not made:
            raise ModelError(
                f"what {type(model).__name__} predicts cannot be compared with its target, so no block can be left "
                f"out; set layerprobe_ablation to none for this model"
            )
        return made


class _Snapshot:
    """A prepared batch as it was: families take keys out of it, or put some in, in their forward."""

    def __init__(self, batch: Mapping[str, Any]) -> None:
        self._batch = self._copied(batch)
        tensors = [(name, value) for name, value in batch.items() if torch.is_tensor(value)]
        self._versions = [(name, value, value._version) for name, value in tensors if not value.is_inference()]

    def copy(self) -> dict[str, Any]:
        return self._copied(self._batch)

    def check(self) -> None:
        """Raises ModelError if a tensor of the batch was changed in place."""
        changed = [name for name, value, version in self._versions if value._version != version]
        if changed:
            raise ModelError(
                f"the forward changed {changed[0]!r} of the batch in place, so it cannot be repeated; set "
                f"layerprobe_ablation to none for this model"
            )

    @staticmethod
    def _copied(batch: Mapping[str, Any]) -> dict[str, Any]:
        return {name: type(value)(value) if type(value) in (dict, list) else value for name, value in batch.items()}


def free_bytes(device: torch.device) -> float:
    """How much of a device's memory is free; infinite where it does not tell."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "cpu" and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return float("inf")
