"""What the arguments of the commands have in common: their types, and options that several commands take."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Mapping
from typing import NoReturn, Protocol

from simpletuner_layerprobe.errors import ProbeError
from simpletuner_layerprobe.lokr.amounts import preset_parameters, whole_amount

USAGE = 2
MAX_BINS = 1000
MAX_FACTOR = 2**20
ARTICLE_WEIGHTING = {"clip_percentile": 90.0, "text_weight": 1 / 3, "image_weight": 2 / 3}
KNOWN_MODELS = "sd35-large, sd35-medium, flux-dev, or a diffusers transformer config.json"


class Add(Protocol):
    """Adds a command to the command line, and returns its parser for the arguments."""

    def __call__(
        self, name: str, command: Callable[[argparse.Namespace], int], summary: str, more: str, example: str
    ) -> argparse.ArgumentParser: ...


def add_run(added: argparse.ArgumentParser) -> None:
    added.add_argument("run", metavar="RUN", help="run folder")


def add_bins(added: argparse.ArgumentParser) -> None:
    added.add_argument(
        "--bins",
        type=whole(1, MAX_BINS),
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


def add_weighting(added: argparse.ArgumentParser) -> None:
    """The numbers of the article's recipe, from heatmaps to contributions."""
    added.add_argument(
        "--clip-percentile",
        type=number_like("a number above 0 and at most 100", lambda number: 0 < number <= 100),
        default=ARTICLE_WEIGHTING["clip_percentile"],
        metavar="P",
        help="clip each heatmap at this percentile of its cells; default 90",
    )
    weight = number_like("a number from 0 to 1000000, or a fraction such as 1/3", lambda number: 0 <= number <= 1e6)
    for stream, usual in (("text", "1/3"), ("image", "2/3")):
        added.add_argument(
            f"--{stream}-weight",
            type=weight,
            default=ARTICLE_WEIGHTING[f"{stream}_weight"],
            metavar="W",
            help=f"of the {stream} stream; default {usual}",
        )


def given_weighting(arguments: argparse.Namespace) -> dict[str, float]:
    """What differs from the article's."""
    return {name: vars(arguments)[name] for name, usual in ARTICLE_WEIGHTING.items() if vars(arguments)[name] != usual}


class Parser(argparse.ArgumentParser):
    """A parser whose usage errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"layerprobe: error: {' '.join(message.split())} (see {self.prog} --help)\n")


def whole(low: int, high: int) -> Callable[[str], int]:
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


def number_like(expected: str, allowed: Callable[[float], bool]) -> Callable[[str], float]:
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


def amount(expected: str, units: Mapping[str, int]) -> Callable[[str], int]:
    """A whole amount of 1 or more with a unit of `units` (keys in lower case): "400M". `expected` says so in words."""

    def parse(text: str) -> int:
        found = whole_amount(text, units)
        if not found:
            raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
        return found

    return parse


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
        found = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", part.strip(), re.ASCII)
        first = int(found[1]) if found else 1
        last = int(found[2] or first) if found else 0
        if first > last:
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of block numbers and ranges such as 0,3-5")
        numbers += range(first, last + 1)
    return tuple(sorted(set(numbers)))


def critical_blocks(text: str) -> str | tuple[int, ...]:
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
