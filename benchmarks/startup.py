"""What the autoload adds to every start of Python, and how long `layerprobe --help` takes.

Measured on a fresh virtual environment that holds this package and its .pth file and nothing else.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

from measure import RESULTS, machine, save, spread

ROOT = Path(__file__).parent.parent
PTH = "simpletuner_layerprobe.pth"


def run(command: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """(seconds of the clock, seconds of CPU) of a process that must succeed."""
    start = time.perf_counter()
    with open(os.devnull, "wb") as nothing:
        target = [(os.POSIX_SPAWN_DUP2, nothing.fileno(), stream) for stream in (1, 2)]
        pid = os.posix_spawn(command[0], command, environment, file_actions=target)
        _, status, usage = os.wait4(pid, 0)
    if status:
        raise subprocess.CalledProcessError(os.waitstatus_to_exitcode(status), command)
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime


def autoload(python: str, pth: Path, environment: dict[str, str], pairs: int) -> dict[str, Any]:
    """Milliseconds that the .pth file adds to `python -c pass`: the difference of each pair of starts."""
    away = pth.with_suffix(".away")
    without, wall, cpu = [], [], []
    run([python, "-c", "pass"], environment)  # writes the bytecode
    for number in range(pairs):
        found: dict[bool, tuple[float, float]] = {}
        for present in (True, False) if number % 2 else (False, True):
            if not present:
                pth.rename(away)
            found[present] = run([python, "-c", "pass"], environment)
            if not present:
                away.rename(pth)
        without.append(found[False][0] * 1000)
        wall.append((found[True][0] - found[False][0]) * 1000)
        cpu.append((found[True][1] - found[False][1]) * 1000)
    return {"without_ms": spread(without), "added_ms": spread(wall), "added_cpu_ms": spread(cpu)}


def import_simpletuner(environment: dict[str, str], pairs: int) -> dict[str, Any] | None:
    """Seconds of `import simpletuner` with and without the autoload before it; None where it is not installed."""
    plain = "import simpletuner"
    hooked = f"import simpletuner_layerprobe.training.autoload; {plain}"
    environment = environment | {"SIMPLETUNER_LAYERPROBE": "0", "PYTHONPATH": str(ROOT)}
    try:
        run([sys.executable, "-c", hooked], environment)
    except subprocess.CalledProcessError:
        return None
    seconds = [[run([sys.executable, "-c", code], environment) for code in (plain, hooked)] for _ in range(pairs)]
    return {
        "without_seconds": round(statistics.median(pair[0][0] for pair in seconds), 3),
        "added_ms": spread([(pair[1][0] - pair[0][0]) * 1000 for pair in seconds], 1),
        "added_cpu_ms": spread([(pair[1][1] - pair[0][1]) * 1000 for pair in seconds], 1),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--without-simpletuner", action="store_true", help="leave `import simpletuner` out")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for startup.json")
    options = parser.parse_args(arguments)
    pairs = options.pairs
    names = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "SIMPLETUNER"))}
    result: dict[str, Any] = {"machine": machine(), "pairs": pairs}
    with tempfile.TemporaryDirectory() as name:
        venv.create(name, with_pip=False, symlinks=True)
        (packages,) = Path(name).glob("lib/python*/site-packages")
        ignored = shutil.ignore_patterns("__pycache__", ".*_cache")
        shutil.copytree(ROOT / "simpletuner_layerprobe", packages / "simpletuner_layerprobe", ignore=ignored)
        shutil.copy(ROOT / PTH, packages / PTH)
        python = str(Path(name) / "bin" / "python")
        result["autoload"] = autoload(python, packages / PTH, names, pairs)
        code = "import sys; from simpletuner_layerprobe.cli import main; sys.exit(main(['--help']))"
        run([python, "-c", code], names)
        helps = [run([python, "-c", code], names) for _ in range(max(5, pairs // 4))]
        result["help_seconds"] = spread([one[0] for one in helps])
        result["help_cpu_seconds"] = spread([one[1] for one in helps])
    result["import_simpletuner"] = None if options.without_simpletuner else import_simpletuner(names, 5)
    print(f"  autoload: {result['autoload']['added_ms']['median']} ms; --help: {result['help_seconds']['median']} s")
    save("startup", result, options.out)


if __name__ == "__main__":
    main()
