"""A process of the `layerprobe` command imports LyCORIS and PEFT without what no proof needs."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from synthetic_run import manifest, sd3_modules, write_run

from simpletuner_layerprobe.commands.imports import WITHOUT, first_import
from simpletuner_layerprobe.run.manifest import Module, create_run

HIDDEN = sorted({name for names in WITHOUT.values() for name in names} - {"scipy"})  # scipy: of the analysis
ODD_CLASSES = ("QLinear", "QLinearOpt", "Linear8bitLt", "LinearNF4", "Fp8Linear", "LoraLayer", "NonDynamicallyLinear")

# Prints as JSON: per command line its exit code, its output, the packages imported after it, the names left as None,
# whether garbage is collected; then where the classes of LyCORIS's list of quantised layers come from, if from others.
COMMANDS = """
import gc, io, json, sys
from contextlib import redirect_stdout
from simpletuner_layerprobe.cli import main

alone, watched, lines = json.loads(sys.argv[1])
found = []
for line in lines:
    sys.argv = ["layerprobe", *line]
    with redirect_stdout(io.StringIO()) as output:
        code = main() if alone else main(line)
    here = [name for name in watched if sys.modules.get(name) is not None]
    hidden = [name for name, module in sys.modules.items() if module is None and name in watched]
    found.append([code, output.getvalue(), here, hidden, gc.isenabled()])
from lycoris.utils.quant import QuantLinears
theirs = sorted(one.__module__ for one in QuantLinears if not one.__module__.startswith("lycoris."))
print(json.dumps([found, theirs]))
"""


def after(lines: list[list[str]], *, alone: bool) -> tuple[list[list[Any]], list[str]]:
    """What COMMANDS says in a new process. alone: as the `layerprobe` command, or called by another program."""
    command = [sys.executable, "-c", COMMANDS, json.dumps([alone, HIDDEN, lines])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found, theirs = json.loads(done.stdout.splitlines()[-1])
    return found, theirs


def test_the_command_proves_the_same_without_them(tmp_path: Path) -> None:
    run, odd = str(tmp_path / "run"), str(tmp_path / "odd")
    blocks = {"image": tuple(f"transformer_blocks.{i}" for i in range(4))}
    write_run(tmp_path / "run", blocks, 400, modules=sd3_modules(4))
    table = [Module("layers", "ModuleList", ())]
    table += [Module(f"layers.{i}", kind, (32, 32)) for i, kind in enumerate((*ODD_CLASSES, "Linear"))]
    create_run(tmp_path / "odd", manifest(blocks, modules=table))
    config = tmp_path / "config.json"
    names: dict[str, Any] = {
        f"layers.{i}": {"algo": algo, "factor": 4, "dim": 2}
        for i, algo in enumerate(("lokr", "loha", "glora", "lora") * 2)
    }
    names["transformer_blocks.0.attn.to_q"] = {"algo": "lokr", "factor": 4}  # in the run, for --params
    settings = {"algo": "lokr", "multiplier": 1.0, "linear_dim": 10000, "linear_alpha": 1, "factor": 8}
    preset = {"target_module": [], "name_algo_map": names}
    config.write_text(json.dumps(settings | {"full_matrix": True, "apply_preset": preset}))
    proofs = [
        ["lokr", run, "--preset", "article", "--json"],
        ["check-config", str(config), "--run", odd],
        ["lokr", run, "--params", str(config), "--json"],
        ["lokr", run, "--preset", "article", "--algo", "loha", "--json"],
    ]
    lines = [*proofs, ["lokr", run, "--preset", "article", "--algo", "lora", "--rank", "8", "--json"]]
    light, nothing = after(lines, alone=True)
    whole, quantised = after(lines, alone=False)
    for line, (code, output, *_), (other_code, other_output, *_) in zip(lines, light, whole, strict=True):
        assert (code, output) == (other_code, other_output), line
        assert output and (code == 0 or line[0] == "check-config")
    assert len([line for line in light[1][1].splitlines() if line.startswith(("ok", "WRONG"))]) >= 6
    assert all(here == [] for _, _, here, _, _ in light[: len(proofs)])
    assert "peft" in light[-1][2]  # which proves itself
    assert not {"bitsandbytes", "torchao", "sklearn"}.intersection(light[-1][2])
    assert all(hidden == [] and collects for *_, hidden, collects in light + whole)
    assert nothing == []
    assert {"optimum.quanto", "peft"} <= set(whole[0][2])
    assert quantised and all(one.startswith("optimum.quanto.") for one in quantised)


def test_a_verdict_by_the_recorded_size_builds_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_run(run, {"image": tuple(f"transformer_blocks.{i}" for i in range(4))}, 400, modules=sd3_modules(4))
    own = {"model_type": "lora", "lora_type": "lycoris", "lycoris_config": {}, "parameters": 100_000}
    (run / "training.json").write_text(json.dumps(own))
    code = (
        "import sys\n"
        "from simpletuner_layerprobe.cli import main\n"
        "assert main(['status', sys.argv[1]]) == main(['findings', sys.argv[1]]) == 0\n"
        "print([name for name in ('torch', 'lycoris', 'pandas') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True, text=True, check=True)
    assert "as many as your own config trains" in " ".join(done.stdout.split())
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_library_call_leaves_lycoris_whole() -> None:
    """`check_config`, called by a program that may train, as the first to import LyCORIS."""
    code = (
        "from simpletuner_layerprobe.lokr.proof import check_config\n"
        "from simpletuner_layerprobe.models import Architecture\n"
        "from simpletuner_layerprobe.run.manifest import Module\n"
        "config = {'algo': 'lokr', 'multiplier': 1, 'linear_dim': 4, 'linear_alpha': 1}\n"
        "model = Architecture('', '', '', (), (), (Module('a', 'Linear', (8, 8)),))\n"
        "check_config(config | {'apply_preset': {'target_module': []}}, model)\n"
        "from lycoris.modules.lokr import LokrModule\n"
        "from optimum.quanto import QLinear, qint8\n"
        "import torch\n"
        "linear = QLinear.from_module(torch.nn.Linear(8, 8), weights=qint8)\n"
        "print(LokrModule('a', linear, lora_dim=4, alpha=1).is_quant)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "True"


def test_what_is_imported_already_stays_and_nothing_stays_hidden(tmp_path: Path, monkeypatch) -> None:
    first = "import probed_loaded\ntry: import probed_extra\nexcept ImportError: probed_extra = None"
    for name, text in (("extra", ""), ("loaded", ""), ("first", first)):
        (tmp_path / f"probed_{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    without = ("probed_extra", "probed_loaded")
    loaded = import_module("probed_loaded")
    with suppress(RuntimeError), first_import("probed_first", without):
        made = import_module("probed_first")
        assert made.probed_extra is None and made.probed_loaded is loaded and not gc.isenabled()
        raise RuntimeError
    assert "probed_extra" not in sys.modules and gc.isenabled()
    with first_import("probed_first", without):
        assert import_module("probed_extra") and gc.isenabled()
    for name in (*without, "probed_first"):
        del sys.modules[name]
