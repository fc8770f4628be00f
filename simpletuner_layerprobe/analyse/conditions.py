"""Conditions: whether what a sample was made with (caption, size, ...) goes with its distances, at equal sigma.

A fact that differs within images (a dropped caption, a crop's size) is compared within each image, so that what images
are like plays no part. One that is the same for all samples of an image is compared between images, and an image counts
once however often it came back.

Shape letters: N samples, T bins, D columns of all streams side by side, G units (images or samples).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simpletuner_layerprobe.analyse.chances import sign_chances, student95
from simpletuner_layerprobe.analyse.samples import Samples
from simpletuner_layerprobe.analyse.units import MOST_GROUPS, bin_index, grouped, sums, unit_numbers

CAPTION, SIZE, ASPECT = "caption length", "size", "aspect"
DROPPED = "captions dropped"
BACKEND = "data backend"
CONDITIONS = (CAPTION, SIZE, ASPECT, DROPPED, BACKEND)
MAX_BACKENDS = 16
"""Data backends that are compared with the rest, the largest ones; further ones count among the others."""
MIN_UNITS = 12
"""Units that a fact must differ within, or between which it must: with fewer no chance is small enough."""
MIN_GROUP = 4
"""Units that the smaller of two groups must have."""
LEAST = 0.01  # of the mean distance: smaller ones count as that, as 0 has no logarithm
WITHIN = 0.2
"""A fact is compared within images if at least this part of its variance is there."""


@dataclass(frozen=True)
class Condition:
    """One fact as a number per sample. name: of CONDITIONS. value: the backend, else "". x_N: the number, NaN where it
    is not known. binary: whether it is 1 for a group and 0 for the rest; else it is a logarithm to base 2."""

    name: str
    value: str
    x_N: NDArray[np.float64]
    binary: bool = False


@dataclass(frozen=True)
class Effect:
    """What a fact goes with, for all columns side by side.

    columns: stream -> its columns among the D. effect_D: change relative to the distance, of one group against the
    rest, or over two standard deviations of the number. low_D, high_D: 95% interval. p_D: corrected for all columns.
    level_D: mean distance. within: whether images were compared with themselves. units: images (samples, where they are
    not known) that told something. samples: behind it.
    """

    columns: Mapping[str, slice]
    effect_D: NDArray[np.float64]
    low_D: NDArray[np.float64]
    high_D: NDArray[np.float64]
    p_D: NDArray[np.float64]
    level_D: NDArray[np.float64]
    within: bool
    units: int
    samples: int


def conditions(samples: Samples) -> Iterator[Condition]:
    """The facts of the samples, in the order of CONDITIONS; a caption's length is in words where these are known."""
    facts, N = samples.facts, samples.samples
    dropped_N = facts.get("dropped", np.full(N, -1))
    known = [length_N for length_N in _caption_lengths(facts, dropped_N) if np.isfinite(length_N).any()]
    varying = [length_N for length_N in known if np.nanmin(length_N) < np.nanmax(length_N)]
    yield Condition(CAPTION, "", next(iter(varying + known), np.full(N, np.nan)))
    width_N, height_N = (np.asarray(facts.get(side, np.zeros(N)), dtype=np.float64) for side in ("width", "height"))
    known_N = (width_N > 0) & (height_N > 0)
    width_N, height_N = (np.log2(np.where(known_N, side_N, 1)) for side_N in (width_N, height_N))
    yield Condition(SIZE, "", np.where(known_N, width_N + height_N, np.nan))
    yield Condition(ASPECT, "", np.where(known_N, np.abs(width_N - height_N), np.nan))
    yield Condition(DROPPED, "", np.where(dropped_N >= 0, dropped_N, np.nan).astype(np.float64), binary=True)
    backend_N = np.asarray(facts.get("backend", np.full(N, "")), dtype=np.str_)
    names, counts = np.unique(backend_N[backend_N != ""], return_counts=True)
    for name in sorted(names[np.argsort(-counts, kind="stable")][:MAX_BACKENDS].tolist()):
        yield Condition(BACKEND, name, np.where(backend_N != "", backend_N == name, np.nan), binary=True)


def _caption_lengths(
    facts: Mapping[str, NDArray[Any]], dropped_N: NDArray[np.integer]
) -> Iterator[NDArray[np.float64]]:
    for name in ("caption_words", "caption_characters", "text_tokens"):
        length_N = np.asarray(facts.get(name, np.full(len(dropped_N), -1)), dtype=np.float64)
        # A dropped caption is no short one: it has an effect of its own.
        yield np.log2(1 + np.where((length_N >= 0) & (dropped_N != 1), length_N, np.nan))


def effect(samples: Samples, condition: Condition, bins: int = 10) -> Effect | str:
    """What the condition goes with, or why that cannot be said.

    The logarithm of the distance (images and samples scatter by a share of it) and the fact are taken as deviations
    from their means in each sigma bin. The effect is the slope of one over the other, with the jackknife's error over
    units (CR3, MacKinnon and White 1985, Bell and McCaffrey 2002); its chance comes from the units' scores with signs
    at random (`sign_chances`).
    """
    used_N = np.isfinite(condition.x_N)
    if not used_N.any():
        return "not recorded in this run"
    bin_N = bin_index(samples.sigma_N[used_N], bins)
    unit_N = np.unique(unit_numbers(samples)[0][used_N], return_inverse=True)[1]
    U = int(unit_N.max()) + 1
    x_N, within, units = _compared(condition, unit_N, bin_N, bins)
    if reason := _too_few(condition, samples, unit_N, x_N, within, units):
        return reason
    G = min(U, MOST_GROUPS)
    group_N = grouped(unit_N, U, G)
    span = 1.0 if condition.binary else 2 * float(np.sqrt((x_N**2).mean()))
    parts, columns, first = [], {}, 0
    for name, distance_NC in samples.distances.items():
        columns[name] = slice(first, first := first + distance_NC.shape[1])
        parts.append(_stream_scores(distance_NC[used_N].astype(np.float64), x_N, group_N, G, bin_N, bins))
    score_GD, square_GD, level_D = (np.concatenate(part, axis=-1) for part in zip(*parts, strict=True))
    with np.errstate(divide="ignore", invalid="ignore"):
        effect_D = span * score_GD.sum(axis=0) / square_GD.sum(axis=0)
        left_out_GD = span * (score_GD.sum(axis=0) - score_GD) / (square_GD.sum(axis=0) - square_GD)
    margin_D = student95(np.array(min(units, G) - 1.0)) * np.sqrt(
        ((left_out_GD - effect_D) ** 2).sum(axis=0) * (1 - 1 / G)
    )
    return Effect(
        columns=columns,
        effect_D=np.expm1(effect_D),
        low_D=np.expm1(effect_D - margin_D),
        high_D=np.expm1(effect_D + margin_D),
        p_D=sign_chances(score_GD),
        level_D=level_D,
        within=within,
        units=units,
        samples=int(np.count_nonzero(used_N)),
    )


def _stream_scores(
    distance_NC: NDArray[np.float64],
    x_N: NDArray[np.float64],
    group_N: NDArray[np.intp],
    groups: int,
    bin_N: NDArray[np.int64],
    bins: int,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Of one stream: (G, C) sums of x times the logarithms' deviations from their bins, (G, C) of x squared, and (C,)
    the mean distance."""
    finite_N = np.isfinite(distance_NC).all(axis=1)
    distance_NC[~finite_N] = 0.0
    over_bins, x_N = sums(bin_N, bins, finite_N.astype(np.float64)), x_N * finite_N
    count_T1 = np.maximum(np.bincount(bin_N, finite_N, bins), 1)[:, None]
    level_C = (over_bins @ distance_NC / count_T1).sum(axis=0) / max(1, len(np.unique(bin_N[finite_N])))
    np.log(np.maximum(distance_NC, np.where(level_C > 0, LEAST * level_C, 1.0)), out=distance_NC)
    mean_TC = over_bins @ distance_NC / count_T1
    x_GT = np.bincount(group_N * bins + bin_N, x_N, groups * bins).reshape(groups, bins)
    score_GC = sums(group_N, groups, x_N) @ distance_NC - x_GT @ mean_TC
    square_GC = np.broadcast_to(np.bincount(group_N, x_N**2, groups)[:, None], score_GC.shape)
    return score_GC, square_GC, level_C


def _compared(
    condition: Condition, unit_N: NDArray[np.intp], bin_N: NDArray[np.int64], bins: int
) -> tuple[NDArray[np.float64], bool, int]:
    """(N,) the fact's deviations, within or between units, whether within, and how many units tell something."""
    known_N = condition.x_N[np.isfinite(condition.x_N)]
    x_N = known_N - (np.bincount(bin_N, known_N, bins) / np.maximum(np.bincount(bin_N, minlength=bins), 1))[bin_N]
    x_N[np.abs(x_N) <= 1e-9 * max(1.0, float(np.abs(known_N).max()))] = 0.0
    mean_U = np.bincount(unit_N, x_N) / np.bincount(unit_N)
    inside_N = x_N - mean_U[unit_N]
    within = bool((inside_N**2).sum() >= WITHIN * (x_N**2).sum() > 0)
    if not within:
        return mean_U[unit_N], False, len(mean_U) if x_N.any() else 0
    own_N = np.abs(known_N - (np.bincount(unit_N, known_N) / np.bincount(unit_N))[unit_N])
    return inside_N, True, int(np.count_nonzero(np.bincount(unit_N, own_N > 1e-9)))


def _too_few(
    condition: Condition, samples: Samples, unit_N: NDArray[np.intp], x_N: NDArray[np.float64], within: bool, units: int
) -> str:
    """Why nothing can be said, or ""."""
    if not units:
        x = float(np.nanmax(condition.x_N))
        there = {DROPPED: "captions dropped", BACKEND: f"samples of {condition.value}"}.get(condition.name)
        return f"{'all' if x else 'no'} {there}" if there else f"the {condition.name} does not vary in this run"
    what = "images" if samples.images is not None else "samples"
    if units < MIN_UNITS:
        return f"not enough {what}: {units} tell something of it, {MIN_UNITS} are needed"
    if condition.binary and not within:
        in_U = np.bincount(unit_N, condition.x_N[np.isfinite(condition.x_N)] > 0.5) / np.bincount(unit_N) > 0.5
        smaller = int(min(in_U.sum(), (~in_U).sum()))
        if smaller < MIN_GROUP:
            return f"not enough {what}: {smaller} in the smaller group, {MIN_GROUP} are needed"
    return ""
