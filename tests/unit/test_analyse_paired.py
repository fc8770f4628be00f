"""The paired comparison: against a plain reference, planted changes and none, and what it says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from failing import fails
from synthetic_run import manifest, rows, write_rows

from simpletuner_layerprobe import Run, compare, load
from simpletuner_layerprobe.analyse.paired import Paired, clear, paired, paired_text
from simpletuner_layerprobe.analyse.samples import Samples

BLOCKS = {"image": ("a", "b", "c", "d"), "text": ("a", "b")}
NUMBER = {"a": 0, "b": 1, "c": 2, "d": 3}


def sides(
    images: int, repeats: int, seed: int, loss: float = 0.0, block: float = 0.0, where: float = 1.0, spread: float = 1.0
) -> tuple[Samples, Samples, np.ndarray, np.ndarray]:
    """Two runs of the same images. B changes the loss below sigma `where` and the image stream's block b, by so much on
    the average over all images that there could be; each image by its own amount, and each pair by chance."""
    random = np.random.default_rng(seed)
    image_N = np.repeat(random.permutation(np.arange(1, images + 1, dtype=np.uint64)), repeats)
    repeat_N = np.tile(np.arange(repeats), images)
    N = len(image_N)
    sigma_N = (random.random(images)[:, None] + np.arange(repeats) / repeats).reshape(-1) % 1
    own_N = np.repeat(random.gamma(2.0, 0.5, images), repeats)  # skewed, mean 1
    chance = spread * random.normal(0, 0.02, (2, N)) + spread * 0.02 * np.repeat(random.normal(size=images), repeats)
    loss_a_N = 0.4 + 0.3 * sigma_N + np.repeat(random.normal(0, 0.2, images), repeats)
    loss_b_N = loss_a_N + chance[0] + loss * own_N * (sigma_N < where)
    streams_a = {name: 0.1 + 0.05 * random.random((N, len(paths))) for name, paths in BLOCKS.items()}
    streams_b = {name: value_NL + 0.1 * chance[1][:, None] for name, value_NL in streams_a.items()}
    streams_b["image"][:, 1] += block * own_N
    order = random.permutation(N)  # B ran in another order
    facts = {"image": image_N, "repeat": repeat_N}
    a = Samples(sigma_N, image_N, BLOCKS, streams_a, facts=facts)
    b = Samples(
        sigma_N[order],
        image_N[order],
        BLOCKS,
        {name: value_NL[order] for name, value_NL in streams_b.items()},
        facts={name: value_N[order] for name, value_N in facts.items()},
    )
    return a, b, loss_a_N, loss_b_N[order]


def test_means_and_intervals_are_those_of_a_plain_reference() -> None:
    a, b, loss_a_N, loss_b_N = sides(30, 7, seed=1, loss=-0.03, block=0.01)
    loss_b_N[5] = np.nan
    made = paired(a, b, loss_a_N, loss_b_N, bins=5)
    of_b = {(i, r): n for n, (i, r) in enumerate(zip(b.image_N.tolist(), b.facts["repeat"].tolist(), strict=True))}
    by_image: dict[int, list[tuple[float, float, float]]] = {}
    for n, place in enumerate(zip(a.image_N.tolist(), a.facts["repeat"].tolist(), strict=True)):
        difference = loss_b_N[of_b[place]] - loss_a_N[n]
        angle = b.distances["image"][of_b[place], 1] - a.distances["image"][n, 1]
        by_image.setdefault(place[0], []).append((difference, angle, a.sigma_N[n]))
    assert len(by_image) == made.images == 30 and made.pairs == 210
    every = [pair for pairs in by_image.values() for pair in pairs]
    known = [loss for loss, _, _ in every if not np.isnan(loss)]
    assert made.loss.difference[0] == pytest.approx(np.mean(known))
    assert made.angles["image"].difference[1] == pytest.approx(np.mean([angle for _, angle, _ in every]))
    for t in range(5):
        here = [loss for loss, _, sigma in every if int(sigma * 5) == t and not np.isnan(loss)]
        assert made.counts_T[t] == len(here) and made.loss_T.difference[t] == pytest.approx(np.mean(here))
    # Other draws of images, one by one.
    random, means = np.random.default_rng(9), []
    for _ in range(4000):
        drawn = [pair for image in random.integers(0, 30, 30) for pair in list(by_image.values())[image]]
        means.append(np.nanmean([loss for loss, _, _ in drawn]))
    widened = np.sqrt(30 / 29) * 2.045 / 1.96  # Student's, 29 degrees of freedom
    low, high = np.mean(known) + widened * (np.quantile(means, (0.025, 0.975)) - np.mean(known))
    assert made.loss.low[0] == pytest.approx(low, abs=0.05 * (high - low))
    assert made.loss.high[0] == pytest.approx(high, abs=0.05 * (high - low))


@pytest.mark.parametrize("images", [12, 60])
def test_intervals_hold_the_planted_change_and_chances_are_right(images: int) -> None:
    """200 pairs of runs each: a planted change of the loss and of one block, none of the others."""
    worlds = 200
    held, false_blocks, false_loss, seen = np.zeros(4), 0, 0, 0
    for seed in range(worlds):
        made = paired(*sides(images, 5, seed, loss=-0.02, block=0.004))
        low, high = made.loss.low[0], made.loss.high[0]
        block, other = made.angles["image"], made.angles["text"]
        held += [
            low <= -0.02 <= high,
            block.low[1] <= 0.004 <= block.high[1],
            block.low[0] <= 0 <= block.high[0],
            other.low[1] <= 0 <= other.high[1],
        ]
        seen += int(clear(block)[1])
        none = paired(*sides(images, 5, seed + worlds))
        false_loss += not none.loss.low[0] <= 0 <= none.loss.high[0]
        false_blocks += any(clear(change).any() for change in none.angles.values())
    assert (held / worlds > 0.905).all()  # 0.95 less three standard errors of 200 pairs
    assert false_loss / worlds < 0.1 and false_blocks / worlds < 0.1
    assert images < 40 or seen > 0.95 * worlds


def test_pairing_finds_what_is_lost_unpaired(tmp_path: Path) -> None:
    a, b = runs(tmp_path, loss=-0.012, block=0.001)
    comparison = compare(a, b)
    made = comparison.paired
    assert made is not None and comparison.not_paired == ""
    assert comparison.streams["image"].levels.significant.sum() == 0
    assert clear(made.angles["image"]).tolist() == [False, True, False, False]
    text = paired_text(made, NUMBER)
    assert text.startswith("B lowers the loss on these 60 images by 0.01") and text.endswith(
        "block 1 turns further (image stream)"
    )


def runs(tmp_path: Path, seed_a: int | None = 7, seed_b: int | None = 7, **planted: float) -> tuple[Run, Run]:
    a, b, loss_a_N, loss_b_N = sides(60, 5, seed=3, **planted)
    made = []
    for name, samples, loss_N, seed in (("a", a, loss_a_N, seed_a), ("b", b, loss_b_N, seed_b)):
        settings = {"sigmas": "stratified in each image"} | ({} if seed is None else {"noise_seed": seed})
        written = rows(
            samples.sigma_N,
            {(stream, "last"): value_NL for stream, value_NL in samples.distances.items()},
            samples.facts,
        )
        object.__setattr__(written, "loss_N", loss_N.astype(np.float32))
        made.append(
            load(write_rows(tmp_path / name, manifest(BLOCKS, readings=("last",), settings=settings), written).path)
        )
    return made[0], made[1]


@pytest.mark.parametrize(
    ("seeds", "why"),
    [
        ((7, 8), "the runs have different noise seeds, 7 in A and 8 in B"),
        ((7, None), "only A has a noise seed"),
        ((None, 7), "only B has a noise seed"),
        ((None, None), "the runs have no noise seed"),
    ],
)
def test_other_seeds_are_compared_as_before_and_it_is_said(tmp_path: Path, seeds: tuple, why: str) -> None:
    comparison = compare(*runs(tmp_path, *seeds))
    assert comparison.paired is None and comparison.not_paired == why
    assert set(comparison.streams) == {"image", "text"}


def test_samples_without_a_partner_are_counted_and_left_out() -> None:
    a, b, loss_a_N, loss_b_N = sides(10, 6, seed=2)
    kept = b.facts["repeat"] < 4
    fewer = part(b, kept)
    made = paired(a, fewer, loss_a_N, loss_b_N[kept])
    assert (made.pairs, made.left_a, made.left_b, made.images) == (40, 20, 0, 10)
    twice = np.r_[np.arange(60), 3]  # as two ranks may record an image twice
    made = paired(a, part(b, twice), loss_a_N, loss_b_N[twice])
    assert (made.pairs, made.left_b) == (60, 1)
    few = a.image_N < 5
    with fails("4 images are in both runs with the same repeats, at least 5 are needed"):
        paired(part(a, few), b, loss_a_N[few], loss_b_N)
    with fails("0 images are in both runs"):
        paired(part(a, a.facts["repeat"] < 2), part(b, b.facts["repeat"] > 3), loss_a_N[:20], loss_b_N[:20])
    other = Samples(1 - a.sigma_N, a.image_N, BLOCKS, a.distances, facts=a.facts)
    with fails("the same repeats of the same images have other sigmas in B"):
        paired(a, other, loss_a_N, loss_a_N)


def part(samples: Samples, kept: np.ndarray) -> Samples:
    return Samples(
        samples.sigma_N[kept],
        samples.image_N[kept],
        BLOCKS,
        {name: value_NL[kept] for name, value_NL in samples.distances.items()},
        facts={name: value_N[kept] for name, value_N in samples.facts.items()},
    )


def test_nothing_changed_and_rounding_are_no_change() -> None:
    a, _, loss_a_N, _ = sides(20, 5, seed=4)
    for noise in (0.0, 2e-8):
        b = Samples(
            a.sigma_N, a.image_N, BLOCKS, {name: v + noise for name, v in a.distances.items()}, facts=a.facts
        )  # fmt: skip
        made = paired(a, b, loss_a_N, loss_a_N + noise)
        assert made.loss.low[0] <= 0 <= made.loss.high[0]
        assert not any(clear(change).any() for change in (made.loss_T, *made.angles.values()))
        text = paired_text(made, NUMBER)
        assert text.startswith("no change of the loss beyond chance on these 20 images: ")
        assert text.endswith("no block changed beyond chance")


def test_distances_and_losses_that_are_not_finite_are_left_out() -> None:
    a, b, loss_a_N, loss_b_N = sides(20, 5, seed=4, loss=0.05)
    a.distances["image"][3, 2] = np.nan  # type: ignore[index]
    made = paired(a, b, loss_a_N, loss_b_N)
    assert made.nonfinite == {"image": 1, "text": 0}
    assert made.angles["image"].a[0] == pytest.approx(np.delete(a.distances["image"][:, 0], 3).mean())
    nothing = paired(a, b, np.full(100, np.nan), loss_b_N)
    assert np.isnan(nothing.loss.difference[0]) and nothing.counts_T.sum() == 0
    assert paired_text(nothing, NUMBER).startswith("too few pairs have a loss in both runs")


def test_where_the_loss_changes_most() -> None:
    made: Paired = paired(*sides(100, 10, seed=5, loss=0.1, where=0.4))
    assert "B raises the loss on these 100 images by 0.04" in paired_text(made, NUMBER)
    assert ", most at sigma 0 to 0.4;" in paired_text(made, NUMBER)
    everywhere = paired(*sides(100, 10, seed=5, loss=0.1))
    assert "most at" not in paired_text(everywhere, NUMBER)


def test_the_command_and_the_page_say_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from simpletuner_layerprobe.cli import main

    runs(tmp_path, loss=-0.012, block=0.001)
    page = tmp_path / "compare.html"
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(page)]) == 0
    out = capsys.readouterr().out
    assert "Paired, 300 pairs of 60 images: B lowers the loss on these 60 images by 0.01" in out
    assert "block 1 turns further (image stream)" in out and "Unpaired, as if each run" in out
    text = page.read_text()
    assert "B lowers the loss on these 60 images" in text and "but for the pairs" in text
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--json"]) == 0
    assert '"pairs": 300' in capsys.readouterr().out
    runs(tmp_path / "other", seed_b=8)
    assert main(["compare", str(tmp_path / "other" / "a"), str(tmp_path / "other" / "b")]) == 0
    assert "not paired: the runs have different noise seeds, 7 in A and 8 in B; the runs are" in capsys.readouterr().out
