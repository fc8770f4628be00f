from __future__ import annotations

import pytest
import torch
from failing import fails
from synthetic_run import write_run
from test_run_lock import holding

from simpletuner_layerprobe.probe.fingerprint import fingerprint
from simpletuner_layerprobe.training.options import ProbeSettings
from simpletuner_layerprobe.training.session import Session


def session(tmp_path, monkeypatch, rank: int = 0, ranks: int = 1, **settings: object) -> Session:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    return Session(ProbeSettings(directory=str(tmp_path / "run"), **settings), {})  # type: ignore[arg-type]


@pytest.mark.parametrize(("samples", "ranks"), [(10, 1), (10, 3), (2, 4), (0, 2)])
def test_the_ranks_quotas_add_up(tmp_path, monkeypatch, samples, ranks):
    quotas = [session(tmp_path, monkeypatch, rank, ranks, samples=samples).quota for rank in range(ranks)]
    if samples:
        assert sum(quotas) == samples and max(quotas) - min(quotas) <= 1
    else:
        assert set(quotas) == {float("inf")}


@pytest.mark.parametrize("mode", ["uniform", "stratified"])
def test_ranks_draw_different_sigmas(tmp_path, monkeypatch, mode):
    draws = []
    for rank in range(2):
        one = session(tmp_path, monkeypatch, rank, 2, sigmas=mode)
        draws += [*one.draw_sigmas(3, seed=1), *one.draw_sigmas(2, seed=1)]
    assert len(set(draws)) == 10
    if mode == "stratified":
        assert sorted(int(10 * sigma) for sigma in draws) == list(range(10))


def test_a_single_process_ends_in_the_step_that_completes_it(tmp_path, monkeypatch):
    one = session(tmp_path, monkeypatch, samples=4)
    assert one.last_step(global_step=7, max_train_steps=9) == 9
    assert one.last_step(global_step=9, max_train_steps=9) == 11  # short batches: more steps than foreseen
    one._kept = 4
    assert one.finished and one.last_step(global_step=7, max_train_steps=9) == 7
    assert one.agree(reached_epoch_end=False) == (False, True)


def test_epochs_decide_without_a_sample_count(tmp_path, monkeypatch):
    one = session(tmp_path, monkeypatch)
    one._kept = 10**6
    assert not one.finished and not one.wants_to_stop()
    assert one.last_step(global_step=9, max_train_steps=9) == 9
    assert one.agree(reached_epoch_end=True) == (True, False)


def test_fingerprint_tells_models_apart():
    def model(seed: int) -> torch.nn.Module:
        torch.manual_seed(seed)
        return torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.LayerNorm(30))

    assert fingerprint(model(0)) == fingerprint(model(0))
    others = [model(1), model(0).to(torch.bfloat16), torch.nn.Sequential(model(0))]
    tuned = model(0)
    with torch.no_grad():
        tuned[0].weight += 1e-3
    assert len({fingerprint(one) for one in [model(0), tuned, *others]}) == 5
    assert len(fingerprint(torch.nn.Linear(3, 3, device="meta"))) == 64


def test_settled_factors_end_the_run_as_a_signal_does(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "run", {"image": ("a", "b", "c")}, 400, peaks=[("image", 0)])
    judging, other = (session(tmp_path, monkeypatch, rank, 2, stop_when_stable=0.5) for rank in range(2))
    for one in (judging, other, session(tmp_path, monkeypatch)):
        one._judge()
        assert one.wants_to_stop() == (one is judging)
    assert "at least 50.0% of the bootstrap replicates of 400 samples agree" in capsys.readouterr().out
    judging.ranks = 1
    assert judging.agree(reached_epoch_end=False) == (False, True)
    assert judging.last_step(global_step=7, max_train_steps=9) == 7
    assert not judging._stop_requested  # a first Ctrl-C still ends the step instead of the process


def test_a_run_that_cannot_be_judged_goes_on_and_says_so_once(tmp_path, monkeypatch, capsys):
    run = write_run(tmp_path / "run", {"image": ("a", "b", "c")}, 400)
    one = session(tmp_path, monkeypatch, stop_when_stable=0.5)
    run.shards[0].write_bytes(b"broken")
    for _ in range(2):
        one._judge()
    assert not one.wants_to_stop()
    assert capsys.readouterr().out.count("layerprobe_stop_when_stable has no effect any more: shard") == 1


def test_a_rank_is_recorded_by_one_process_at_a_time(tmp_path, monkeypatch):
    write_run(tmp_path / "run", {"image": ("a", "b")}, 20)
    with holding(tmp_path / "run" / "shards" / "rank00001.lock"):
        with fails("another process is recording rank 1 of the run"):
            session(tmp_path, monkeypatch, rank=1, ranks=2)
        assert session(tmp_path, monkeypatch, rank=0, ranks=2).recorded == 20
        assert session(tmp_path, monkeypatch, rank=1, ranks=2, samples=20).nothing_to_do
    assert session(tmp_path, monkeypatch, rank=1, ranks=2).recorded == 20
