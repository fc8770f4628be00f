"""Ablation: which blocks the loss needs, and how far their angular distances tell it. See docs/findings.md.

The loss increase of a block is the mean over sigma bins, each weighing the same, of the loss with the block left out
minus the loss without. All that is set beside it comes from the same samples, and the replicates draw the same images
for both.

Shape letters: N samples, T bins, L blocks, R replicates, the first of which is the run itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from simpletuner_layerprobe.analyse.bootstrap import MIN_SAMPLES, MIN_UNITS, Bootstrap
from simpletuner_layerprobe.analyse.ranks import Interval, difference
from simpletuner_layerprobe.analyse.samples import Samples
from simpletuner_layerprobe.analyse.sections import Section
from simpletuner_layerprobe.analyse.shapes import shape_sections
from simpletuner_layerprobe.analyse.told import Told, order_text, told, told_notes
from simpletuner_layerprobe.analyse.units import IMAGE, unit_means
from simpletuner_layerprobe.errors import ProbeError
from simpletuner_layerprobe.readings import WHOLE

REPLICATES = 2000


@dataclass(frozen=True)
class Level:
    """A number of each of L blocks and the ends of its 95% interval, (L,) each; NaN for a block that has none."""

    value_L: NDArray[np.float64]
    low_L: NDArray[np.float64]
    high_L: NDArray[np.float64]


@dataclass(frozen=True)
class TextUpdate:
    """What leaving out only the update of the text stream shows.

    blocks: paths of those that have a text stream. loss: their loss increase. share: its sum over these blocks, of the
    sum with the whole blocks left out. told: how far the text stream's angle tells it.
    """

    blocks: tuple[str, ...]
    loss: Level
    share: Interval
    told: Told


@dataclass(frozen=True)
class Ablation:
    """What leaving blocks out shows.

    blocks: L paths, all that any stream has. loss: their loss increase. loss_TL: (T, L) by sigma bin, 0 where a bin has
    no sample. counts_T: samples of each. used_T: the bins that have MIN_SAMPLES; the others play no part. reading: the
    angle's. angle: stream -> mean angular distance of the blocks in the same samples. told: stream -> how far its angle
    tells the loss increases. text: None where text updates were not left out. sections: in words. samples, images
    (None if they are not known): with ablation.
    """

    blocks: tuple[str, ...]
    loss: Level
    loss_TL: NDArray[np.float64]
    counts_T: NDArray[np.int64]
    used_T: NDArray[np.bool_]
    reading: str
    angle: Mapping[str, Level]
    told: Mapping[str, Told]
    text: TextUpdate | None
    sections: tuple[Section, ...]
    samples: int
    images: int | None

    @property
    def needed(self) -> tuple[int, ...]:
        """Numbers of the blocks that the loss needs clearly more than most, the most needed first."""
        return self._named("needed")[::-1]

    @property
    def hardly(self) -> tuple[int, ...]:
        """Numbers of the blocks whose leaving out hardly hurts, the least needed first."""
        return self._named("hardly")

    def _named(self, kind: str) -> tuple[int, ...]:
        """Those of a kind, the least needed first."""
        paths = [part.blocks[0] for section in self.sections if section.kind == kind for part in section.findings]
        return tuple(sorted(map(self.blocks.index, paths), key=lambda number: float(self.loss.value_L[number])))


def ablation(
    whole: Samples, angle: Samples, norm: Samples | None = None, text: Samples | None = None, bins: int = 10
) -> Ablation:
    """What the ablation of whole blocks shows, and how far the angle tells it.

    angle, norm, text: the same samples in an angle, in the relative norm of the updates, and with the text updates left
    out; None if not recorded. Raises ProbeError for too few samples or images, and if they are not the same samples.
    """
    for other in (angle, norm, text):
        if other is not None and not np.array_equal(other.sigma_N, whole.sigma_N):
            raise ProbeError("the ablation and what it is compared with are not of the same samples")
    if not whole.samples:
        raise ProbeError("no sample has been taken with ablation yet")
    bootstrap = Bootstrap.of(whole, bins, REPLICATES)
    used_T = _used(bootstrap)
    loss_RTL = _drawn(whole, bins, used_T)[WHOLE]
    angles = _drawn(angle, bins, used_T)
    norms = _drawn(norm, bins, used_T)
    blocks = whole.blocks[WHOLE]
    depth_L = np.abs(np.arange(len(blocks)) - (len(blocks) - 1) / 2)
    places = {name: [blocks.index(block) for block in angle.blocks[name]] for name in angles}
    parts = {
        name: told(angle.blocks[name], depth_L[places[name]], loss_RTL[:, :, places[name]], part_RTL, norms.get(name))
        for name, part_RTL in angles.items()
    }
    of_text = None
    if text is not None and "text" in angles:
        alone_RTL, place = _drawn(text, bins, used_T)["text"], places["text"]
        of_text = TextUpdate(
            blocks=text.blocks["text"],
            loss=_level(alone_RTL),
            share=_share(alone_RTL, loss_RTL[:, :, place]),
            told=told(text.blocks["text"], depth_L[place], alone_RTL, angles["text"], norms.get("text")),
        )
    return Ablation(
        blocks=blocks,
        loss=_level(loss_RTL),
        loss_TL=bootstrap.mean_TL[WHOLE],
        counts_T=bootstrap.counts_T[WHOLE],
        used_T=used_T,
        reading=angle.reading,
        angle={name: _level(part_RTL, places[name], len(blocks)) for name, part_RTL in angles.items()},
        told=parts,
        text=of_text,
        sections=(*shape_sections(bootstrap, (WHOLE,)), *_told_sections(parts, of_text, whole.samples)),
        samples=whole.samples,
        images=whole.images,
    )


def _used(bootstrap: Bootstrap) -> NDArray[np.bool_]:
    """(T,) the bins with MIN_SAMPLES. Raises ProbeError if there is none, or there are too few images."""
    used_T: NDArray[np.bool_] = bootstrap.counts_T[WHOLE] >= MIN_SAMPLES
    if not used_T.any():
        raise ProbeError(f"not enough samples with ablation: no sigma bin has {MIN_SAMPLES}")
    if bootstrap.units < MIN_UNITS:
        what = "images" if bootstrap.unit == IMAGE else "samples"
        raise ProbeError(f"not enough {what} with ablation: {bootstrap.units}, at least {MIN_UNITS} are needed")
    return used_T


def _drawn(samples: Samples | None, bins: int, used_T: NDArray[np.bool_]) -> dict[str, NDArray[np.float64]]:
    """stream -> (R, T, L), of the bins used. The same images are drawn for every reading: the draws depend on nothing
    but how many there are."""
    if samples is None:
        return {}
    bootstrap = Bootstrap.of(samples, bins, REPLICATES)
    replicates = bootstrap.replicates()
    return {
        name: np.concatenate([mean_TL[None], replicates[name]])[:, used_T]
        for name, mean_TL in bootstrap.mean_TL.items()
    }


def _level(value_RTL: NDArray[np.float64], places: Sequence[int] | None = None, blocks: int = 0) -> Level:
    """The mean over the bins. places: the columns' places among so many blocks, if there are others."""
    level_RL = value_RTL.mean(axis=1)
    parts = np.stack([level_RL[0], *np.quantile(level_RL[1:], [0.025, 0.975], axis=0, method="weibull")])
    if places is None:
        return Level(*parts)
    spread = np.full((3, blocks), np.nan)
    spread[:, places] = parts
    return Level(*spread)


def _share(part_RTL: NDArray[np.float64], whole_RTL: NDArray[np.float64]) -> Interval:
    """The sum over blocks of the one, of that of the other; NaN where this is not clear of 0."""
    part_R, whole_R = (side_RTL.mean(axis=1).sum(axis=1) for side_RTL in (part_RTL, whole_RTL))
    if np.quantile(whole_R, 0.025) <= 0:
        return Interval(np.nan, np.nan, np.nan)
    return difference(part_R / np.where(whole_R > 0, whole_R, np.inf))


def _told_sections(parts: Mapping[str, Told], text: TextUpdate | None, samples: int) -> Iterator[Section]:
    for stream, part in parts.items():
        yield Section("told", stream, (), samples, notes=told_notes(part), text=order_text(part, stream))
    if text is not None:
        said = f"leaving out only the text update raises the loss by {text.share} of what the whole block does, over "
        said += f"{len(text.blocks)} blocks; {order_text(text.told, 'text')}"
        yield Section("told", "text update alone", (), samples, notes=told_notes(text.told), text=said)


# Parts of the images, to see how stable it is


def levels(samples: Samples, bins: int = 10, images: NDArray[np.integer] | None = None) -> NDArray[np.float64]:
    """(L,) the mean of a reading of one stream (an ablation) over the sigma bins, each weighing the same.

    images: the numbers of those to look at, all if None. Bins without a sample play no part. Raises ProbeError if there
    is no sample.
    """
    if images is not None:
        samples = of_images(samples, images)
    means = unit_means(samples, bins)
    filled_T = (means.count_TD > 0).any(axis=1)
    level_L: NDArray[np.float64] = means.mean_TD[filled_T].mean(axis=0)
    return level_L


def of_images(samples: Samples, images: NDArray[np.integer]) -> Samples:
    """The samples of these images alone."""
    kept_N = np.isin(samples.image_N, images)
    return replace(
        samples,
        sigma_N=samples.sigma_N[kept_N],
        image_N=samples.image_N[kept_N],
        distances={name: distance_NC[kept_N] for name, distance_NC in samples.distances.items()},
        facts={name: fact_N[kept_N] for name, fact_N in samples.facts.items()},
    )


def parted(samples: Samples, count: int | None = None, seed: int = 0) -> tuple[NDArray[np.unsignedinteger], ...]:
    """The numbers of the images in two parts, at random: `count` of them, half by default, and the rest.

    Raises ProbeError if not all images are known, or there are no more than `count`.
    """
    images = np.random.default_rng(seed).permutation(np.unique(samples.image_N))
    count = len(images) // 2 if count is None else count
    if samples.images is None or not 0 < count < len(images):
        raise ProbeError(f"{count} images cannot be drawn: there are {samples.images or 'unknown ones'}")
    return images[:count], images[count:]
