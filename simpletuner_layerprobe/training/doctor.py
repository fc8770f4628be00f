"""Whether a probe-only run can work in this environment, and if not, what to do. Imports no torch, no SimpleTuner."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from simpletuner_layerprobe import __version__
from simpletuner_layerprobe.probe.families import FAMILIES
from simpletuner_layerprobe.training.seams import missing_seams_in_source


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. remedy: what to do if it is not ok, else empty."""

    name: str
    ok: bool
    detail: str
    remedy: str = ""


def checks() -> list[Check]:
    """All checks, in the order in which they matter."""
    results = [_autoload(), _simpletuner()]
    results += [_package(name) for name in ("lycoris-lora", "torch", "diffusers", "accelerate")]
    results.append(_accelerate_command())
    package = importlib.util.find_spec("simpletuner")
    if package is not None and package.origin is not None:
        root = Path(package.origin).parent
        results += [_trainer(root), _field_registry(root), *_block_functions(root)]
    return results


def _autoload() -> Check:
    if os.environ.get("SIMPLETUNER_LAYERPROBE") == "0":
        return Check(
            "plugin",
            False,
            "switched off by SIMPLETUNER_LAYERPROBE=0",
            "unset SIMPLETUNER_LAYERPROBE and try again",
        )
    if not _loaded_at_start():
        return Check(
            "plugin",
            False,
            f"simpletuner-layerprobe {__version__} is importable, but its .pth file did not run",
            f"install it into this environment: {sys.executable} -m pip install simpletuner-layerprobe",
        )
    return Check("plugin", True, f"simpletuner-layerprobe {__version__} is active in {sys.prefix}")


def _loaded_at_start() -> bool:
    """Asks a fresh interpreter of this environment, as SimpleTuner's processes are."""
    question = "import sys; sys.exit('simpletuner_layerprobe.training.autoload' not in sys.modules)"
    return subprocess.run([sys.executable, "-c", question], capture_output=True).returncode == 0


def _simpletuner() -> Check:
    check = _package("simpletuner")
    return Check("simpletuner", check.ok, check.detail, check.remedy and "install SimpleTuner into this environment")


def _package(name: str) -> Check:
    try:
        return Check(name, True, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Check(name, False, "not installed", f"install it: {sys.executable} -m pip install {name}")


def _accelerate_command() -> Check:
    """SimpleTuner starts the first `accelerate` on PATH, which may belong to another environment."""
    command = shutil.which("accelerate")
    if command is None:
        return Check("accelerate command", False, "not on PATH", "activate the environment, then try again")
    here = Path(sys.executable).parent
    if Path(command).parent.resolve() != here.resolve():
        return Check(
            "accelerate command",
            False,
            f"PATH finds {command}, not the one of {here}",
            "activate this environment: SimpleTuner would train in the other one, without the probe",
        )
    return Check("accelerate command", True, command)


def _trainer(root: Path) -> Check:
    missing = missing_seams_in_source(root / "helpers" / "training" / "trainer.py")
    if missing:
        return Check(
            "Trainer seams",
            False,
            "; ".join(missing),
            f"install a SimpleTuner that simpletuner-layerprobe {__version__} supports (see its README)",
        )
    return Check("Trainer seams", True, "all methods that the probe wraps are there as expected")


def _field_registry(root: Path) -> Check:
    path = root / "simpletuner_sdk" / "server" / "services" / "field_registry" / "registry.py"
    ok = path.exists() and "_add_field" in _functions(path)
    detail = "FieldRegistry._add_field is there" if ok else f"no FieldRegistry._add_field in {path}"
    return Check("option registry", ok, detail, "" if ok else "the flag cannot be registered in this SimpleTuner")


def _block_functions(root: Path) -> list[Check]:
    results = []
    for family in FAMILIES:
        for call in sorted({entry.call for entry in family.blocks if ":" in entry.call}):
            module, function = call.split(":")
            path = root.parent.joinpath(*module.split(".")).with_suffix(".py")
            ok = path.exists() and function in _functions(path)
            remedy = "" if ok else f"family {family.name!r} cannot be probed with this SimpleTuner"
            results.append(Check(f"{family.name} blocks", ok, f"{call} {'is there' if ok else 'is missing'}", remedy))
    return results


def _functions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
