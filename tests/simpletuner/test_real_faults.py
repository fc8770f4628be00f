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
from test_real_run import RUN, assert_one_line_error, column, run_of, set_options

from simpletuner_layerprobe.cli import main
from simpletuner_layerprobe.run.records import open_run


def shards_in(folder: Path) -> list[Path]:
    return sorted((folder / RUN / "shards").glob("*.safetensors"))


def wait_for_shards(folder: Path, started: object, count: int) -> None:
    end = time.monotonic() + 120
    while len(shards_in(folder)) < count:
        assert time.monotonic() < end, started.text()[-4000:]  # type: ignore[attr-defined]
        time.sleep(0.02)


def seen_in(result: object, folder: Path, start: str) -> str:
    """The last line of a log that starts with `start`, the test's own folder left out."""
    return result.line(start).replace(f"{folder}/", "")  # type: ignore[attr-defined]


def test_kills_of_the_training_process(simpletuner, tiny):
    folder = tiny(
        max_train_steps=5000, train_batch_size=2, layerprobe_flush_seconds=0.05, layerprobe_sigmas="stratified"
    )
    draw = random.Random(3)
    before: dict[Path, bytes] = {}
    kills = 4
    committed = 0
    for _ in range(kills):
        started = simpletuner.start(folder, "tiny-probe")
        wait_for_shards(folder, started, len(before) + 2)
        time.sleep(draw.uniform(0, 0.2))
        seen = {path: path.read_bytes() for path in shards_in(folder)}
        os.kill(started.pid, signal.SIGKILL)
        assert started.result().code == -signal.SIGKILL
        assert all(seen[path] == data for path, data in before.items())
        run = run_of(folder)
        committed += len(set(seen) - set(before))
        before = {path: path.read_bytes() for path in run.shards}
        assert before.items() >= seen.items()
        assert len(np.unique(column(run, "sigma_N"))) == run.sample_count()
    total = run_of(folder).sample_count()
    set_options(folder, layerprobe_samples=total + 7)
    result = simpletuner.run(folder, "tiny-probe")
    assert result.code == 0, result.log[-4000:]
    run = run_of(folder)
    assert run.sample_count() == total + 7
    assert all(path.read_bytes() == data for path, data in before.items())
    assert len(np.unique(column(run, "sigma_N"))) == total + 7  # no sample twice
    assert f"goes on after {total} samples" in result.log
    record(
        "SIGKILL of the real training process at random moments, started again",
        tried=kills,
        committed=total,
        lost=0,
        seen=f"nothing; at the next start: {seen_in(result, folder, 'layerprobe: run folder')}",
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_it_at_once_and_keeps_the_rows(simpletuner, tiny, number):
    folder = tiny(max_train_steps=5000, layerprobe_flush_seconds=1000)
    started = simpletuner.start(folder, "tiny-probe", setup="setups.py:slow_steps")
    started.wait_for("third step begins")
    os.kill(started.pid, number)
    started.wait_for("stopping after this step; once more to stop at once")
    since = time.monotonic()
    os.kill(started.pid, number)
    result = started.result()
    assert time.monotonic() - since < 15  # the step itself would have taken 30 s
    assert result.code == 0 and "Traceback" not in result.log, result.log[-4000:]
    assert result.line("layerprobe: ") == f"layerprobe: interrupted; what was written is kept in {RUN}"
    assert run_of(folder).sample_count() == 2
    record(
        f"{'Ctrl-C' if number == signal.SIGINT else 'SIGTERM'} twice, the second in the middle of a step",
        tried=1,
        committed=2,
        lost=0,
        seen=seen_in(result, folder, "layerprobe: "),
    )


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
    full = run.sample_count()
    assert full > 0 and sum(map(len, run.rows())) == full
    assert not [name for name in os.listdir(folder / RUN / "shards") if not name.endswith(".safetensors")]
    line = seen_in(result, folder, "layerprobe: error")

    subprocess.run(["mount", "-o", "remount,size=4m", folder / RUN], check=True)
    set_options(folder, layerprobe_samples=full + 5)
    result = simpletuner.run(folder, "tiny-probe")
    assert result.code == 0, result.log[-4000:]
    assert run_of(folder).sample_count() == full + 5
    record(
        "disk full in the middle of a run (tmpfs of 128 kB), then room made", tried=1, committed=full, lost=0, seen=line
    )


def test_states_that_are_no_numbers_are_counted_and_averaged_nowhere(simpletuner, tiny, capsys):
    folder = tiny(max_train_steps=9, layerprobe_sigmas="stratified")
    result = simpletuner.run(folder, "tiny-probe", setup="setups.py:sometimes_no_number")
    assert result.code == 0, result.log[-4000:]
    warning = result.line("layerprobe: warning: ")
    assert "6 of the 9 samples of rank 0 have distances that are not finite" in warning
    run = run_of(folder)
    image_NL = np.concatenate([rows.distances["image", "mean"] for rows in run.rows()])
    assert image_NL.shape == (9, 6)
    bad_N = ~np.isfinite(image_NL).all(axis=1)
    assert bad_N.sum() == 6  # of every three steps one with NaN, one with infinity
    assert np.isfinite(image_NL[:, :2]).all()

    assert main(["status", str(folder / RUN)]) == 0
    shown = capsys.readouterr().out
    assert "non-finite  " in shown and "image mean: 6" in shown
    assert main(["heatmap", str(folder / RUN), "--out", str(folder / "figures"), "--tokens", "mean"]) == 0
    assert "6 samples are left out of the image stream: distances not finite" in capsys.readouterr().err
    means = np.load(folder / "figures" / "heatmap.npz")
    sigma_N = column(run, "sigma_N")
    for t in range(10):
        inside_N = (sigma_N * 10 // 1 == t) & ~bad_N
        expected_L = image_NL[inside_N].astype(np.float64).mean(axis=0) if inside_N.any() else np.zeros(6)
        np.testing.assert_allclose(means["image_mean"][t], expected_L, rtol=1e-12)
    record("NaN and infinity in a block's output, 6 of 9 samples", tried=1, committed=9, lost=0, seen=warning)


def test_a_clock_that_jumps_changes_nothing(simpletuner, tiny):
    folder = tiny(max_train_steps=40, layerprobe_flush_seconds=0.2)
    result = simpletuner.run(folder, "tiny-probe", setup="setups.py:jumping_clock")
    assert result.code == 0, result.log[-4000:]
    run = run_of(folder)
    assert run.sample_count() == 40 and len(run.shards) > 2
    last = result.line("layerprobe: ")
    assert last.startswith("layerprobe: 40 samples in ")
    assert 0 < float(last.split()[4]) < result.seconds
    record("clock that jumps by a day, back and forth, at every look", tried=1, committed=40, lost=0, seen="nothing")


def test_open_run_of_a_running_process_reads_only_whole_shards(simpletuner, tiny):
    folder = tiny(max_train_steps=5000, layerprobe_flush_seconds=0.02)
    started = simpletuner.start(folder, "tiny-probe")
    wait_for_shards(folder, started, 1)
    counts = []
    for _ in range(40):
        run = open_run(folder / RUN)
        counts.append(sum(map(len, run.rows())))
        time.sleep(0.01)
    os.kill(started.pid, signal.SIGTERM)
    assert started.result().code == 0
    assert counts == sorted(counts) and counts[0] < counts[-1]
