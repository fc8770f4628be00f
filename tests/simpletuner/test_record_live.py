from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from synthetic_run import manifest, rows

from simpletuner_layerprobe.analyse.running import RunningTally
from simpletuner_layerprobe.run.records import ShardWriter, create_run
from simpletuner_layerprobe.training import live as module
from simpletuner_layerprobe.training.live import Live


class Notebook:
    """A tracker of one's own, as accelerate lets users write them."""

    def __init__(self, name: str = "notebook") -> None:
        self.name = name
        self.values: list[dict] = []
        self.images: list[dict] = []

    def log(self, values: dict, step: int) -> None:
        self.values.append(values)

    def log_images(self, images: dict, step: int, **options: object) -> None:
        self.images.append(images | {"options": options})


@pytest.fixture
def writer(tmp_path: Path) -> ShardWriter:
    what = manifest({"image": ("a", "b", "c")}, tokens=("last",))
    create_run(tmp_path, what)
    return ShardWriter(tmp_path, what, rank=0)


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """A clock that goes on by `slow` whenever somebody looks at it."""
    now = SimpleNamespace(time=1000.0, slow=0.0)

    def monotonic() -> float:
        now.time += now.slow
        return now.time

    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=monotonic))
    return now


def write(writer: ShardWriter, samples: int, sigma: float = 0.5) -> None:
    writer.write(rows([sigma] * samples, {("image", "last"): np.full((samples, 3), 0.25)}))


def test_values_at_most_once_a_minute_and_images_as_the_run_grows(tmp_path, writer, clock):
    tracker = Notebook()
    live = Live(lambda: [tracker], lambda: 7, RunningTally(tmp_path), 0, None)
    seen = []
    for samples in (40, 10, 20, 200):
        write(writer, samples)
        clock.time += 30
        live.update()
        clock.time += 30.5
        live.update()
        live.update()
        seen.append((len(tracker.values), len(tracker.images)))
    assert seen == [(1, 1), (2, 1), (3, 2), (4, 3)]
    assert [one["layerprobe/samples"] for one in tracker.values] == [40, 50, 70, 270]
    rates = [one["layerprobe/samples_per_second"] for one in tracker.values]
    np.testing.assert_allclose(rates, np.array([40, 10, 20, 200]) / 60.5)
    assert tracker.values[-1]["layerprobe/sigma_coverage"] == 0.1  # one bin of ten
    assert "layerprobe/settled" not in tracker.values[-1]
    assert tracker.images[-1]["layerprobe/heatmap_image"].shape[0] == 1
    assert tracker.images[-1]["options"] == {}
    live.update(last=True)
    assert len(tracker.values) == 5 and len(tracker.images) == 4


def test_a_slow_tracker_is_asked_less_often(tmp_path, writer, clock):
    tracker = Notebook()
    live = Live(lambda: [tracker], lambda: 0, RunningTally(tmp_path), 0, None)
    write(writer, 5)
    clock.time, clock.slow = clock.time + 61, 3.0  # an update takes three seconds or more, and may take a hundredth
    live.update()
    clock.slow = 0.0
    clock.time += 290
    live.update()
    assert len(tracker.values) == 1
    clock.time += 11
    live.update()
    assert len(tracker.values) == 2


def test_without_trackers_nothing_is_read(tmp_path, writer, clock):
    tally = RunningTally(tmp_path)
    live = Live(lambda: [], lambda: 0, tally, 0, None)
    write(writer, 5)
    clock.time += 1000
    live.update(last=True)
    assert tally.samples == 0


def test_a_broken_shard_switches_it_off_with_one_warning(tmp_path, writer, clock, capsys):
    tracker = Notebook("tensorboard")
    live = Live(lambda: [tracker], lambda: 0, RunningTally(tmp_path), 0, None)
    path = writer.write(rows([0.5], {("image", "last"): np.ones((1, 3))}))
    assert path is not None
    path.write_bytes(b"broken")
    for _ in range(2):
        live.update(last=True)
    assert capsys.readouterr().out.count("layerprobe: warning: nothing more is logged to the trackers: ProbeError") == 1
    assert tracker.values == []


def test_tensorboard_is_told_the_order_of_the_axes(tmp_path, writer, clock):
    tracker = Notebook("tensorboard")
    write(writer, 5)
    Live(lambda: [tracker], lambda: 0, RunningTally(tmp_path), 0, None).update(last=True)
    assert tracker.images[0]["options"] == {"dataformats": "NHWC"}
