"""Write contributions.json from probe runs with ablation, one for each base.

    python -m weighting.contributions base1=RUN base2=RUN

with benchmarks on PYTHONPATH. The runs are of the pictures that are trained on (emoji-probe with layerprobe_ablation).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import simpletuner_layerprobe as layerprobe

FILE = Path(__file__).parent / "contributions.json"


def main(arguments: list[str]) -> int:
    made = {}
    for name, _, folder in (one.partition("=") for one in arguments):
        run = layerprobe.load(folder)
        angle, ablation = run.contribution("mean"), run.contribution("ablation")
        made[name] = {
            "measured": True,
            "samples": run.counted,
            "critical": list(angle.critical_union()),
            "angle": [round(float(value), 4) for value in angle.value_L],
            "ablation": [round(float(value), 4) for value in ablation.value_L],
        }
    FILE.write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
