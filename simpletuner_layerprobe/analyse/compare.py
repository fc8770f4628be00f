"""Comparison: what changed from one run to another of the same blocks, and how sure that is. See docs/compare.md.

A change is always run B minus run A. Both runs are taken for independent draws: their errors add up.

Shape letters: N samples, T bins, L blocks, G groups of samples, R replicates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from simpletuner_layerprobe.analyse.bootstrap import (
    SHARE,
    Bootstrap,
    Confidence,
    Factors,
    article_decision,
    confidence,
    tally,
)
from simpletuner_layerprobe.analyse.contribution import article_contributions
from simpletuner_layerprobe.analyse.heatmap import Heatmap, all_blocks
from simpletuner_layerprobe.errors import ProbeError

if TYPE_CHECKING:
    from simpletuner_layerprobe.run.manifest import Manifest
    from simpletuner_layerprobe.run.records import Run

ALPHA = 0.05
"""The chance that a comparison of two runs of the same truth shows any change at all."""
KIND_ALPHA = ALPHA / 3
"""The part of it that the cells, the blocks and the factors may each take."""
BIN_SAMPLES = 20
"""Samples that a bin must have in both runs: with fewer, skewed distances make chances smaller than they are."""
SAMPLES = 2000
"""Samples of each run with which planted changes are found with precision and recall of 0.95 (docs/compare.md)."""
RESOLUTION = 1e-7
"""Of the mean: float32 holds no finer differences, so a smaller one is not looked into."""
SAME, CHANGED, OPEN = "same", "changed", "not settled"


@dataclass(frozen=True)
class Change:
    """Numbers of run A and of run B, arrays of one shape, and how they differ.

    a, b: float64. difference: b - a. low, high: its 95% interval, of each number by itself. p: the two-sided chance of
    a difference as large if there is none, after Holm's correction for all tests of its kind; NaN where none was made.
    """

    a: NDArray[np.float64]
    b: NDArray[np.float64]
    difference: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    p: NDArray[np.float64]

    @property
    def significant(self) -> NDArray[np.bool_]:
        """Where there is a change beyond chance. The same shape, bool."""
        found: NDArray[np.bool_] = np.nan_to_num(self.p, nan=1.0) <= KIND_ALPHA
        return found


@dataclass(frozen=True)
class StreamComparison:
    """One stream of both runs.

    count_a_T, count_b_T: samples of each bin. nonfinite_a, nonfinite_b: samples left out. used_T: the bins that have
    BIN_SAMPLES in both. cells: (T, L). levels: (L,), the mean over the bins used, each weighing the same. missing: why
    nothing can be said, else "".
    """

    stream: str
    blocks: tuple[str, ...]
    count_a_T: NDArray[np.int64]
    count_b_T: NDArray[np.int64]
    nonfinite_a: int
    nonfinite_b: int
    used_T: NDArray[np.bool_]
    cells: Change
    levels: Change
    missing: str


@dataclass(frozen=True)
class FactorComparison:
    """The article's contributions and factors of both runs, for every block in the model's order.

    values: the contributions. a, b: intervals, factors and agreement of each run. critical_a, critical_b: numbers of
    the critical blocks. verdict_L: "same" or "changed" where both factors are settled, else "not settled"; "changed"
    also needs a change beyond chance of what the factor comes from.
    """

    blocks: tuple[str, ...]
    values: Change
    a: Confidence
    b: Confidence
    critical_a: tuple[int, ...]
    critical_b: tuple[int, ...]
    verdict_L: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """Two runs side by side. factors: None where `factors_missing` says why. differences: of what was recorded and
    how, a line each. notes: what else the reader should know."""

    tokens: str
    bins: int
    samples_a: int
    samples_b: int
    streams: Mapping[str, StreamComparison]
    factors: FactorComparison | None
    factors_missing: str
    differences: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def blocks(self) -> tuple[str, ...]:
        """All blocks of the model, in its order."""
        return all_blocks([stream.blocks for stream in self.streams.values()])


def compare(run_a: Run, run_b: Run, recipe: Factors, *, tokens: str = "last", bins: int = 10) -> Comparison:
    """Compare two runs with the same streams and blocks in one pass over each; recipe: the article's.

    Raises ProbeError if the streams or blocks differ, or a run has no samples or was not recorded with this reading.
    """
    require_same_blocks(run_a.manifest, run_b.manifest)
    a, b = (tally(run, tokens=tokens, bins=bins).bootstrap() for run in (run_a, run_b))
    streams = stream_comparisons(a, b)
    factors, missing = None, ""
    try:
        factors = factor_comparison(a, b, streams, recipe, tokens=tokens)
    except ProbeError as error:
        missing = str(error)
    return Comparison(
        tokens=tokens,
        bins=bins,
        samples_a=a.samples,
        samples_b=b.samples,
        streams=streams,
        factors=factors,
        factors_missing=missing,
        differences=tuple(manifest_differences(run_a.manifest, run_b.manifest)),
        notes=tuple(_notes(run_a.manifest, run_b.manifest, streams)),
    )


def require_same_blocks(a: Manifest, b: Manifest) -> None:
    """Raises ProbeError, naming the first difference, if the runs are not of the same streams and blocks."""
    streams = [{stream.name: stream.blocks for stream in one.streams} for one in (a, b)]
    if streams[0].keys() != streams[1].keys():
        names = [", ".join(sorted(one)) for one in streams]
        raise ProbeError(f"the runs have different streams: A has {names[0]}, B has {names[1]}; {_WANTED}")
    for name, blocks_a in streams[0].items():
        blocks_b = streams[1][name]
        if len(blocks_a) != len(blocks_b):
            found = f"A has {len(blocks_a)}, B has {len(blocks_b)}"
        else:
            pair = next(((one, other) for one, other in zip(blocks_a, blocks_b, strict=True) if one != other), None)
            if pair is None:
                continue
            found = f"A has {pair[0]!r:.80} where B has {pair[1]!r:.80}"
        raise ProbeError(f"the runs have different blocks in the {name} stream: {found}; {_WANTED}")


_WANTED = "compare runs of the same architecture"


def manifest_differences(a: Manifest, b: Manifest) -> list[str]:
    """What the manifests of two runs differ in besides the time, a line each: "settings.seed: 1 in A, 2 in B"."""
    told = ("family", "flavour", "model_class", "fingerprint", "source")
    here, there = (
        {name: getattr(one, name) or "unknown" for name in told}
        | {f"settings.{name}": value for name, value in one.settings.items()}
        | {f"versions.{name}": value for name, value in one.versions.items()}
        for one in (a, b)
    )
    lines = []
    for name in dict.fromkeys([*here, *there]):
        found = [_shown(one[name]) if name in one else "absent" for one in (here, there)]
        if here.get(name) != there.get(name):
            lines.append(f"{name}: {found[0]} in A, {found[1]} in B")
    if a.modules != b.modules:
        lines.append(f"modules: {len(a.modules):,} in A, {len(b.modules):,} in B; they are not the same")
    return lines


def _shown(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _notes(a: Manifest, b: Manifest, streams: Mapping[str, StreamComparison]) -> Iterator[str]:
    if a.settings.get("sigmas") != b.settings.get("sigmas"):
        yield (
            "the runs draw sigma in different ways, so within a bin their sigmas may lie differently: where a distance "
            "changes much with sigma, that alone can look like a change (more bins make it smaller)"
        )
    for name, stream in streams.items():
        unused = int((~stream.used_T).sum())
        if unused and not stream.missing:
            yield (
                f"{unused} of {len(stream.used_T)} sigma bins of the {name} stream are left out: fewer than "
                f"{BIN_SAMPLES} samples in A or in B"
            )
        if stream.nonfinite_a or stream.nonfinite_b:
            yield (
                f"samples left out of the {name} stream because a distance is not finite: {stream.nonfinite_a:,} in A, "
                f"{stream.nonfinite_b:,} in B"
            )
    fewest = min(int(min(one.count_a_T.sum(), one.count_b_T.sum())) for one in streams.values())
    if fewest < SAMPLES:
        yield f"{fewest:,} samples: with fewer than {SAMPLES:,} weaker changes are missed"


# Cells and blocks


def stream_comparisons(a: Bootstrap, b: Bootstrap) -> dict[str, StreamComparison]:
    """Cells and blocks of every stream, the chances corrected over all streams together."""
    cells: dict[str, _Test] = {}
    levels: dict[str, _Test] = {}
    used: dict[str, NDArray[np.bool_]] = {}
    for name, blocks in a.blocks.items():
        used_T = used[name] = np.minimum(a.count_T[name], b.count_T[name]) >= BIN_SAMPLES
        mean_a_TL, mean_b_TL = a.mean_TL[name], b.mean_TL[name]
        error_TL, freedom_TL = _cell_errors(a, b, name, used_T)
        cells[name] = _test(
            mean_a_TL, mean_b_TL, error_TL, freedom_TL, np.broadcast_to(used_T[:, None], error_TL.shape)
        )
        square_TL = error_TL[used_T] ** 2
        T = max(int(used_T.sum()), 1)
        levels[name] = _test(
            mean_a_TL[used_T].sum(axis=0) / T,
            mean_b_TL[used_T].sum(axis=0) / T,
            np.sqrt(square_TL.sum(axis=0)) / T,
            _freedom(square_TL, freedom_TL[used_T]),
            np.full(len(blocks), bool(used_T.any())),
        )
    found_cells, found_levels = _changes(cells), _changes(levels)
    return {
        name: StreamComparison(
            stream=name,
            blocks=a.blocks[name],
            count_a_T=a.count_T[name],
            count_b_T=b.count_T[name],
            nonfinite_a=a.samples - int(a.count_T[name].sum()),
            nonfinite_b=b.samples - int(b.count_T[name].sum()),
            used_T=used[name],
            cells=found_cells[name],
            levels=found_levels[name],
            missing=""
            if used[name].any()
            else f"not enough samples: no sigma bin has {BIN_SAMPLES} with finite distances in both runs",
        )
        for name in a.blocks
    }


@dataclass(frozen=True)
class _Test:
    """a, b, the two sides of the interval around b - a, and p not corrected; NaN in all but a and b if not tested."""

    a: NDArray[np.float64]
    b: NDArray[np.float64]
    margin: NDArray[np.float64]
    p: NDArray[np.float64]


def _cell_errors(
    a: Bootstrap, b: Bootstrap, name: str, used_T: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(T, L) standard errors of the cells' differences and their degrees of freedom; 0 and infinite where not used.

    The error is Welch's, or the one with each run's spread over the other's number of samples if that is larger. They
    are the same for equal numbers. With few samples of a skewed distance a low mean comes with a small spread, and
    Welch's error alone would call that a change against a run of many samples.
    """
    count_a_T1, count_b_T1 = (np.where(used_T, one.count_T[name], 1)[:, None] for one in (a, b))
    square_a_TL, square_b_TL = (np.where(used_T[:, None], one.error_TL[name], 0.0) ** 2 for one in (a, b))
    swapped_TL = square_a_TL * (count_a_T1 / count_b_T1) + square_b_TL * (count_b_T1 / count_a_T1)
    freedom_2T1 = np.stack([np.maximum(one.groups_T - 1.0, 1)[:, None] for one in (a, b)])
    return (
        np.sqrt(np.maximum(square_a_TL + square_b_TL, swapped_TL)),
        _freedom(np.stack([square_a_TL, square_b_TL]), freedom_2T1),
    )


def _freedom(square_N: NDArray[np.float64], freedom_N: NDArray[np.float64]) -> NDArray[np.float64]:
    """Degrees of freedom of the sum over the first axis of squared errors with these degrees of freedom.

    Satterthwaite's formula (Welch 1947, Biometrika 34); infinite where all errors are 0.
    """
    # Relative to the largest, as fourth powers of small errors underflow.
    share_N = square_N / np.maximum(square_N.max(axis=0, initial=0.0), np.finfo(np.float64).tiny)
    fourth = (share_N**2 / freedom_N).sum(axis=0)
    freedom: NDArray[np.float64] = np.where(
        fourth > 0, share_N.sum(axis=0) ** 2 / np.where(fourth > 0, fourth, 1), np.inf
    )
    return freedom


def _test(
    a: NDArray[np.float64],
    b: NDArray[np.float64],
    error: NDArray[np.float64],
    freedom: NDArray[np.float64],
    tested: NDArray[np.bool_],
) -> _Test:
    """Student's test of b - a with this standard error, all of one shape."""
    error = np.maximum(error, RESOLUTION * np.maximum(np.abs(a), np.abs(b)))
    with np.errstate(divide="ignore", invalid="ignore"):
        score = np.abs(b - a) / error
    score = np.where(np.isnan(score), 0.0, score)  # 0 / 0: both are 0 in every sample
    p = np.where(tested, two_sided(score, freedom), np.nan)
    return _Test(a, b, np.where(tested, student95(freedom) * error, np.nan), p)


def _changes(tests: Mapping[str, _Test]) -> dict[str, Change]:
    corrected = holm(np.concatenate([test.p.ravel() for test in tests.values()]))
    stops = np.cumsum([test.p.size for test in tests.values()])[:-1]
    found = {}
    for (name, test), p in zip(tests.items(), np.split(corrected, stops), strict=True):
        difference = np.where(np.isnan(test.margin), np.nan, test.b - test.a)
        found[name] = Change(
            test.a, test.b, difference, difference - test.margin, difference + test.margin, p.reshape(test.p.shape)
        )
    return found


def holm(p_N: NDArray[np.float64]) -> NDArray[np.float64]:
    """Chances corrected for their number by Holm's step-down method (1979). NaN counts as no test and stays NaN.

    Whoever calls everything at or below alpha a change calls anything wrongly with a chance of at most alpha, however
    the tests depend on each other.
    """
    corrected_N = np.full(p_N.shape, np.nan)
    tested = np.flatnonzero(~np.isnan(p_N))
    order = tested[np.argsort(p_N[tested], kind="stable")]
    left = np.arange(len(order), 0, -1)
    corrected_N[order] = np.minimum(np.maximum.accumulate(p_N[order] * left), 1.0)
    return corrected_N


def two_sided(score: NDArray[np.float64], freedom: NDArray[np.float64]) -> NDArray[np.float64]:
    """The chance that |t| of Student's distribution is larger. score: 0 or more. freedom: 1 or more, may be infinite.

    By the normal number with the same chance (G. W. Hill, 1970, Algorithm 395, Communications of the ACM 13).
    """
    score, freedom = np.broadcast_arrays(score, freedom)
    large = freedom > 1e6
    n = np.where(large, 1e6, freedom)
    a = n - 0.5
    b = 48 * a**2
    with np.errstate(over="ignore"):
        y = a * np.log1p(np.minimum(score, 1e150) ** 2 / n)
    tail = ((-0.4 * y - 3.3) * y - 24.0) * y - 85.5
    z = (((tail / (0.8 * y**2 + 100 + b)) + y + 3) / b + 1) * np.sqrt(y)
    z = np.where(large, score, z)
    chance = np.array([math.erfc(one / math.sqrt(2)) for one in z.ravel().tolist()])
    return chance.reshape(z.shape)


def student95(freedom: NDArray[np.float64]) -> NDArray[np.float64]:
    """The 97.5% point of Student's t, by its expansion around the normal one; good to 1e-4 from 10 degrees up."""
    z, v = 1.959963984540054, np.maximum(freedom, 1.0)
    point: NDArray[np.float64] = (
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    )
    return point


# Contributions and factors


def factor_comparison(
    a: Bootstrap, b: Bootstrap, streams: Mapping[str, StreamComparison], recipe: Factors, *, tokens: str = "last"
) -> FactorComparison:
    """The article's contributions and factors of both. Raises ProbeError, naming the run, if one has none."""
    blocks = all_blocks(list(a.blocks.values()))
    values, errors, sure, critical = [], [], [], []
    for label, one in (("A", a), ("B", b)):
        try:
            contribution = article_contributions(_heatmaps(one, tokens))
        except ProbeError as error:
            raise ProbeError(f"{label} has no contributions: {error}") from None
        decide = article_decision(one.blocks, one.count_T, recipe)
        values.append(contribution.value_L)
        # The least and the most block move all others: replicates lie off the run's own value. That counts as error.
        errors.append(np.sqrt(((decide(one.replicates())[0] - contribution.value_L) ** 2).mean(axis=0)))
        sure.append(confidence(one, decide))
        critical.append(contribution.critical_union())
    everywhere_L = np.full(len(blocks), True)
    test = _test(values[0], values[1], np.hypot(*errors), np.full(len(blocks), np.inf), everywhere_L)
    found = _changes({"": test})[""]
    same_bins = all(np.array_equal(a.count_T[name] > 0, b.count_T[name] > 0) for name in a.blocks)
    settled_L = np.full(len(blocks), same_bins)
    for judged in sure:
        settled_L[list(judged.unsettled(SHARE))] = False
    evidence_L = found.significant
    for stream in streams.values():
        level = dict(zip(stream.blocks, stream.levels.significant, strict=True))
        for i in set(critical[0]) ^ set(critical[1]):
            evidence_L[i] |= bool(level.get(blocks[i], False))
    differ_L = sure[0].factor_K != sure[1].factor_K
    verdict_L = tuple(
        OPEN if not settled else SAME if not differ else CHANGED if evidence else OPEN
        for settled, differ, evidence in zip(settled_L, differ_L, evidence_L, strict=True)
    )
    return FactorComparison(blocks, found, sure[0], sure[1], critical[0], critical[1], verdict_L)


def _heatmaps(bootstrap: Bootstrap, tokens: str) -> dict[str, Heatmap]:
    return {
        name: Heatmap(
            stream=name,
            tokens=tokens,
            blocks=blocks,
            mean_TL=bootstrap.mean_TL[name],
            count_T=bootstrap.count_T[name],
            nonfinite=bootstrap.samples - int(bootstrap.count_T[name].sum()),
            bins=len(bootstrap.count_T[name]),
        )
        for name, blocks in bootstrap.blocks.items()
    }


# For other programs


def as_json(comparison: Comparison) -> dict[str, Any]:
    """The comparison as JSON values; numbers that are not known are null."""
    found: dict[str, Any] = {
        "alpha": ALPHA,
        "kind_alpha": KIND_ALPHA,
        "tokens": comparison.tokens,
        "bins": comparison.bins,
        "samples": {"a": comparison.samples_a, "b": comparison.samples_b},
        "differences": list(comparison.differences),
        "notes": list(comparison.notes),
        "streams": {},
        "factors": None,
        "factors_missing": comparison.factors_missing,
    }
    for name, stream in comparison.streams.items():
        found["streams"][name] = {
            "missing": stream.missing,
            "blocks": list(stream.blocks),
            "bins_used": stream.used_T.tolist(),
            "count": {"a": stream.count_a_T.tolist(), "b": stream.count_b_T.tolist()},
            "nonfinite": {"a": stream.nonfinite_a, "b": stream.nonfinite_b},
            "levels": _change_json(stream.levels),
            "cells": _change_json(stream.cells),
        }
    factors = comparison.factors
    if factors is not None:
        found["factors"] = {
            "blocks": list(factors.blocks),
            "verdict": list(factors.verdict_L),
            **{
                side: {
                    "contribution": plain(values_L),
                    "low": plain(sure.low_L),
                    "high": plain(sure.high_L),
                    "factor": sure.factor_K.tolist(),
                    "agreement": plain(sure.agreement_K),
                    "critical": list(critical),
                }
                for side, values_L, sure, critical in (
                    ("a", factors.values.a, factors.a, factors.critical_a),
                    ("b", factors.values.b, factors.b, factors.critical_b),
                )
            },
        }
    return found


def _change_json(change: Change) -> dict[str, Any]:
    parts = {name: plain(getattr(change, name)) for name in ("a", "b", "difference", "low", "high", "p")}
    return {**parts, "changed": change.significant.tolist()}


def plain(values: NDArray[np.float64]) -> list[Any]:
    """Nested lists of floats, None where not finite."""
    known = values.astype(object)
    known[~np.isfinite(values)] = None
    listed: list[Any] = known.tolist()
    return listed


def sigma_ranges(changed_T: NDArray[np.bool_]) -> tuple[tuple[float, float], ...]:
    """The parts of sigma that these bins cover, neighbours joined: ((0.2, 0.5), (0.9, 1.0))."""
    bins = len(changed_T)
    steps = np.flatnonzero(np.diff(np.concatenate([[False], changed_T, [False]]).astype(np.int8)))
    return tuple((first / bins, last / bins) for first, last in steps.reshape(-1, 2).tolist())


def sigma_text(changed_T: NDArray[np.bool_]) -> str:
    """ "0.2 to 0.5, 0.9 to 1", "none"."""
    return ", ".join(f"{low:.3g} to {high:.3g}" for low, high in sigma_ranges(changed_T)) or "none"


def change_text(levels: Change, i: int) -> str:
    """The change of block i with its interval, and relative to A where that is not 0."""
    percent = 100 * levels.difference[i] / levels.a[i] if levels.a[i] else math.nan
    share = "" if math.isnan(percent) else f" ({percent:+.3g}%)" if abs(percent) < 999.5 else f" ({percent:+,.0f}%)"
    return f"{levels.difference[i]:+.3g} [{levels.low[i]:+.3g}, {levels.high[i]:+.3g}]{share}"
