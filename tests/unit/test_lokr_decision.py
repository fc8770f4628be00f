"""What a recipe gives to many sets of heatmaps at once, against one set at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from failing import fails
from synthetic_run import manifest, rows, sd3_modules, write_run

from simpletuner_layerprobe.analyse.bootstrap import Bootstrap, Tally, confidence, tally
from simpletuner_layerprobe.analyse.contribution import article_contributions, stream_contributions
from simpletuner_layerprobe.analyse.heatmap import Heatmap, all_blocks
from simpletuner_layerprobe.lokr import decision
from simpletuner_layerprobe.lokr import plan as planner
from simpletuner_layerprobe.lokr.factors import achieved_factor, article_factors
from simpletuner_layerprobe.lokr.ranks import Ladder, rank_plan, ranks_for_budget, ranks_from_factors
from simpletuner_layerprobe.probe import families

BLOCKS = {
    "image": tuple(f"transformer_blocks.{i}" for i in range(6)),
    "text": tuple(f"transformer_blocks.{i}" for i in range(5)),
}
MODULES = sd3_modules(6)
SD3 = families.family("sd3").targets
WEIGHTING = {"clip_percentile": 80.0, "text_weight": 0.5, "image_weight": 0.7}


@pytest.fixture
def bootstrap(tmp_path: Path) -> Bootstrap:
    return tally(write_run(tmp_path / "run", BLOCKS, 120, modules=MODULES), bins=4).bootstrap(replicates=12)


def one_by_one(bootstrap: Bootstrap) -> list[dict[str, Heatmap]]:
    """The replicates as heatmaps."""
    return [
        {
            name: Heatmap(name, "last", BLOCKS[name], mean_RTL[r], bootstrap.count_T[name], 0, 4)
            for name, mean_RTL in bootstrap.replicates().items()
        }
        for r in range(12)
    ]


@pytest.mark.parametrize("per_stream", [False, True])
def test_a_plan_for_each_replicate(bootstrap, per_stream):
    groups = planner.module_groups(
        all_blocks(list(BLOCKS.values())), SD3, MODULES, streams=BLOCKS if per_stream else None
    )
    made = planner.Planner(groups, 60_000)
    value_RL, number_RK = decision.planned(bootstrap, made, per_stream=per_stream, **WEIGHTING)(bootstrap.replicates())
    assert number_RK.shape == (12, len(groups)) and len(np.unique(number_RK, axis=0)) > 1
    for r, streams in enumerate(one_by_one(bootstrap)):
        contribution = article_contributions(streams, **WEIGHTING)
        np.testing.assert_allclose(value_RL[r], contribution.value_L, atol=1e-12)
        values = {planner.JOINT: contribution.value_L}
        if per_stream:
            values |= stream_contributions(streams, clip_percentile=80.0)
        for group, factor, number in zip(groups, made.plan(values).factors, number_RK[r], strict=True):
            # The number is the first factor that splits all of the group's modules as the plan's does.
            sizes = {size for module in group.modules for size in module.shape}
            split = [achieved_factor(size, factor) for size in sizes]
            first = next(one for one in range(1, factor + 1) if [achieved_factor(size, one) for size in sizes] == split)
            assert number == first


def parts(dimension: int, factor: int) -> tuple[int, int]:
    """LyCORIS's split, written again: what divides is taken as it is, the smaller part first."""
    if dimension % factor:
        factor = max(part for part in range(1, factor) if dimension % part == 0 and part * part <= dimension)
    small, large = sorted((factor, dimension // factor))
    return small, large


def test_factors_that_lycoris_realises_alike_agree():
    """A block of width 64: modulation of 384 and feed-forward of 256 at the factor, attention of 64 at twice that."""
    counted = Tally(manifest({"image": BLOCKS["image"]}, tokens=("last",), modules=MODULES), bins=1)
    random = np.random.default_rng(0)
    level_L = np.array([0.9, 0.8, 0.5, 0.15, 0.08, 0.0])
    counted.add(rows([0.5] * 400, {("image", "last"): level_L + 0.4 * random.standard_normal((400, 6))}))
    bootstrap = counted.bootstrap(replicates=300)
    named = confidence(bootstrap, decision.article(bootstrap, (), (), critical=()))
    realised = confidence(bootstrap, decision.article(bootstrap, MODULES, SD3, critical=()))
    assert (realised.agreement_K >= named.agreement_K).all()
    # 9, 10 and 11 are one factor in effect.
    assert named.factor_K[4] == 11 and named.agreement_K[4] < 0.8 and realised.agreement_K[4] > 0.95
    alike = decision.realised_alike(bootstrap, MODULES, SD3)
    first = alike(np.arange(1, 500)[:, None].repeat(6, axis=1))[:, 0].tolist()
    split = [
        (parts(384, factor), parts(256, factor), parts(64, factor), parts(64, 2 * factor)) for factor in range(1, 500)
    ]
    assert first == [1 + split.index(one) for one in split]
    assert first[8:11] == [9, 9, 9] and first[11] == 12


def test_the_articles_ranks(bootstrap):
    kept = [0, 2, 3, 5]
    blocks = all_blocks(list(BLOCKS.values()))
    decide = decision.article_ranks(bootstrap, "locon", blocks, MODULES, SD3, largest=100, kept=kept, **WEIGHTING)
    _, number_RK = decide(bootstrap.replicates())
    for r, streams in enumerate(one_by_one(bootstrap)):
        contribution = article_contributions(streams, **WEIGHTING)
        factors = article_factors(contribution.value_L, critical=contribution.critical_union())[kept]
        # Nothing here can use more than rank 64.
        assert number_RK[r].tolist() == np.minimum(ranks_from_factors(factors, 100), 64).ravel().tolist()


def test_ranks_for_a_budget(bootstrap):
    kept = [0, 2, 3, 5]
    blocks = [all_blocks(list(BLOCKS.values()))[number] for number in kept]
    ladder = Ladder("loha", blocks, SD3, MODULES, 60_000)
    decide = decision.budgeted_ranks(
        bootstrap, ladder, lambda value: (1 + 11 * (1 - value), value), kept=kept, **WEIGHTING
    )
    _, number_RK = decide(bootstrap.replicates())
    assert len(np.unique(number_RK, axis=0)) > 1
    for r, streams in enumerate(one_by_one(bootstrap)):
        value = article_contributions(streams, **WEIGHTING).value_L[kept]
        found = ranks_for_budget("loha", 1 + 11 * (1 - value), value, blocks, SD3, MODULES, 60_000)
        assert number_RK[r].reshape(4, 2).tolist() == found.rank_L2.tolist()
        assert found.reached == sum(one.parameters for one in rank_plan("loha", blocks, found.rank_L2, SD3, MODULES))


def test_presets(bootstrap):
    known = manifest(BLOCKS, modules=MODULES)
    assert decision.of_preset(known, None)(bootstrap)(bootstrap.replicates())[1].shape == (12, 6)
    assert decision.of_preset(known, 60_000)(bootstrap)(bootstrap.replicates())[1].shape == (12, 18)
    # A family that was discovered, or records that were imported: by name.
    for what in (manifest(BLOCKS, modules=MODULES, family="unheard-of"), manifest(BLOCKS)):
        _, number_RK = decision.of_preset(what, None)(bootstrap)(bootstrap.replicates())
        assert number_RK.max() == 12
    with fails("no module table"):
        decision.of_preset(manifest(BLOCKS), 60_000)
    with fails("'unheard-of' is not supported"):
        decision.of_preset(manifest(BLOCKS, modules=MODULES, family="unheard-of"), 60_000)
