"""The `layerprobe` command: parse, call, print. Imports only the standard library until a command runs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress

from simpletuner_layerprobe import __version__
from simpletuner_layerprobe.commands import (
    adapter,
    check_config,
    classes,
    compare,
    doctor,
    export,
    findings,
    heatmap,
    import_file,
    lokr,
    merge,
    report,
    status,
    trial,
)
from simpletuner_layerprobe.commands.arguments import Parser
from simpletuner_layerprobe.errors import ProbeError

COMMANDS = (
    doctor,
    status,
    heatmap,
    findings,
    report,
    compare,
    lokr,
    trial,
    check_config,
    classes,
    adapter,
    import_file,
    export,
    merge,
)
PROBLEM, INTERRUPTED = 1, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit code; a usage error or --help raises SystemExit, as argparse does."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a path or a model name may not fit the terminal
    try:
        try:
            arguments = parser().parse_args(argv)
            arguments.own_process = argv is None  # nobody else's, such as a program that trains
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


def parser() -> argparse.ArgumentParser:
    """The command line, with a sub-command per module of `commands`."""
    made = Parser(
        prog="layerprobe",
        description="From a SimpleTuner probe run to heatmaps and a weighted LoKr config.",
        epilog="A RUN is what a probe run writes (<output_dir>/layerprobe), or a file of the article's records. "
        "Exit codes: 0 all went well, 1 a problem (said on stderr), 2 wrong usage, 130 interrupted.",
    )
    made.add_argument("--version", action="version", version=f"layerprobe {__version__}")
    commands = made.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Parser)

    def add(name: str, command: Callable[[argparse.Namespace], int], summary: str, more: str, example: str) -> Parser:
        added = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.\n\n{more}".strip(),
            epilog="example:\n" + "\n".join(f"  {line}" for line in example.splitlines()),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(command=command, wrong_usage=added.error)
        return added

    for module in COMMANDS:
        module.add_parser(add)
    return made


if __name__ == "__main__":
    sys.exit(main())
