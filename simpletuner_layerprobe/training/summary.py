"""What the user is told of a probe-only run: at its start, and in its last line."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

from simpletuner_layerprobe.training.goal import Goal
from simpletuner_layerprobe.training.options import ProbeSettings
from simpletuner_layerprobe.training.signals import last_line


def start_text(
    settings: ProbeSettings,
    goal: Goal,
    streams: Mapping[str, Sequence[str]],
    extra: Sequence[str],
    changed: Sequence[str],
    device: str,
    forwards: float,
) -> str:
    """What the probe records (streams: name -> blocks; extra: further readings) and what it switched off.

    forwards: how many a sample with blocks left out takes, 0 if none are.
    """
    blocks = ", ".join(f"{len(paths)} {stream}" for stream, paths in streams.items())
    lines = [
        f"layerprobe: probe-only run, nothing is trained. Blocks: {blocks}. Sigmas: {settings.sigma_text}. "
        f"Samples: {goal.samples or 'as max_train_steps or the epochs give'}. Device: {device}.",
        f"layerprobe: run folder {settings.directory}" + (f", goes on after {goal.counted}" if goal.recorded else ""),
    ]
    if settings.adapter:
        lines.append(
            f"layerprobe: the adapter {settings.adapter} is on the base; what is recorded is the adapted model"
        )
    if settings.noise_seed is not None:
        lines.append(
            f"layerprobe: noise seed {settings.noise_seed}: each repeat of an image has a sigma and noise of its own"
        )
    if extra:
        lines.append(f"layerprobe: further readings: {', '.join(extra)}")
    if forwards:
        what = {"blocks": "whole blocks", "text": "text updates", "both": "whole blocks and text updates"}
        count = min(settings.ablation_samples, goal.samples or settings.ablation_samples)
        lines.append(
            f"layerprobe: {what[settings.ablation]} are left out in {count} samples, which take "
            f"{forwards:.1f} forwards each"
        )
    if settings.stop_when_stable:
        lines.append(
            f"layerprobe: ends by itself when every factor of the preset {settings.preset} is agreed by "
            f"{settings.stop_when_stable:.1%} of the bootstrap replicates"
        )
    return "\n".join([*lines, *(f"layerprobe: switched off or overridden - {line}" for line in changed)])


class LastLine:
    """The run's last line: what it is so far, and whether it was printed."""

    def __init__(self, directory: str, rank: int) -> None:
        self._directory = directory
        self._rank = rank
        self._text = ""

    def recorded(self, new: int, total: str, seconds: float) -> None:
        """The loop is over: `new` samples in so many seconds; `total`: those in the run, in words."""
        self._text = (
            f"layerprobe: {new} samples in {seconds:.1f} s ({new / seconds:.2f} samples/s), {total} in the run "
            f"{self._directory}; next: layerprobe report {shlex.quote(self._directory)}"
        )

    def nothing_to_do(self, goal: Goal) -> None:
        """The run has all of its samples."""
        self._text = (
            f"layerprobe: the run {self._directory} has its {goal.counted} already, nothing to do; "
            f"raise layerprobe_samples ({goal.samples}) for more"
        )

    def ended_by(self, error: BaseException) -> None:
        """The loop was left by this error."""
        how = "interrupted" if isinstance(error, KeyboardInterrupt) else "ended by an error"
        self._text = f"layerprobe: {how}; what was written is kept in {self._directory}"

    def print(self) -> None:
        """Once, on the main process."""
        if self._text and self._rank == 0:
            last_line(self._text)
        self._text = ""
