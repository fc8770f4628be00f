"""The layers that --precision gives a model without weights, beside those that SimpleTuner gives one with weights.

Prints one JSON object a line: {"family", "precision", "layers", "different"}. layers: class -> how many.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

QUANTO = ("int8-quanto", "int4-quanto", "fp8-quanto")
PRECISIONS = ("no_change", *QUANTO, "int8-torchao", "fp8wo-torchao", "fp8-native")
# SDNQ and fp8-native leave small layers as they are.
SD3 = {
    "num_attention_heads": 4,
    "attention_head_dim": 64,
    "num_layers": 3,
    "caption_projection_dim": 256,
    "joint_attention_dim": 256,
}


def main() -> int:
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # SimpleTuner prints to stdout
    from table import CASES

    cases: dict[str, Any] = {}
    for case in CASES:
        cases.setdefault(case.family, case)
    families = ("sd3", "flux", "wan", "ltxvideo2", "mageflow", "sdxl")
    todo = [(cases[name], "int8-quanto") for name in families]
    todo += [(cases["sd3"], precision) for precision in PRECISIONS]
    for case, precision in todo:
        print(json.dumps(compared(case, case.denoiser, precision)), file=lines, flush=True)
    large = partial(cases["sd3"].denoiser, **SD3)
    for precision in ("int8-sdnq", "fp8-native"):
        print(json.dumps(compared(cases["sd3"], large, precision)), file=lines, flush=True)
    return 0


def compared(case: Any, denoiser: Any, precision: str) -> dict[str, Any]:
    import torch

    from simpletuner_layerprobe.models import architecture
    from simpletuner_layerprobe.probe.modules import module_table

    made = denoiser().to(torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        made.save_config(folder)
        said = architecture(f"{case.family}:{folder}", precision=precision)
    real = module_table(with_weights(case, made, precision))
    told = [(module.name, module.type, module.shape) for module in said.modules]
    return {
        "family": case.family,
        "precision": precision,
        "layers": Counter(kind for _, kind, shape in told if "Linear" in kind),
        "different": [str(pair) for pair in zip(real, told, strict=True) if pair[0] != pair[1]],
    }


def with_weights(case: Any, denoiser: Any, precision: str) -> Any:
    """As Trainer.init_precision has it, by SimpleTuner's own options."""
    import torch
    from case import make_config
    from simpletuner.helpers.training.quantisation import quantise_model
    from simpletuner.helpers.training.state_tracker import StateTracker

    options = make_config(case, torch.bfloat16, Path("unused"))
    options.base_model_precision, options.quantize_via = precision, "cpu"
    StateTracker.set_args(options)
    with torch.compiler.set_stance("force_eager" if "sdnq" in precision else "default"):
        for _ in range(2 if "quanto" in precision else 1):  # the trainer calls it twice
            denoiser = quantise_model(model=denoiser, args=options, return_dict=True)["model"]
    assert StateTracker.get_args() is options
    return denoiser


if __name__ == "__main__":
    sys.exit(main())
