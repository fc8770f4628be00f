"""One run in one process, without SimpleTuner: counts, ranks, sigmas over restarts, locks, rows that are kept."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from failing import fails
from small import DOUBLE_AND_JOINT, SMALL, Add, Denoiser, FluxLike
from synthetic_run import manifest, rows, write_ablated_run, write_run
from test_run_lock import holding
from torch.utils._python_dispatch import TorchDispatchMode

from simpletuner_layerprobe.probe.fingerprint import fingerprint
from simpletuner_layerprobe.probe.observer import Observer
from simpletuner_layerprobe.run.load import RunData, load_run
from simpletuner_layerprobe.run.manifest import create_run
from simpletuner_layerprobe.run.records import RecordWriter
from simpletuner_layerprobe.training.ablation import StepAblation
from simpletuner_layerprobe.training.goal import Goal
from simpletuner_layerprobe.training.loop import probe_progress
from simpletuner_layerprobe.training.options import ProbeSettings
from simpletuner_layerprobe.training.session import Session
from simpletuner_layerprobe.training.summary import start_text


def session(tmp_path: Path, monkeypatch, rank: int = 0, ranks: int = 1, **settings: object) -> Session:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    watchers = settings.pop("watchers", ())
    return Session(ProbeSettings(directory=str(tmp_path / "run"), **settings), {}, watchers)  # type: ignore[arg-type]


@pytest.mark.parametrize(("samples", "ranks"), [(10, 1), (10, 3), (2, 4), (0, 2)])
def test_the_ranks_quotas_add_up(tmp_path, monkeypatch, samples, ranks):
    quotas = [session(tmp_path, monkeypatch, rank, ranks, samples=samples).goal.quota for rank in range(ranks)]
    if samples:
        assert sum(quotas) == samples and max(quotas) - min(quotas) <= 1
    else:
        assert set(quotas) == {float("inf")}


@pytest.mark.parametrize("mode", ["uniform", "stratified"])
def test_no_sigma_is_drawn_twice_however_unevenly_the_ranks_stop(tmp_path, monkeypatch, mode):
    """Two ranks with 100 and 37 samples, then one rank, then three: each goes on in its own sequence."""
    run = create_run(tmp_path / "run", manifest({"image": ("a",)}, readings=("last",)))
    for counts in ([100, 37], [21], [8, 60, 33], [0, 0, 5]):
        sessions = [session(tmp_path, monkeypatch, rank, len(counts), sigmas=mode) for rank in range(len(counts))]
        for rank, count in enumerate(counts):
            if count:
                sigmas = sessions[rank].draw_sigmas(count, seed=4)
                with RecordWriter(tmp_path / "run", run, rank) as writer:
                    writer.write(rows(sigmas, {("image", "last"): np.zeros((count, 1), np.float32)}))
    sigma_N, files = load_run(tmp_path / "run").sigma, load_run(tmp_path / "run").files
    assert len(np.unique(sigma_N)) == 100 + 37 + 21 + 8 + 60 + 33 + 5
    if mode == "uniform":
        return
    starts = np.cumsum([0, *(file.samples for file in files)])
    for rank in range(3):
        own = [sigma_N[at : at + file.samples] for at, file in zip(starts, files, strict=False) if file.rank == rank]
        tenths = (10 * np.concatenate(own)).astype(int)
        for first in range(0, len(tenths), 10):
            window = tenths[first : first + 10].tolist()
            assert len(set(window)) == len(window)


def test_sigmas_that_were_drawn_for_a_batch_that_is_not_kept_are_drawn_again(tmp_path, monkeypatch):
    """At the end of an epoch a rank has prepared a batch that another rank does not have."""
    run = session(tmp_path, monkeypatch, sigmas="stratified")
    assert run.draw_sigmas(4, seed=1).tolist() == run.draw_sigmas(4, seed=1).tolist()


def test_a_single_process_ends_in_the_step_that_completes_it(tmp_path, monkeypatch):
    run = session(tmp_path, monkeypatch, samples=4)
    assert run.last_step(global_step=7, max_train_steps=9) == 9
    assert run.last_step(global_step=9, max_train_steps=9) == 11  # short batches: more steps than foreseen
    assert [run.goal.keep(3), run.goal.keep(3)] == [3, 1]
    assert run.goal.finished and run.last_step(global_step=7, max_train_steps=9) == 7
    assert run.agree(reached_epoch_end=False) == (False, True)


def test_epochs_decide_without_a_sample_count(tmp_path, monkeypatch):
    run = session(tmp_path, monkeypatch, samples=0)
    assert run.goal.keep(10**6) == 10**6
    assert not run.goal.finished and not run.wants_to_stop
    assert run.last_step(global_step=9, max_train_steps=9) == 9
    assert run.agree(reached_epoch_end=True) == (True, False)


def test_a_watcher_of_the_main_process_ends_the_run_as_a_signal_does(tmp_path, monkeypatch):
    class Watcher:
        wants_stop = False
        told = MappingProxyType({"settled": "50%"})

    watcher = Watcher()
    main, other = (session(tmp_path, monkeypatch, rank, 2, watchers=[watcher]) for rank in range(2))
    assert not main.wants_to_stop
    watcher.wants_stop = True
    assert main.wants_to_stop and not other.wants_to_stop
    main.goal.ranks = 1
    assert main.agree(reached_epoch_end=False) == (False, True)
    assert main.last_step(global_step=7, max_train_steps=9) == 7
    assert not main.stop.requested  # a first Ctrl-C still ends the step instead of the process


def test_the_progress_bar_tells_samples_and_nothing_of_it_stays_behind(tmp_path, monkeypatch):
    said = []

    class Bar:
        def set_postfix(self, told=None, **more):
            said.append((told, more))

    names = {"tqdm": Bar, "train": None}
    exec("def train():\n    tqdm().set_postfix(step_loss=0.5, lr=1e-4)\n    raise ZeroDivisionError", names)
    ended = session(tmp_path, monkeypatch, samples=10, ranks=2)
    ended.goal.keep(3)
    ended._watchers = (SimpleNamespace(told={"settled": "50%"}),)
    with pytest.raises(ZeroDivisionError), probe_progress(names["train"], ended):
        names["train"]()
    assert said == [({"samples": "6/10", "settled": "50%"}, {})] and names["tqdm"] is Bar


def test_a_step_without_a_forward_is_said(tmp_path, monkeypatch):
    run = session(tmp_path, monkeypatch)
    run.arm()
    with fails("the training step ran no forward of the model"):
        run.commit()


def test_a_rank_is_recorded_by_one_process_at_a_time(tmp_path, monkeypatch):
    write_run(tmp_path / "run", {"image": ("a", "b")}, 20)
    with holding(tmp_path / "run" / "rank-0001.lock"):
        with fails("another process is recording rank 1 of the run"):
            session(tmp_path, monkeypatch, rank=1, ranks=2)
        assert session(tmp_path, monkeypatch, rank=0, ranks=2).goal.recorded == 20
        assert session(tmp_path, monkeypatch, rank=1, ranks=2, samples=20).goal.nothing_to_do
    assert session(tmp_path, monkeypatch, rank=1, ranks=2).goal.recorded == 20


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


class CountWaits(TorchDispatchMode):
    """Counts what makes the host wait for a device: a number, a copy, or a shape that depends on values."""

    WAITS = frozenset({"_local_scalar_dense", "nonzero", "masked_select", "equal", "unique2", "is_nonzero"})

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.waits = 0
        for name in ("tolist", "numpy", "cpu"):
            monkeypatch.setattr(torch.Tensor, name, self._counted(getattr(torch.Tensor, name)))

    def _counted(self, method: Any) -> Any:
        def counted(tensor: torch.Tensor) -> Any:
            self.waits += 1
            return method(tensor)

        return counted

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        of_generator = torch.is_tensor(args[0]) and args[0].dtype == torch.uint8 if args else False  # on the host
        self.waits += function.overloadpacket.__name__ in self.WAITS and not of_generator
        return function(*args, **(kwargs or {}))


def predicting(model: FluxLike) -> tuple[Any, Any]:
    """SimpleTuner's model, as far as the probe asks it, and its forward."""
    states: list[Any] = []

    def predict(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        states.clear()
        model(batch["image"], batch["text"], keep=states)
        return {"model_prediction": states[-1][0] + states[-1][1].mean()}

    return SimpleNamespace(get_prediction_target=lambda batch: batch["image"] * 0.5), predict


def test_a_step_is_recorded_without_waiting_for_the_device(tmp_path, monkeypatch):
    """Beside the first, after which the noise is checked once, and the flushes; with blocks left out too."""
    plain = recorded_steps(tmp_path / "plain", monkeypatch)
    ablated = recorded_steps(tmp_path / "ablated", monkeypatch, ablation="both", ablation_samples=4)
    for key in (("image", "last"), ("image", "mean"), ("text", "last"), ("text", "mean")):
        assert np.array_equal(plain.distances(*key), ablated.distances(*key))  # bit for bit
    assert np.array_equal(plain.loss, ablated.loss) and len(np.unique(plain.loss)) == 8
    increase_NL = ablated.distances("block", "ablation")
    taken_N = ~np.isnan(increase_NL).any(axis=1)
    assert taken_N.sum() == 4 and np.isfinite(increase_NL[taken_N]).all() and np.isnan(increase_NL[~taken_N]).all()
    assert ablated.distances("text", "ablation_text").shape == (8, 5)


def recorded_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> RunData:
    """Four steps of two samples, with nothing to wait for in any but the first."""
    run = session(tmp_path, monkeypatch, flush_seconds=1000, **settings)
    run.family = DOUBLE_AND_JOINT
    run.idle_parameter = torch.nn.Parameter(torch.zeros(()))
    torch.manual_seed(0)
    model = FluxLike()
    simpletuner_model, predict = predicting(model)
    counted = CountWaits(monkeypatch)
    with torch.no_grad(), run.recording(model, "", {}, {}, to_come=8):
        waits = [counted.waits]
        for _ in range(4):
            sigma_B = torch.tensor([0.25, 0.75])
            latents, noise = torch.randn(2, 2, 4, 8, 8).unbind()
            grid = sigma_B.view(-1, 1, 1, 1)
            batch = {"sigmas": sigma_B, "latents": latents, "noise": noise, "prompts": ["a cat", ""]}
            batch["noisy_latents"] = (1 - grid) * latents + grid * noise
            batch |= {"image": torch.randn(2, 5, 6), "text": torch.randn(2, 3, 6)}
            with counted:
                run.arm()
                run.forward(simpletuner_model, batch, predict)
                run.commit()
            waits.append(counted.waits)
        with counted:
            assert torch.ones(()).item() == 1
        assert counted.waits == waits[-1] + 1  # it counts
    assert np.diff(waits).tolist() == [1, 0, 0, 0]
    recorded = load_run(tmp_path / "run")
    assert recorded.sigma.tolist() == [0.25, 0.75] * 4
    assert recorded.facts["caption_words"].tolist() == [2, 0] * 4
    assert recorded.facts["dropped"].tolist() == [0, 1] * 4
    assert recorded.facts["text_tokens"].tolist() == [-1] * 8
    monkeypatch.undo()
    return recorded


def test_what_an_earlier_start_left_out_counts(tmp_path, monkeypatch):
    write_ablated_run(tmp_path / "run", {"image": ("a", "b")}, 30, (0.5, 0.1))  # of every third sample
    assert session(tmp_path, monkeypatch)._ablated == 10


@pytest.mark.parametrize(
    ("family", "predict", "message"),
    [
        (SMALL, lambda batch: {"model_prediction": batch["x"]}, "layerprobe_ablation is 'text', but no block of"),
        (DOUBLE_AND_JOINT, lambda batch: {}, "predicts cannot be compared with its target"),
        (DOUBLE_AND_JOINT, lambda batch: batch["x"].add_(1), "the forward changed 'x' of the batch in place"),
    ],
)
def test_a_model_whose_blocks_cannot_be_left_out_is_refused(family, predict, message):
    model = FluxLike() if family is DOUBLE_AND_JOINT else Denoiser(Add())
    with Observer(model, family) as observer, fails(message):
        step = StepAblation(observer, "text", torch.device("cpu"))
        step.run(SimpleNamespace(), {"x": torch.zeros(2)}, predict, dict)


def test_states_without_room_are_said_once(capsys):
    torch.manual_seed(0)
    model = FluxLike()
    simpletuner_model, predict = predicting(model)
    with Observer(model, DOUBLE_AND_JOINT) as observer, torch.no_grad():
        step = StepAblation(observer, "blocks", torch.device("cpu"))
        step.ablation.budget_bytes = 1000  # the first block gives 2 * (5 + 3) * 6 numbers, the joint ones as many
        made = []
        for _ in range(2):
            torch.manual_seed(1)
            batch = {"image": torch.randn(2, 5, 6), "text": torch.randn(2, 3, 6)}
            observer.begin(batch)
            made.append(step.run(simpletuner_model, batch, predict, observer.finish)[2]["block", "ablation"])
    assert torch.equal(*made)
    said = capsys.readouterr().out
    assert said.count("layerprobe: warning:") == 1
    assert "the states of 3 of 5 blocks have no room beside the model (0 MiB of the others" in said
    assert "4.2 forwards for a sample with blocks left out, not 3.0" in said


def test_the_batch_and_the_random_numbers_are_as_a_plain_forward_leaves_them():
    """Also of a family that takes keys out of the batch and draws in its forward."""
    torch.manual_seed(0)
    model = FluxLike()
    simpletuner_model, predict = predicting(model)

    def taking(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        assert batch["list"] == [1, 2] and batch.pop("once") == "here"
        batch["list"].append(torch.rand(1))
        output = predict(batch)
        return {"model_prediction": output["model_prediction"] + torch.rand(1)}

    def prepared() -> dict[str, Any]:
        torch.manual_seed(1)
        return {"image": torch.randn(2, 5, 6), "text": torch.randn(2, 3, 6), "once": "here", "list": [1, 2]}

    plain = prepared()
    taking(plain)
    expected = torch.get_rng_state()
    batch = prepared()
    with Observer(model, DOUBLE_AND_JOINT) as observer, torch.no_grad():
        observer.begin(batch)
        step = StepAblation(observer, "blocks", torch.device("cpu"))
        _, _, values = step.run(simpletuner_model, batch, taking, observer.finish)
    assert torch.equal(torch.get_rng_state(), expected)
    assert batch.keys() == plain.keys() and len(batch["list"]) == 3
    assert step.forwards == 3 and step.ablation.runs == 15
    # The last block's update of the text is all that reaches the prediction beside the image.
    assert values["block", "ablation"].shape == (2, 5) and (values["block", "ablation_change"] > 0).all()


@pytest.mark.parametrize(("samples", "count"), [(40, 40), (600, 200), (0, 200)])
def test_blocks_are_left_out_in_no_more_samples_than_there_are(samples, count):
    settings = ProbeSettings("run", ablation="blocks", ablation_samples=200)
    said = start_text(settings, Goal(samples, 0), {"image": ["a"]}, (), (), "cpu", 2.5)
    assert f"whole blocks are left out in {count} samples, which take 2.5 forwards each" in said
