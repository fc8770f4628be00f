"""README.md: its session is run as it stands, in a folder laid out like a clone, and the end of it is looked at.

Convention: in ```console blocks a line that starts with `$ ` is a command, the lines below it are its output. There,
`...` on a line of its own stands for any lines, and inside a line for any text. Numbers with a decimal point or a
thousands separator, and sizes, are measurements and may differ. Lines in ```sh blocks are not run, but parsed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path

import pytest
from real import ANSI
from safetensors import safe_open

from simpletuner_layerprobe import load
from simpletuner_layerprobe.cli import parser
from simpletuner_layerprobe.training.options import OPTIONS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = tuple(parser()._actions[-1].choices or ())
RUN = "output/tiny-probe/layerprobe"
SOME_LINES = "..."
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack"}


@dataclass(frozen=True)
class Step:
    command: str
    shown: tuple[str, ...]


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language, in order."""
    return [text for name, text in re.findall(r"^```(\w*)\n(.*?)^```$", README, re.M | re.S) if name == language]


def steps() -> Iterator[Step]:
    for block in blocks("console"):
        first, *rest = re.split(r"^\$ ", block, flags=re.M)
        assert first == "", f"a console block starts with output: {first}"
        for part in rest:
            command, *shown = part.splitlines()
            yield Step(command, tuple(shown))


STEPS = tuple(steps())


@dataclass(frozen=True)
class Session:
    """What the session left behind: its last working folder, stdout per command, hashes of the base model."""

    folder: Path
    printed: dict[str, str]
    base_model: dict[str, str]


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    """All commands of the README, run in order. Each has to end with exit code 0."""
    folder = tmp_path_factory.mktemp("clone")
    shutil.copytree(ROOT / "examples", folder / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SIMPLETUNER_")}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    environment |= {"HF_HUB_OFFLINE": "1", "COLUMNS": "160"}  # every column of a plan
    printed: dict[str, str] = {}
    base_model: dict[str, str] = {}
    for step in STEPS:
        program, *arguments = shlex.split(step.command)
        if program == "cd":
            folder = folder.joinpath(*arguments)
            base_model = hashes(folder / "pipeline")
            continue
        done = subprocess.run([program, *arguments], cwd=folder, env=environment, capture_output=True)
        out, err = (clean(stream.decode(errors="replace")) for stream in (done.stdout, done.stderr))
        assert done.returncode == 0, f"{step.command}:\n{out[-3000:]}\n{err[-3000:]}"
        assert step.command not in printed, f"{step.command} stands in the README twice"
        printed[step.command] = out
    return Session(folder, printed, base_model)


def clean(text: str) -> str:
    """Without colours, every state of a progress bar on its own line, no blanks at the ends of lines."""
    lines = ANSI.sub("", text).replace("\r", "\n").split("\n")
    return "\n".join(line.rstrip() for line in lines)


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def pattern_of(shown: tuple[str, ...]) -> re.Pattern[str]:
    """A pattern for what a command may print, given what the README shows of it."""
    size = r"\d+(?:\.\d+)?(?= (?:bytes|kB|MB|GB)\b)"
    measured = rf"{size}|\d{{1,3}}(?:,\d{{3}})+|\d+\.\d+"
    lines = []
    for line in shown:
        if line == SOME_LINES:
            lines.append(r"(?:[^\n]*\n)*?")
            continue
        # Factors and parameters follow from the contributions, which differ: another test looks at the table.
        numbers = rf"{measured}|\d+(?=%)|(?<= )\d+(?= )" if "transformer_blocks." in line else measured
        parts = re.split(rf"({numbers}|\.\.\.|\s+)", line)
        kinds = [
            re.escape(part) if i % 2 == 0 else r"[^\n]*" if part == "..." else r"\s+" if part.isspace() else r"[\d.,]+"
            for i, part in enumerate(parts)
        ]
        lines.append("".join(kinds).rstrip() + r"\n")
    return re.compile("".join(lines))


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        (("a 1.5 s", "b"), "a 17.25 s\nb\n", True),
        (("a 1.5 s", "b"), "a 17.25 s\nc\n", False),
        (("a 15 s",), "a 16 s\n", False),
        (("...", "b"), "x\ny\nb\n", True),
        (("...", "b"), "x\ny\nb\nc\n", False),
        (("b", "..."), "b\nx\n", True),
        (("a ... c",), "a b b c\n", True),
        (("a ... c",), "a b\nb c\n", False),
        (("309,302 parameters",), "1,309,302 parameters\n", True),
        (("   0  transformer_blocks.0  0.5  7  note",), "   0  transformer_blocks.0  0.4  8  note\n", True),
        (("   0  transformer_blocks.0  0.5  7  note",), "   0  transformer_blocks.1  0.4  8  note\n", False),
    ],
)
def test_the_comparison_of_output_itself(shown: tuple[str, ...], printed: str, same: bool) -> None:
    assert bool(pattern_of(shown).fullmatch(printed)) == same


# The session


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.command)
def test_the_readme_shows_what_the_command_prints(session: Session, step: Step) -> None:
    if step.command.startswith("cd "):
        assert step.shown == ()
        return
    printed = session.printed[step.command]
    assert pattern_of(step.shown).fullmatch(printed), "\n".join([*step.shown, "--- printed:", printed[-3000:]])


@dataclass(frozen=True)
class Row:
    contribution: float
    factor: int
    parameters: int
    critical: bool


@pytest.fixture(scope="module")
def factors(session: Session) -> dict[str, Row]:
    """The table of `layerprobe lokr`: block -> row."""
    (printed,) = (out for command, out in session.printed.items() if command.startswith("layerprobe lokr"))
    line = r"^\s*\d+  (transformer_blocks\.\d+)\s+([\d.]+)\s+[\d.]+ - [\d.]+\s+(\d+)\s+\d+%\s+([\d,]+)(.*)$"
    return {
        block: Row(float(value), int(factor), int(parameters.replace(",", "")), "critical" in note)
        for block, value, factor, parameters, note in re.findall(line, printed, re.M)
    }


def test_the_table_of_factors(factors: dict[str, Row]) -> None:
    assert list(factors) == [f"transformer_blocks.{i}" for i in range(6)]
    for row in factors.values():
        if row.critical:
            assert row.factor == 1
        else:
            assert row.factor == pytest.approx((1 - row.contribution) * 11 + 1, abs=0.501)


def written(session: Session, name: str) -> dict:
    return json.loads((session.folder / "config" / "tiny-weighted" / name).read_text())


def test_the_weighted_environment(session: Session, factors: dict[str, Row]) -> None:
    options = written(session, "config.json")
    assert not any("layerprobe" in name for name in options)
    assert options["model_type"] == "lora" and options["lora_type"] == "lycoris"
    assert options["lycoris_config"] == "config/tiny-weighted/lycoris_config.json"
    assert options["output_dir"] == "output/tiny-weighted"
    names = written(session, "lycoris_config.json")["apply_preset"]["name_algo_map"]
    for block, row in factors.items():
        assert names[f"{block}.ff*"] == names[f"{block}.norm1*"] == {"factor": row.factor}
        assert names[f"{block}.*"] == {"factor": 2 * row.factor}


def split(size: int, factor: int) -> tuple[int, int]:
    """LoKr's split of one dimension: the factor if it divides, else the largest divisor up to it and the root."""
    if size % factor == 0:
        return min(factor, size // factor), max(factor, size // factor)
    part = max(m for m in range(1, factor + 1) if size % m == 0 and m * m <= size)
    return part, size // part


def test_the_trained_lokr_has_the_planned_factorisation_in_every_module(
    session: Session, factors: dict[str, Row]
) -> None:
    config = written(session, "lycoris_config.json")
    modules = json.loads((session.folder / RUN / "manifest.json").read_text())["modules"]
    expected = {}
    for name, kind, shape in modules:
        settings = (
            settings
            for pattern, settings in config["apply_preset"]["name_algo_map"].items()
            if fnmatchcase(name, pattern)
        )
        first = next(settings, None)
        if first is not None and kind == "Linear":
            (out_1, out_2), (in_1, in_2) = (split(size, first["factor"]) for size in shape)
            expected[f"lycoris_{name.replace('.', '_')}"] = {"lokr_w1": [out_1, in_1], "lokr_w2": [out_2, in_2]}

    found: dict[str, dict[str, list[int]]] = {}
    path = session.folder / "output" / "tiny-weighted" / "pytorch_lora_weights.safetensors"
    with safe_open(path, "np") as file:
        for key in file.keys():  # noqa: SIM118 - not a mapping
            module, tensor = key.rsplit(".", 1)
            if tensor != "alpha":
                found.setdefault(module, {})[tensor] = file.get_slice(key).get_shape()
    assert found == expected
    assert len(expected) == sum(kind == "Linear" and "_blocks." in name for name, kind, _ in modules) == 81
    assert len({str(shapes["lokr_w1"]) for shapes in expected.values()}) > 4
    numbers = sum(prod(shape) for shapes in found.values() for shape in shapes.values())
    assert numbers == sum(row.parameters for row in factors.values())


def test_the_base_model_is_untouched(session: Session) -> None:
    assert len(session.base_model) > 10
    assert hashes(session.folder / "pipeline") == session.base_model


def test_the_probe_leaves_no_weights_and_a_run_that_can_be_read(session: Session) -> None:
    output = session.folder / "output" / "tiny-probe"
    assert not [path for path in output.rglob("*") if path.suffix in WEIGHTS or "checkpoint" in path.name]
    run = load(output / "layerprobe")
    assert (run.samples, run.images) == (120, 12)
    assert (run.facts["caption_words"] > 0).any() and len(run.files) == 1
    assert {path.suffix for path in (output / "layerprobe").iterdir()} == {".arrows", ".json"}


def test_the_figures_are_there(session: Session) -> None:
    names = {path.name for path in (session.folder / "figures").iterdir()}
    assert names == {"figure1_streams.png", "figure2_combined.png", "figure3_factors.png", "heatmap.npz"}
    assert (ROOT / "docs" / "heatmap.png").stat().st_size < 250_000


# The rest of the README


def help_of(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        parser().parse_args([command, "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


def options_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))


def test_the_languages_of_the_blocks() -> None:
    fences = re.findall(r"^```(.*)$", README, re.M)
    assert fences[1::2] == [""] * (len(fences) // 2)
    assert set(fences[::2]) == {"console", "sh"}
    assert not re.search(r"^\s*\$ ", "".join(blocks("sh")), re.M)
    assert len(README.splitlines()) <= 150


def lines_of(language: str) -> list[str]:
    return [line for block in blocks(language) for line in block.splitlines()]


@pytest.mark.parametrize("line", lines_of("sh"))
def test_commands_that_are_not_run_can_be_parsed(line: str) -> None:
    for part in line.split("&&"):
        program, *arguments = shlex.split(part, comments=True)
        if program == "layerprobe":
            assert parser().parse_args(arguments).command
        elif program == "simpletuner":
            train, environment, *options = arguments
            assert train == "train" and re.fullmatch(r"env=[\w-]+", environment)
            assert {option.partition("=")[0] for option in options} <= {option.name for option in OPTIONS}
        else:
            assert program == "pip"


def test_commands_and_options_in_the_text_exist(capsys: pytest.CaptureFixture[str]) -> None:
    known = {command: options_in(help_of(command, capsys)) for command in COMMANDS}
    prose = re.sub(r"^```.*?^```$", "", README, flags=re.M | re.S)
    spans = re.findall(r"`([^`]+)`", prose)
    mentioned = [span.split() for span in spans if re.match(r"layerprobe [a-z]", span)]
    assert {words[1] for words in mentioned} | set(spans) >= set(COMMANDS)
    for words in mentioned:
        assert words[1] in COMMANDS and options_in(" ".join(words)) <= known[words[1]], words
    assert options_in(" ".join(spans)) <= set().union(*known.values())


def test_the_options_table_is_complete_and_has_the_defaults() -> None:
    text = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(layerprobe\w*)` \| (.*?) \| (.*?) \|", text, re.M)
    assert [name for name, _, _ in rows] == [option.name for option in OPTIONS]
    for (_, values, default), option in zip(rows, OPTIONS, strict=True):
        shown = {"False": "false", "None": "<output_dir>/layerprobe", "30.0": "30", "0.0": "0"}
        assert default.strip("`") == shown.get(str(option.default), str(option.default))
        assert all(f"`{choice}`" in values for choice, _ in option.choices)


PAGES = (
    "README.md",
    "examples/README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    *map(str, sorted(ROOT.glob("docs/*.md"))),
)


@pytest.mark.parametrize("file", PAGES)
def test_links_lead_somewhere(file: str) -> None:
    path = ROOT / file
    links = re.findall(
        r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", re.sub(r"```.*?```", "", path.read_text("utf-8"), flags=re.S)
    )
    for link in (one or other for one, other in links):
        if not link.startswith("https://"):
            there, _, heading = link.partition("#")
            target = path.parent / there if there else path
            assert target.exists(), link
            assert not heading or heading in headings(target.read_text("utf-8")), link


def headings(text: str) -> set[str]:
    """What a link to a part of a page can name."""
    named = {re.sub(r"[^\w -]", "", line).lower().replace(" ", "-") for line in re.findall(r"^#+ (.*)$", text, re.M)}
    return named | set(re.findall(r"<a id=\"([^\"]+)\"", text))


def test_the_options_of_the_tiny_pipeline_exist() -> None:
    script = ROOT / "examples" / "tiny_sd3.py"
    shown = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True, check=True).stdout
    text = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    assert options_in(text) and options_in(text) <= options_in(shown)
