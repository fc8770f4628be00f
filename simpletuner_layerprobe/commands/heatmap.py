"""`layerprobe heatmap`: the figures and the arrays."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simpletuner_layerprobe.commands.arguments import Add, add_bins, add_run, add_tokens
from simpletuner_layerprobe.commands.output import OK, model_name, replace_files, sample_warnings, warn
from simpletuner_layerprobe.errors import ProbeError
from simpletuner_layerprobe.readings import UPDATE_COSINE, UPDATE_NORM

if TYPE_CHECKING:
    from simpletuner_layerprobe.run.records import Run

PAIRS = "pairs"


def add_parser(add: Add) -> None:
    added = add(
        "heatmap",
        command,
        "draw the article's figures and write the heatmaps as arrays",
        "Figure 1: both streams, linear, log1p and clipped at the 95th percentile. Figure 2: their mean.\n"
        "Figure 3: the factors of the article's recipe, critical blocks found in the run.\n"
        "heatmap.npz: the arrays. Files of the same names in DIR are replaced.\n"
        "With --reading, one figure and one .npz of that reading, if the run was recorded with it.",
        "layerprobe heatmap output/sd35-probe/layerprobe --out figures",
    )
    add_run(added)
    added.add_argument("--out", required=True, metavar="DIR", help="folder for the files; made if need be")
    add_bins(added)
    add_tokens(added, "to draw")
    added.add_argument(
        "--reading",
        choices=("angle", UPDATE_NORM, UPDATE_COSINE, PAIRS),
        default="angle",
        help="what to draw: the angular distance (default), what each block adds (layerprobe_residual) as its relative "
        "norm or its cosine, or distances over several blocks in a row (layerprobe_block_pairs)",
    )
    added.add_argument("--format", choices=("png", "svg"), default="png", help="default png")


def command(arguments: argparse.Namespace) -> int:
    from simpletuner_layerprobe.analyse.contribution import article_contributions
    from simpletuner_layerprobe.analyse.heatmap import combined, heatmaps
    from simpletuner_layerprobe.lokr.factors import article_factors
    from simpletuner_layerprobe.run.records import open_run
    from simpletuner_layerprobe.show import figures

    run = open_run(arguments.run)
    if arguments.reading != "angle":
        return _draw_reading(run, arguments)
    streams = heatmaps(run, tokens=arguments.tokens, bins=arguments.bins)
    look: dict[str, Any] = {"model": model_name(run.manifest), "file_format": arguments.format}
    suffix = "." + arguments.format
    arrays = dict(streams)
    files: dict[str, bytes] = {f"figure1_streams{suffix}": figures.streams_figure(streams, **look)}
    warnings = sample_warnings(streams)
    try:
        if len(streams) > 1:
            arrays["combined"] = combined(streams)
            files[f"figure2_combined{suffix}"] = figures.combination_figure(arrays["combined"], **look)
        contribution = article_contributions(streams)
        critical = contribution.critical_union()
        files[f"figure3_factors{suffix}"] = figures.factor_figure(
            contribution.blocks,
            article_factors(contribution.value_L, critical=critical).tolist(),
            critical=critical,
            repeated=[i for i, covered in enumerate(contribution.covered_L) if not covered],
            **look,
        )
    except ProbeError as error:
        warnings.append(f"not every figure can be drawn: {error}")
    files["heatmap.npz"] = figures.heatmap_npz(arrays)
    return _written(arguments, files, warnings)


def _draw_reading(run: Run, arguments: argparse.Namespace) -> int:
    """The figure and the arrays of a further reading."""
    from simpletuner_layerprobe.analyse.heatmap import heatmaps, pair_heatmaps
    from simpletuner_layerprobe.show import figures

    reading, tokens = arguments.reading, arguments.tokens
    look: dict[str, Any] = {"model": model_name(run.manifest), "file_format": arguments.format}
    warnings: list[str] = []
    if reading == PAIRS:
        pairs = pair_heatmaps(run, tokens=tokens, bins=arguments.bins)
        figure, arrays = figures.pairs_figure(pairs, **look), figures.pairs_npz(pairs)
    else:
        if f"{reading}_{tokens}" not in run.manifest.extra:
            raise ProbeError(
                f"{run.path} has no reading {reading!r} ({tokens} tokens); a probe run records it with "
                f"layerprobe_residual"
            )
        streams = heatmaps(run, tokens=f"{reading}_{tokens}", bins=arguments.bins)
        figure, arrays = figures.reading_figure(streams, **look), figures.heatmap_npz(streams)
        warnings = sample_warnings(streams)
    return _written(arguments, {f"{reading}.{arguments.format}": figure, f"{reading}.npz": arrays}, warnings)


def _written(arguments: argparse.Namespace, files: dict[str, bytes], warnings: list[str]) -> int:
    replace_files(Path(arguments.out), files)
    for message in warnings:
        warn(message)
    for name in files:
        print(os.path.join(arguments.out, name))
    return OK
