"""The study of docs/ablation.md: is the angle worth anything? Three probe runs with every block left out, and one page.

python benchmarks/ablation.py FOLDER            makes the runs in FOLDER (half an hour on two cores), then the numbers
python benchmarks/ablation.py FOLDER --runs     the runs alone; started again, it goes on where it was
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = 600
# name -> (environment of examples/emoji, seed)
RUNS = {"A": ("emoji-seen", 0), "B": ("emoji-probe", 0), "C": ("emoji-seen", 1)}


def record(folder: Path) -> None:
    """Make the runs that FOLDER does not have yet, by `simpletuner train`."""
    if not (folder / "config").exists():
        shutil.copytree(ROOT / "examples" / "emoji", folder, dirs_exist_ok=True)
        subprocess.run([sys.executable, "unpack.py"], cwd=folder, check=True)
    for name, (environment, seed) in RUNS.items():
        config = folder / "config" / f"study-{name}"
        shutil.copytree(folder / "config" / environment, config, dirs_exist_ok=True)
        options = json.loads((config / "config.json").read_text(encoding="utf-8"))
        options |= {
            "layerprobe_samples": SAMPLES,
            "layerprobe_sigmas": "stratified",
            "layerprobe_ablation": "both",
            "layerprobe_ablation_samples": SAMPLES,
            "layerprobe_residual": True,
            "seed": seed,
            "output_dir": f"output/study-{name}",
        }
        (config / "config.json").write_text(json.dumps(options, indent=2), encoding="utf-8")
        environ = os.environ | {"HF_HUB_OFFLINE": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        subprocess.run(["simpletuner", "train", f"env=study-{name}"], cwd=folder, env=environ, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", action="store_true", help="do not look at the numbers")
    given = parser.parse_args()
    record(given.folder)


if __name__ == "__main__":
    main()
