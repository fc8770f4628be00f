"""A coverage-guided fuzzer for every reader of this package.

    python tests/fuzz/run.py --inputs 200000

Each reader starts from valid inputs (readers.py) that are changed again and again (mutate.py). An input that reaches a
line of the package that none reached before (sys.monitoring) is kept and changed further. A reader may raise a
ProbeError of one line, and nothing else; it must not take over 5 s of CPU time, nor over 1 GB more memory than before,
nor leave a file. Each reader runs in a process of its own, which is ended and counted as hung if an input takes a
minute.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fuzz.mutate import mutated_bytes
from fuzz.readers import READERS, Reader

from simpletuner_layerprobe.errors import ProbeError

PACKAGE = str(Path(sys.modules["simpletuner_layerprobe"].__file__ or "").parent)
HUNG_SECONDS = 60.0
MEMORY_BYTES = 1024**3
CORPUS = 400
# How the inputs are shared out. A LyCORIS config takes a hundred times longer than the others.
SHARES = {"manifest": 24, "stream file": 24, "records": 20, "settings": 15, "run options": 14, "LyCORIS config": 3}


class Coverage:
    """Counts the lines of the package that were reached for the first time. Costs next to nothing after that."""

    def __init__(self) -> None:
        self.lines = 0
        monitoring = sys.monitoring
        monitoring.use_tool_id(monitoring.COVERAGE_ID, "layerprobe-fuzz")
        monitoring.register_callback(monitoring.COVERAGE_ID, monitoring.events.LINE, self._line)
        monitoring.set_events(monitoring.COVERAGE_ID, monitoring.events.LINE)

    def _line(self, code: Any, line: int) -> object:
        self.lines += code.co_filename.startswith(PACKAGE)
        return sys.monitoring.DISABLE


def mutated(reader: Reader, data: bytes, corpus: list[bytes], draw: random.Random) -> bytes:
    try:
        return reader.mutate(data, corpus, draw)
    except (RecursionError, OverflowError):  # an input that was kept may be beyond what JSON can be changed in
        return mutated_bytes(data, corpus, draw)


def fuzz(reader: Reader, folder: Path, inputs: int, seed: int, connection: Any) -> None:
    """In the reader's process: send ("start", input) before each and the totals at the end."""
    draw = random.Random(seed)
    folder.mkdir()
    reader.prepare(folder)
    seeds = reader.seeds()
    for data in seeds:
        reader.read(folder, data)  # a valid input is read; what is imported late is imported
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, resource.RLIM_INFINITY))
    coverage = Coverage()
    corpus = list(seeds)
    refused, slowest, tracebacks = 0, 0.0, dict[str, str]()
    for number in range(inputs):
        data = mutated(reader, draw.choice(corpus if draw.random() < 0.9 else seeds), corpus, draw)
        before = coverage.lines
        connection.send(number)
        (folder.parent / f"{folder.name}.input").write_bytes(data)
        started = time.process_time()
        try:
            reader.read(folder, data)
        except ProbeError as error:
            refused += 1
            if "\n" in str(error):
                tracebacks[f"error of several lines: {error!s:.200}"] = repr(data[:2000])
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            tracebacks.setdefault(
                f"{type(error).__name__} in {where.filename}:{where.lineno}",
                f"{error!s:.300}\n{''.join(traceback.format_tb(error.__traceback__)[-4:])}\n{data[:2000]!r}",
            )
        slowest = max(slowest, time.process_time() - started)
        if coverage.lines > before and len(corpus) < CORPUS:
            corpus.append(data)
    found = {"inputs": inputs, "refused": refused, "slowest_seconds": round(slowest, 3), "lines": coverage.lines}
    connection.send({**found, "kept": len(corpus) - len(seeds), "tracebacks": tracebacks})


def run(name: str, inputs: int, seed: int) -> dict[str, Any]:
    """Fuzz one reader in a process of its own; one that hangs or dies is counted, with the input that did it."""
    scratch = Path(tempfile.mkdtemp(prefix="layerprobe-fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    context = get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=fuzz, args=(READERS[name], scratch / "reader", inputs, seed, sending))
    process.start()
    sending.close()
    message: Any = None
    total = {"inputs": 0, "refused": 0, "slowest_seconds": 0.0, "lines": 0, "kept": 0, "hangs": 0, "crashes": 0}
    try:
        while receiving.poll(300 if message is None else HUNG_SECONDS):
            message = receiving.recv()
            if isinstance(message, dict):
                return total | message
        ending = "hangs"
    except EOFError:
        ending = "crashes"
    finally:
        data = (scratch / "reader.input").read_bytes() if (scratch / "reader.input").exists() else b""
        process.kill()
        process.join()
        shutil.rmtree(scratch)
    assert message is not None, f"{name}: the process ended before its first input"
    return total | {"inputs": message + 1, ending: 1, "tracebacks": {ending: repr(data[:2000])}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=200_000, help="over all readers")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--reader", choices=sorted(READERS), help="this one alone")
    parser.add_argument("--save", metavar="FILE", help="write the counts there too")
    arguments = parser.parse_args()
    names = [arguments.reader] if arguments.reader else list(READERS)
    shares = sum(SHARES[name] for name in names)
    results = {}
    for name in names:
        started = time.monotonic()
        found = run(name, -(-arguments.inputs * SHARES[name] // shares), arguments.seed)
        for what, where in found["tracebacks"].items():
            print(f"--- {name}: {what}\n{where}", file=sys.stderr, flush=True)
        results[name] = {
            **found,
            "tracebacks": len(found["tracebacks"]),
            "seconds": round(time.monotonic() - started, 1),
        }
    print(json.dumps(results))
    if arguments.save:
        Path(arguments.save).write_text(json.dumps(results, indent=1) + "\n")
    return int(any(one["tracebacks"] for one in results.values()))


if __name__ == "__main__":
    sys.exit(main())
