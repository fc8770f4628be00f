"""From the result files to one JSON, a table and two figures per base.

    python -m weighting.report --results FOLDER --prepared FOLDER --out FOLDER --json FILE

with benchmarks on PYTHONPATH. Shape letters: S seeds, Q images, U sigmas.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from simpletuner_layerprobe.analyse.chances import holm
from simpletuner_layerprobe.analyse.crossed import Crossed, crossed
from simpletuner_layerprobe.analyse.trial import verdict
from weighting.arm import Arm
from weighting.arms import SHUFFLED
from weighting.figures import by_size, differences
from weighting.results import FINAL, Result, read_results
from weighting.rounds import ROUND, SHUFFLE_SEEDS, is_shuffle, tuning_means
from weighting.statistics import exchange_rate
from weighting.store import load_arms
from weighting.task import read_json

SIZES = {"uniform-90": 0.9, "uniform": 1.0, "uniform-110": 1.1, "uniform-125": 1.25}
OTHER_SIZE = (*(name for name in SIZES if name != "uniform"), "article-full", "uniform-article-size")
DIGITS = 7


def losses(results: Sequence[Result], base: str) -> dict[str, dict[int, NDArray[np.float32]]]:
    """arm -> seed -> (Q, U) judging losses."""
    found: dict[str, dict[int, NDArray[np.float32]]] = {}
    for one in results:
        if one.base == base and one.phase == FINAL:
            found.setdefault(one.arm, {})[one.seed] = one.loss_QU
    return found


def full_rounds(
    found: Mapping[str, Mapping[int, NDArray[np.float32]]], arms: Sequence[str]
) -> tuple[list[int], list[str]]:
    """The seeds that all named arms have, in whole rounds, and the arms: a round that was cut off does not count.

    Raises ValueError if not even one round is complete.
    """
    named = [arm for arm in arms if not is_shuffle(arm)]
    seeds = sorted(set.intersection(*(set(found.get(arm, {})) for arm in named)))
    seeds = seeds[: len(seeds) // ROUND * ROUND] or seeds
    if not seeds:
        raise ValueError("not one seed is there for every named arm")
    shuffles = [arm for arm in arms if is_shuffle(arm) and set(seeds[:SHUFFLE_SEEDS]) <= set(found.get(arm, {}))]
    return seeds, [*named, *shuffles]


def rows_of(results: Sequence[Result], base: str, arms: Mapping[str, Arm], reference: str = "uniform") -> dict:
    """Everything that the table, the figures and the JSON of a base say."""
    found = losses(results, base)
    seeds, names = full_rounds(found, list(arms))
    stacked = {name: np.stack([found[name][seed] for seed in seeds if seed in found[name]]) for name in names}
    image_SQ = {name: loss_SQU.mean(axis=2, dtype=np.float64) for name, loss_SQU in stacked.items()}
    base_SQ = image_SQ[reference]
    own: dict[str, Crossed] = {
        name: crossed(loss_SQ - base_SQ[: len(loss_SQ)]) for name, loss_SQ in image_SQ.items() if name != reference
    }
    margin = -own["uniform-110"].mean if "uniform-110" in own else 0.0
    tested = [name for name in own if not is_shuffle(name) and name not in OTHER_SIZE]
    corrected = dict(zip(tested, holm(np.array([own[name].p for name in tested])).tolist(), strict=True))
    mean = {name: float(loss_SQ.mean()) for name, loss_SQ in image_SQ.items()}
    # Against the equal plans of 90 to 125%, on the same seeds as the arm.
    sizes = [name for name in SIZES if name in mean]
    rows = []
    for name, loss_SQ in image_SQ.items():
        arm, count = arms[name], len(loss_SQ)
        row: dict = {
            "arm": name,
            "note": arm.note,
            "parameters": arm.parameters,
            "learning_rate": next(one.rate for one in results if (one.base, one.phase, one.arm) == (base, FINAL, name)),
            "tuning": {f"{rate:g}": round(loss, DIGITS) for rate, loss in tuning_means(results, base, name).items()},
            "loss": round(mean[name], DIGITS),
            "loss_by_seed": [round(float(loss), DIGITS) for loss in loss_SQ.mean(axis=1)],
            "loss_by_sigma": [round(float(loss), 5) for loss in stacked[name].mean(axis=(0, 1), dtype=np.float64)],
            "parameters_by_block": by_block(arm),
            "difference": 0.0,
            "interval": [0.0, 0.0],
        }
        equal = [float(image_SQ[size][:count].mean()) for size in sizes]
        rate = exchange_rate(float(loss_SQ.mean()), [SIZES[size] for size in sizes], equal) if len(sizes) > 1 else None
        row["as_good_as_size"] = None if rate is None else round(rate, 3)
        if name in own:
            row |= {
                "difference": round(own[name].mean, DIGITS),
                "interval": interval(own[name]),
                "p": known(own[name].p),
            }
        if name in corrected:
            p = corrected[name]
            row |= {"holm_p": known(p), "verdict": verdict(own[name], p, margin)}
        rows.append(row)
    shuffles = [own[name].mean for name in own if is_shuffle(name)]
    place = None
    if shuffles and SHUFFLED in own:
        first = image_SQ[SHUFFLED][:SHUFFLE_SEEDS] - base_SQ[:SHUFFLE_SEEDS]
        place = {"better_than": sum(float(first.mean()) < one for one in shuffles), "of": len(shuffles)}
    article = None
    if "article-full" in image_SQ and "uniform-article-size" in image_SQ:
        made = crossed(image_SQ["article-full"] - image_SQ["uniform-article-size"])
        article = {"difference": round(made.mean, DIGITS), "interval": interval(made)}
    return {
        "seeds": seeds,
        "images": int(base_SQ.shape[1]),
        "margin": round(margin, DIGITS),
        "shuffles": place,
        "article_against_equal_of_its_size": article,
        "arms": rows,
    }


def interval(made: Crossed) -> list[float | None]:
    """The ends of the 95% interval, None where one seed or one picture cannot tell."""
    return [known(round(end, DIGITS)) for end in made.interval()]


def known(number: float) -> float | None:
    return number if math.isfinite(number) else None


def thousandths(row: Mapping) -> str:
    """ "+0.52 [+0.10, +0.94]", the difference and its interval in thousandths."""
    ends = ["?" if end is None else f"{1e3 * end:+.2f}" for end in row["interval"]]
    return f"{1e3 * row['difference']:+.2f} [{', '.join(ends)}]"


def by_block(arm: Arm) -> list[int]:
    """Trainable parameters of each block."""
    found: dict[int, int] = {}
    for pair in arm.pairs:
        number = int(pair.module.split(".")[1])
        found[number] = found.get(number, 0) + pair.parameters
    return [found.get(number, 0) for number in range(max(found) + 1)]


def size_words(row: Mapping) -> str:
    """The exchange rate in words."""
    size = row["as_good_as_size"]
    if size is None:
        return "outside 90 to 125%"
    return (
        "" if abs(size - 1) < 5e-4 else f"as good as {abs(size - 1):.1%} {'more' if size > 1 else 'fewer'} parameters"
    )


def table(base: Mapping) -> str:
    lines = [
        "| arm | parameters | learning rate | loss | against equal (95%) | verdict | |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(base["arms"], key=lambda row: row["loss"]):
        change = "" if row["arm"] == "uniform" else thousandths(row)
        cells = [row["arm"], f"{row['parameters']:,}", f"{row['learning_rate']:g}", f"{row['loss']:.5f}", change]
        lines.append(f"| {' | '.join([*cells, row.get('verdict', ''), size_words(row)])} |")
    return "\n".join(lines)


def summary(name: str, base: Mapping) -> str:
    """The table with the sentences around it."""
    parts = [
        f"### {name}: {len(base['seeds'])} seeds, {base['images']} images, differences in thousandths",
        table(base),
    ]
    parts.append(f"Margin (equal factors with 10% more parameters): {1e3 * base['margin']:.2f} thousandths.")
    if base["shuffles"]:
        parts.append(
            f"{SHUFFLED} is better than {base['shuffles']['better_than']} of its {base['shuffles']['of']} shuffles."
        )
    if base["article_against_equal_of_its_size"]:
        own = thousandths(base["article_against_equal_of_its_size"])
        parts.append(f"article-full against uniform-article-size: {own}.")
    return "\n\n".join(parts)


def drawn(row: Mapping) -> Mapping:
    """The row as the figure shows it: a shuffle by its place alone, as intervals of two seeds would dwarf the rest."""
    alone = is_shuffle(row["arm"]) or None in row["interval"]
    return {**row, "interval": [row["difference"]] * 2} if alone else row


def yes(bases: Mapping[str, Mapping]) -> list[str]:
    """The arms that are better than equal factors on the first base and of the same sign on every other."""
    if not bases:
        return []
    first, *others = bases.values()
    signs = [{row["arm"]: row["difference"] for row in other["arms"]} for other in others]
    return [
        row["arm"]
        for row in first["arms"]
        if row.get("verdict", "").startswith("better") and all(sign.get(row["arm"], 1) < 0 for sign in signs)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--prepared", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="for the table and the figures")
    parser.add_argument("--json", type=Path, required=True, help="the numbers, for git")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    results = list(read_results(options.results))
    bases = {}
    for name in dict.fromkeys(one.base for one in results):
        arms = load_arms(options.prepared / f"{name}-arms.json")
        trained = {one.arm for one in results if one.base == name and one.phase == FINAL}
        if "uniform" not in trained:
            continue
        bases[name] = rows_of(results, name, {arm: made for arm, made in arms.items() if arm in trained})
        contributions = options.prepared / f"{name}-contributions.json"
        if contributions.exists():
            read = read_json(contributions)
            bases[name]["contributions"] = {key: read[key] for key in ("angle", "ablation", "oracle")}
        count = f"{len(bases[name]['seeds'])} seeds, {bases[name]['images']} pictures"
        rows = bases[name]["arms"]
        near = [drawn(row) for row in rows if row["arm"] not in ("uniform", "article-full", "uniform-article-size")]
        differences(options.out / f"study-weighting-{name}.png", near, bases[name]["margin"], f"{name}: {count}")
        by_size(options.out / f"study-weighting-{name}-size.png", rows, f"{name}: {count}")
    run = options.results / "run.json"
    written = {"run": read_json(run) if run.exists() else {}, "better_on_all_bases": yes(bases), "bases": bases}
    options.json.write_text(json.dumps(written, indent=1).replace("\n      ", " "), encoding="utf-8")
    text = "\n\n".join(summary(name, base) for name, base in bases.items())
    (options.out / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    print("better on all bases:", ", ".join(written["better_on_all_bases"]) or "none")
    return 0


if __name__ == "__main__":
    sys.exit(main())
