"""Plans from contributions, and what they decide for many heatmaps at once, against one at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from failing import fails
from lokr_models import (
    ARTICLE_FACTORS,
    Model,
    contribution,
    numbers,
    sd3_blocks,
    sd3_model,
    small_blocks,
    small_model,
    wavy,
)
from synthetic_run import manifest, rows, sd3_modules, write_rows, write_run

from simpletuner_layerprobe.analyse.bootstrap import Bootstrap
from simpletuner_layerprobe.analyse.contribution import article_contributions, stream_contributions
from simpletuner_layerprobe.analyse.heatmap import Heatmap
from simpletuner_layerprobe.analyse.samples import Samples
from simpletuner_layerprobe.analyse.settled import confidence
from simpletuner_layerprobe.files import read_object
from simpletuner_layerprobe.lokr.plan import decide_of, make_plan
from simpletuner_layerprobe.run.load import RunData
from simpletuner_layerprobe.run.manifest import Target

BLOCKS = {
    "image": tuple(f"transformer_blocks.{i}" for i in range(6)),
    "text": tuple(f"transformer_blocks.{i}" for i in range(5)),
}
WEIGHTING = {"clip_percentile": 80.0, "text_weight": 0.5, "image_weight": 0.7}


# Plans


def test_the_articles_factors_are_a_plan(tmp_path):
    """The numbers of the article's published config, from contributions that give its factors."""
    value_L = 1 - (np.array(ARTICLE_FACTORS) - 1) / 11
    value_L[[31, 35]] = 0.4  # what its three critical blocks have instead does not count
    plan = make_plan(sd3_model(38, 2432), contribution(sd3_blocks(38), value_L), critical=(0, 31, 35))
    assert list(plan.block_factors) == ARTICLE_FACTORS
    assert plan.parameters == sum(map(plan.block_parameters, range(38))) == 765_636_738
    assert plan.word == "factor"
    assert (plan.budget, plan.gap, plan.bound, plan.differing, plan.check) == (None, 0, "", (), None)
    assert len(plan.intended) == 529
    names = plan.config()["apply_preset"]["name_algo_map"]
    assert {name: settings["factor"] for name, settings in names.items()} == {
        f"transformer_blocks.{number}.{pattern}": factor * level
        for number, factor in enumerate(ARTICLE_FACTORS)
        for pattern, level in (("norm1*", 1), ("norm1_context*", 1), ("ff*", 1), ("*", 2))
    }
    plan.write(tmp_path / "lycoris_config.json")
    assert read_object(tmp_path / "lycoris_config.json", "") == plan.config()
    assert plan.files() == {"lycoris_config.json": (tmp_path / "lycoris_config.json").read_bytes()}
    assert plan.options("config/x") == {
        "model_type": "lora",
        "lora_type": "lycoris",
        "lycoris_config": "config/x/lycoris_config.json",
    }


def test_critical_blocks_are_looked_for_unless_they_are_named():
    small = contribution(small_blocks(4), [0.0, 1.0, 0.5, 0.2], critical=(3,))
    assert make_plan(small_model(4), small).block_factors == (12, 1, 6, 1)
    assert make_plan(small_model(4), small, critical=()).block_factors == (12, 1, 6, 10)
    assert make_plan(small_model(4), small, critical=(0,), contrast=3).block_factors == (1, 1, 2, 3)


def test_a_budget_is_a_plan():
    model, blocks = sd3_model(38, 2432), sd3_blocks(38)
    plan = make_plan(model, contribution(blocks, wavy(38)), preset="400M", critical=(5,), freeze=(0, 7))
    assert plan.budget == 400_000_000 and -400_000 <= plan.gap <= 0 and plan.least < plan.parameters < plan.most
    assert plan.block_parameters(0) == plan.block_parameters(7) == 0
    fives = [place for place, group in enumerate(plan.groups) if group.number == 5]
    assert {plan.numbers[place] for place in fives} == {1}
    assert len(plan.groups) == 36 * 3
    assert plan.parameters == sum(numbers(*each) for each in zip(plan.groups, plan.numbers, strict=True))
    assert plan.bound.startswith("reached within 0.1%")
    assert plan == make_plan(model, contribution(blocks, wavy(38)), preset=400_000_000, critical=(5,), freeze=(0, 7))


def test_a_plan_per_stream_goes_by_each_streams_contributions():
    blocks = sd3_blocks(6)
    streams = {"image": np.linspace(0, 1, 6), "text": np.linspace(1, 0, 6)}
    plan = make_plan(sd3_model(6, 64), contribution(blocks, wavy(6)), streams=streams, preset=200_000, per_stream=True)
    factors = {
        (group.stream, group.number): factor
        for group, factor in zip(plan.groups, plan.numbers, strict=True)
        if group.kind == "attention"
    }
    assert factors["image", 0] > factors["image", 4] and factors["text", 0] < factors["text", 4]
    with fails("a plan per stream needs the contributions of each stream"):
        make_plan(sd3_model(6, 64), contribution(blocks, wavy(6)), preset=100_000, per_stream=True)


def test_what_a_whole_block_does_says_nothing_of_streams(run):
    """Contributions from leaving whole blocks out: in the plan, and for its replicates."""
    whole = {"block": np.linspace(0, 1, 6)}
    with fails("plans per stream go by the angle"):
        options = {"preset": 200_000, "per_stream": True}
        make_plan(sd3_model(6, 64), contribution(sd3_blocks(6), wavy(6)), streams=whole, **options)
    change_NL = np.random.default_rng(0).random((20, 6))
    samples = Samples(np.full(20, 0.5), np.zeros(20), {"block": BLOCKS["image"]}, {"block": change_NL}, "ablation")
    with fails("plans per stream go by the angle"):
        decide_of(run.manifest, **options)(Bootstrap.of(samples))


def test_ranks_are_plans_as_well():
    small = contribution(small_blocks(3), [0.0, 1.0, 0.5])
    plan = make_plan(small_model(3), small, algo="locon", rank=24)
    assert plan.word == "rank"
    given_to = {(group.number, group.kind): rank for group, rank in zip(plan.groups, plan.numbers, strict=True)}
    assert given_to == {
        (number, kind): max(1, round(24 / (factor * level)))
        for number, factor in enumerate(plan.block_factors)
        for kind, level in (("feed-forward", 1), ("attention", 2))
    }
    assert plan.intended["blocks.1.gate"].tensors[0][1] == (3, 12)  # no more than it can use
    lora = make_plan(small_model(3), small, algo="lora", preset=1000)
    assert not any("mix" in name for name in lora.intended)  # no convolutions
    assert abs(lora.gap) <= 30 and set(lora.files()) == {"lora_ranks.safetensors", "lora_target_modules.json"}
    for what in (lora.config, lambda: lora.write("x")):
        with fails("write an environment"):
            what()


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("the algorithm is 'lokrr'", {"algo": "lokrr"}),
        ("the critical blocks are 'none'", {"critical": "none"}),
        ("the preset is 'large'", {"preset": "large"}),
        ("need a number of parameters", {"per_stream": True}),
        ("need a number of parameters", {"direction": "uniform"}),
        ("a rank is for loha, locon and lora", {"rank": 4}),
        ("a rank is for loha, locon and lora", {"rank": 4, "algo": "loha", "preset": 1000}),
        ("the largest rank is 0", {"rank": 0, "algo": "loha"}),
        ("frozen block 9 does not exist", {"freeze": (9,)}),
        ("critical block 9 does not exist", {"critical": (9,)}),
        ("block 1 is frozen and critical", {"critical": (1,), "freeze": (1,)}),
        ("the contrast is 0", {"contrast": 0}),
        ("the contrast is 40; with a budget it can be 1 to 30", {"contrast": 40, "preset": 1000}),
        ("all blocks are frozen", {"freeze": (0, 1, 2)}),
    ],
)
def test_options_that_do_not_fit(text, options):
    with fails(text):
        make_plan(small_model(3), contribution(small_blocks(3), [0.0, 1.0, 0.5]), **options)


def test_a_run_without_a_module_table_has_no_plan():
    for preset in ("article", 1000):
        with fails("there is no module table"):
            make_plan(Model(()), contribution(small_blocks(3), [0.0, 1.0, 0.5]), preset=preset)


# Decisions


def samples_of(run: RunData) -> Samples:
    distances = {stream: run.distances(stream, "last") for stream in run.streams}
    return Samples(run.sigma, run.facts["image"], run.streams, distances, "last")


@pytest.fixture
def run(tmp_path: Path) -> RunData:
    return write_run(tmp_path / "run", BLOCKS, 240, modules=sd3_modules(6), images=60)


@pytest.fixture
def bootstrap(run: RunData) -> Bootstrap:
    return Bootstrap.of(samples_of(run), bins=4, replicates=12)


def replicates(bootstrap: Bootstrap) -> list[dict[str, Heatmap]]:
    """As heatmaps, one set after the other."""
    means = bootstrap.replicates()
    return [
        {
            name: Heatmap(name, "last", BLOCKS[name], means[name][r], bootstrap.counts_T[name], means[name][r] * 0, 0)
            for name in BLOCKS
        }
        for r in range(12)
    ]


def test_the_articles_recipe_decides_each_replicate_as_it_would_alone(run, bootstrap):
    for options in ({}, {"critical": (2,)}, {"freeze": (1, 4), "contrast": 5}, {"algo": "locon", "rank": 100}):
        decide = decide_of(run.manifest, weighting=WEIGHTING, **options)(bootstrap)
        value_RL, number_RK = decide(bootstrap.replicates())
        distinct: dict[tuple, set] = {}
        for r, streams in enumerate(replicates(bootstrap)):
            alone = article_contributions(streams, **WEIGHTING)
            np.testing.assert_allclose(value_RL[r], alone.value_L, atol=1e-12)
            plan = make_plan(run.manifest, alone, **options)
            kept = tuple(dict.fromkeys(group.number for group in plan.groups))  # not frozen
            assert number_RK.shape == (12, len(kept))
            for k, number in enumerate(kept):
                trained = tuple(
                    adapter.tensors
                    for name, adapter in plan.intended.items()
                    if name.startswith(f"{BLOCKS['image'][number]}.")
                )
                distinct.setdefault((k, int(number_RK[r, k])), set()).add(trained)
        # Equal numbers train alike, and other numbers otherwise.
        assert all(len(trained) == 1 for trained in distinct.values())
        assert len({(k, *trained) for (k, _), trained in distinct.items()}) == len(distinct)


@pytest.mark.parametrize(
    "options", [{}, {"per_stream": True}, {"algo": "loha"}, {"freeze": (1,), "critical": (2,), "preset": 200_000}]
)
def test_a_budget_decides_each_replicate_as_it_would_alone(run, bootstrap, options):
    """But for the groups that a plan says it has otherwise."""
    options = {"preset": 60_000, **options}
    value_RL, number_RK = decide_of(run.manifest, weighting=WEIGHTING, **options)(bootstrap)(bootstrap.replicates())
    algo = options.get("algo", "lokr")
    for r, each in enumerate(replicates(bootstrap)):
        alone = article_contributions(each, by_own=True, **WEIGHTING)
        np.testing.assert_allclose(value_RL[r], alone.value_L, atol=1e-12)
        streams = stream_contributions(each, clip_percentile=80.0)
        plan = make_plan(run.manifest, alone, streams=streams, **options)
        assert len(plan.groups) == number_RK.shape[1]
        for place, (group, number) in enumerate(zip(plan.groups, plan.numbers, strict=True)):
            pairs = zip(group.adapters(algo, number), group.adapters(algo, int(number_RK[r, place])), strict=True)
            assert all(one.same_as(other) for one, other in pairs) == (place not in plan.differing)
    assert len(np.unique(number_RK, axis=0)) > 1


def test_factors_that_lycoris_realises_alike_agree(tmp_path):
    """A block of width 64: modulation of 384 and feed-forward of 256 at the factor, attention of 64 at twice that."""
    random = np.random.default_rng(0)
    level_L = np.array([0.9, 0.8, 0.5, 0.15, 0.08, 0.0]) + 1
    distance_NL = level_L + 0.4 * random.standard_normal((400, 6))
    images = {"image": np.arange(400) + 1}
    table = sd3_modules(6)
    what = manifest({"image": BLOCKS["image"]}, readings=("last",), modules=table)
    run = write_rows(tmp_path / "run", what, rows([0.5] * 400, {("image", "last"): distance_NL}, images))
    bootstrap = Bootstrap.of(samples_of(run), bins=1, replicates=300)
    unknown = manifest({"image": BLOCKS["image"]}, readings=("last",))
    named = confidence(bootstrap, decide_of(unknown, critical=())(bootstrap))
    realised = confidence(bootstrap, decide_of(run.manifest, critical=())(bootstrap))
    assert (realised.agreement_K >= named.agreement_K).all()
    # 9, 10 and 11 are one factor in effect.
    assert named.factor_K[4] == 11 and named.agreement_K[4] < 0.8 and realised.agreement_K[4] > 0.95
    assert realised.factor_K[4] == 9


def test_runs_that_were_discovered_or_imported(bootstrap):
    """Targets come from the manifest, whatever the family; without a module table only the article's factors can be."""
    guessed = (Target("transformer_blocks.*", ("*",), ()),)
    discovered = manifest(BLOCKS, family="unheard-of", modules=sd3_modules(6), targets=guessed)
    assert decide_of(discovered)(bootstrap)(bootstrap.replicates())[1].shape == (12, 6)
    assert decide_of(discovered, preset=60_000)(bootstrap)(bootstrap.replicates())[1].shape == (12, 6)
    imported = manifest(BLOCKS, targets=())
    assert decide_of(imported)(bootstrap)(bootstrap.replicates())[1].max() == 12
    with fails("there is no module table"):
        decide_of(imported, preset=60_000)(bootstrap)
