"""What the arguments of the commands have in common: their types, and options that several commands take."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, Protocol

from simpletuner_layerprobe.commands.output import say
from simpletuner_layerprobe.errors import ProbeError
from simpletuner_layerprobe.lokr.amounts import amount, preset_parameters
from simpletuner_layerprobe.printable import printable

USAGE = 2
MAX_BINS = 1000
KNOWN_MODELS = (
    "a name such as sd35-large, flux-dev or wan21-14b (docs/models.md has all), the config.json of a diffusers "
    "transformer or unet, or a pipeline's folder; FAMILY:PATH where several of SimpleTuner's families fit"
)


class Add(Protocol):
    """Adds a command to the command line, and returns its parser for the arguments."""

    def __call__(
        self, name: str, command: Callable[[argparse.Namespace], int], summary: str, more: str, example: str
    ) -> Parser: ...


class Parser(argparse.ArgumentParser):
    """A parser whose usage errors are one line, and whose --help shows the common options; --help-all shows all."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._rest: list[argparse._ArgumentGroup] = []

    def add_rest(self, title: str) -> argparse._ArgumentGroup:
        """A group of options that --help only names."""
        if not self._rest:
            self.add_argument("--help-all", action=_HelpAll, nargs=0, help="show all options and exit")
        self._rest.append(self.add_argument_group(title))
        return self._rest[-1]

    def format_help(self) -> str:
        helps = [(action, action.help) for group in self._rest for action in group._group_actions]
        for group in self._rest:
            group.description = ", ".join(action.option_strings[0] for action in group._group_actions)
        for action, _ in helps:
            action.help = argparse.SUPPRESS
        shown = super().format_help()
        for action, text in helps:
            action.help = text
        for group in self._rest:
            group.description = None
        return shown

    def print_all(self) -> None:
        """Print the help with every option."""
        sys.stdout.write(super().format_help())

    def error(self, message: str) -> NoReturn:
        choice = re.fullmatch(r"(.*invalid choice: '(.*)') \(choose from (.*)\)", message)
        near = difflib.get_close_matches(choice[2], re.findall(r"[\w.:-]+", choice[3]), n=1) if choice else []
        if choice and near:
            message = f"{choice[1]}; did you mean {near[0]}?"
        self.exit(USAGE, f"layerprobe: error: {printable(' '.join(message.split()))} (see {self.prog} --help)\n")


class _HelpAll(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        assert isinstance(parser, Parser)
        parser.print_all()
        parser.exit()


def add_run(added: argparse.ArgumentParser) -> None:
    added.add_argument(
        "run",
        metavar="RUN",
        nargs="?",
        help="run folder or the output_dir that it lies in, or a file of the article's records; default the newest run "
        "below the current folder",
    )


def chosen_run(arguments: argparse.Namespace) -> str:
    """The RUN that was given, else the newest below the current folder, which is said in a line of its own."""
    if arguments.run is not None:
        run: str = arguments.run
        return run
    from simpletuner_layerprobe.api.records import runs_below

    runs = runs_below(".")
    if not runs:
        or_model = ", or --model for a plan without a run" if "model" in arguments else ""
        arguments.wrong_usage(f"give RUN{or_model}: there is no run below the current folder")
    (time, newest), *others = runs
    if others and others[0][0] == time:
        arguments.wrong_usage(f"give RUN: {newest} and {others[0][1]} below the current folder are of the same time")
    if not getattr(arguments, "json", False):
        say(f"newest run  {newest}" + (f", of {len(runs):,} below this folder" if others else ""))
    return str(newest)


def add_wide(added: argparse._ActionsContainer) -> None:
    added.add_argument(
        "--wide", action="store_true", help="print every column, however wide the terminal (or COLUMNS) is"
    )


def add_force(added: argparse.ArgumentParser, what: str = "a file") -> None:
    """For every command that writes files; what: that it may find in its way."""
    added.add_argument(
        "--force", action="store_true", help=f"overwrite {what} that exists and does not say that layerprobe made it"
    )


def add_bins(added: argparse.ArgumentParser) -> None:
    added.add_argument(
        "--bins",
        type=within(int, 1, MAX_BINS),
        default=10,
        metavar="N",
        help="sigma bins of equal width over 0 (clean) .. 1 (noise); default 10",
    )


def add_tokens(added: argparse._ActionsContainer, use: str) -> None:
    added.add_argument(
        "--tokens",
        choices=("last", "mean"),
        help=f"the reading {use}: last token, as in the article, or mean over tokens; default last, if the run has it",
    )


def add_precision(added: argparse._ActionsContainer) -> None:
    added.add_argument(
        "--precision",
        metavar="P",
        help="with --model: SimpleTuner's base_model_precision, such as int8-quanto; it replaces layers, and a config "
        "that goes by their classes reaches others",
    )


def add_preset(added: argparse.ArgumentParser) -> None:
    added.add_argument(
        "--preset",
        type=preset,
        metavar="P",
        help="what the factors are judged for: article, or a plan for a number of parameters such as 400M or a size in "
        "bf16 such as 800MB; default the run's own layerprobe_preset, else article",
    )


def within[N: (int, float)](convert: type[N], low: N, high: N) -> Callable[[str], N]:
    """A number in [low, high]; of int a whole one."""
    kind = "whole number" if convert is int else "number"

    def parse(text: str) -> N:
        try:
            value = convert(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a {kind} from {low} to {high}")
        return value

    return parse


def budget(text: str) -> int | str:
    """A number of parameters, also by their size in bf16, or the path of a file."""
    parameters = amount(text)
    if not parameters and not Path(text).is_file():
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a number of parameters such as 400M, nor a size such as 800MB, nor a file"
        )
    return parameters or text


def amount_of_parameters(text: str) -> int:
    """A number of parameters, also by their size in bf16."""
    parameters = amount(text)
    if not parameters:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a number of parameters such as 400M, nor a size such as 800MB"
        )
    return parameters


def preset(text: str) -> str:
    """ "article", or an amount of parameters or bytes."""
    try:
        preset_parameters(text)
    except ProbeError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def block_numbers(text: str) -> tuple[int, ...]:
    """Block numbers and ranges of them: "0,3-5"."""
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", part.strip(), re.ASCII)
        first = int(match[1]) if match else 1
        last = int(match[2] or first) if match else 0
        if first > last:
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of block numbers and ranges such as 0,3-5")
        numbers += range(first, last + 1)
    return tuple(sorted(set(numbers)))


def frozen_blocks(text: str) -> tuple[tuple[int, ...], int]:
    """What --freeze takes, "0-3,least:2": the numbers, and N of "least:N", 0 without."""
    parts = [part.strip() for part in text.split(",")]
    counts = [part.removeprefix("least:") for part in parts if part.startswith("least")]
    if len(counts) > 1 or not all(re.fullmatch(r"[1-9]\d{0,5}", count, re.ASCII) for count in counts):
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected least:N once, with a whole number from 1, such as least:6"
        )
    numbers = [part for part in parts if not part.startswith("least")]
    return block_numbers(",".join(numbers)) if numbers else (), int(counts[0]) if counts else 0


def critical_blocks(text: str) -> str | tuple[int, ...]:
    """ "auto", or block numbers; "none" is no number."""
    if text in ("auto", "none"):
        return text if text == "auto" else ()
    return block_numbers(text)
