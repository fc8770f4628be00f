"""Several processes of the real SimpleTuner: other numbers of ranks at each start, ranks that die, two starts at once.

The ranks are forked from the one process that has SimpleTuner imported, with the variables that torchrun sets; the
launchers themselves are in test_real_cli.py and in the last tests here.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from test_real_cli import ENVIRONMENT
from test_real_run import (
    RUN,
    assert_one_line_error,
    contents,
    of_rank,
    run_of,
    samples_per_rank,
    set_options,
    wait_for_batches,
)


def test_two_ranks_then_one_then_three(simpletuner, tiny):
    """Each start goes on with what is left, and each rank in its own sequence of sigmas."""
    folder = tiny(layerprobe_samples=11, layerprobe_sigmas="stratified", num_train_epochs=1)
    expected: dict[int, int] = {}
    for ranks, total, new in ((2, 11, {0: 6, 1: 5}), (1, 14, {0: 3}), (3, 30, {0: 6, 1: 5, 2: 5})):
        set_options(folder, layerprobe_samples=total)
        before = contents(run_of(folder)) if (folder / RUN).exists() else {}
        results = [rank.result() for rank in simpletuner.start_ranks(folder, "tiny-probe", ranks)]
        assert [result.code for result in results] == [0] * ranks, results[-1].log[-4000:]
        expected = {rank: expected.get(rank, 0) + new.get(rank, 0) for rank in expected.keys() | new.keys()}
        run = run_of(folder)
        assert samples_per_rank(run) == expected and run.samples == total
        assert before.items() <= contents(run).items()
        assert f"layerprobe: {sum(new.values())} samples in" in results[0].line("layerprobe: ")
        assert f", {total} samples of {run.images} images in the run" in results[0].line("layerprobe: ")
    assert len(np.unique(run.sigma)) == 30
    for rank, count in expected.items():
        tenths = (10 * run.sigma[of_rank(run, rank)]).astype(int)
        for start in range(0, count, 10):  # every ten samples of a rank fill the ten tenths
            window = tenths[start : start + 10].tolist()
            assert len(set(window)) == len(window)


def test_a_rank_that_dies_ends_the_others_and_their_rows_are_kept(simpletuner, tiny):
    folder = tiny(max_train_steps=100_000, layerprobe_flush_seconds=0.2)
    ranks = simpletuner.start_ranks(folder, "tiny-probe", 3)
    wait_for_batches(folder, 2, ranks[0].text, ranks=3)
    os.kill(ranks[1].pid, signal.SIGKILL)
    results = [rank.result() for rank in ranks]
    assert results[1].code == -signal.SIGKILL
    for rank in (0, 2):
        assert results[rank].code not in (0, None)
    counts = samples_per_rank(run_of(folder))
    assert set(counts) == {0, 1, 2}
    # The survivors had finished as many steps as each other, give or take the one that failed.
    assert abs(counts[0] - counts[2]) <= 1 and counts[1] <= counts[0] + 1
    assert "Connection closed by peer" in results[0].log or "what was written is kept in" in results[0].log
    assert not list((folder / RUN).glob("rank-0000.lock"))
    # And the run goes on, with fewer ranks.
    set_options(folder, layerprobe_samples=sum(counts.values()) + 4)
    result = simpletuner.run(folder, "tiny-probe")
    assert result.code == 0, result.log[-4000:]
    assert run_of(folder).samples == sum(counts.values()) + 4


def test_two_trainings_of_one_run_at_the_same_time(simpletuner, tiny):
    """The second says so and ends, before the model is loaded; after a SIGKILL of the first there is no lock left."""
    folder = tiny(max_train_steps=100_000, layerprobe_flush_seconds=0.2)
    first = simpletuner.start(folder, "tiny-probe")
    wait_for_batches(folder, 2, first.text)
    second = simpletuner.run(folder, "tiny-probe", log="second.txt")
    assert_one_line_error(second, "another process is recording rank 0 of the run", "choose another layerprobe_dir")
    os.kill(first.pid, signal.SIGKILL)
    assert first.result().code == -signal.SIGKILL
    assert (folder / RUN / "rank-0000.lock").exists()
    before = run_of(folder).samples
    set_options(folder, layerprobe_samples=before + 2)
    third = simpletuner.run(folder, "tiny-probe", log="third.txt")
    assert third.code == 0, third.log[-4000:]
    assert run_of(folder).samples == before + 2
    assert not (folder / RUN / "rank-0000.lock").exists()


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"fsdp_enable": True, "fsdp_version": 2}, ["fsdp_enable is True", "cannot work with it"]),
        ({"deepspeed_config": {"zero_optimization": {"stage": 2}}}, ["deepspeed_config is", "zero_optimization"]),
        ({"context_parallel_size": 2}, ["context_parallel_size is 2"]),
    ],
)
def test_sharded_models_are_refused_by_option(simpletuner, tiny, options, parts):
    folder = tiny(**options)
    assert_one_line_error(simpletuner.run(folder, "tiny-probe"), *parts)
    assert not (folder / RUN).exists()


@pytest.mark.parametrize(
    "name",
    [
        "ACCELERATE_USE_FSDP",
        "ACCELERATE_USE_DEEPSPEED",
        "ACCELERATE_USE_MEGATRON_LM",
        "ACCELERATE_USE_PARALLELISM_CONFIG",
    ],
)
def test_sharded_models_are_refused_by_variable(simpletuner, tiny, name):
    folder = tiny()
    result = simpletuner.run(folder, "tiny-probe", environment={name: "true"})
    assert_one_line_error(result, f"{name} is 'true', from `accelerate config` or the environment", "whole model")
    assert not (folder / RUN).exists()


def test_a_rank_that_dies_under_torchrun(tiny):
    package = importlib.util.find_spec("simpletuner")
    assert package is not None and package.origin is not None
    folder = tiny(max_train_steps=100_000, layerprobe_flush_seconds=0.2)
    log = folder / "log.txt"
    with log.open("w") as output:
        process = subprocess.Popen(
            ["torchrun", "--nproc_per_node=2", str(Path(package.origin).parent / "train.py")],
            cwd=folder,
            env=ENVIRONMENT | {"ENV": "tiny-probe", "ACCELERATE_USE_CPU": "1", "ACCELERATE_MIXED_PRECISION": "bf16"},
            stdout=output,
            stderr=output,
        )
        try:
            wait_for_batches(folder, 2, lambda: log.read_text(errors="replace"), ranks=2)
            workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            ranks = {int(Path(f"/proc/{pid}/environ").read_text().split("\0RANK=")[1][0]): int(pid) for pid in workers}
            os.kill(ranks[1], signal.SIGKILL)
            assert process.wait(timeout=600) == 1
        finally:
            process.kill()
    assert not Path(f"/proc/{ranks[0]}").exists()
    counts = samples_per_rank(run_of(folder))
    assert counts[0] >= 2 and counts[1] >= 2
    assert "Signal 9 (SIGKILL) received by PID" in log.read_text(errors="replace")
