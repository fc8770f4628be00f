"""Runs the family cases and prints one JSON object a line: an outcome, or {"family", "label", "error"}.

Without names, the first line is {"registry": [every model family that this SimpleTuner has]}.

    python tests/run_families.py [FAMILY ...]

One process, so that SimpleTuner is imported once; each family in a fork, so that none sees another's patches.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import TextIO

TESTS = Path(__file__).parent
# (dtype, gradient checkpointing as in the user's config)
RUNS = (("float32", False), ("bfloat16", False), ("float32", True))


def main(names: list[str]) -> int:
    sys.path.insert(0, str(TESTS))
    # SimpleTuner prints to stdout; the outcomes go to the real one.
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import simpletuner.helpers.training.trainer  # noqa: F401
    import torch

    torch.set_num_threads(1)
    if not names:
        from simpletuner.helpers.configuration.cmd_args import get_argument_parser

        option = next(one for one in get_argument_parser()._actions if one.dest == "model_family")
        print(json.dumps({"registry": sorted(option.choices)}), file=lines, flush=True)
    known = sorted(path.stem for path in (TESTS / "families").glob("*.py") if path.stem != "__init__")
    failed = False
    for name in names or known:
        pid = os.fork()
        if pid == 0:
            # Whatever happens, not through the exit handlers: those of onnxruntime wait for threads that a fork lacks.
            code = 1
            try:
                code = run_family(name, lines)
            except Exception:
                traceback.print_exc()
            finally:
                os._exit(code)
        failed |= os.waitpid(pid, 0)[1] != 0
    return int(failed)


def run_family(name: str, lines: TextIO) -> int:
    import torch
    from family_case import run_case

    code = 0
    for case in importlib.import_module(f"families.{name}").CASES:
        for dtype, checkpointing in RUNS:
            where = {"family": case.family, "label": case.label or case.flavour, "dtype": dtype}
            where["checkpointing"] = checkpointing
            try:
                outcome = dataclasses.asdict(run_case(case, getattr(torch, dtype), checkpointing))
            except Exception as error:
                traceback.print_exc()
                outcome = {"error": f"{type(error).__name__}: {error}"}
                code = 1
            print(json.dumps(outcome | where), file=lines, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
