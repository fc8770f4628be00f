"""The import rule: what runs offline imports neither torch nor SimpleTuner, and training imports no matplotlib; the
halves meet only in run/."""

from __future__ import annotations

import ast
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import simpletuner_layerprobe

PACKAGE = Path(simpletuner_layerprobe.__file__).parent
HEAVY = ("torch", "simpletuner", "lycoris", "diffusers", "matplotlib")


def modules(*parts: str) -> list[str]:
    names = []
    for part in parts:
        if (PACKAGE / f"{part}.py").exists():
            names.append(f"simpletuner_layerprobe.{part}")
        else:
            prefix = f"simpletuner_layerprobe.{part}."
            names += [one.name for one in pkgutil.walk_packages([str(PACKAGE / part)], prefix)]
    return names


def imported(names: list[str]) -> set[str]:
    """Which of HEAVY a fresh interpreter has after it imported these modules."""
    code = (
        f"import sys\nfor name in {names!r}: __import__(name)\nprint([one for one in {HEAVY!r} if one in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(eval(done.stdout))


OFFLINE = ("run", "analyse", "lokr", "show", "commands", "cli", "readings", "models")


@pytest.mark.parametrize("part", OFFLINE)
def test_the_offline_half_is_light(part):
    assert modules(part)
    assert imported(modules(part)) == set()


def test_training_draws_no_figures():
    assert imported(modules("training")) <= {"torch"}


KNOWS = {
    "run": set(),
    "analyse": {"run"},
    "lokr": {"run", "analyse", "probe"},
    "show": {"run", "analyse", "lokr", "probe"},
}
"""The folders of the package that each may import. What is used of another is handed in, as compare's recipe is."""


def imports(source: str) -> set[str]:
    """The folders of the package that a module imports anywhere: also in functions and for types alone."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports hide where they lead"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    parts = [name.split(".") for name in found]
    return {part[1] for part in parts if part[0] == PACKAGE.name and len(part) > 1 and (PACKAGE / part[1]).is_dir()}


@pytest.mark.parametrize("part", KNOWS)
def test_no_half_reaches_into_another(part: str) -> None:
    paths = list((PACKAGE / part).glob("**/*.py"))
    assert len(paths) > 1
    for path in paths:
        assert imports(path.read_text(encoding="utf-8")) <= {part, *KNOWS[part]}, path.name


@pytest.mark.parametrize(
    "line",
    [
        "from simpletuner_layerprobe.lokr.factors import article_factors",
        "from simpletuner_layerprobe.lokr import factors",
        "from simpletuner_layerprobe import lokr, ProbeError",
        "import simpletuner_layerprobe.lokr.factors as factors",
        "if TYPE_CHECKING:\n    from simpletuner_layerprobe.lokr import factors",
        "def late():\n    import simpletuner_layerprobe.lokr",
    ],
)
def test_every_way_to_import_is_seen(line: str) -> None:
    assert imports(f"from simpletuner_layerprobe.lokr import amounts as preset\n{line}\nimport numpy") == {"lokr"}
