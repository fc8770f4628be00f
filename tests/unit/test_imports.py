"""The import rule: which part of the package may know which, and what a part brings into a process.

Read from the source of every module, so that imports inside functions, for types alone and by name are seen too.
The finder of training/autoload.py, which the .pth file starts, is the only thing that loads modules by a table.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import simpletuner_layerprobe

NAME = "simpletuner_layerprobe"
PACKAGE = Path(simpletuner_layerprobe.__file__).parent
BASE = {"counts", "errors", "readings"}
# Which parts of the package each part may import, anywhere in it: those above it, so that no two know each other. Only
# models, api, plugin and commands see both halves, recording (probe, training) and offline (analyse, lokr, show).
KNOWS: dict[str, set[str]] = {
    "counts": set(),
    "errors": set(),
    "printable": set(),
    "readings": {"errors"},
    "targets": {"errors"},
    "files": {"errors", "targets"},
    "probe": BASE,
    "run": {*BASE, "targets"},
    "training": {*BASE, "targets", "files", "probe", "run"},
    "analyse": BASE,
    "lokr": {*BASE, "files", "run", "analyse"},
    "show": {*BASE, "targets", "run", "analyse"},
    "published": set(),
    "models": {*BASE, "files", "run", "probe", "training", "published"},
    "api": {*BASE, "targets", "probe", "run", "training", "analyse", "lokr", "show", "models"},
    "plugin": {*BASE, "training", "analyse", "lokr", "show", "api"},
    "trial": {*BASE, "targets", "files", "run", "training", "analyse", "lokr", "show", "api"},
    # Of lokr and show a few words, see below.
    "commands": {"errors", "printable", "targets", "files", "api", "trial", "lokr", "show"},
    "cli": {"errors", "printable", "commands"},
    "": {"api", "errors"},  # __init__.py: the names of the API, on demand
}
WORDS = (f"{NAME}.lokr.amounts.", f"{NAME}.show.words.", f"{NAME}.show.findings.", f"{NAME}.show.verdict.")
# Which foreign packages a part may import anywhere in it, beside the standard library.
FOREIGN: dict[str, set[str]] = {
    "counts": set(),
    "errors": set(),
    "printable": set(),
    "readings": set(),
    "targets": set(),
    "files": set(),
    "probe": {"torch", "triton", "numpy"},
    "run": {"numpy", "pyarrow", "pandas"},
    "training": {"torch", "numpy", "safetensors", "simpletuner", "accelerate"},
    "analyse": {"numpy", "scipy"},
    "lokr": {"numpy", "scipy", "torch", "lycoris", "peft", "safetensors"},
    "show": {"numpy", "matplotlib", "PIL"},
    "published": set(),
    "models": set(),
    "api": {"numpy", "pandas"},
    "plugin": set(),
    "trial": {"numpy", "PIL", "psutil"},
    "commands": set(),
    "cli": set(),
    "": set(),
}
HEAVY = ("torch", "simpletuner", "lycoris", "peft", "diffusers", "transformers", "matplotlib", "pandas")
LIGHT = ("", "errors", "printable", "readings", "run", "analyse", "lokr", "show", "published", "models", "api")
LIGHT += ("trial", "commands", "cli")


def sources() -> dict[str, str]:
    """Module name without the package's -> its source, for every module of the package."""
    made = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        made[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text(encoding="utf-8")
    return made


SOURCES = sources()


def part_of(module: str) -> str:
    return module.partition(".")[0]


def imports(source: str, *, late: bool = True) -> Iterator[str]:
    """The full names that a module imports: everywhere, or with late=False only when it is imported itself.

    A string that is the name of a module of the package counts as an import: import_module takes such.
    """
    tree = ast.parse(source)
    inside = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or _for_types(node):
            inside |= set(ast.walk(node)) - {node}
    docstrings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if not late and node in inside:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports hide where they lead"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docstrings:
            yield from re.findall(rf"^{NAME}(?:\.\w+)+$", node.value)


def _for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def parts(names: Iterator[str]) -> set[str]:
    """Which parts of the package these full names lead to; the package's own `__version__` leads nowhere."""
    own = [name.split(".")[1] if "." in name else "" for name in names if part_of(name) == NAME]
    known = {part_of(module) for module in SOURCES}
    return {part if part in known else "" for part in own if part != "__version__"}


def foreign(names: Iterator[str]) -> set[str]:
    return {part_of(name) for name in names} - set(sys.stdlib_module_names) - {NAME, "__future__"}


def test_every_part_has_its_rule() -> None:
    assert {part_of(module) for module in SOURCES} == set(KNOWS) == set(FOREIGN)


@pytest.mark.parametrize("module", SOURCES)
def test_no_part_reaches_into_another(module: str) -> None:
    part = part_of(module)
    assert parts(imports(SOURCES[module])) <= {part, *KNOWS[part]}
    assert foreign(imports(SOURCES[module])) <= FOREIGN[part]


def test_the_autoload_leads_to_training_and_the_plugin_alone() -> None:
    """Its table names modules of the package and functions in them, which no import shows."""
    from simpletuner_layerprobe.training.autoload import HOOKS

    assert {module for module, _ in HOOKS.values()} <= {"plugin", *(m for m in SOURCES if part_of(m) == "training")}


def test_commands_take_from_below_the_api_only_words_and_types_of_arguments() -> None:
    for module, source in SOURCES.items():
        if part_of(module) == "commands":
            below = {name for name in imports(source) if name.startswith((f"{NAME}.lokr", f"{NAME}.show"))}
            assert all(name.startswith(WORDS) for name in below), module


def test_what_is_heavy_is_imported_inside_calls() -> None:
    """Of the import rule FOREIGN says who may; this, that SimpleTuner never and torch only by half is there at once."""
    for module, source in SOURCES.items():
        at_once = foreign(imports(source, late=False))
        assert "simpletuner" not in at_once, module
        if part_of(module) not in ("probe", "training"):
            assert not at_once & {"torch", "lycoris", "peft", "diffusers"}, module
        if part_of(module) == "lokr" and foreign(imports(source)) & {"torch", "lycoris", "peft"}:
            assert module in ("lokr.network", "lokr.skeleton", "lokr.lora"), module


@pytest.mark.parametrize(
    "line",
    [
        f"from {NAME}.lokr.factors import article_factors",
        f"from {NAME}.lokr import factors",
        f"from {NAME} import lokr, __version__",
        f"import {NAME}.lokr.factors as factors",
        f"if TYPE_CHECKING:\n    from {NAME}.lokr import factors",
        f"def late():\n    import {NAME}.lokr",
        f"import_module('{NAME}.lokr.factors')",
    ],
)
def test_every_way_to_import_is_seen(line: str) -> None:
    assert parts(imports(f'"""About {NAME}.run."""\n{line}\nimport numpy')) == {"lokr"}
    assert foreign(imports(f"{line}\nimport os.path, numpy.typing")) == {"numpy"}
    late = "import a\nif TYPE_CHECKING:\n    import b\nclass C:\n    import c\n    def f(self):\n        import d\n"
    assert set(imports(late, late=False)) == {"a", "c"} and set(imports(late)) == {"a", "b", "c", "d"}


def imported(modules: list[str], watched: tuple[str, ...]) -> list[str]:
    """Which packages of `watched` a fresh interpreter has after it imported these modules."""
    code = (
        "import sys, json\nfor name in json.loads(sys.argv[1]): __import__(name)\nprint(json.dumps(list(sys.modules)))"
    )
    command = [sys.executable, "-c", code, json.dumps(modules)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [name for name in watched if name in json.loads(done.stdout)]


@pytest.mark.parametrize("part", LIGHT)
def test_the_offline_half_is_light(part: str) -> None:
    modules = [f"{NAME}.{module}".rstrip(".") for module in SOURCES if part_of(module) == part]
    assert imported(modules, HEAVY) == []
    if part in ("", "errors", "readings", "commands", "cli"):
        assert imported(modules, ("numpy", "scipy", "pyarrow")) == []


def test_training_and_the_probe_import_nothing_of_the_analysis() -> None:
    modules = [f"{NAME}.{module}" for module in SOURCES if part_of(module) in ("probe", "training")]
    assert set(imported(modules, (*HEAVY, "scipy"))) <= {"torch"}
