"""The `layerprobe` command: parse, call, print. Imports only the standard library until a command runs."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from simpletuner_layerprobe import ProbeError, __version__

if TYPE_CHECKING:
    from simpletuner_layerprobe.analyse.contribution import Contribution
    from simpletuner_layerprobe.analyse.heatmap import Heatmap
    from simpletuner_layerprobe.lokr.verify import Check
    from simpletuner_layerprobe.run.manifest import Manifest

OK, PROBLEM, USAGE, INTERRUPTED = 0, 1, 2, 130
MAX_BINS = 1000
MAX_FACTOR = 2**20
HISTOGRAM_WIDTH = 40


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit code; a usage error or --help raises SystemExit, as argparse does."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a path or a model name may not fit the terminal
    try:
        try:
            arguments = _parser().parse_args(argv)
            code: int = arguments.command(arguments)
            return code
        finally:
            sys.stdout.flush()
    except ProbeError as error:
        message = str(error)
    except BrokenPipeError:
        _drop_stdout()  # whoever read our output has gone: nobody to tell
        return PROBLEM
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)
    except KeyboardInterrupt:
        print("layerprobe: interrupted", file=sys.stderr)
        return INTERRUPTED
    print(f"layerprobe: error: {' '.join(message.split())}", file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:
        _drop_stdout()
    return PROBLEM


def _drop_stdout() -> None:
    """Send what stdout still holds nowhere, so that the interpreter's last flush does not complain."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch, diffusers and LyCORIS from warning about themselves while they are imported and used."""
    import logging
    import warnings

    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _warn(message: str) -> None:
    print(f"layerprobe: warning: {message}", file=sys.stderr)


# The commands


def _doctor(arguments: argparse.Namespace) -> int:
    from simpletuner_layerprobe.record import doctor

    found = doctor.checks()
    width = max((len(check.name) for check in found), default=0)
    for check in found:
        print(f"{'ok' if check.ok else 'MISSING':<9}{check.name:<{width}}  {check.detail}")
        if not check.ok:
            print(f"{'':<9}{'':<{width}}  -> {check.remedy}")
    missing = sum(not check.ok for check in found)
    if missing:
        raise ProbeError(f"{missing} of {len(found)} checks failed; what to do stands beside each (->)")
    return OK


def _status(arguments: argparse.Namespace) -> int:
    from simpletuner_layerprobe.analyse.heatmap import all_blocks
    from simpletuner_layerprobe.analyse.summary import summary
    from simpletuner_layerprobe.run.shards import open_run

    run = open_run(arguments.run)
    manifest = run.manifest
    counts = summary(run, bins=arguments.bins)
    blocks = all_blocks([stream.blocks for stream in manifest.streams])
    total = sum(counts.samples.values())
    ranks = ", ".join(f"rank {rank}: {count:,}" for rank, count in counts.samples.items())
    nonfinite = ", ".join(f"{stream} {reading}: {count:,}" for (stream, reading), count in counts.nonfinite.items())
    versions = ", ".join(f"{package} {version}" for package, version in sorted(manifest.versions.items()))
    backends = ", ".join(f"{name or 'unknown'}: {count:,}" for name, count in counts.backends.items())
    facts = {
        "run": str(run.path),
        "model": f"{_model_name(manifest) or 'unknown'}, {_counted(len(blocks), 'block')}",
        "recorded": f"{manifest.created or 'unknown'} ({manifest.source})",
        "versions": versions or "unknown",
        "samples": f"{total:,} ({ranks})",
        "streams": ", ".join(f"{stream.name} {_counted(len(stream.blocks), 'block')}" for stream in manifest.streams),
        "readings": ", ".join(manifest.tokens),
        "modules": f"{len(manifest.modules):,} in the module table" if manifest.modules else "no module table",
        "backends": backends,
        "non-finite": nonfinite or "none",
        "size": f"{_size(run.size_bytes())} in {_counted(len(run.shards), 'shard')}",
    }
    for name, value in facts.items():
        print(f"{name:<12}{value}")
    print(f"{'sigma':<12}samples per bin, 0 clean .. 1 noise")
    largest = int(counts.count_T.max())
    for label, count in zip(_bin_labels(arguments.bins), counts.count_T.tolist(), strict=True):
        bar = "#" * math.ceil(HISTOGRAM_WIDTH * count / largest)
        print(f"  {label:<14}{count:>12,}  {bar or '(none)'}")
    return OK


def _heatmap(arguments: argparse.Namespace) -> int:
    from simpletuner_layerprobe.analyse.contribution import article_contributions
    from simpletuner_layerprobe.analyse.heatmap import combined, heatmaps
    from simpletuner_layerprobe.lokr.factors import article_factors
    from simpletuner_layerprobe.report import figures
    from simpletuner_layerprobe.run.shards import open_run

    run = open_run(arguments.run)
    streams = heatmaps(run, tokens=arguments.tokens, bins=arguments.bins)
    look: dict[str, Any] = {"model": _model_name(run.manifest), "file_format": arguments.format}
    suffix = "." + arguments.format
    arrays = dict(streams)
    files: dict[str, bytes] = {f"figure1_streams{suffix}": figures.streams_figure(streams, **look)}
    warnings = _sample_warnings(streams)
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
    _replace_files(Path(arguments.out), files)
    for message in warnings:
        _warn(message)
    for name in files:
        print(os.path.join(arguments.out, name))
    return OK


def _lokr(arguments: argparse.Namespace) -> int:
    from simpletuner_layerprobe import families
    from simpletuner_layerprobe.analyse.contribution import article_contributions
    from simpletuner_layerprobe.analyse.heatmap import heatmaps
    from simpletuner_layerprobe.lokr import config as lokr_config
    from simpletuner_layerprobe.lokr.factors import article_factors
    from simpletuner_layerprobe.run.shards import open_run

    run = open_run(arguments.run)
    manifest = run.manifest
    if not manifest.modules and not arguments.unverified:
        raise ProbeError(
            f"{run.path} has no module table (imported without --model), so the config cannot be proved; "
            "import it again with --model, or add --unverified"
        )
    streams = heatmaps(run, tokens=arguments.tokens, bins=arguments.bins)
    contribution = article_contributions(
        streams,
        clip_percentile=arguments.clip_percentile,
        text_weight=arguments.text_weight,
        image_weight=arguments.image_weight,
    )
    critical = contribution.critical_union() if arguments.critical == "auto" else arguments.critical
    factors = article_factors(contribution.value_L, max_factor=arguments.max_factor, critical=critical)
    # Without a module table and a family the records are taken for the article's model.
    targets = families.family(manifest.family if manifest.modules else manifest.family or "sd3").targets
    config = lokr_config.article_config(contribution.blocks, factors.tolist(), targets)
    # Before the proof, which takes seconds.
    if arguments.env is not None:
        options = lokr_config.read_options(arguments.run)
        lokr_config.plan_environment(arguments.env, options, config_dir=arguments.config_dir, force=arguments.force)
    elif arguments.out is not None:
        lokr_config.require_free([arguments.out], force=arguments.force)
    check = None
    if manifest.modules:
        from simpletuner_layerprobe.lokr.verify import verify

        plan = lokr_config.article_plan(contribution.blocks, factors.tolist(), targets, manifest.modules)
        with _quiet():
            check = verify(config, plan, manifest.modules, model_class=manifest.model_class)
        check.require()
    written, following = _write_lokr(arguments, config)
    for message in _sample_warnings(streams):
        _warn(message)
    _print_factors(contribution, factors.tolist(), critical, arguments.critical == "auto", check)
    if check is None:
        guess = "" if manifest.family else "; names are those of SD3"
        print(f"NOT verified: the run has no module table, LyCORIS may apply another factor{guess}")
    else:
        print(f"verified: LyCORIS {check.lycoris} gives all {len(check.rows):,} modules the factor meant")
    for path in written:
        print(f"written: {path}")
    print(following)
    return OK


def _write_lokr(arguments: argparse.Namespace, config: Mapping[str, Any]) -> tuple[list[str], str]:
    """Write what --out or --env ask for. Returns the paths written and the line that says what comes next."""
    from simpletuner_layerprobe.lokr import config as lokr_config

    if arguments.env is not None:
        made = lokr_config.environment(
            arguments.env,
            lokr_config.read_options(arguments.run),
            config,
            config_dir=arguments.config_dir,
            force=arguments.force,
        )
        return [str(made.options), str(made.lycoris_config)], f"next: simpletuner train env={made.name}"
    if arguments.out is not None:
        lokr_config.write_config(arguments.out, config, force=arguments.force)
        return [arguments.out], (
            f'next: set "lycoris_config": "{arguments.out}", "lora_type": "lycoris" and "model_type": "lora" '
            "in your SimpleTuner config, then simpletuner train"
        )
    return (
        [],
        "nothing written: add --env NAME for a SimpleTuner environment, or --out FILE for the config alone",
    )


def _print_factors(
    contribution: Contribution,
    factors: Sequence[int],
    critical: Sequence[int],
    found: bool,
    check: Check | None,
) -> None:
    """The table of blocks. `found`: the critical blocks were found in the run, so their streams are known."""
    width = max(len("block"), *(len(block) for block in contribution.blocks))
    print(f"{'':>4}  {'block':<{width}}  {'contribution':>12}  {'factor':>6}  {'parameters':>14}")
    for number, block in enumerate(contribution.blocks):
        notes = []
        if number in critical:
            where = [name for name, numbers in contribution.critical.items() if number in numbers]
            notes.append(f"critical ({', '.join(where)})" if found else "critical")
        if not contribution.covered_L[number]:
            notes.append("contribution of the nearest block")
        parameters = f"{check.block_parameters(block):,}" if check else "unknown"
        line = f"{number:>4}  {block:<{width}}  {contribution.value_L[number]:>12.4f}  {factors[number]:>6}"
        print(f"{line}  {parameters:>14}  {', '.join(notes)}".rstrip())
    if check:
        size = _size(2 * check.parameters)
        print(f"{'':>4}  {'total':<{width}}  {'':>12}  {'':>6}  {check.parameters:>14,}  {size} in bf16")
    print("feed-forward and modulation get the factor, attention twice the factor")


def _check_config(arguments: argparse.Namespace) -> int:
    from simpletuner_layerprobe.lokr.config import read_config
    from simpletuner_layerprobe.lokr.verify import check_config
    from simpletuner_layerprobe.run.manifest import read_manifest

    config = read_config(arguments.config)
    if arguments.run is not None:
        manifest = read_manifest(arguments.run)
        modules, model_class = manifest.modules, manifest.model_class
        if not modules:
            raise ProbeError(
                f"{arguments.run} has no module table (imported without --model); name the model with --model"
            )
    else:
        from simpletuner_layerprobe.lokr.zoo import architecture

        with _quiet():
            model = architecture(arguments.model)
        modules, model_class = model.modules, model.model_class
    with _quiet():
        check = check_config(config, modules, model_class=model_class, where=arguments.config)
    for row in check.rows:
        if not row.ok:
            print(f"WRONG  {row}")
        elif not arguments.differences:
            print(f"ok     {row.name}: {row.got}")
    for pattern in check.unmatched:
        print(f"note   nothing in the model matches {pattern}")
    for note in check.notes:
        print(f"note   {note}")
    if not check.rows:
        raise ProbeError(f"{arguments.config} gives no module of this model an adapter")
    print(
        f"LyCORIS {check.lycoris}: {len(check.wrong):,} of {len(check.rows):,} modules wrong, "
        f"{check.parameters:,} trainable parameters, {check.intended_parameters:,} meant"
    )
    check.require()
    return OK


def _import(arguments: argparse.Namespace) -> int:
    from simpletuner_layerprobe.run.jsonl import import_jsonl

    known: dict[str, Any] = {}
    if arguments.model is not None:
        from simpletuner_layerprobe.lokr.zoo import architecture

        with _quiet():
            model = architecture(arguments.model)
        if not model.streams:
            raise ProbeError(f"{arguments.model} is a {model.model_class}; the layer probe does not know its blocks")
        known = {
            "modules": model.modules,
            "family": model.family,
            "flavour": model.flavour,
            "model_class": model.model_class,
            "block_paths": {stream.name: stream.blocks for stream in model.streams},
        }
    run = import_jsonl(arguments.file, arguments.run, tokens=arguments.tokens, **known)
    print(f"{run.sample_count():,} samples imported into {arguments.run}")
    return OK


def _export(arguments: argparse.Namespace) -> int:
    from simpletuner_layerprobe.run.jsonl import export_jsonl
    from simpletuner_layerprobe.run.shards import open_run

    written, skipped = export_jsonl(open_run(arguments.run), arguments.file, tokens=arguments.tokens)
    if skipped:
        _warn(f"{skipped:,} samples left out: a record cannot hold distances that are not finite")
    print(f"{written:,} samples written to {arguments.file}")
    return OK


# What the commands share


def _model_name(manifest: Manifest) -> str:
    name = " ".join(part for part in (manifest.family, manifest.flavour) if part)
    return name or manifest.model_class


def _counted(count: int, noun: str) -> str:
    """ "1 block", "1,455 blocks"."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def _bin_labels(bins: int) -> list[str]:
    """The sigma range of each bin, in order: "0.1 - 0.2"."""
    edges = [f"{edge / bins:.3g}" for edge in range(bins + 1)]
    return [f"{low} - {high}" for low, high in pairwise(edges)]


def _sample_warnings(streams: Mapping[str, Heatmap]) -> list[str]:
    """One line per stream for bins without samples, and for samples that were left out."""
    warnings = []
    for name, heatmap in streams.items():
        empty = heatmap.empty_bins()
        if empty:
            labels = _bin_labels(heatmap.bins)
            shown = ", ".join(labels[t] for t in empty[:5]) + (", ..." if len(empty) > 5 else "")
            warnings.append(
                f"{len(empty)} of {heatmap.bins} sigma bins have no samples in the {name} stream ({shown}); "
                "they count as 0, as in the article: record more samples or use fewer --bins"
            )
        if heatmap.nonfinite:
            warnings.append(f"{heatmap.nonfinite:,} samples are left out of the {name} stream: distances not finite")
    return warnings


def _size(size_bytes: int) -> str:
    """A size in decimal units, as disks and model pages give it: "1.53 GB"."""
    size = float(size_bytes)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def _replace_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files into a folder, made if need be; files of the same name are replaced, each one as a whole.

    Nothing is replaced before all of them are on the disk under temporary names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    temporary = {name: folder / f".layerprobe-{os.getpid()}-{name}.tmp" for name in files}
    try:
        for name, data in files.items():
            with open(temporary[name], "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for name in files:
            os.replace(temporary[name], folder / name)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


# The command line


class _Parser(argparse.ArgumentParser):
    """A parser whose usage errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"layerprobe: error: {' '.join(message.split())} (see {self.prog} --help)\n")


def _whole(low: int, high: int) -> Callable[[str], int]:
    """A whole number in [low, high]."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = low - 1
        if not low <= number <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")
        return number

    return parse


def _number(expected: str, allowed: Callable[[float], bool]) -> Callable[[str], float]:
    """A number or a fraction such as 1/3 for which `allowed` is true; `expected` says so in words."""

    def parse(text: str) -> float:
        try:
            numerator, _, denominator = text.partition("/")
            number = float(numerator) / float(denominator) if denominator else float(text)
        except (ValueError, ZeroDivisionError):
            number = math.nan
        if not allowed(number):
            raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
        return number

    return parse


def _critical(text: str) -> str | tuple[int, ...]:
    """ "auto", or block numbers; "none" is no number."""
    if text == "auto":
        return text
    if text == "none":
        return ()
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = (-1,)
    if min(numbers) < 0:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither auto nor none nor a list of block numbers such as 0,31,35"
        )
    return numbers


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="layerprobe",
        description="From a SimpleTuner probe run to heatmaps and a weighted LoKr config.",
        epilog="A run folder is what a probe run writes (<output_dir>/layerprobe). "
        "Exit codes: 0 all went well, 1 a problem (said on stderr), 2 wrong usage.",
    )
    parser.add_argument("--version", action="version", version=f"layerprobe {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(
        name: str, command: Callable[[argparse.Namespace], int], summary: str, more: str, example: str
    ) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.\n\n{more}".strip(),
            epilog="example:\n" + "\n".join(f"  {line}" for line in example.splitlines()),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(command=command)
        return added

    def add_run(added: argparse.ArgumentParser) -> None:
        added.add_argument("run", metavar="RUN", help="run folder")

    def add_bins(added: argparse.ArgumentParser) -> None:
        added.add_argument(
            "--bins",
            type=_whole(1, MAX_BINS),
            default=10,
            metavar="N",
            help="sigma bins of equal width over 0 (clean) .. 1 (noise); default 10",
        )

    def add_tokens(added: argparse.ArgumentParser, use: str) -> None:
        added.add_argument(
            "--tokens",
            choices=("last", "mean"),
            default="last",
            help=f"the reading {use}: last token, as in the article, or mean over tokens; default last",
        )

    add(
        "doctor",
        _doctor,
        "say whether the probe is active and every part of SimpleTuner it needs is there",
        "Exits with 1, and says what to do, if something is missing.",
        "layerprobe doctor",
    )

    added = add(
        "status",
        _status,
        "print what a run folder holds",
        "",
        "layerprobe status output/sd35-probe/layerprobe",
    )
    add_run(added)
    add_bins(added)

    added = add(
        "heatmap",
        _heatmap,
        "draw the article's figures and write the heatmaps as arrays",
        "Figure 1: both streams, linear, log1p and clipped at the 95th percentile. Figure 2: their mean.\n"
        "Figure 3: the factors of the article's recipe, critical blocks found in the run.\n"
        "heatmap.npz: the arrays. Files of the same names in DIR are replaced.",
        "layerprobe heatmap output/sd35-probe/layerprobe --out figures",
    )
    add_run(added)
    added.add_argument("--out", required=True, metavar="DIR", help="folder for the files; made if need be")
    add_bins(added)
    add_tokens(added, "to draw")
    added.add_argument("--format", choices=("png", "svg"), default="png", help="default png")

    added = add(
        "lokr",
        _lokr,
        "turn a run into a weighted LoKr config and prove it before it is written",
        "The config is built with LyCORIS on a skeleton of the model, without weights; a module that\n"
        "would get another factor than meant is an error, and nothing is written. Without --out and\n"
        "--env only the table is printed.",
        "layerprobe lokr output/sd35-probe/layerprobe --env sd35-weighted\n"
        "layerprobe lokr output/sd35-probe/layerprobe --critical 0,31,35 --out lycoris_config.json",
    )
    add_run(added)
    added.add_argument("--preset", choices=("article",), default="article", help="the recipe; default article")
    target = added.add_mutually_exclusive_group()
    target.add_argument("--out", metavar="FILE", help="write the LyCORIS config to this file")
    target.add_argument(
        "--env",
        metavar="NAME",
        help="write the SimpleTuner environment NAME: its config.json, from the probe run's own, and its "
        "lycoris_config.json",
    )
    added.add_argument("--config-dir", default="config", metavar="DIR", help="where environments are; default config")
    add_bins(added)
    added.add_argument(
        "--clip-percentile",
        type=_number("a number above 0 and at most 100", lambda number: 0 < number <= 100),
        default=90.0,
        metavar="P",
        help="clip each heatmap at this percentile of its cells; default 90",
    )
    weight = _number("a number from 0 to 1000000, or a fraction such as 1/3", lambda number: 0 <= number <= 1e6)
    added.add_argument("--text-weight", type=weight, default=1 / 3, metavar="W", help="of the text stream; default 1/3")
    added.add_argument(
        "--image-weight", type=weight, default=2 / 3, metavar="W", help="of the image stream; default 2/3"
    )
    added.add_argument(
        "--max-factor",
        type=_whole(1, MAX_FACTOR),
        default=12,
        metavar="F",
        help="factor of the block that contributes least; default 12",
    )
    added.add_argument(
        "--critical",
        type=_critical,
        default="auto",
        metavar="BLOCKS",
        help="blocks that get factor 1: auto (those beyond Tukey's far-out fence in a stream), none, or "
        "numbers such as 0,31,35; default auto",
    )
    add_tokens(added, "to use")
    added.add_argument("--force", action="store_true", help="overwrite files that exist")
    added.add_argument(
        "--unverified",
        action="store_true",
        help="write a config without proof if the run has no module table (imported without --model)",
    )

    added = add(
        "check-config",
        _check_config,
        "show what each module was meant to get from a LyCORIS config and what it gets",
        "Exits with 1 if a module gets something else.",
        "layerprobe check-config lycoris_config.json --model sd35-large --differences",
    )
    added.add_argument("config", metavar="LYCORIS_CONFIG", help="the LyCORIS config, a JSON file")
    source = added.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", metavar="RUN", help="the model is the one of this run folder")
    source.add_argument(
        "--model",
        metavar="MODEL",
        help="sd35-large, sd35-medium, flux-dev, or a diffusers transformer config.json",
    )
    added.add_argument("--differences", action="store_true", help="list only the modules that differ")

    added = add(
        "import",
        _import,
        "make a run folder from a file of the article's records",
        "One JSON object per line:\n"
        '  {"timestep": sigma, "encoder_hidden_states": [...], "hidden_states": [...]}\n'
        "Plain, gzip or bz2. All of it is imported, or nothing.",
        "layerprobe import sd3_hidden_state_similarity.jsonl.gz runs/article --model sd35-large",
    )
    added.add_argument("file", metavar="FILE", help="file of records")
    added.add_argument("run", metavar="RUN", help="run folder to make")
    added.add_argument(
        "--model",
        metavar="MODEL",
        help="the model recorded: sd35-large, sd35-medium, flux-dev, or a diffusers transformer config.json; "
        "without it lokr cannot prove a config",
    )
    add_tokens(added, "that the records hold")

    added = add(
        "export",
        _export,
        "write a run as a file of the article's records",
        "A name that ends in .gz or .bz2 is compressed. A file that exists is not overwritten.",
        "layerprobe export output/sd35-probe/layerprobe records.jsonl.gz",
    )
    add_run(added)
    added.add_argument("file", metavar="FILE", help="file to write")
    add_tokens(added, "to write")
    return parser


if __name__ == "__main__":
    sys.exit(main())
