"""Does the probe record the right angles on every base that SimpleTuner can train on? One table, on a CPU or a GPU.

    python benchmarks/bases.py                      quantised bases, offloading, compilation, attention; minutes
    python benchmarks/bases.py --device cuda        the same where a GPU is
    python benchmarks/bases.py --only int8-quanto --only ramtorch

Each is a probe-only run of the real SimpleTuner on the tiny SD3 of examples/tiny_sd3.py, some also on a tiny Flux and
Wan. What it records is compared with the article's formula in float64 on copies of the states that hooks on the norm
layers took (tests/taps.py), which shares nothing with the probe. The result is written after every run
(results/bases-DEVICE.json).
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import RESULTS, device_name, machine, save

from simpletuner_layerprobe.run.load import load_run

TESTS = Path(__file__).parent.parent / "tests"
EXAMPLES = TESTS.parent / "examples"
sys.path.insert(0, str(TESTS))

SAMPLES = 4
TOLERANCE = 2e-6
"""What the probe's float32 and the reference's float64 may differ by."""

PRECISIONS = """int8-quanto int4-quanto int2-quanto fp8-quanto fp8uz-quanto int8-torchao int8dq-torchao
int8dq-int4-torchao int4-torchao fp8-torchao fp8wo-torchao fp8-native nf4-bnb int8-sdnq uint8-sdnq int16-sdnq fp8-sdnq
int6-sdnq uint4-sdnq"""
ATTENTION = """diffusers xformers sageattention flash-attn flash-attn-3 flex native cudnn native-efficient native-flash
native-math kohaku-fa-auto"""
RANKS = "two ranks"
"""On GPUs of their own, or both on the CPU."""
SD3 = "SD3"
BASES: dict[str, dict[str, Any]] = {
    "no_change": {},
    RANKS: {},
    **{name: {"base_model_precision": name, "quantize_via": "cpu"} for name in PRECISIONS.split()},
    "int8-quanto, quantize_via accelerator": {"base_model_precision": "int8-quanto", "quantize_via": "accelerator"},
    "int8-quanto, quantize_via pipeline": {"base_model_precision": "int8-quanto", "quantize_via": "pipeline"},
    "float32": {"mixed_precision": "no", "base_model_default_dtype": "fp32"},
    "RamTorch": {"ramtorch": True},
    "block swap": {"musubi_blocks_to_swap": 2},
    "feed-forward in chunks": {"enable_chunked_feed_forward": True, "feed_forward_chunk_size": 2},
    "torch.compile": {"dynamo_backend": "inductor"},
    "torch.compile, by regions": {"dynamo_backend": "inductor", "dynamo_use_regional_compilation": True},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "models offloaded at the start": {"offload_during_startup": True},
    "text encoders unloaded": {"fully_unload_text_encoder": True},
    "VAE in tiles": {"vae_enable_tiling": True, "vae_enable_slicing": True},
    **{f"attention: {name}": {"attention_mechanism": name} for name in ATTENTION.split()},
}
OTHERS = {
    "Flux": ("no_change", "int8-quanto", "fp8-quanto", "int8dq-int4-torchao", "int8-sdnq", "block swap"),
    "Wan": ("no_change", "int8-quanto", "fp8-quanto", "int8-sdnq", "block swap", "feed-forward in chunks"),
}
"""Families beside SD3, with what is tried on them too."""
ROWS = {name: (SD3, options) for name, options in BASES.items()} | {
    f"{family}: {name}": (family, BASES[name]) for family, names in OTHERS.items() for name in names
}
"""Row of the table -> family and SimpleTuner's options."""


@dataclass(frozen=True)
class Verdict:
    """word: exact, differs, refused (by the probe, in one line), fails (SimpleTuner's own error) or not tried.

    layers: class -> how many.
    """

    word: str
    said: str
    layers: dict[str, int]
    seconds: float


def make(simpletuner: Any, family: str, folder: Path) -> str:
    """Make a family's tiny pipeline in `folder`. Gives why that does not work here, "" if it does."""
    if family == SD3:
        made = simpletuner.script(EXAMPLES / "tiny_sd3.py", "--out", folder, "--images", SAMPLES)
    else:
        made = simpletuner.script(TESTS / f"tiny_{family.lower()}.py", folder)
    return made.stderr.strip().splitlines()[-1][:200] if made.returncode else ""


def judged(
    simpletuner: Any, folder: Path, family: str, options: dict[str, Any], device: str, ranks: int = 1
) -> Verdict:
    """What a run of the tiny pipeline in `folder` shows, with these options of SimpleTuner's."""
    path = folder / "config" / "tiny-probe" / "config.json"
    settings = {"layerprobe_samples": SAMPLES, "max_train_steps": SAMPLES, **options}
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    environment = {"ACCELERATE_USE_CPU": "1" if device == "cpu" else "0"}
    if settings.get("mixed_precision"):
        environment["ACCELERATE_MIXED_PRECISION"] = settings["mixed_precision"]
    tap = f"taps.py:tap_{family.lower()}"
    started = simpletuner.start_ranks(folder, "tiny-probe", ranks, setup=tap, environment=environment)
    results = [rank.result() for rank in started]
    result = next((result for result in results if result.code), results[0])
    lines = [line.strip() for line in result.log.splitlines() if line.strip()]
    if result.code:
        refused = [line for line in lines if "layerprobe: error: " in line]
        if refused:
            return Verdict("refused", refused[-1].partition("layerprobe: error: ")[2], {}, result.seconds)
        # The last one is not the hooks', which found nothing to write.
        errors = [line for line in lines if re.match(r"\w*(Error|Exception|NotImplemented)\w*:", line)]
        own = [line for line in errors if "need at least one array" not in line]
        return Verdict("fails", (own or lines)[-1][:200], {}, result.seconds)
    run = load_run(folder / "output" / "tiny-probe" / "layerprobe")
    layers = Counter(module.type for module in run.manifest.modules if "Linear" in module.type)
    references = [np.load(path) for path in sorted(folder.glob("reference*.npz"))]
    apart = []
    for name in references[0].files:
        found, expected = run.distances(*name.split(".")), np.concatenate([one[name] for one in references])
        apart.append(np.abs(found - expected).max() if found.shape == expected.shape else np.inf)
    worst = float(np.max(apart))  # NaN if one is
    word = "exact" if worst <= TOLERANCE and run.samples == SAMPLES else "differs"
    return Verdict(word, f"{worst:.0e} at most, {run.samples} samples", dict(layers), result.seconds)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", choices=list(ROWS), action="append")
    parser.add_argument("--jobs", type=int, default=1, help="how many runs at the same time")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the result")
    options = parser.parse_args(arguments)
    from real import SimpleTuner

    result: dict[str, Any] = {"machine": machine(device_name(options.device)), "bases": {}, "complete": False}
    with tempfile.TemporaryDirectory() as temporary:
        simpletuner = SimpleTuner(Path(temporary, "server.txt"))
        names = list(options.only or ROWS)
        if RANKS in names and options.device == "cuda" and torch.cuda.device_count() < 2:
            print(f"{RANKS:40} not measured: there is one GPU")
            names.remove(RANKS)

        def tried(name: str) -> Verdict:
            family, settings = ROWS[name]
            if lacks[family]:
                return Verdict("not tried", lacks[family], {}, 0.0)
            folder = Path(shutil.copytree(Path(temporary, family), Path(temporary, f"run{names.index(name)}")))
            return judged(simpletuner, folder, family, settings, options.device, 2 if name == RANKS else 1)

        try:
            families = dict.fromkeys(ROWS[name][0] for name in names)
            lacks = {family: make(simpletuner, family, Path(temporary, family)) for family in families}
            for name, verdict in zip(names, ThreadPoolExecutor(options.jobs).map(tried, names), strict=True):
                layers = ", ".join(f"{count} {kind}" for kind, count in sorted(verdict.layers.items()))
                print(f"{name:40} {verdict.word:9} {layers:34} {verdict.said}", flush=True)
                result["bases"][name] = vars(verdict) | {"seconds": round(verdict.seconds, 1)}
                save(f"bases-{options.device}", result, options.out)
        finally:
            simpletuner.close()
    result["complete"] = True
    save(f"bases-{options.device}", result, options.out)


if __name__ == "__main__":
    main()
