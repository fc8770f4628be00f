"""`layerprobe compare`: what changed from one run to another."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from simpletuner_layerprobe.commands.arguments import Add, add_bins, add_tokens
from simpletuner_layerprobe.commands.output import OK, counted, model_name, print_json, replace_files

if TYPE_CHECKING:
    from simpletuner_layerprobe.analyse.compare import Comparison, FactorComparison, StreamComparison


def add_parser(add: Add) -> None:
    added = add(
        "compare",
        command,
        "say what changed from one run to another of the same blocks, and how sure that is",
        "Before and after a fine-tune, two data sets, two flavours of one architecture: changed blocks and cells, and\n"
        "changes of the article's factors. docs/compare.md says how each is decided. Exits with 0 also if nothing\n"
        "changed.",
        "layerprobe compare output/before/layerprobe output/after/layerprobe\n"
        "layerprobe compare output/before/layerprobe output/after/layerprobe --out compare.html",
    )
    added.add_argument("a", metavar="A", help="run folder")
    added.add_argument("b", metavar="B", help="run folder; changes are B minus A")
    added.add_argument("--json", action="store_true", help="print everything as one JSON object")
    added.add_argument(
        "--out",
        metavar="FILE",
        help="also make an HTML page: a file that ends in .html, or a folder for compare.html; one of the same name is "
        "replaced",
    )
    add_bins(added)
    add_tokens(added, "to compare")


def command(arguments: argparse.Namespace) -> int:
    from simpletuner_layerprobe.analyse.compare import as_json, compare
    from simpletuner_layerprobe.lokr.factors import article_factors
    from simpletuner_layerprobe.run.records import open_run

    run_a, run_b = open_run(arguments.a), open_run(arguments.b)
    found = compare(run_a, run_b, article_factors, tokens=arguments.tokens, bins=arguments.bins)
    out = None
    if arguments.out is not None:
        from simpletuner_layerprobe.show.compare_page import compare_page

        out = Path(arguments.out)
        out = out if out.suffix == ".html" and not out.is_dir() else out / "compare.html"
        replace_files(out.parent, {out.name: compare_page(run_a, run_b, found).encode()})
    if arguments.json:
        print_json({"a": str(run_a.path), "b": str(run_b.path), **as_json(found)})
        return OK
    for label, run, samples in (("A", run_a, found.samples_a), ("B", run_b, found.samples_b)):
        print(f"{label}  {run.path}: {model_name(run.manifest) or 'unknown model'}, {counted(samples, 'sample')}")
    for line in found.differences:
        print(f"differs: {line}")
    for line in found.notes:
        print(f"note: {line}")
    for stream in found.streams.values():
        _print_stream(stream, found)
    if found.factors is None:
        print(f"\nFactors: none: {found.factors_missing}")
    else:
        _print_factors(found.factors)
    if out is not None:
        print(f"written: {out}")
    return OK


def _print_stream(stream: StreamComparison, found: Comparison) -> None:
    from simpletuner_layerprobe.analyse.compare import change_text, sigma_text

    title = f"{stream.stream[:1].upper()}{stream.stream[1:]} stream"
    if stream.missing:
        print(f"\n{title}: {stream.missing}")
        return
    changed_L, changed_TL = stream.levels.significant, stream.cells.significant
    tested = int(stream.used_T.sum()) * len(stream.blocks)
    print(
        f"\n{title}: {changed_L.sum():,} of {counted(len(stream.blocks), 'block')} changed, "
        f"{changed_TL.sum():,} of {counted(tested, 'cell')}"
    )
    rows: list[tuple[str, ...]] = [("#", "block", "A", "B", "change [95% interval]", "p", "cells changed at sigma")]
    for i, block in enumerate(stream.blocks):
        if changed_L[i] or changed_TL[:, i].any():
            change = change_text(stream.levels, i) if changed_L[i] else "no change over all sigmas"
            p = chance_text(stream.levels.p[i]) if changed_L[i] else ""
            where = sigma_text(changed_TL[:, i])
            number = str(found.blocks.index(block))
            rows.append((number, block, f"{stream.levels.a[i]:.4g}", f"{stream.levels.b[i]:.4g}", change, p, where))
    if len(rows) > 1:
        _print_table(rows)


def _print_factors(factors: FactorComparison) -> None:
    from simpletuner_layerprobe.analyse.compare import CHANGED, OPEN, SAME

    counts = {verdict: factors.verdict_L.count(verdict) for verdict in (CHANGED, SAME, OPEN)}
    said = ", ".join(f"{count:,} {verdict}" for verdict, count in counts.items())
    print(f"\nFactors (preset article): {said} of {counted(len(factors.blocks), 'block')}")
    rows: list[tuple[str, ...]] = [
        ("#", "block", "contribution A", "contribution B", "factor A", "factor B", "agreement", "")
    ]
    for i, block in enumerate(factors.blocks):
        if factors.verdict_L[i] == SAME or factors.a.factor_K[i] == factors.b.factor_K[i]:
            continue
        rows.append(
            (
                str(i),
                block,
                *(
                    f"{value_L[i]:.2f} [{sure.low_L[i]:.2f}, {sure.high_L[i]:.2f}]"
                    for value_L, sure in ((factors.values.a, factors.a), (factors.values.b, factors.b))
                ),
                str(factors.a.factor_K[i]),
                str(factors.b.factor_K[i]),
                f"{factors.a.agreement_K[i]:.0%}, {factors.b.agreement_K[i]:.0%}",
                factors.verdict_L[i],
            )
        )
    if len(rows) > 1:
        _print_table(rows)


def chance_text(p: float) -> str:
    return f"{p:.2g}" if p >= 1e-6 else "< 1e-6"


def _print_table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = (
            f"{text:>{width}}" if i == 0 else f"{text:<{width}}"
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        print(f"  {'  '.join(cells)}".rstrip())
