"""`layerprobe compare`: what changed from one run to another."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

from simpletuner_layerprobe.commands.arguments import Add, add_bins, add_force, add_preset, add_tokens, add_wide
from simpletuner_layerprobe.commands.output import LEFT, OK, RIGHT, print_json, print_table, print_text, say
from simpletuner_layerprobe.files import write_files
from simpletuner_layerprobe.show.words import capital, counted, share_text
from simpletuner_layerprobe.targets import PAGE, require_file, require_folder

if TYPE_CHECKING:
    from simpletuner_layerprobe.api.changes import Comparison, StreamComparison


def add_parser(add: Add) -> None:
    added = add(
        "compare",
        command,
        "say what changed from one run to another of the same blocks, and how sure that is",
        "Before and after a fine-tune, two data sets, two flavours of one architecture: changed blocks and cells, and\n"
        "changed factors; of two runs with one noise seed also sample by sample, with the\n"
        "loss. docs/compare.md says how each is decided. Exits with 0 also if nothing changed.",
        "layerprobe compare output/before/layerprobe output/after/layerprobe\n"
        "layerprobe compare output/before/layerprobe output/after/layerprobe --out compare.html",
    )
    added.add_argument("a", metavar="A", help="run folder")
    added.add_argument("b", metavar="B", help="run folder; changes are B minus A")
    added.add_argument("--json", action="store_true", help="print everything as one JSON object")
    added.add_argument(
        "--out",
        metavar="FILE",
        help="also make an HTML page: a name that ends in .html, or a folder that exists for its compare.html",
    )
    add_force(added)
    add_bins(added)
    add_tokens(added, "to compare")
    add_preset(added)
    add_wide(added)


def command(arguments: argparse.Namespace) -> int:
    from simpletuner_layerprobe.api import compare, load
    from simpletuner_layerprobe.api.changes import as_json, common_preset
    from simpletuner_layerprobe.api.options import WEIGHED
    from simpletuner_layerprobe.api.pages import comparison_page

    out = None if arguments.out is None else _page_path(arguments.out, arguments.force)
    run_a, run_b = load(arguments.a), load(arguments.b)
    preset = arguments.preset or common_preset(run_a, run_b)
    comparison = compare(run_a, run_b, reading=arguments.tokens, bins=arguments.bins, preset=preset)
    options = {"reading": arguments.tokens, "bins": arguments.bins, "preset": preset, "direction": WEIGHED}
    decided = run_a.decided(**options) if comparison.factors else ()
    if out is not None:
        write_files({out: comparison_page(run_a, run_b, comparison, decided).encode()}, force=arguments.force)
        arguments.written = [out]
    if arguments.json:
        runs = {"a": str(run_a.path), "b": str(run_b.path), "preset": preset}
        print_json({**runs, "images": {"a": run_a.images, "b": run_b.images}, **as_json(comparison)})
        return OK
    for label, run in (("A", run_a), ("B", run_b)):
        print_text(f"{label}  ", f"{run.path}: {run.model or 'unknown model'}, {run.counted}", wide=arguments.wide)
    for line in comparison.notes:
        print_text("note: ", line, wide=arguments.wide)
    _print_paired(comparison, arguments.wide)
    for stream in comparison.streams.values():
        _print_stream(stream, comparison, arguments.wide)
    _print_factors(comparison, decided, preset, arguments.wide)
    if out is not None:
        say(f"written: {out}")
    return OK


def _page_path(out: str, force: bool) -> Path:
    if os.path.isdir(out):
        return require_file(require_folder(out) / "compare.html", force=force)
    return require_file(out, PAGE, force=force)


def _print_paired(comparison: Comparison, wide: bool) -> None:
    from simpletuner_layerprobe.api.changes import change_text, clear, paired_text

    made = comparison.paired
    if made is None:
        said = f"{comparison.not_paired}; the runs are taken for independent draws of images"
        print_text("not paired: ", said, wide=wide)
        return
    number = {block: i for i, block in enumerate(comparison.blocks)}
    say()
    say(f"Paired, {counted(made.pairs, 'pair')} of {counted(made.images, 'image')}: {paired_text(made, number)}")
    if made.left_a or made.left_b:
        say(f"  without a partner: {counted(made.left_a, 'sample')} of A, {made.left_b:,} of B")
    rows = [
        (f"{t / made.bins:.3g} to {(t + 1) / made.bins:.3g}", f"{made.counts_T[t]:,}", f"{made.loss_T.a[t]:.4g}",
         f"{made.loss_T.b[t]:.4g}", change_text(made.loss_T, t))
        for t in range(made.bins)
        if not math.isnan(made.loss_T.difference[t])
    ]  # fmt: skip
    if rows:
        heads = ("sigma", "pairs", "loss A", "loss B", "change [95% interval]")
        print_table(heads, rows, LEFT + 3 * RIGHT + LEFT, "  ", spare=("loss A", "loss B"), wide=wide)
    rows = [
        (str(number[block]), f"{block} ({stream})", f"{change.a[i]:.4g}", f"{change.b[i]:.4g}", change_text(change, i))
        for stream, change in made.angles.items()
        for i, block in enumerate(made.blocks[stream])
        if clear(change)[i]
    ]
    if rows:
        say()
        heads = ("#", "block", "A", "B", "change [95% interval]")
        print_table(heads, rows, RIGHT + 4 * LEFT, "  ", spare=("A", "B"), wide=wide)
    say()
    say("Unpaired, as if each run had drawn its own images:")


def _print_stream(stream: StreamComparison, comparison: Comparison, wide: bool) -> None:
    from simpletuner_layerprobe.api.changes import chance, change_text, sigma_text

    title = f"{capital(stream.stream)} stream"
    say()
    if stream.missing:
        say(f"{title}: {stream.missing}")
        return
    changed_L, changed_TL = stream.levels.significant, stream.cells.significant
    tested = int(stream.used_T.sum()) * len(stream.blocks)
    say(
        f"{title}: {changed_L.sum():,} of {counted(len(stream.blocks), 'block')} changed, "
        f"{changed_TL.sum():,} of {counted(tested, 'cell')}"
    )
    rows = []
    for i, block in enumerate(stream.blocks):
        if changed_L[i] or changed_TL[:, i].any():
            change = change_text(stream.levels, i) if changed_L[i] else "no change over all sigmas"
            p = chance(float(stream.levels.p[i])) if changed_L[i] else ""
            where = sigma_text(changed_TL[:, i])
            number = str(comparison.blocks.index(block))
            rows.append((number, block, f"{stream.levels.a[i]:.4g}", f"{stream.levels.b[i]:.4g}", change, p, where))
    if rows:
        heads = ("#", "block", "A", "B", "change [95% interval]", "chance", "cells changed at sigma")
        print_table(heads, rows, RIGHT + 6 * LEFT, "  ", spare=("A", "B", "chance", "#"), wide=wide)


def _print_factors(comparison: Comparison, decided: tuple[tuple[int, str], ...], preset: str, wide: bool) -> None:
    factors = comparison.factors
    say()
    if factors is None:
        say(f"Factors: none: {comparison.factors_missing}")
        return
    verdicts = factors.verdict_K
    counts = ", ".join(f"{verdicts.count(verdict):,} {verdict}" for verdict in ("changed", "same", "not settled"))
    say(f"Factors (preset {preset}): {counts} of {len(verdicts):,}")
    for label, sure in (("A", factors.a), ("B", factors.b)):
        print_text(f"  {label}: ", sure.text(), wide=wide)
    rows = []
    for place, (number, kind) in enumerate(decided):
        if verdicts[place] == "same" or factors.a.factor_K[place] == factors.b.factor_K[place]:
            continue
        sides = ((factors.values.a, factors.a), (factors.values.b, factors.b))
        values = [f"{v_L[number]:.2f} [{sure.low_L[number]:.2f}, {sure.high_L[number]:.2f}]" for v_L, sure in sides]
        numbers = [str(sure.factor_K[place]) for _, sure in sides]
        agreed = ", ".join(share_text(sure.agreement_K[place]) for _, sure in sides)
        rows.append(
            (str(number), f"{factors.blocks[number]} {kind}".strip(), *values, *numbers, agreed, verdicts[place])
        )
    if rows:
        heads = ("#", "block", "contribution A", "contribution B", "factor A", "factor B", "agreement", "")
        spare = ("agreement", "contribution A", "contribution B")
        print_table(heads, rows, RIGHT + 7 * LEFT, "  ", spare=spare, wide=wide)
