"""Runs benchmarks/gpu.py on tiny shapes on the CPU, where SimpleTuner may be imported. FOLDER is for its JSON."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

if __name__ == "__main__":
    import gpu

    gpu.main(["--device", "cpu", "--tiny", "--pairs", "3", "--out", sys.argv[1]])
