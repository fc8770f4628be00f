"""The stacked engine of benchmarks/weighting against LyCORIS's own modules on diffusers' own model."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from weighting.arm import Training, lycoris_network, make_arm
from weighting.claims import claim
from weighting.engine import Engine, Samples
from weighting.evidence import energies, read_contributions
from weighting.report import rows_of, table
from weighting.results import FINAL, SWEEP, Result
from weighting.rounds import best_rate, extensions, final, sweep
from weighting.stack import BETAS, EPS, WEIGHT_DECAY
from weighting.statistics import exchange_rate

TOKENS, BATCH = 5, 2
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def model():
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(5)
    made = SD3Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        num_attention_heads=2,
        attention_head_dim=12,
        qk_norm="rms_norm",
        joint_attention_dim=20,
        caption_projection_dim=24,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0, 0.15)
    return made.requires_grad_(False).eval()


def config(factor: int, *, leave: int | None = None, attention: int | None = None) -> dict:
    """One factor for all blocks, or another for attention, or one block without an adapter."""
    names = {
        f"transformer_blocks.{block}.attn.*": {"factor": attention or factor} for block in range(3) if block != leave
    }
    names |= {f"transformer_blocks.{block}.*": {"factor": factor} for block in range(3) if block != leave}
    preset = {"use_fnmatch": True, "target_module": [], "name_algo_map": names}
    whole = {"linear_dim": 1000000, "linear_alpha": 1, "full_matrix": True, "factor": 1}
    return {"algo": "lokr", "multiplier": 1.0, **whole, "apply_preset": preset}


def batches(seeds, step) -> Samples:
    made = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(100 * seed + step)
        shapes = (BATCH, 4, 4, 4), (BATCH, 4, 4, 4), (BATCH, TOKENS, 20), (BATCH, 16)
        clean, noise, text, pooled = (torch.randn(shape, generator=generator) for shape in shapes)
        made.append((clean, noise, torch.rand(BATCH, generator=generator), text, pooled))
    return Samples(*(torch.stack(each) for each in zip(*made, strict=True)))


def loss_of(model, samples: Samples) -> torch.Tensor:
    share = samples.sigma[:, None, None, None]
    noisy = (1 - share) * samples.clean + share * samples.noise
    said = model(noisy, samples.text, samples.pooled, samples.sigma * 1000, return_dict=False)[0]
    return (said - (samples.noise - samples.clean)).square().mean()


def one_by_one(model, training: Training, steps: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """LyCORIS's network on the model, trained by torch's AdamW."""
    network = lycoris_network(training.arm.config, model, training.seed)
    network.apply_to()
    names = {id(lora.org_module[0]): name for name, lora in network.named_modules() if hasattr(lora, "org_module")}
    assert len(names) == len(training.arm.pairs)
    groups = [
        {"params": list(lora.parameters()), "lr": 0.0, "top": training.rate * pair.rate}
        for lora, pair in zip(network.loras, training.arm.pairs, strict=True)
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = group["top"] * min(1.0, step / 10)
        samples = batches([training.seed], step)
        loss = loss_of(model, Samples(*(tensor[0] for tensor in vars(samples).values())))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    trained = {
        pair.module: (lora.lokr_w1.detach().clone(), lora.lokr_w2.detach().clone())
        for lora, pair in zip(network.loras, training.arm.pairs, strict=True)
    }
    network.restore()
    return losses, trained


def test_stack_trains_as_lycoris_does(model):
    arms = [
        make_arm("two", config(2), model),
        make_arm("uneven", config(3, attention=1), model, by_rms=True),
        make_arm("frozen", config(4, leave=1), model),
    ]
    trainings = [Training(arms[0], 0, 4e-2), Training(arms[1], 0, 1e-2), Training(arms[2], 7, 2e-2)]
    trainings += [Training(arms[0], 7, 1e-2)]
    stack, loss_TE = Engine(model).train(trainings, batches, 4)
    for e, training in enumerate(trainings):
        losses, trained = one_by_one(model, training, 4)
        torch.testing.assert_close(loss_TE[:, e], torch.tensor(losses), rtol=1e-5, atol=0)
        for name, tensors in trained.items():
            for own, lycoris in zip(stack.adapter(e, name), tensors, strict=True):
                assert (own - lycoris).norm() <= 1e-5 * max(lycoris.norm(), 1e-3), name
                # Nothing reads the text's queries in the last block.
                assert bool(lycoris.any()) or name == "transformer_blocks.2.attn.add_q_proj", name


def test_forward_is_diffusers_with_merged_weights(model):
    arm = make_arm("uneven", config(3, attention=2), model)
    training = Training(arm, 3, 5e-2)
    engine = Engine(model)
    stack, _ = engine.train([training, Training(arm, 4, 5e-2)], batches, 3)
    samples = batches([3, 4], 9)
    with torch.no_grad():
        said = engine.velocities(stack, samples, torch.tensor([0, 1]))
        for pair in arm.pairs:
            model.get_submodule(pair.module).weight += torch.kron(*stack.adapter(0, pair.module))
        share = samples.sigma[0, :, None, None, None]
        noisy = (1 - share) * samples.clean[0] + share * samples.noise[0]
        expected = model(noisy, samples.text[0], samples.pooled[0], samples.sigma[0] * 1000, return_dict=False)[0]
    torch.testing.assert_close(said[0], expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_decomposed_adapters_are_refused(model):
    low_rank = {**config(2), "full_matrix": False, "linear_dim": 2, "linear_alpha": 2}
    with pytest.raises(ValueError, match="not two full matrices"):
        make_arm("low rank", low_rank, model)


@pytest.mark.parametrize("attention", ["fused", "plain"])
def test_ways_of_attention_agree(model, attention):
    arm = make_arm("two", config(2), model)
    losses = [
        Engine(model, attention=how).train([Training(arm, 0, 1e-2)], batches, 3)[1] for how in ("fused", attention)
    ]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)


def test_rates_by_rms_have_mean_one(model):
    pairs = make_arm("uneven", config(3, attention=1), model, by_rms=True).pairs
    total = sum(pair.parameters for pair in pairs)
    assert sum(pair.rate * pair.parameters for pair in pairs) == pytest.approx(total)
    assert {round(pair.rate / pair.w1[1] ** 0.5, 9) for pair in pairs} == {
        round(pairs[0].rate / pairs[0].w1[1] ** 0.5, 9)
    }


def test_energy_is_what_one_product_can_hold():
    w1, w2 = torch.randn(2, 3), torch.randn(6, 4)
    found = energies({"exact": torch.kron(w1, w2)})["exact"]
    whole = float(torch.kron(w1, w2).square().sum())
    assert found["1"] == pytest.approx(whole, rel=1e-5)
    assert all(0 < part <= whole * (1 + 1e-5) for part in found.values())


def test_placeholder_contributions_are_refused(tmp_path):
    path = tmp_path / "contributions.json"
    path.write_text(json.dumps({"base1": {"measured": False, "angle": [0.0, 1.0], "ablation": [1.0, 0.0]}}))
    with pytest.raises(ValueError, match="placeholder"):
        read_contributions(path, "base1", 2, allow_placeholder=False)
    assert read_contributions(path, "base1", 2, allow_placeholder=True)["angle"] == [0.0, 1.0]


def test_the_table_judges_arms_and_sets_shuffles_apart(model):
    arm = make_arm("uniform", config(2), model)
    random = np.random.default_rng(3)
    picture_QU, seed_S = random.gamma(2, 0.2, (100, 10)), random.normal(0, 0.1, 4)
    planted = {"uniform": 0.0, "uniform-110": -0.02, "angle-12": 0.03, "shuffle-00": 0.01, "shuffle-01": 0.04}
    results = [
        Result("base1", FINAL, name, seed, 1e-3, picture_QU + seed_S[seed] + change + random.normal(0, 0.02, (100, 10)))
        for name, change in planted.items()
        for seed in range(2 if name.startswith("shuffle-") else 4)
    ]
    made = rows_of(results, "base1", {name: replace(arm, name=name) for name in planted})
    rows = {row["arm"]: row for row in made["arms"]}
    assert made["seeds"] == [0, 1, 2, 3] and made["images"] == 100 and made["margin"] == pytest.approx(0.02, abs=2e-3)
    assert made["shuffles"] == {"better_than": 1, "of": 2}
    assert {name: row["verdict"] for name, row in rows.items() if "verdict" in row} == {"angle-12": "worse"}
    low, high = rows["angle-12"]["interval"]
    assert 0.02 < low < 0.03 < high < 0.04 and rows["angle-12"]["p"] == rows["angle-12"]["holm_p"] < 1e-6
    single = [replace(one, loss_QU=one.loss_QU[:1]) for one in results]
    row = rows_of(single, "base1", {name: replace(arm, name=name) for name in planted})
    assert "[?, ?] | open" in table(row)


def test_exchange_rate():
    assert exchange_rate(0.95, [0.9, 1.0, 1.1], [1.1, 1.0, 0.9]) == pytest.approx(1.1**0.5)
    assert exchange_rate(1.2, [0.9, 1.0], [1.1, 1.0]) is None


def test_rounds_give_all_arms_the_same_seeds(model):
    arm = make_arm("uniform", config(2), model)
    arms = {"uniform": arm, "shuffle-00": replace(arm, name="shuffle-00")}
    made = final(arms, dict.fromkeys(arms, 0.001), 100, 8)
    assert [one.seed for one in made if one.arm.name == "uniform"] == list(range(100, 108))
    assert [one.seed for one in made if one.arm.name == "shuffle-00"] == list(range(100, 102))
    assert {one.seed for one in made[:6]} == set(range(100, 104))


def test_a_sweep_goes_on_beyond_its_end_once(model):
    arm = make_arm("uniform", config(2), model)

    def swept(losses):
        return [
            Result("base1", SWEEP, "uniform", 1000, rate, np.full((1, 1), loss, dtype=np.float32))
            for rate, loss in losses.items()
        ]

    rates = [1e-3, 2e-3, 4e-3]
    ask = {"base": "base1", "arms": {"uniform": arm}, "rates": rates, "seeds": [1000]}
    at_end = {1e-3: 0.6, 2e-3: 0.5, 4e-3: 0.4}
    assert [one.rate for one in extensions(swept(at_end), **ask)] == [8e-3]
    assert [one.rate for one in extensions(swept({**at_end, 8e-3: 0.3}), **ask)] == [8e-3]
    assert extensions(swept({1e-3: 0.6, 2e-3: 0.3, 4e-3: 0.4}), **ask) == []
    assert best_rate(swept({**at_end, 8e-3: float("nan")}), "base1", "uniform") == 4e-3


def test_a_training_belongs_to_one_process(tmp_path):
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[2])\n"
        "from weighting.claims import claim\nwith claim(Path(sys.argv[1]), 'uniform-0') as mine: print(mine)"
    )
    command = [sys.executable, "-c", code, str(tmp_path), str(BENCHMARKS)]
    with claim(tmp_path, "uniform-0") as mine, claim(tmp_path, "uniform-1") as other:
        assert mine and other
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "False\n"
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "True\n"


def test_shuffles_share_the_learning_rate_that_two_of_them_choose(model):
    arm = make_arm("uniform", config(2), model)
    arms = {name: replace(arm, name=name) for name in ("uniform", "shuffle-00", "shuffle-01", "shuffle-02")}
    assert {one.arm.name for one in sweep(arms, [1e-3], [1000])} == {"uniform", "shuffle-00", "shuffle-01"}
    losses = {
        ("shuffle-00", 1e-3): 0.5,
        ("shuffle-00", 2e-3): 0.6,
        ("shuffle-01", 1e-3): 0.5,
        ("shuffle-01", 2e-3): 0.3,
    }
    results = [
        Result("base1", SWEEP, name, 1000, rate, np.full((1, 1), loss, dtype=np.float32))
        for (name, rate), loss in losses.items()
    ]
    assert {best_rate(results, "base1", name) for name in ("shuffle-00", "shuffle-02")} == {2e-3}
