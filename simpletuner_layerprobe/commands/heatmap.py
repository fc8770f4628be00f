"""`layerprobe heatmap`: the figures and the arrays."""

from __future__ import annotations

import argparse
import os

from simpletuner_layerprobe.commands.arguments import Add, add_bins, add_force, add_run, add_tokens, chosen_run
from simpletuner_layerprobe.commands.output import OK, sample_warnings, say, warn
from simpletuner_layerprobe.files import write_files
from simpletuner_layerprobe.targets import require_file, require_folder

ANGLE, PAIRS = "angle", "pairs"
ABLATIONS = ("ablation", "ablation_text", "ablation_change", "ablation_text_change")


def add_parser(add: Add) -> None:
    added = add(
        "heatmap",
        command,
        "draw the article's figures and write the heatmaps as arrays",
        "Figure 1: both streams, linear, log1p and clipped at the 95th percentile. Figure 2: their mean.\n"
        "Figure 3: the parameters and factors by the article's recipe, critical blocks as they are seen in the run.\n"
        "heatmap.npz: the arrays. Files of these names in DIR that layerprobe made are replaced.\n"
        "With --reading, one figure and one .npz of that reading, if the run was recorded with it.",
        "layerprobe heatmap output/sd35-probe/layerprobe --out figures",
    )
    add_run(added)
    added.add_argument("--out", required=True, metavar="DIR", help="folder for the files; made if need be")
    add_force(added)
    add_bins(added)
    add_tokens(added, "to draw")
    added.add_argument(
        "--reading",
        choices=(ANGLE, "update_norm", "update_cosine", PAIRS, *ABLATIONS),
        default=ANGLE,
        help="what to draw: the angular distance (default), what each block adds (layerprobe_residual) as its relative "
        "norm or its cosine, distances over several blocks in a row (layerprobe_block_pairs), or how much the loss "
        "rises or the prediction changes with the block or its text update left out (layerprobe_ablation)",
    )
    added.add_argument("--format", choices=("png", "svg"), default="png", help="default png")


def command(arguments: argparse.Namespace) -> int:
    from simpletuner_layerprobe.api import load
    from simpletuner_layerprobe.api.pages import figure_names, figures, reading_figure

    folder = require_folder(arguments.out)
    for name in figure_names("" if arguments.reading == ANGLE else arguments.reading, arguments.format):
        require_file(folder / name, force=arguments.force)
    run, look = load(chosen_run(arguments)), {"bins": arguments.bins, "file_format": arguments.format}
    reading, problem = arguments.tokens or run.reading, ""
    if arguments.reading == ANGLE:
        files, problem = figures(run, reading, **look)
    else:
        reading = arguments.reading if arguments.reading in ABLATIONS else f"{arguments.reading}_{reading}"
        files = reading_figure(run, reading, **look)
    write_files({folder / name: data for name, data in files.items()}, force=arguments.force)
    arguments.written = [folder / name for name in files]
    warnings = [] if arguments.reading == PAIRS else [*sample_warnings(run, reading, arguments.bins)]
    warn(*warnings, *([f"not every figure can be drawn: {problem}"] if problem else []))
    for name in files:
        say(os.path.join(arguments.out, name))
    return OK
