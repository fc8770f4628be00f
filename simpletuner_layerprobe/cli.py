"""The `layerprobe` command: parse, call, print. Imports next to nothing until `main` can answer for a Ctrl-C."""

from __future__ import annotations

import os
import sys
from contextlib import suppress

from simpletuner_layerprobe.errors import ProbeError
from simpletuner_layerprobe.printable import printable

TYPE_CHECKING = False  # typing has it too, but takes time in which a Ctrl-C would be a traceback

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

PROBLEM, INTERRUPTED = 1, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit code; a usage error or --help raises SystemExit, as argparse does."""
    if argv is not None:  # the process is somebody else's, such as a program that trains
        return _run(argv, lambda: False)
    try:
        from simpletuner_layerprobe.commands.process import Interrupt, open_streams

        interrupt = Interrupt()
        if not open_streams():
            return _say("error: standard output is closed")
        code = _run(None, lambda: interrupt.came)
    except KeyboardInterrupt:
        code = _say("interrupted", INTERRUPTED)
    if code == INTERRUPTED:
        os._exit(code)  # where C code met the KeyboardInterrupt, Python would now end by the signal itself
    return code


def _run(argv: Sequence[str] | None, interrupted: Callable[[], bool]) -> int:
    """Run one command, and say on stderr, in one line, what kept it from its end and which files are written anyhow.

    interrupted: whether Ctrl-C came, whatever a library has made of it.
    """
    import argparse

    arguments, code = argparse.Namespace(own_process=argv is None, written=()), PROBLEM
    try:
        return _command(argv, arguments)
    except KeyboardInterrupt:
        said, code = "interrupted", INTERRUPTED
    except BrokenPipeError:  # whoever read our output has gone: nobody to tell
        said = ""
    except ProbeError as error:
        said = f"error: {error}"
    except OSError as error:
        said = f"error: {error.filename}: {error.strerror}" if error.filename else f"error: {error.strerror or error}"
    except Exception:
        if not interrupted():
            raise
    if interrupted():
        said, code = "interrupted", INTERRUPTED
    written = f"written: {', '.join(map(str, arguments.written))}" if arguments.written else ""
    return _say("; ".join(filter(None, (said, written))), code)


def _command(argv: Sequence[str] | None, arguments: argparse.Namespace) -> int:
    try:
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")  # a path or a model name may not fit the terminal
        parser().parse_args(argv, arguments)
        _require_working_folder()
        code: int = arguments.command(arguments)
    except SystemExit:  # argparse's, after --help and after wrong usage
        sys.stdout.flush()
        raise
    sys.stdout.flush()
    return code


def _require_working_folder() -> None:
    """Raise ProbeError in a folder that has been deleted: torch and others end or fail without a word of it there."""
    try:
        os.getcwd()
    except OSError as error:
        raise ProbeError(f"the working folder cannot be used ({error.strerror}): change to one that is there") from None


def _say(text: str, code: int = PROBLEM) -> int:
    """Say what ended a command, "" for nothing, and make sure that the interpreter's last flush has nothing to add."""
    try:
        if text:
            print(f"layerprobe: {printable(' '.join(text.split()))}", file=sys.stderr)
        sys.stdout.flush()
    except OSError:
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def parser() -> argparse.ArgumentParser:
    """The command line, with a sub-command per module of `commands`."""
    import argparse

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

    made = Parser(
        prog="layerprobe",
        description="From a SimpleTuner probe run to heatmaps, findings and a LoKr config that is proved.",
        epilog="A RUN is what a probe run writes (<output_dir>/layerprobe, or that output_dir), or a file of the "
        "article's records; most commands take the newest below the current folder if none is given. "
        "Exit codes: 0 all went well, 1 a problem (said on stderr, unless whoever read the output has gone), "
        "2 wrong usage, 130 interrupted.",
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

    for module in (
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
    ):
        module.add_parser(add)
    return made


if __name__ == "__main__":
    sys.exit(main())
