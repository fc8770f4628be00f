"""Recording meets analysis: who looks at a run while SimpleTuner records it, and the hook that brings them in.

The training half knows nothing of analysis, and plans: it is handed these watchers. They read the run folder as
everybody else does, on the main process, after a flush and at growing intervals.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from simpletuner_layerprobe.errors import ConfigError, ProbeError
from simpletuner_layerprobe.training.live import Live, Pace

if TYPE_CHECKING:
    from simpletuner_layerprobe.lokr.groups import Model
    from simpletuner_layerprobe.training.guard import Verdicts
    from simpletuner_layerprobe.training.options import ProbeSettings
    from simpletuner_layerprobe.training.session import Watcher

JUDGE_GROWTH = 1.1
"""The samples must have grown by so much since the factors were judged before they are judged again."""
LIVE_SECONDS = 60.0
"""At least so long between two updates of the trackers."""
IMAGES_GROWTH = 1.5
"""The samples must have grown by so much since the last images before the next ones."""


def install(module: Any) -> None:
    """Hook `simpletuner.helpers.training.trainer`, right after it was imported."""
    from simpletuner_layerprobe.training import trainer

    trainer.install(module, watchers, verdicts, own_parameters)


def verdicts() -> Verdicts:
    """What the guard asks about the adapter of a normal training."""
    from simpletuner_layerprobe.lokr import guard

    return guard


def own_parameters(training: Mapping[str, Any], model: Model) -> int | None:
    """How many parameters a probe run's own config would train, for which LyCORIS builds it; None if not known."""
    from simpletuner_layerprobe.lokr.own import Own

    return Own(model, training).known_parameters


def watchers(
    settings: ProbeSettings, trackers: Callable[[], Sequence[Any]], step: Callable[[], int]
) -> tuple[Watcher, ...]:
    """Those of one run: the live view, and what ends the run when its factors are settled, if that was asked for.

    trackers: gives the run's trackers. step: gives its training step. Raises ConfigError for a preset that is none.
    """
    _check_preset(settings.preset)
    share = settings.stop_when_stable
    settled = Settled(settings.directory, share, settings.preset) if share else None
    view = LiveView(settings.directory, Live(trackers, step), settled)
    return (view,) if settled is None else (settled, view)


def _check_preset(text: str) -> None:
    from simpletuner_layerprobe.lokr.amounts import preset_parameters

    try:
        preset_parameters(text)
    except ProbeError:
        raise ConfigError(
            f"layerprobe_preset is {text!r}; it must be article, a number of parameters such as 400M, or a size such "
            f"as 800MB"
        ) from None


class Settled:
    """Ends the run as soon as every factor of a preset is settled, by the same question that `layerprobe status` asks.

    share: the share of bootstrap replicates that must agree with every factor. settled_share: the part of the factors
    that were settled when last asked. A run that cannot be judged goes on.
    """

    def __init__(self, directory: str, share: float, preset: str) -> None:
        from simpletuner_layerprobe import api  # its imports take time, which is not the looks'

        self.wants_stop = False
        self.settled_share = 0.0
        self._load = api.load
        self._directory = directory
        self._share = share
        self._preset = preset
        self._pace = Pace()
        self._next_samples = 0.0
        self._off = False

    @property
    def told(self) -> dict[str, str]:
        return {"settled": f"{self.settled_share:.0%}"}

    def begins(self, recorded: int) -> None:
        pass

    def after_flush(self) -> None:
        if self.wants_stop or self._off or not self._pace.due:
            return
        with self._pace.look():
            try:
                self._judge()
            except ProbeError as error:
                print(f"layerprobe: warning: layerprobe_stop_when_stable has no effect any more: {error}", flush=True)
                self._off = True

    def _judge(self) -> None:
        run = self._load(self._directory)
        if run.samples < self._next_samples:
            return
        self._next_samples = JUDGE_GROWTH * run.samples
        from simpletuner_layerprobe.api.options import WEIGHED

        confidence = run.confidence(preset=self._preset, share=self._share, direction=WEIGHED)
        self.settled_share = float(confidence.settled_K.mean())
        self.wants_stop = confidence.settled
        if self.wants_stop:
            print(f"\nlayerprobe: {confidence.text()}; stopping after this step", flush=True)

    def at_end(self) -> None:
        pass


class LiveView:
    """Shows the trackers how far the run is, and its heatmaps as they grow clearer."""

    wants_stop = False
    told: ClassVar[dict[str, str]] = {}

    def __init__(self, directory: str, live: Live, settled: Settled | None) -> None:
        self._directory = directory
        self._live = live
        self._settled = settled
        self._samples = 0
        self._since = time.monotonic()
        self._pace = Pace(LIVE_SECONDS)
        self._next_images = 0.0

    def begins(self, recorded: int) -> None:
        self._samples, self._since = recorded, time.monotonic()
        self._pace = Pace(LIVE_SECONDS)

    def after_flush(self) -> None:
        if self._pace.due:
            self._show(last=False)

    def at_end(self) -> None:
        self._show(last=True)

    def _show(self, last: bool) -> None:
        if self._live.wanted:
            with self._pace.look(), self._live.forgiving():
                self._log(last)

    def _log(self, last: bool) -> None:
        from simpletuner_layerprobe import api
        from simpletuner_layerprobe.analyse.bootstrap import MIN_SAMPLES
        from simpletuner_layerprobe.show.live_image import live_image

        now = time.monotonic()
        run = api.load(self._directory)
        heatmaps = run.heatmaps() if run.samples else {}
        values = {
            "layerprobe/samples": float(run.samples),
            "layerprobe/sigma_coverage": min(
                (float((heatmap.counts_T >= MIN_SAMPLES).mean()) for heatmap in heatmaps.values()), default=0.0
            ),
        }
        if now > self._since and run.samples > self._samples:
            values["layerprobe/samples_per_second"] = (run.samples - self._samples) / (now - self._since)
        if self._settled is not None:
            values["layerprobe/settled"] = self._settled.settled_share
        images = {}
        if last or run.samples >= self._next_images:
            for stream, heatmap in heatmaps.items():
                title = f"{stream} stream, {heatmap.reading} token, {run.counted}"
                images[f"layerprobe/heatmap_{stream}"] = live_image(title, heatmap.values_TL, heatmap.counts_T)[None]
            self._next_images = IMAGES_GROWTH * run.samples
        self._samples, self._since = run.samples, now
        self._live.log(values, images)
