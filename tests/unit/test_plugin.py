"""Those who look at a run while it is recorded: the live view, and the end of a run that is settled."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from failing import fails
from synthetic_run import manifest, rows, write_run

from simpletuner_layerprobe import plugin
from simpletuner_layerprobe.plugin import LiveView, Settled
from simpletuner_layerprobe.run.manifest import create_run
from simpletuner_layerprobe.run.records import RecordWriter
from simpletuner_layerprobe.training import live
from simpletuner_layerprobe.training.live import Live
from simpletuner_layerprobe.training.options import ProbeSettings


class Notebook:
    """A tracker of one's own, as accelerate lets users write them."""

    def __init__(self, name: str = "notebook") -> None:
        self.name = name
        self.values: list[dict] = []
        self.images: list[dict] = []

    def log(self, values: dict, step: int) -> None:
        self.values.append(values | {"step": step})

    def log_images(self, images: dict, step: int, **options: object) -> None:
        self.images.append(images | {"options": options})


@pytest.fixture
def writer(tmp_path: Path) -> RecordWriter:
    run = create_run(tmp_path, manifest({"image": ("a", "b", "c")}, readings=("last",)))
    return RecordWriter(tmp_path, run, rank=0)


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """A clock that goes on by `slow` whenever somebody looks at it."""
    now = SimpleNamespace(time=1000.0, slow=0.0)

    def monotonic() -> float:
        now.time += now.slow
        return now.time

    for module in (plugin, live):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=monotonic))
    return now


def write(writer: RecordWriter, samples: int, sigma: float = 0.5) -> None:
    writer.write(rows([sigma] * samples, {("image", "last"): np.full((samples, 3), 0.25, np.float32)}))


def view_of(folder: Path, *trackers: Notebook, recorded: int = 0) -> LiveView:
    view = LiveView(str(folder), Live(lambda: trackers, lambda: 7), None)
    view.begins(recorded)
    return view


def test_values_at_most_once_a_minute_and_images_as_the_run_grows(tmp_path, writer, clock):
    tracker = Notebook()
    view = view_of(tmp_path, tracker)
    seen = []
    for samples in (40, 10, 20, 200):
        write(writer, samples)
        clock.time += 30
        view.after_flush()
        clock.time += 30.5
        view.after_flush()
        view.after_flush()
        seen.append((len(tracker.values), len(tracker.images)))
    assert seen == [(1, 1), (2, 1), (3, 2), (4, 3)]
    assert [values["layerprobe/samples"] for values in tracker.values] == [40, 50, 70, 270]
    rates = [values["layerprobe/samples_per_second"] for values in tracker.values]
    np.testing.assert_allclose(rates, np.array([40, 10, 20, 200]) / 60.5)
    assert tracker.values[-1]["layerprobe/sigma_coverage"] == 0.1  # one bin of ten
    assert "layerprobe/settled" not in tracker.values[-1] and tracker.values[-1]["step"] == 7
    assert tracker.images[-1]["layerprobe/heatmap_image"].shape[0] == 1
    assert tracker.images[-1]["options"] == {}
    view.at_end()
    assert len(tracker.values) == 5 and len(tracker.images) == 4


def test_the_rate_of_a_run_that_goes_on_counts_new_samples_only(tmp_path, writer, clock):
    tracker = Notebook()
    write(writer, 100)
    view = view_of(tmp_path, tracker, recorded=100)
    write(writer, 5)
    clock.time += 10
    view.at_end()
    assert tracker.values[0]["layerprobe/samples_per_second"] == 0.5


def test_a_slow_tracker_is_asked_less_often(tmp_path, writer, clock):
    tracker = Notebook()
    view = view_of(tmp_path, tracker)
    write(writer, 5)
    clock.time, clock.slow = clock.time + 61, 3.0  # an update takes three seconds or more, and may take a hundredth
    view.after_flush()
    clock.slow = 0.0
    clock.time += 290
    view.after_flush()
    assert len(tracker.values) == 1
    clock.time += 1000
    view.after_flush()
    assert len(tracker.values) == 2


def test_without_trackers_nothing_is_read(tmp_path, writer, clock):
    writer.write(rows([0.5], {("image", "last"): np.ones((1, 3), np.float32)}))
    assert writer.path is not None
    writer.path.write_bytes(b"broken")
    view_of(tmp_path).at_end()


def test_a_broken_file_switches_it_off_with_one_warning(tmp_path, writer, clock, capsys):
    tracker = Notebook("tensorboard")
    view = view_of(tmp_path, tracker)
    write(writer, 1)
    assert writer.path is not None
    writer.path.write_bytes(b"broken file of records")
    for _ in range(2):
        view.at_end()
    assert capsys.readouterr().out.count("layerprobe: warning: nothing more is logged to the trackers: RunError") == 1
    assert tracker.values == []


def test_tensorboard_is_told_the_order_of_the_axes(tmp_path, writer, clock):
    tracker = Notebook("tensorboard")
    write(writer, 5)
    view_of(tmp_path, tracker).at_end()
    assert tracker.images[0]["options"] == {"dataformats": "NHWC"}


def settings(folder: Path, **options: object) -> ProbeSettings:
    return ProbeSettings(directory=str(folder), **options)  # type: ignore[arg-type]


def test_who_looks_at_a_run(tmp_path):
    kinds = [
        [type(watcher) for watcher in plugin.watchers(settings(tmp_path, **options), list, int)]
        for options in ({}, {"stop_when_stable": 0.5}, {"stop_when_stable": 0.5, "preset": "400M"})
    ]
    assert kinds == [[LiveView], [Settled, LiveView], [Settled, LiveView]]


@pytest.mark.parametrize("preset", ["much", "0", "1B B", ""])
def test_a_preset_that_is_none_is_refused_by_name(tmp_path, preset):
    with fails(f"layerprobe_preset is {preset!r}; it must be article"):
        plugin.watchers(settings(tmp_path, preset=preset), list, int)


def test_settled_factors_end_the_run(tmp_path, capsys):
    run = write_run(tmp_path / "run", {"image": ("a", "b", "c")}, 400, peaks=[("image", 0)], images=40)
    settled = Settled(str(run.path), 0.5, "article")
    assert not settled.wants_stop
    settled.after_flush()
    assert settled.wants_stop and settled.settled_share == 1
    assert "3 of 3 factors settled for images like these 40" in capsys.readouterr().out
    settled.after_flush()
    assert capsys.readouterr().out == ""


def test_it_is_not_asked_again_before_the_run_has_grown_or_too_often(tmp_path, clock, monkeypatch):
    run = write_run(tmp_path / "run", {"image": ("a", "b", "c")}, 30, images=3)  # too few images
    settled = Settled(str(run.path), 0.5, "article")
    asked = []
    monkeypatch.setattr(settled, "_load", lambda directory: asked.append(directory) or run_of_samples(30))

    def run_of_samples(samples: int) -> SimpleNamespace:
        def confidence(**options: object) -> SimpleNamespace:
            judged.append(samples)
            return SimpleNamespace(settled_K=np.array([True, False]), settled=False)

        return SimpleNamespace(samples=samples, confidence=confidence)

    judged: list[int] = []
    clock.slow = 2.0  # a look takes two seconds
    settled.after_flush()
    settled.after_flush()
    assert (len(asked), judged, settled.settled_share) == (1, [30], 0.5)
    clock.time += 300
    settled.after_flush()
    assert (len(asked), judged) == (2, [30])  # it has not grown


def test_a_run_that_cannot_be_judged_goes_on_and_says_so_once(tmp_path, capsys):
    run = write_run(tmp_path / "run", {"image": ("a", "b", "c")}, 400)
    settled = Settled(str(run.path), 0.5, "article")
    run.files[0].path.write_bytes(b"broken file of records")
    for _ in range(2):
        settled.after_flush()
    assert not settled.wants_stop
    assert capsys.readouterr().out.count("layerprobe_stop_when_stable has no effect any more: ") == 1
