"""What --model says of every case of table.py, beside the denoiser that the family tests really make.

Prints one JSON object a line: {"family", "label", "class", "tables", "networks", "light", "planned"}, or "error".
tables: the differences between the two module tables. networks: those between what LyCORIS builds on the skeleton and
on SimpleTuner's own class, per config. light: the same table from a process that imports of SimpleTuner what it must.
planned: for lokr's plans of the model alone and of a run imported with it, the modules that get what was meant.

    python tests/simpletuner/families/tables.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

GLOBAL = {"algo": "lokr", "multiplier": 1, "linear_dim": 10000, "linear_alpha": 1, "factor": 8}
LIGHT = """
import json, sys
from argparse import Namespace
from simpletuner_layerprobe.commands.imports import named_model
for line in sys.stdin:
    model = named_model(Namespace(model=line.rstrip("\\n"), own_process=True))
    print(json.dumps([model.family, model.model_class, repr(model.modules)]), flush=True)
"""


def main() -> int:
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # SimpleTuner prints to stdout
    from table import CASES

    light = subprocess.Popen([sys.executable, "-c", LIGHT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    code, known = 0, set()
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            key = (case.family, repr(case.denoiser.args), repr(case.denoiser.keywords))
            if key in known:
                continue
            known.add(key)
            try:
                said = compared(case, Path(folder) / "config.json", light)
            except Exception as error:
                said, code = {"error": f"{type(error).__name__}: {error}"}, 1
            print(json.dumps({"family": case.family, "label": case.name} | said), file=lines, flush=True)
    light.communicate()
    return code or light.returncode


def compared(case: Any, path: Path, light: Any) -> dict[str, Any]:
    from simpletuner_layerprobe.lokr.skeleton import skeleton
    from simpletuner_layerprobe.models import architecture

    denoiser = made(case)
    path.write_text(json.dumps(config_of(case, denoiser)))
    name = f"{case.family}:{path}"
    model = architecture(name)
    told = architecture(path)  # by the file alone
    forms = configs(model)
    # Their classes are one, and so is all that a plan asks of them.
    assert told.family == case.family or {told.family, case.family} == {"kandinsky5_image", "kandinsky5_video"}
    assert (told.model_class, told.modules, told.targets) == (model.model_class, model.modules, model.targets)
    print(name, file=light.stdin, flush=True)
    tables = table_of(denoiser), table_of(model)
    both = denoiser.to("meta"), skeleton(model.modules, model.model_class)
    return {
        "class": model.model_class,
        "tables": differences(*tables),
        "networks": {form: differences(*(network_on(each, config) for each in both)) for form, config in forms.items()},
        "planned": [planned(model), planned(imported(model, path.parent))],
        "light": json.loads(light.stdout.readline()) == [model.family, model.model_class, repr(model.modules)],
    }


def planned(of: Any) -> int:
    """The modules of a plan, proved."""
    from simpletuner_layerprobe.api import plan

    least = plan(of, params=1).least
    check = plan(of, params=2 * least).verify().check
    return sum(row.ok for row in check.rows)


def imported(model: Any, folder: Path) -> Any:
    """A run of records that fit the model."""
    from simpletuner_layerprobe.api.records import import_records

    keys = {"image": "hidden_states", "text": "encoder_hidden_states"}
    lengths = {keys[stream.name]: len(stream.blocks) for stream in model.streams if stream.name in keys}
    file = folder / "records.jsonl"
    record = {key: [(place + 1) / 100 for place in range(length)] for key, length in lengths.items()}
    file.write_text("".join(json.dumps({"timestep": sigma / 10, **record}) + "\n" for sigma in range(10)))
    return import_records(file, Path(tempfile.mkdtemp(dir=folder)), model=model)


def made(case: Any) -> Any:
    """The case's denoiser; ACE-Step's with its class's own lyric encoder, for which other tests have a small one."""
    import models

    if case.denoiser.func is models.ace_step:
        models.ace_step(**case.denoiser.keywords)  # which mends an import
        return models.loaded("ace_step.transformer:ACEStepTransformer2DModel")(**case.denoiser.keywords)
    return case.denoiser()


def configs(model: Any) -> dict[str, dict[str, Any]]:
    """LyCORIS configs by what they reach."""
    everything = {"apply_preset": {"target_module": [model.model_class]}}
    return {
        "default classes": GLOBAL,
        "default classes and norms": GLOBAL | {"train_norm": True},
        "Attention": GLOBAL | {"apply_preset": {"target_module": ["Attention"]}},
        "everything": GLOBAL | everything | {"train_norm": True},
    }


def config_of(case: Any, denoiser: Any) -> dict[str, Any]:
    """What the class itself writes to a config.json; that of one that cannot write, by its settings."""
    if not hasattr(denoiser, "save_config"):
        return asdict(denoiser.config) | {"_class_name": type(denoiser).__name__}
    with tempfile.TemporaryDirectory() as folder:
        denoiser.save_config(folder)
        config = json.loads((Path(folder) / "config.json").read_text())
    assert config["_class_name"] == type(denoiser).__name__
    # As in the published files, which diffusers' class wrote.
    names = {"FlowMapUNet2DConditionModel": "UNet2DConditionModel"}
    return config | {"_class_name": names.get(config["_class_name"], config["_class_name"])}


def table_of(model: Any) -> dict[str, Any]:
    """Name -> class and shape: of a denoiser, or of an architecture."""
    from simpletuner_layerprobe.probe.modules import module_table
    from simpletuner_layerprobe.run.manifest import Module

    modules = model.modules if isinstance(model.modules, tuple) else [Module(*row) for row in module_table(model)]
    return {module.name: module for module in modules}


def network_on(built: Any, config: dict[str, Any]) -> dict[str, Any]:
    """Name -> algorithm and shapes of LyCORIS's adapters on the denoiser, or on the skeleton of its table."""
    from simpletuner_layerprobe.lokr.network import adapters_on

    names = {id(module): name for name, module in built.named_modules()}
    return {names[id(module)]: (adapter.algo, adapter.tensors) for module, adapter in adapters_on(config, built)}


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return [
        f"{name}: {one.get(name)}, {other.get(name)}" for name in {**one, **other} if one.get(name) != other.get(name)
    ]


if __name__ == "__main__":
    sys.exit(main())
