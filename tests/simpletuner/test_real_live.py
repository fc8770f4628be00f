"""What the user's trackers get of a probe-only run inside the real SimpleTuner."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import IMAGES, SCALARS, TENSORS, EventAccumulator
from test_real_run import run_of

from simpletuner_layerprobe import api
from simpletuner_layerprobe.show.live_image import live_image


def events(folder: Path) -> EventAccumulator:
    """All that the run wrote for TensorBoard."""
    paths = [path for path in folder.rglob("events.out.tfevents.*") if b"layerprobe/samples" in path.read_bytes()]
    assert len(paths) == 1, paths
    found = EventAccumulator(str(paths[0]), size_guidance={SCALARS: 0, IMAGES: 0, TENSORS: 0})
    found.Reload()
    return found


def test_tensorboard_gets_the_numbers_and_the_heatmaps(simpletuner, tiny):
    folder = tiny(
        max_train_steps=30,
        train_batch_size=4,
        layerprobe_sigmas="stratified",
        layerprobe_flush_seconds=0.1,
        layerprobe_stop_when_stable=0.99,
        report_to="tensorboard,simpletuner",
    )
    result = simpletuner.run(folder, "tiny-probe", setup="setups.py:eager_trackers")
    assert result.code == 0, result.log[-4000:]
    run = run_of(folder)
    total = run.samples
    assert 100 <= total <= 120  # it may end by itself from 100 on

    found = events(folder)
    samples = found.Scalars("layerprobe/samples")
    assert len(samples) > 2 and samples[-1].value == total
    assert (np.diff([one.value for one in samples]) >= 0).all() and (np.diff([one.step for one in samples]) >= 0).all()
    assert all(one.value > 0 for one in found.Scalars("layerprobe/samples_per_second"))
    # Stratified: 100 samples are 10 in each of the ten bins, which is enough; the first few are not.
    coverage = found.Scalars("layerprobe/sigma_coverage")
    assert coverage[-1].value == 1 and coverage[0].value < 1
    settled = [one.value for one in found.Scalars("layerprobe/settled")]
    assert settled[0] == 0 and 0 <= settled[-1] <= 1 and (settled[-1] == 1 or total == 120)

    loaded = api.load(run.path)
    for stream, heatmap in loaded.heatmaps().items():
        images = found.Images(f"layerprobe/heatmap_{stream}")
        assert 2 <= len(images) < len(samples)
        picture = np.asarray(Image.open(io.BytesIO(images[-1].encoded_image_string)).convert("RGB"))
        title = f"{stream} stream, last token, {loaded.counted}"
        np.testing.assert_array_equal(picture, live_image(title, heatmap.values_TL, heatmap.counts_T))

    # SimpleTuner's own metrics have the numbers too.
    lines = (folder / "output" / "tiny-probe" / "training_metrics.jsonl").read_text().splitlines()
    own = [json.loads(line)["metrics"] for line in lines]
    assert [one["layerprobe/samples"] for one in own if "layerprobe/samples" in one][-1] == total


def test_a_tracker_that_fails_ends_nothing(simpletuner, tiny):
    folder = tiny(max_train_steps=30, layerprobe_flush_seconds=0.05, report_to="tensorboard")
    result = simpletuner.run(folder, "tiny-probe", setup="setups.py:failing_tracker")
    assert result.code == 0, result.log[-4000:]
    assert run_of(folder).samples == 30
    line = "layerprobe: warning: nothing more is logged to the trackers: OSError: [Errno 28] No space left on device"
    assert result.log.count(line) == 1
    assert len(events(folder).Scalars("layerprobe/samples")) == 1


def test_wandb_offline_gets_them_too(simpletuner, tiny):
    folder = tiny(max_train_steps=6, layerprobe_flush_seconds=0.05, report_to="wandb")
    environment = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    result = simpletuner.run(folder, "tiny-probe", setup="setups.py:eager_wandb", environment=environment)
    assert result.code == 0 and "nothing more is logged" not in result.log, result.log[-4000:]
    (record,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    for name in ("samples", "samples_per_second", "sigma_coverage"):
        assert f"layerprobe/{name}".encode() in record.read_bytes()
    loaded = api.load(run_of(folder).path)
    for stream, heatmap in loaded.heatmaps().items():
        paths = list(record.parent.glob(f"files/media/images/layerprobe/heatmap_{stream}_*.png"))
        title = f"{stream} stream, last token, {loaded.counted}"
        last = live_image(title, heatmap.values_TL, heatmap.counts_T)
        assert any(np.array_equal(np.asarray(Image.open(path).convert("RGB")), last) for path in paths)
