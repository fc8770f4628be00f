"""The SimpleTuner options of this run as the user gave them, before defaults and SimpleTuner's own changes."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from simpletuner_layerprobe.errors import ConfigError

TRUE_WORDS = frozenset({"true", "1", "yes", "y", "on", "t"})
FALSE_WORDS = frozenset({"false", "0", "no", "n", "off", "f", ""})

_arguments: list[str] = []


def install(loader: Any) -> None:
    """Wrap the parser that `simpletuner.helpers.configuration.loader` calls for every configuration backend.

    SimpleTuner reads either a config file or the command line. The probe's own options count in both places, so
    that `simpletuner train env=NAME layerprobe=true` never trains by mistake: those on the command line are added to
    the file's. Their values are checked by ProbeSettings, not by the parser.
    """
    parse = loader.helpers["cmd"]

    def parse_with_probe_options(input_args: Any = None, exit_on_error: bool = False) -> Any:
        _arguments[:] = sys.argv[1:] if input_args is None else [*input_args, *probe_arguments(sys.argv[1:])]
        if input_args is not None:
            input_args = [_parsable(argument) for argument in _arguments]
        take_any_value(loader.cmd_args.get_argument_parser())
        return parse(input_args=input_args, exit_on_error=exit_on_error)

    loader.helpers["cmd"] = parse_with_probe_options


def take_any_value(parser: argparse.ArgumentParser) -> None:
    """Leave the check of the probe's own choices to ProbeSettings, which refuses a wrong one in one line."""
    for action in parser._actions:
        if action.dest.startswith("layerprobe"):
            action.choices = None


def probe_arguments(argv: list[str]) -> list[str]:
    """The `--layerprobe...` arguments in a command line, as `--name=value` or `--name`."""
    arguments = []
    for argument, following in zip(argv, [*argv[1:], "--"], strict=False):
        if not argument.startswith("--layerprobe"):
            continue
        if "=" in argument or following.startswith("--"):
            arguments.append(argument)
        else:
            arguments.append(f"{argument}={following}")
    return arguments


def _parsable(argument: str) -> str:
    """A wrong value of the flag itself becomes `true` for the parser; `check_flag` then refuses it in one line."""
    name, _, value = argument.partition("=")
    if name == "--layerprobe" and value.lower() not in TRUE_WORDS | FALSE_WORDS:
        return "--layerprobe=true"
    return argument


def given_options() -> dict[str, Any]:
    """The options as a flat mapping, ready to be a config.json: true/false and numbers as such, repeated options
    as lists, everything else as text."""
    options: dict[str, Any] = {}
    arguments = list(_arguments)
    while arguments:
        argument = arguments.pop(0)
        if not argument.startswith("--"):
            continue
        name, separator, text = argument[2:].partition("=")
        if not separator and arguments and not arguments[0].startswith("--"):
            text, separator = arguments.pop(0), "="
        value = _value(text) if separator else True
        if name not in options or name.startswith("layerprobe"):
            options[name] = value
        elif isinstance(options[name], list):
            options[name].append(value)
        else:
            options[name] = [options[name], value]
    return options


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            number = kind(text)
        except ValueError:
            continue
        if str(number) == text:
            return number
    return text


def check_flag() -> None:
    """Refuse a `layerprobe` value that is neither true nor false. Raises ConfigError."""
    value = given_options().get("layerprobe", False)
    if str(value).lower() not in TRUE_WORDS | FALSE_WORDS:
        raise ConfigError(f"layerprobe is {value!r}; it must be true or false")
