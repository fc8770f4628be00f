"""What the arguments of the commands have in common: their types, and options that several commands take."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, Protocol

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
    ) -> argparse.ArgumentParser: ...


class Parser(argparse.ArgumentParser):
    """A parser whose usage errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"layerprobe: error: {printable(' '.join(message.split()))} (see {self.prog} --help)\n")


def add_run(added: argparse.ArgumentParser) -> None:
    added.add_argument("run", metavar="RUN", help="run folder, or a file of the article's records")


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


def add_tokens(added: argparse.ArgumentParser, use: str) -> None:
    added.add_argument(
        "--tokens",
        choices=("last", "mean"),
        help=f"the reading {use}: last token, as in the article, or mean over tokens; default last, if the run has it",
    )


def add_precision(added: argparse.ArgumentParser) -> None:
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
