"""The wheel and the editable install in fresh environments: what they put there and what that does."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PTH = "simpletuner_layerprobe.pth"
SOURCES = ("simpletuner_layerprobe", PTH, "setup.cfg", "setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE")
HEAVY = {"torch", "numpy", "simpletuner", "matplotlib", "safetensors", "accelerate", "diffusers", "lycoris"}
MODULES = "import sys; print(*sorted(name.partition('.')[0] for name in sys.modules))"


def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command outside the source tree, without this process' settings of Python and SimpleTuner."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "SIMPLETUNER"))}
    arguments = [str(part) for part in command]
    return subprocess.run(arguments, env=clean | environment, cwd="/", capture_output=True, text=True, check=False)


def output(*command: object, **environment: str) -> str:
    """The stdout of a command that succeeds and has nothing to complain about."""
    done = run(*command, **environment)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    assert done.stderr == "", f"{command} complained:\n{done.stderr}"
    return done.stdout


def build(hook: str, source: Path, target: Path) -> Path:
    """Calls a PEP 517 hook as pip does, with the installed setuptools instead of a downloaded one."""
    code = f"from setuptools import build_meta; print(build_meta.{hook}({str(target)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target / done.stdout.splitlines()[-1]


class Environment:
    """A fresh virtual environment with one wheel in it."""

    def __init__(self, folder: Path, wheel: Path) -> None:
        output(sys.executable, "-m", "venv", "--without-pip", folder)
        self.python = folder / "bin" / "python"
        self.layerprobe = folder / "bin" / "layerprobe"
        self.pip("install", "--quiet", "--no-deps", "--no-index", wheel)
        self.site_packages = Path(
            output(self.python, "-c", "import sysconfig as s; print(s.get_path('purelib'))").strip()
        )

    def pip(self, *arguments: object) -> None:
        output(sys.executable, "-m", "pip", "--python", self.python, "--disable-pip-version-check", *arguments)

    def modules(self, **environment: str) -> set[str]:
        """The top-level modules of a process that does nothing."""
        return set(output(self.python, "-c", MODULES, **environment).split())


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source tree: building leaves files in it."""
    folder = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".*_cache"))
        else:
            shutil.copy(ROOT / name, folder / name)
    (folder / "README.md").write_text("A README.\n")
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("build_wheel", source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module", params=["wheel", "editable"])
def installed(
    request: pytest.FixtureRequest, source: Path, wheel: Path, tmp_path_factory: pytest.TempPathFactory
) -> Environment:
    if request.param == "editable":
        wheel = build("build_editable", source, tmp_path_factory.mktemp("editable"))
    return Environment(tmp_path_factory.mktemp(request.param) / "environment", wheel)


def test_wheel_holds_the_package_the_pth_and_the_licence(source: Path, wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(name for name in names if name.endswith("/METADATA"))).decode()
        pth = archive.read(PTH).decode()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"simpletuner_layerprobe", PTH}
    packaged = {name for name in names if name.startswith("simpletuner_layerprobe/")}
    assert "simpletuner_layerprobe/py.typed" in packaged
    files = {path for path in (source / "simpletuner_layerprobe").rglob("*") if path.is_file()}
    assert packaged == {path.relative_to(source).as_posix() for path in files}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert "License-Expression: AGPL-3.0-or-later" in metadata
    assert "Requires-Python: >=3.12" in metadata
    # site.py runs a .pth line only if it starts with "import"; a second line would run on its own.
    assert pth.startswith("import ") and pth.count("\n") == 1 and pth.endswith("\n")


def test_sdist_builds_the_same_wheel(source: Path, wheel: Path, tmp_path: Path) -> None:
    sdist = build("build_sdist", source, tmp_path)
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    again = build("build_wheel", tmp_path / sdist.name.removesuffix(".tar.gz"), tmp_path)
    with zipfile.ZipFile(again) as second, zipfile.ZipFile(wheel) as first:
        assert sorted(second.namelist()) == sorted(first.namelist())


def test_what_an_install_puts_there_and_what_python_gets_of_it(installed: Environment) -> None:
    assert (installed.site_packages / PTH).read_text() == (ROOT / PTH).read_text()
    (record,) = installed.site_packages.glob("simpletuner_layerprobe-*.dist-info/RECORD")
    assert [line for line in record.read_text().splitlines() if line.startswith(f"{PTH},")]
    assert re.fullmatch(r"layerprobe \d+\.\d+\.\d+\S*\n", output(installed.layerprobe, "--version"))
    with_us = installed.modules()
    assert with_us - installed.modules(SIMPLETUNER_LAYERPROBE="0") == {"simpletuner_layerprobe"}
    assert not with_us & HEAVY
    code = "import sys; print(*(getattr(finder, '__module__', '') for finder in sys.meta_path))"
    ours = "simpletuner_layerprobe.training.autoload"
    assert ours in output(installed.python, "-c", code).split()
    assert ours not in output(installed.python, "-c", code, SIMPLETUNER_LAYERPROBE="0").split()


def test_left_over_pth_does_not_disturb_python(wheel: Path, tmp_path: Path) -> None:
    environment = Environment(tmp_path / "environment", wheel)
    shutil.rmtree(environment.site_packages / "simpletuner_layerprobe")
    assert "simpletuner_layerprobe" not in environment.modules()  # `modules` also wants an empty stderr


def test_uninstall_leaves_nothing(wheel: Path, source: Path, tmp_path: Path) -> None:
    for number, built in enumerate((wheel, build("build_editable", source, tmp_path))):
        environment = Environment(tmp_path / f"environment{number}", built)
        environment.pip("uninstall", "--quiet", "--yes", "simpletuner-layerprobe")
        assert list(environment.site_packages.glob("*")) == []  # the folder itself may go too
        assert not environment.layerprobe.exists()


def constraints() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    return {name: Version(pinned) for name, pinned in pairs}


def test_constraints_fulfil_every_requirement() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lines = config["options"]["install_requires"] + config["options.extras_require"]["dev"]
    pinned = constraints()
    for line in lines.splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            assert requirement.name in pinned, f"{requirement.name} is missing in constraints.txt"
            assert pinned[requirement.name] in requirement.specifier


def test_tests_run_on_the_constraints() -> None:
    different = {}
    for name, pinned in constraints().items():
        try:
            found = Version(version(name))
        except PackageNotFoundError:
            continue  # not needed on this platform
        if found.public != pinned.public:
            different[name] = f"{found} installed, {pinned} in constraints.txt"
    assert different == {}


# tools/find_python.sh


def find_python(path: Path, script: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """What the script, or a changed text of it, says where only `path` is looked into."""
    source = ["-c", script] if script else [str(ROOT / "tools" / "find_python.sh")]
    environment = {"PATH": str(path), "HOME": str(path)} | environment
    return subprocess.run(["/bin/sh", *source], env=environment, capture_output=True, text=True, check=False)


def executable(file: Path, script: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    return file


def test_find_python_passes_over_what_does_not_run(tmp_path: Path) -> None:
    executable(tmp_path / "python3.13", "echo 'version 3.13 is not installed' >&2; exit 127")
    executable(tmp_path / "python3.12", "echo /no/such/python")
    executable(tmp_path / "versions" / "3.12.9" / "bin" / "python3", f'exec "{sys.executable}" "$@"')
    found = find_python(tmp_path, PYENV_ROOT=str(tmp_path))
    assert (found.returncode, found.stderr) == (0, "")
    assert Path(found.stdout.strip()).samefile(sys.executable)


def test_find_python_takes_the_one_that_is_named_or_says_that_it_does_not_fit(tmp_path: Path) -> None:
    works = f'exec "{sys.executable}" "$@"'
    named = executable(tmp_path / "mine", works)
    other = executable(tmp_path / "python3.13", "exit 127")
    found = find_python(tmp_path, PYTHON=str(named))
    assert found.returncode == 0 and Path(found.stdout.strip()).samefile(sys.executable)
    executable(named, "exit 1")
    executable(other, works)
    found = find_python(tmp_path, PYTHON=str(named))
    assert found.returncode == 0 and f"PYTHON={named} is not" in found.stderr


def test_find_python_says_what_to_install_in_one_line(tmp_path: Path) -> None:
    # The fixed folders that it looks into may hold a Python on this machine; its list is cut for this test.
    script = (ROOT / "tools" / "find_python.sh").read_text()
    cut = script.replace("/opt/homebrew/bin /usr/local/bin /usr/bin", "/no/such/folder")
    assert cut != script
    done = find_python(tmp_path, cut)
    assert done.returncode == 1 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "install one" in done.stderr
