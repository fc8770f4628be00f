"""The layers that --precision gives a model without weights, beside those that SimpleTuner gives one with weights.

Prints one JSON object a line: {"family", "precision", "layers", "different", "forms", "disagree"}. layers: class -> how
many. forms: LyCORIS configs -> of how many modules the network is that is built on the layers with weights; disagree:
those of which the check says another network.
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
# What decides in a LyCORIS config here: no choice at all, classes of layers, classes around them, names, norms.
FORMS: dict[str, dict[str, Any]] = {
    "default": {},
    "Linear": {"apply_preset": {"target_module": ["Linear"]}},
    "QLinear": {"apply_preset": {"target_module": ["QLinear"]}},
    "Attention": {"apply_preset": {"target_module": ["Attention"]}, "factor": 4},
    "names": {"apply_preset": {"target_module": [], "name_algo_map": {"*": {"factor": 2}}, "use_fnmatch": True}},
    "a class with settings": {"apply_preset": {"module_algo_map": {"Linear": {"algo": "locon", "dim": 2}}}},
    "norms": {"apply_preset": {"target_module": ["Attention"]}, "train_norm": True},
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
    with_values = with_weights(case, made, precision)
    real = module_table(with_values)
    told = [(module.name, module.type, module.shape) for module in said.modules]
    built = {name: network_on(with_values, form) for name, form in FORMS.items()}
    return {
        "forms": {name: len(modules) for name, modules in built.items()},
        "disagree": [name for name, modules in built.items() if modules != network_said(said, FORMS[name])],
        "family": case.family,
        "precision": precision,
        "layers": Counter(kind for _, kind, shape in told if "Linear" in kind),
        "different": [str(pair) for pair in zip(real, told, strict=True) if pair[0] != pair[1]],
    }


Network = dict[str, Any]


def network_on(denoiser: Any, form: dict[str, Any]) -> Network:
    """Module -> the tensors that LyCORIS trains there, in a process of its own as SimpleTuner builds it."""
    from simpletuner_layerprobe.lokr.network import fresh_wrapper, silent
    from simpletuner_layerprobe.probe.wrappers import named_modules

    wrapper, rest = fresh_wrapper(), dict(form)
    with silent():
        if preset := rest.pop("apply_preset", None):
            wrapper.LycorisNetwork.apply_preset(preset)
        network = wrapper.create_lycoris(denoiser, 1, 10000, 1, algo="lokr", **rest)
    names = {id(module): name for name, module in named_modules(denoiser)}
    modules = {names[id(lora.org_module[0])]: list(lora.named_parameters()) for lora in network.loras}
    # A norm of another class than torch's gets a module of LyCORIS's without parameters.
    return {name: sorted((key, tuple(each.shape)) for key, each in held) for name, held in modules.items() if held}


def network_said(said: Any, form: dict[str, Any]) -> Network:
    from simpletuner_layerprobe.lokr.proof import check_config

    check = check_config({"algo": "lokr", "multiplier": 1, "linear_dim": 10000, "linear_alpha": 1, **form}, said)
    return {row.name: sorted(row.got.tensors) for row in check.rows if row.got is not None}


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
