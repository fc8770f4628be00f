"""Runs the cases of table.py and prints one JSON object a line: an outcome, or {"family", "label", "error"}.

Without names, the first line is {"registry": [every model family that this SimpleTuner has]}.

    python tests/simpletuner/families/run.py [FAMILY ...]

SimpleTuner is imported once; each family runs in a fork, so that none sees another's patches.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from dataclasses import asdict
from typing import TextIO

# (dtype, gradient checkpointing as in the user's config)
RUNS = (("float32", False), ("bfloat16", False), ("float32", True))


def main(names: list[str]) -> int:
    # SimpleTuner prints to stdout; the outcomes go to the real one.
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import simpletuner.helpers.training.trainer  # noqa: F401
    import torch
    from table import CASES

    torch.set_num_threads(1)
    if not names:
        from simpletuner.helpers.configuration.cmd_args import get_argument_parser

        option = next(action for action in get_argument_parser()._actions if action.dest == "model_family")
        print(json.dumps({"registry": sorted(option.choices)}), file=lines, flush=True)
    known = sorted({case.family for case in CASES})
    failed = not set(names) <= set(known)
    with tempfile.TemporaryDirectory() as folder:
        tempfile.tempdir = folder
        running = 0
        for name in (name for name in names or known if name in known):
            if running == (os.cpu_count() or 1):
                failed |= os.wait()[1] != 0
                running -= 1
            if os.fork() == 0:
                leave_with(name, lines)
            running += 1
        for _ in range(running):
            failed |= os.wait()[1] != 0
    return int(failed)


def leave_with(name: str, lines: TextIO) -> None:
    """Run a family in this fork and end it, not through the exit handlers: some wait for threads that a fork lacks."""
    code = 1
    try:
        code = run_family(name, lines)
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(code)


def run_family(name: str, lines: TextIO) -> int:
    import torch
    from case import run_case
    from fixed import told_of
    from table import CASES

    code = 0
    for case in CASES:
        if case.family != name:
            continue
        for dtype, checkpointing in RUNS:
            try:
                exact = dtype == "float32" and not checkpointing
                outcome = asdict(run_case(case, getattr(torch, dtype), checkpointing, ablation=exact))
                outcome |= {"fixed": told_of(case)} if exact else {}
            except Exception as error:
                traceback.print_exc()
                outcome = {"family": name, "label": case.name, "error": f"{type(error).__name__}: {error}"}
                code = 1
            print(json.dumps(outcome | {"dtype": dtype, "checkpointing": checkpointing}), file=lines, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
