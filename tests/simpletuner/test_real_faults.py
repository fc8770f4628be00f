"""What goes wrong in a real training process: killed, interrupted twice, a full disk, states that are no numbers."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from faults.table import record
from test_real_run import RUN, assert_one_line_error, contents, run_of, set_options, wait_for_batches

from simpletuner_layerprobe.analyse.heatmap import heatmaps
from simpletuner_layerprobe.analyse.samples import Samples


def seen_in(result: object, folder: Path, start: str) -> str:
    """The last line of a log that starts with `start`, the test's own folder left out."""
    return result.line(start).replace(f"{folder}/", "")  # type: ignore[attr-defined]


def test_kills_of_the_training_process(simpletuner, tiny):
    folder = tiny(
        max_train_steps=1_000_000, train_batch_size=2, layerprobe_flush_seconds=0.05, layerprobe_sigmas="stratified"
    )
    draw = random.Random(3)
    before: dict[Path, bytes] = {}
    kills, committed, batches = 4, 0, 0
    for _ in range(kills):
        started = simpletuner.start(folder, "tiny-probe")
        wait_for_batches(folder, 2, started.text, besides=batches)
        time.sleep(draw.uniform(0, 0.2))
        seen = run_of(folder)
        os.kill(started.pid, signal.SIGKILL)
        assert started.result().code == -signal.SIGKILL
        run = run_of(folder)
        # Files of earlier starts are as they were; of this one all is there that was.
        assert before.items() <= contents(run).items() and len(run.files) == len(before) + 1
        assert run.samples >= seen.samples and np.array_equal(run.sigma[: seen.samples], seen.sigma)
        committed += seen.samples
        before, batches = contents(run), sum(file.batches for file in run.files)
        assert len(np.unique(run.sigma)) == run.samples
    total = run_of(folder).samples
    set_options(folder, layerprobe_samples=total + 7)
    result = simpletuner.run(folder, "tiny-probe")
    assert result.code == 0, result.log[-4000:]
    run = run_of(folder)
    assert run.samples == total + 7
    assert before.items() <= contents(run).items()
    assert len(np.unique(run.sigma)) == total + 7  # no sample twice
    assert f"goes on after {total} samples" in result.log
    record(
        "SIGKILL of the real training process at random moments, started again",
        tried=kills,
        committed=total,
        lost=0,
        seen=f"nothing; at the next start: {seen_in(result, folder, 'layerprobe: run folder')}",
    )


def test_a_second_ctrl_c_ends_it_at_once_and_keeps_the_rows(simpletuner, tiny):
    folder = tiny(max_train_steps=5000, layerprobe_flush_seconds=1000)
    started = simpletuner.start(folder, "tiny-probe", setup="setups.py:a_step_without_end")
    started.wait_for("third step begins")
    os.kill(started.pid, signal.SIGINT)
    started.wait_for("stopping after this step; Ctrl-C once more to stop at once")
    os.kill(started.pid, signal.SIGINT)
    result = started.result()
    assert result.code == 0 and "Traceback" not in result.log, result.log[-4000:]
    assert result.line("layerprobe: ") == f"layerprobe: interrupted; what was written is kept in {RUN}"
    assert run_of(folder).samples == 2
    record(
        "Ctrl-C twice, the second in the middle of a step",
        tried=1,
        committed=2,
        lost=0,
        seen=seen_in(result, folder, "layerprobe: "),
    )


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_sigterm_changes_nothing(simpletuner, tiny, first):
    """A scheduler sends it to all processes, and each launcher hands its own on."""
    folder = tiny(max_train_steps=5000, layerprobe_flush_seconds=1000)
    started = simpletuner.start(folder, "tiny-probe", setup="setups.py:a_step_without_end")
    started.wait_for("third step begins")
    os.kill(started.pid, first)
    started.wait_for("stopping after this step")
    for _ in range(3):
        os.kill(started.pid, signal.SIGTERM)
    (folder / "go").touch()
    result = started.result()
    assert result.code == 0, result.log[-4000:]
    assert "layerprobe: 3 samples in" in result.line("layerprobe: ")
    assert run_of(folder).samples == 3


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[Path, str], None]]:
    """A function that mounts a small file system in memory on a folder."""
    mounted: list[Path] = []

    def mount(folder: Path, options: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"cannot mount a file system here: {done.stderr.strip()}")
        mounted.append(folder)

    yield mount
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)


def test_a_disk_that_gets_full_ends_the_run_and_keeps_what_was_flushed(simpletuner, tiny, small_disk):
    folder = tiny(max_train_steps=5000, layerprobe_flush_seconds=0.05)
    small_disk(folder / RUN, "size=128k")
    result = simpletuner.run(folder, "tiny-probe")
    assert_one_line_error(result, "No space left on device", "samples since the last flush are lost", "make room")
    assert result.line("layerprobe: ended") == f"layerprobe: ended by an error; what was written is kept in {RUN}"
    run = run_of(folder)
    full = run.samples
    assert full > 0
    line = seen_in(result, folder, "layerprobe: error")

    subprocess.run(["mount", "-o", "remount,size=4m", folder / RUN], check=True)
    set_options(folder, layerprobe_samples=full + 5)
    result = simpletuner.run(folder, "tiny-probe")
    assert result.code == 0, result.log[-4000:]
    assert run_of(folder).samples == full + 5
    record(
        "disk full in the middle of a run (tmpfs of 128 kB), then room made", tried=1, committed=full, lost=0, seen=line
    )


def test_states_that_are_no_numbers_are_counted_and_averaged_nowhere(simpletuner, tiny):
    folder = tiny(max_train_steps=9, layerprobe_sigmas="stratified")
    result = simpletuner.run(folder, "tiny-probe", setup="setups.py:sometimes_no_number")
    assert result.code == 0, result.log[-4000:]
    warning = result.line("layerprobe: warning: ")
    assert "6 of the 9 samples of rank 0 have distances that are not finite" in warning
    run = run_of(folder)
    image_NL = run.distances("image", "mean")
    assert image_NL.shape == (9, 6)
    bad_N = ~np.isfinite(image_NL).all(axis=1)
    assert bad_N.sum() == 6  # of every three steps one with NaN, one with infinity
    assert np.isfinite(image_NL[:, :2]).all()

    samples = Samples(
        run.sigma, run.facts["image"], run.streams, {name: run.distances(name, "mean") for name in run.streams}, "mean"
    )
    heatmap = heatmaps(samples)["image"]
    assert heatmap.nonfinite == 6
    for t in range(10):
        inside_N = (run.sigma * 10 // 1 == t) & ~bad_N
        expected_L = image_NL[inside_N].astype(np.float64).mean(axis=0) if inside_N.any() else np.zeros(6)
        np.testing.assert_allclose(heatmap.values_TL[t], expected_L, rtol=1e-9)
    record("NaN and infinity in a block's output, 6 of 9 samples", tried=1, committed=9, lost=0, seen=warning)


def test_a_clock_that_jumps_changes_nothing(simpletuner, tiny):
    folder = tiny(max_train_steps=20, layerprobe_flush_seconds=0.02)
    result = simpletuner.run(folder, "tiny-probe", setup="setups.py:jumping_clock")
    assert result.code == 0, result.log[-4000:]
    run = run_of(folder)
    assert run.samples == 20 and sum(file.batches for file in run.files) > 2
    last = result.line("layerprobe: ")
    assert last.startswith("layerprobe: 20 samples in ")
    assert 0 < float(last.split()[4]) < result.seconds
    record("clock that jumps by a day, back and forth, at every look", tried=1, committed=20, lost=0, seen="nothing")


def test_a_run_is_read_while_it_is_written(simpletuner, tiny):
    folder = tiny(max_train_steps=1_000_000, layerprobe_flush_seconds=0.02)
    started = simpletuner.start(folder, "tiny-probe")
    wait_for_batches(folder, 1, started.text)
    counts = [run_of(folder).samples for _ in range(40)]
    wait_for_batches(folder, 1, started.text, besides=sum(file.batches for file in run_of(folder).files))
    counts.append(run_of(folder).samples)
    os.kill(started.pid, signal.SIGTERM)
    assert started.result().code == 0
    assert counts == sorted(counts) and counts[0] < counts[-1]
