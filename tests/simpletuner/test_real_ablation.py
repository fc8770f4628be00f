"""Blocks left out in SimpleTuner's own loop: nothing else changes, and no sample is half there when it is killed."""

from __future__ import annotations

import os
import signal

import numpy as np
from test_real_run import assert_one_line_error, run_of, set_options, wait_for_batches
from test_real_sd3 import distances, hashes

BOTH = {"layerprobe_ablation": "both", "train_batch_size": 2}


def test_leaving_blocks_out_changes_nothing_else(simpletuner, tiny):
    folder = tiny(max_train_steps=6, caption_dropout_probability=0.5, layerprobe_ablation_samples=6, **BOTH)
    before = hashes(folder / "pipeline")
    result = simpletuner.run(folder, "tiny-probe", setup="setups.py:compared_with_plain")
    assert result.code == 0, result.log[-4000:]
    assert "whole blocks and text updates are left out in 6 samples, which take 6.0 forwards each" in result.log
    assert result.log.count("equal to the plain step") == 3
    assert hashes(folder / "pipeline") == before
    run = run_of(folder)
    taken = {name: values_NL for name, values_NL in distances(run).items() if "ablation" in name}
    assert {name: values_NL.shape for name, values_NL in taken.items()} == {
        "block.ablation": (12, 6),
        "block.ablation_change": (12, 6),
        "text.ablation_text": (12, 5),
        "text.ablation_text_change": (12, 5),
    }
    left_out_N = ~np.isnan(taken["block.ablation"]).any(axis=1)
    assert left_out_N.sum() == 6
    for values_NL in taken.values():
        assert np.isfinite(values_NL[left_out_N]).all() and np.isnan(values_NL[~left_out_N]).all()
    assert (taken["block.ablation_change"][left_out_N] > 0).all()
    assert (taken["text.ablation_text_change"][left_out_N] > 0).all()
    assert np.isfinite(run.loss).all() and len(np.unique(run.loss)) == 12  # each sample's own


def test_killed_in_the_middle_nothing_is_counted_twice_or_half_there(simpletuner, tiny):
    folder = tiny(
        max_train_steps=1_000_000, layerprobe_flush_seconds=0.05, layerprobe_sigmas="stratified", layerprobe_samples=40,
        layerprobe_ablation_samples=20, **BOTH,
    )  # fmt: skip
    batches = 0
    for _ in range(2):
        started = simpletuner.start(folder, "tiny-probe", setup="setups.py:slow_forwards")
        wait_for_batches(folder, 2, started.text, besides=batches)
        os.kill(started.pid, signal.SIGKILL)  # most of a step's time is its ablation
        assert started.result().code == -signal.SIGKILL
        batches = sum(file.batches for file in run_of(folder).files)
        assert run_of(folder).samples < 40
    result = simpletuner.run(folder, "tiny-probe")
    assert result.code == 0, result.log[-4000:]
    run = run_of(folder)
    assert run.samples == 40 and len(np.unique(run.sigma)) == 40
    assert sorted((run.sigma * 10).astype(int).tolist()) == [tenth for tenth in range(10) for _ in range(4)]
    increase_NL = run.distances("block", "ablation")
    taken_N = np.isfinite(increase_NL).all(axis=1)
    assert 20 <= taken_N.sum() <= 21 and np.isnan(increase_NL[~taken_N]).all()
    for stream, reading in run.manifest.columns():
        if reading.startswith("ablation"):
            assert np.array_equal(np.isfinite(run.distances(stream, reading)).all(axis=1), taken_N)


def test_what_cannot_be_asked_for_is_said(simpletuner, tiny):
    folder = tiny(max_train_steps=2, layerprobe_ablation="layers")
    result = simpletuner.run(folder, "tiny-probe")
    assert_one_line_error(result, "layerprobe_ablation is 'layers'; it must be one of none, blocks, text, both")
    set_options(folder, layerprobe_ablation="blocks", layerprobe_ablation_samples=0)
    assert_one_line_error(simpletuner.run(folder, "tiny-probe"), "layerprobe_ablation_samples is 0; it must be", "1 or")
    set_options(folder, layerprobe_ablation_samples=1, max_train_steps=2)
    assert simpletuner.run(folder, "tiny-probe").code == 0
    set_options(folder, layerprobe_ablation="none", max_train_steps=4)
    assert_one_line_error(simpletuner.run(folder, "tiny-probe"), "holds another run: readings: 2 here, 4 in the run")
