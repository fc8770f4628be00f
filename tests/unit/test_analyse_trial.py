"""A trial judged: planted differences, arms that are alike, trainings that diverge, and what is said of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from failing import fails

from simpletuner_layerprobe.analyse.chances import holm
from simpletuner_layerprobe.analyse.crossed import crossed
from simpletuner_layerprobe.analyse.trial import BETTER, DIVERGED, OPEN, SAME, WORSE, Judgement, Place, judge
from simpletuner_layerprobe.analyse.trial_words import (
    answer_text,
    best_rate,
    change_text,
    decimals,
    place_text,
    rate_text,
    sentences,
    size_text,
)

GAIN = 0.02  # of 10% more parameters
SHUFFLES = tuple(f"shuffle-{number}" for number in range(5))


def world(
    seed: int = 0,
    seeds: int = 3,
    images: int = 40,
    samples: int = 10,
    noise: float = 1.0,
    at: float = 1.0,
    **planted: float,
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Losses of arms with these differences to `uniform` at sigmas up to `at`: by seed, image (skewed) and chance.

    A name's underscores are hyphens. Samples are in no order.
    """
    random = np.random.default_rng(seed)
    image_P = np.repeat(random.permutation(images) * 7 + 3, samples)
    sigma_P = np.tile((np.arange(samples) + 0.5) / samples, images)
    order = random.permutation(len(image_P))
    base_SP = (
        0.5 + 0.2 * sigma_P + np.repeat(random.gamma(2, 0.1, images), samples) + random.normal(0, 0.02, (seeds, 1))
    )
    losses = {"uniform": base_SP[:, order]}
    for name, difference in planted.items():
        own_SP = noise * random.normal(0, 0.003, (seeds, 1)) + noise * random.normal(0, 0.02, base_SP.shape)
        own_SP = own_SP + np.repeat(noise * (random.gamma(2, 0.004, images) - 0.008), samples)
        losses[name.replace("_", "-")] = (base_SP + difference * (sigma_P < at) + own_SP)[:, order]
    return losses, image_P[order], sigma_P[order]


def test_planted_differences_are_seen_with_their_sign_size_and_sigma() -> None:
    made = judge(*world(plan=0.03, against=-0.03, same=0.0, uniform_110=-GAIN, seeds=4, images=100), bins=5)
    assert [made.arms[name].verdict for name in ("plan", "against", "same")] == [WORSE, BETTER, SAME]
    assert made.tested == ("plan", "against", "same") and made.arms["uniform-110"].verdict == ""
    assert made.margin == pytest.approx(GAIN, abs=0.005) and made.no_margin == ""
    assert made.arms["uniform"].difference is None and made.arms["uniform"].size == 1.0
    assert made.arms["uniform-110"].size == pytest.approx(1.1)
    assert made.arms["plan"].size == pytest.approx(1.1**-1.5, abs=0.03)
    assert (made.seeds, made.images) == (4, 100) and made.counts_T.tolist() == [200] * 5
    by_sigma = judge(*world(plan=0.05, at=0.5, seeds=4), bins=10).arms["plan"].by_sigma
    assert by_sigma is not None
    assert (by_sigma.low_T[:5] > 0).all() and np.abs(by_sigma.mean_T[5:]).max() < 0.02


def test_numbers_are_those_of_a_plain_reference() -> None:
    losses, image_P, sigma_P = world(plan=0.01, other=0.0, seeds=2, images=8, samples=6)
    losses = {name: loss_SP[:, :-3] for name, loss_SP in losses.items()}  # images with unlike numbers of samples
    image_P, sigma_P = image_P[:-3], sigma_P[:-3]
    made = judge(losses, image_P, sigma_P, bins=3)
    table = [
        [np.mean([(losses["plan"] - losses["uniform"])[s, image_P == image]]) for image in np.unique(image_P)]
        for s in range(2)
    ]
    own, expected = made.arms["plan"].difference, crossed(np.array(table))
    assert own is not None and own.mean == pytest.approx(expected.mean)
    assert own.interval() == pytest.approx(expected.interval())
    assert made.arms["plan"].loss_S == pytest.approx(
        [np.mean([losses["plan"][s, image_P == image].mean() for image in np.unique(image_P)]) for s in range(2)]
    )
    both = [made.arms[name].difference for name in ("plan", "other")]
    expected_p = holm(np.array([one.p for one in both if one is not None]))
    assert [made.arms[name].p for name in ("plan", "other")] == pytest.approx(expected_p)
    low = sigma_P < 1 / 3
    shown = made.arms["plan"].by_sigma
    here = [
        (losses["plan"] - losses["uniform"])[:, low & (image_P == image)].mean(axis=1)
        for image in np.unique(image_P[low])
    ]
    assert shown is not None and made.counts_T[0] == low.sum() and shown.mean_T[0] == pytest.approx(np.mean(here))


def test_intervals_hold_what_was_planted() -> None:
    """Through `judge`, with skewed images, other seeds and ten samples of an image: 93% or more of 400 trials."""
    times, inside, wrong = 400, 0, 0
    for seed in range(times):
        made = judge(*world(seed, seeds=3, images=30, plan=0.01, same=0.0), bins=1)
        own = made.arms["plan"].difference
        assert own is not None
        inside += own.interval()[0] <= 0.01 <= own.interval()[1]
        wrong += made.arms["same"].verdict in (BETTER, WORSE)
    assert inside / times >= 0.93 - 3 * (0.93 * 0.07 / times) ** 0.5 and wrong / times <= 0.06


def test_arms_that_are_exactly_alike() -> None:
    losses, image_P, sigma_P = world(uniform_110=-GAIN, seeds=2)
    losses["plan"] = losses["uniform"].copy()
    losses["shuffle-0"] = losses["uniform"].copy()
    made = judge(losses, image_P, sigma_P, shuffles=["shuffle-0"])
    own = made.arms["plan"]
    assert own.verdict == (SAME if made.margin else OPEN) and own.p == 1.0
    assert own.difference is not None and own.difference.mean == 0 and own.difference.half() < 1e-4
    assert made.place == Place(0, 1, 1.0)
    assert sentences(made)
    del losses["uniform-110"]
    assert judge(losses, image_P, sigma_P).arms["plan"].verdict == OPEN


def test_a_change_by_rounding_is_none() -> None:
    losses, image_P, sigma_P = world(seeds=3)
    losses["plan"] = losses["uniform"] * (1 + 1e-8)
    assert judge(losses, image_P, sigma_P).arms["plan"].verdict == OPEN


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_training_that_diverged_is_told_and_breaks_nothing(bad: float) -> None:
    planted = {"plan": 0.03, "fast": 0.0, "uniform_110": -GAIN, "shuffle_0": 0.01, "shuffle_1": 0.05}
    losses, image_P, sigma_P = world(**planted)
    sound = judge({name: loss_SP for name, loss_SP in losses.items() if name != "fast"}, image_P, sigma_P)
    losses["fast"][1, 7] = bad
    losses["shuffle-1"][:] = bad
    made = judge(losses, image_P, sigma_P, shuffles=["shuffle-0", "shuffle-1", "shuffle-2"])
    fast = made.arms["fast"]
    assert fast.verdict == DIVERGED and math.isinf(fast.loss) and fast.difference is None and math.isnan(fast.p)
    assert np.isinf(fast.loss_S).tolist() == [False, True, False]
    assert made.arms["plan"].verdict == sound.arms["plan"].verdict == WORSE
    assert made.place == Place(1, 2, 2 / 3)
    assert "fast: diverged with 1 of 3 seeds, and is left out of the tests" in sentences(made)
    losses["uniform-110"][0] = bad
    made = judge(losses, image_P, sigma_P)
    assert made.no_margin == "uniform-110 diverged" and made.arms["plan"].size is None
    losses["uniform"][0, 0] = bad
    made = judge(losses, image_P, sigma_P)
    assert sentences(made) == ["uniform diverged: there is nothing to judge the other arms against"]
    assert made.arms["plan"].verdict == OPEN and made.no_margin == "uniform diverged"
    losses["plan"][0, 0] = bad
    assert judge(losses, image_P, sigma_P, shuffles=["shuffle-0"]).place == Place(0, 1, 1.0)


def test_one_seed_cannot_tell() -> None:
    made = judge(*world(plan=0.05, uniform_110=-GAIN, seeds=1))
    assert made.arms["plan"].verdict == OPEN and made.margin is None
    said = sentences(made)
    assert said[0].startswith("plan: loss 0.0") and said[0].endswith(" above uniform: open") and "[" not in said[0]
    assert "no difference can be given in parameters: one seed cannot tell what more parameters gain" in said
    assert said[-1].startswith("one seed cannot tell a difference from chance")


def test_sizes_are_given_only_where_more_parameters_clearly_gain() -> None:
    made = judge(*world(plan=0.05, uniform_110=0.0))
    assert made.margin is None and made.no_margin == "uniform-110 is not clearly better than uniform"
    assert made.arms["plan"].size is None and made.arms["plan"].verdict == WORSE
    assert judge(*world(plan=0.05)).no_margin == "the trial has no arm uniform-110"


def test_what_cannot_be_judged_is_refused_in_a_line() -> None:
    losses, image_P, sigma_P = world(plan=0.0, images=4)
    with fails("the trial holds out 4 images, at least 5 are needed to judge by"):
        judge(losses, image_P, sigma_P)
    losses, image_P, sigma_P = world(plan=0.0)
    with fails("the trial has no arm 'equal', which the others are judged against"):
        judge(losses, image_P, sigma_P, reference="equal")
    with fails("arm 'plan' has losses of shape (2, 400), expected (3, 400)"):
        judge({**losses, "plan": losses["plan"][:2]}, image_P, sigma_P)
    with fails("399 sigmas for 400 held-out samples"):
        judge(losses, image_P, sigma_P[1:])


def test_bins_without_samples_are_left_open() -> None:
    losses, image_P, sigma_P = world(plan=0.01)
    made = judge(losses, image_P, sigma_P / 2, bins=4)
    by_sigma = made.arms["plan"].by_sigma
    assert by_sigma is not None and made.counts_T.tolist() == [200, 200, 0, 0]
    assert np.isnan(by_sigma.mean_T).tolist() == [False, False, True, True]


# In words


def judged(**planted: float) -> Judgement:
    return judge(*world(uniform_110=-GAIN, seeds=4, **planted), shuffles=SHUFFLES)


def test_the_judgement_in_sentences() -> None:
    shuffles = {f"shuffle_{number}": 0.02 * number + 0.001 for number in range(5)}
    made = judged(other=0.0, plan=0.03, **shuffles)
    said = sentences(made)
    own = made.arms["plan"].difference
    assert own is not None
    low, high = own.interval()
    size = round(100 * (1 - made.arms["plan"].size)) if made.arms["plan"].size else 0
    assert said[0] == (
        f"plan: loss {own.mean:.4f} [{low:.4f}, {high:.4f}] above uniform: worse, as good as {size}% fewer parameters"
    )
    assert said[1].startswith("other: loss") and said[2].startswith("uniform-110: loss 0.0")
    assert said[3] == "plan is better than 3 of its 5 shuffles, which chance alone gives 50% of the time"
    assert said[4] == f"with 4 seeds and 40 images differences below {made.smallest:.2g} cannot be seen"
    below = sentences(judged(plan=-0.03))[0]
    assert below.startswith("plan: loss 0.0") and " below uniform: better" in below and "-" not in below


@pytest.mark.parametrize(
    ("size", "said"),
    [
        (None, ""),
        (1.0, "as good as the same number of parameters"),
        (0.94, "as good as 6% fewer parameters"),
        (1.12, "as good as 12% more parameters"),
        (1.3, "as good as more than 25% more parameters"),
        (0.2, "as good as more than 25% fewer parameters"),
        (math.inf, "as good as more than 25% more parameters"),
    ],
)
def test_sizes_in_words(size: float | None, said: str) -> None:
    assert size_text(size) == said


def test_small_differences_keep_two_digits_of_their_interval() -> None:
    small = judge(*world(plan=3e-6, noise=1e-4, seeds=4))
    own = small.arms["plan"].difference
    assert own is not None and decimals(small) == 7
    assert change_text(own, decimals(small)) == f"{own.mean:+.7f} [{own.interval()[0]:+.7f}, {own.interval()[1]:+.7f}]"
    assert decimals(judged(plan=0.03)) == 4
    assert change_text(crossed(np.full((1, 50), 0.25)), 4) == "+0.2500"


def test_the_answer_is_about_the_plan() -> None:
    assert answer_text(judged(plan=0.03)).startswith("plan trained worse than uniform: its loss is 0.0")
    assert answer_text(judged(plan=-0.03)).startswith("plan trained better than uniform: its loss is 0.0")
    same = answer_text(judge(*world(plan=0.0, uniform_110=-GAIN, seeds=4, noise=0.2)))
    assert same.startswith("plan trained no differently from uniform") and "10% more parameters gain" in same
    stays = answer_text(judge(*world(plan=0.001, seeds=2, images=6)))
    assert stays.startswith("whether plan trains better or worse than uniform stays open")
    assert answer_text(judged(other=-0.03, more=-0.03, bad=0.1)) == "other, more trained better than uniform"
    assert answer_text(judged(other=0.0)) == "no arm trained better than uniform"
    assert place_text(judged(plan=0.0)) == ""


def test_a_best_learning_rate_at_the_end_is_told() -> None:
    tried = {1e-3: 0.5, 5e-4: 0.6, 2e-3: 0.55}
    assert best_rate(tried) == 1e-3 and rate_text("plan", tried) == ""
    said = "plan: its best learning rate, 0.002, is the largest tried: a larger one may do better"
    assert rate_text("plan", {**tried, 2e-3: 0.4}) == said
    assert "0.0005, is the smallest tried: a smaller one" in rate_text("plan", {**tried, 5e-4: 0.4})
    assert best_rate({**tried, 1e-3: math.inf}) == 2e-3
    assert rate_text("plan", dict.fromkeys(tried, math.inf)) == "plan: diverged with every learning rate that was tried"
    assert best_rate({}) is None and rate_text("plan", {}) == rate_text("plan", {1e-3: 0.5}) == ""
