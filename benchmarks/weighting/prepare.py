"""What can be worked out without a GPU: each base's mean gradient, a large adapter's use of the blocks, and all arms.

    python -m weighting.prepare --pipeline base1=examples/emoji/pipeline --out FOLDER

writes FOLDER/base1-evidence.json (kept if it is there) and FOLDER/base1-arms.json, with benchmarks on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from simpletuner_layerprobe.models import architecture
from weighting.arms import NAMED, SHUFFLES, Planner
from weighting.engine import Engine
from weighting.evidence import Evidence, energies, mean_gradient, oracle, read_contributions
from weighting.store import load_task, pipelines, save_arms
from weighting.task import load_transformer, read_json

HERE = Path(__file__).parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pipeline", action="append", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", type=Path, help="where the encoded pictures are kept; with --out without")
    parser.add_argument("--arms", help="names with commas; all of the study without")
    parser.add_argument("--gradient-rounds", type=int, default=5, help="times through the training pictures")
    parser.add_argument("--oracle-steps", type=int, default=300)
    parser.add_argument("--contributions", type=Path, default=HERE / "contributions.json")
    parser.add_argument("--allow-placeholder", action="store_true", help="for tests")
    parser.add_argument("--evidence-only", action="store_true", help="no arms; contributions are not needed")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for base, folder in pipelines(options.pipeline).items():
        model, described = load_transformer(folder), architecture(folder)
        blocks = len(model.transformer_blocks)
        found_path, task_path = (
            options.out / f"{base}-evidence.json",
            (options.tasks or options.out) / f"{base}-task.pt",
        )
        if not found_path.exists():
            begin, engine = time.monotonic(), Engine(model)
            task = load_task(task_path, folder, "cpu")
            energy = energies(mean_gradient(engine, task, options.gradient_rounds))
            empty = Evidence((), (), (), {})
            large = Planner(model, described, empty).large()
            found = {"energy": energy, "oracle": oracle(engine, task, large, options.oracle_steps)}
            found_path.write_text(json.dumps(found), encoding="utf-8")
            print(f"{base}: evidence in {time.monotonic() - begin:.0f} s", flush=True)
        if options.evidence_only:
            continue
        read = read_contributions(options.contributions, base, blocks, allow_placeholder=options.allow_placeholder)
        evidence = Evidence(**{name: tuple(values) for name, values in read.items()}, **read_json(found_path))
        planner, arms = Planner(model, described, evidence), []
        for name in options.arms.split(",") if options.arms else (*NAMED, *SHUFFLES):
            arms.append(planner.arm(name))
            print(f"{base}: {name}: {arms[-1].parameters:,} parameters {arms[-1].note}", flush=True)
        save_arms(options.out / f"{base}-arms.json", arms)
        (options.out / f"{base}-contributions.json").write_text(json.dumps(asdict(evidence)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
