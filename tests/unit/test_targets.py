"""Nothing is ever destroyed: every command that writes, at every kind of thing that can be in its way."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import socket
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import TINY, Result, assert_one_line
from failing import fails
from synthetic_run import sd3_modules, write_run

from simpletuner_layerprobe import api, files
from simpletuner_layerprobe.api.pages import figures, report
from simpletuner_layerprobe.api.records import export
from simpletuner_layerprobe.cli import parser
from simpletuner_layerprobe.files import json_bytes, write_files
from simpletuner_layerprobe.run.merge import merge
from simpletuner_layerprobe.targets import MARKS, is_own, require_file, require_folder
from simpletuner_layerprobe.trial.settings import TRIAL_NAME, Trial

Command = Callable[..., Result]
Arguments = Callable[[Path, object], Sequence[object]]
FORCED = [(), ("--force",)]

# Every command that writes, by the argument that names what: its other arguments, and an ending of the name.
FILES: dict[str, tuple[str, Arguments]] = {
    "report --out": (".html", lambda world, out: ["report", world / "run", "--out", out]),
    "compare --out": (".html", lambda world, out: ["compare", world / "run", world / "run", "--out", out]),
    "lokr --out": (".json", lambda world, out: ["lokr", world / "run", "--params", "60k", "--out", out]),
    "export FILE": (".csv", lambda world, out: ["export", world / "run", out]),
    "trial report --out": (".html", lambda world, out: ["trial", "report", world / "trial", "--out", out]),
}
FOLDERS: dict[str, Arguments] = {
    "heatmap --out": lambda world, out: ["heatmap", world / "run", "--out", out],
}
NEW_FOLDERS: dict[str, Arguments] = {
    "import RUN": lambda world, out: ["import", world / "records.jsonl", out],
    "merge OUT": lambda world, out: ["merge", world / "run", world / "other", out],
    "trial new DIR": lambda world, out: (
        ["trial", "new", out, "--run", world / "run", "--params", "60k", "--held-out", "x", "--steps", 9]
    ),
}
ENVIRONMENTS = {"lokr --env"}


def leaves(made: argparse.ArgumentParser, words: tuple[str, ...] = ()) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every command with its name, and of a command in parts every part."""
    parts = [action for action in made._actions if isinstance(action, argparse._SubParsersAction)]
    if not parts:
        yield " ".join(words), made
    for action in parts:
        for name, child in action.choices.items():
            yield from leaves(child, (*words, name))


def test_every_command_that_writes_is_in_the_table() -> None:
    writing, forced = set(), set()
    for name, command in leaves(parser()):
        for action in command._actions:
            where = action.option_strings[0] if action.option_strings else action.metavar
            positional = not action.option_strings and re.search(r"\bto (write|make)\b", action.help or "")
            if positional or where in ("--out", "--env"):
                writing.add(f"{name} {where}")
            if where == "--force":
                forced.add(name)
    assert writing == FILES.keys() | FOLDERS.keys() | NEW_FOLDERS.keys() | ENVIRONMENTS
    assert {name.rpartition(" ")[0] for name in FILES.keys() | FOLDERS.keys() | ENVIRONMENTS} == forced


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run and another, a trial, records, and all kinds of things in a writer's way. No refused command changes it."""
    folder = tmp_path_factory.mktemp("world")
    for seed, name in enumerate(("run", "other")):
        write_run(folder / name, TINY, 60, modules=sd3_modules(6), images=20, seed=seed)
        (folder / name / "config.json").write_text(json.dumps({"output_dir": "output/probe", "seed": 7}))
    (folder / "run" / "sub").mkdir()
    run = api.load(folder / "run")
    export(run, folder / "records.jsonl")
    trial = Trial(folder / "trial", "run", "sd3", 1000, (), (1, 2), 9, (), 1001, 1, ("new",), 20)
    write_files({trial.folder / TRIAL_NAME: json_bytes(trial.to_json())})
    (folder / "mine").mkdir()
    (folder / "mine" / "held.txt").write_text("mine")
    (folder / "plain").write_text("mine")
    write_files({folder / "own.html": report(run).encode()})
    for ending in (".html", ".json", ".csv"):
        (folder / f"foreign{ending}").write_text("mine, of simpletuner-layerprobe")
        (folder / f"folder{ending}").mkdir()
        os.mkfifo(folder / f"pipe{ending}")
        with socket.socket(socket.AF_UNIX) as made, contextlib.chdir(folder):
            made.bind(f"socket{ending}")
        (folder / f"link{ending}").symlink_to("own.html")
        (folder / f"dangling{ending}").symlink_to("absent")
        (folder / f"null{ending}").symlink_to("/dev/null")
    (folder / "link").symlink_to("run")
    (folder / "to-mine").symlink_to("mine")
    (folder / "dangling").symlink_to("absent")
    return folder


class Seeds:
    """All that `trial report` itself asks of a judged trial."""

    seeds = (1, 2)


@pytest.fixture(scope="module")
def drawn(world: Path) -> dict[str, bytes]:
    """The figures in both formats, and the arrays."""
    run = api.load(world / "run")
    return figures(run)[0] | figures(run, file_format="svg")[0]


def everything(folder: Path) -> dict[str, Any]:
    """What is below a folder: the kind of everything, what is in a file, where a link leads."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        mode = os.lstat(path).st_mode
        content: object = None
        if stat.S_ISREG(mode):
            content = path.read_bytes()
        elif stat.S_ISLNK(mode):
            content = os.readlink(path)
        found[str(path.relative_to(folder))] = stat.S_IFMT(mode), content
    return found


def refused(layerprobe: Command, world: Path, arguments: Sequence[object], target: object, *said: str) -> None:
    before = everything(world)
    result = layerprobe(*arguments)
    assert_one_line(result, 1, str(target), *said)
    assert result.out == "" and ".tmp" not in result.err
    assert everything(world) == before


NEVER = {
    "pipe{}": "is a pipe",
    "socket{}": "is a socket",
    "link{}": "is a link",
    "dangling{}": "is a link",
    "null{}": "is a link",
    "/dev/null": "is a device",
    "run/new{}": "lies in the run folder",
    "run/manifest.json": "lies in the run folder",
    "run/config.json": "lies in the run folder",
    "run/sub/new{}": "lies in the run folder",
    "run/sub/deep/new{}": "lies in the run folder",
    "run/sub/../new{}": "lies in the run folder",
    "mine/../link/new{}": "lies in the run folder",
    "run": "",
    "new.npz": "expected a name that ends in",
    "new.txt": "expected a name that ends in",
    "new": "expected a name that ends in",
    "plain/new{}": "Not a directory",
    "mine/" + 300 * "x" + "{}": "File name too long",
}


@pytest.mark.parametrize("command", FILES)
@pytest.mark.parametrize("what", NEVER)
def test_what_is_never_written(layerprobe: Command, world: Path, command: str, what: str) -> None:
    ending, arguments = FILES[command]
    target = world / what.format(ending)
    for force in FORCED:
        refused(layerprobe, world, [*arguments(world, target), *force], target, NEVER[what])


@pytest.mark.parametrize("command", FILES)
def test_a_folder_and_what_is_no_name_are_never_written(layerprobe: Command, world: Path, command: str) -> None:
    ending, arguments = FILES[command]
    for force in FORCED:
        if command != "compare --out":  # which puts its page into it
            refused(layerprobe, world, [*arguments(world, world / f"folder{ending}"), *force], "is a folder")
        refused(layerprobe, world, [*arguments(world, ""), *force], "''", "is no name of a file")
        if command != "export FILE":  # which writes to standard output
            refused(layerprobe, world, [*arguments(world, "-"), *force], "'-'", "is no name of a file")


@pytest.mark.parametrize("command", FILES)
def test_a_shard_is_never_written(layerprobe: Command, world: Path, command: str) -> None:
    shard = next((world / "run").glob("*.arrows"))
    for force in FORCED:
        refused(layerprobe, world, [*FILES[command][1](world, shard), *force], shard)


@pytest.mark.parametrize("command", FILES)
def test_a_foreign_file_is_written_by_force_alone(
    layerprobe: Command, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    ending, arguments = FILES[command]
    target = world / f"foreign{ending}"
    refused(layerprobe, world, arguments(world, target), target, "exists already", "--force")
    if command == "lokr --out":  # test_cli_lokr.py has what takes a proof
        return
    if command == "trial report --out":  # nothing is trained here
        monkeypatch.setattr("simpletuner_layerprobe.trial.report.judged", lambda trial: (None, Seeds))
        monkeypatch.setattr("simpletuner_layerprobe.trial.report.trial_page", lambda *facts: "page")
        monkeypatch.setattr("simpletuner_layerprobe.commands.trial.print_trial", lambda *_, **__: None)
    mine = tmp_path / f"mine{ending}"
    mine.write_text("mine")
    assert layerprobe(*arguments(world, mine), "--force").code == 0
    assert mine.read_bytes() != b"mine" and os.listdir(tmp_path) == [mine.name]


@pytest.mark.parametrize("command", ["report --out", "compare --out"])
def test_a_page_of_the_programs_own_is_written_again(
    layerprobe: Command, world: Path, tmp_path: Path, command: str
) -> None:
    out = tmp_path / "page.html"
    for _ in range(2):
        assert layerprobe(*FILES[command][1](world, out)).code == 0
        assert is_own(out)


def test_the_reports_own_place_is_the_one_place_in_a_run(layerprobe: Command, tiny_run: Path, tmp_path: Path) -> None:
    place = tiny_run / "report.html"
    (tmp_path / "link").symlink_to(tiny_run)
    for out in ((), ("--out", place), ("--out", tmp_path / "link" / "report.html"), ()):
        assert layerprobe("report", tiny_run, *out).code == 0
        assert is_own(place)
    before = everything(tmp_path)
    assert_one_line(layerprobe("compare", tiny_run, tiny_run, "--out", place), 1, "lies in the run folder")
    assert_one_line(layerprobe("compare", tiny_run, tiny_run, "--out", tiny_run), 1, "is a run folder")
    assert everything(tmp_path) == before
    place.write_text("mine")
    assert_one_line(layerprobe("report", tiny_run), 1, f"{place} exists already", "--force")
    assert place.read_text() == "mine"
    place.unlink()
    place.symlink_to(tmp_path / "mine")
    (tmp_path / "mine").write_text("mine")
    for force in FORCED:
        assert_one_line(layerprobe("report", tiny_run, *force), 1, f"{place} is a link")
    assert place.is_symlink() and (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize("command", FOLDERS)
@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("run", "is a run folder"),
        ("link", "is a run folder"),
        ("run/sub", "lies in the run folder"),
        ("run/new", "lies in the run folder"),
        ("run/sub/..", "is a run folder"),
        ("plain", "is no folder"),
        ("pipe.csv", "is no folder"),
        ("dangling", "is no folder"),
        ("/dev/null", "is no folder"),
        ("plain/new", "Not a directory"),
        ("new.png", "has the name of a file"),
        ("c.txt", "has the name of a file"),
    ],
)
def test_folders_that_nothing_is_written_into(
    layerprobe: Command, world: Path, command: str, what: str, said: str
) -> None:
    for force in FORCED:
        refused(layerprobe, world, [*FOLDERS[command](world, world / what), *force], world / what, said)


def test_figures_replace_their_own_alone(
    layerprobe: Command, world: Path, drawn: dict[str, bytes], tmp_path: Path
) -> None:
    write_files({tmp_path / name: content for name, content in drawn.items()})
    draw = ("heatmap", world / "run", "--out", tmp_path, "--format")
    for name, own in drawn.items():
        path, form = tmp_path / name, "svg" if name.endswith("svg") else "png"
        path.write_bytes(b"mine")
        refused(layerprobe, tmp_path, [*draw, form], path, "exists already", "--force")
        path.unlink()
        path.symlink_to("kept")
        for force in FORCED:
            refused(layerprobe, tmp_path, [*draw, form, *force], path, "is a link")
        path.unlink()
        path.write_bytes(own)
    assert layerprobe(*draw, "png").code == 0
    (tmp_path / "heatmap.npz").write_bytes(b"mine")
    assert layerprobe(*draw, "png", "--force").code == 0
    with np.load(tmp_path / "heatmap.npz", allow_pickle=False) as arrays:
        assert "image_mean" in arrays
    assert all(is_own(tmp_path / name) for name in drawn) and sorted(os.listdir(tmp_path)) == sorted(drawn)


@pytest.mark.parametrize("command", NEW_FOLDERS)
@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("run", "exists already and is not an empty folder"),
        ("link", "exists already and is not an empty folder"),
        ("run/sub", "lies in the run folder"),
        ("run/sub/../new", "lies in the run folder"),
        ("mine", "exists already and is not an empty folder"),
        ("to-mine", "exists already and is not an empty folder"),
        ("plain", "is no folder"),
        ("pipe.csv", "is no folder"),
        ("dangling", "is no folder"),
        ("/dev/null", "is no folder"),
        ("plain/new", "Not a directory"),
        ("c.txt", "has the name of a file"),
    ],
)
def test_where_no_folder_is_made(layerprobe: Command, world: Path, command: str, what: str, said: str) -> None:
    refused(layerprobe, world, NEW_FOLDERS[command](world, world / what), world / what, said)


@pytest.mark.parametrize("name", ["", "-"])
@pytest.mark.parametrize("command", [*FOLDERS, *NEW_FOLDERS])
def test_what_is_no_name_of_a_folder(layerprobe: Command, world: Path, command: str, name: str) -> None:
    refused(layerprobe, world, (FOLDERS | NEW_FOLDERS)[command](world, name), f"{name!r} is no name of a folder")


def test_an_environment_is_written_by_the_same_rules(
    layerprobe: Command, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = ("lokr", world / "run", "--params", "60k", "--env", "new")
    folder = tmp_path / "config" / "new"
    folder.mkdir(parents=True)
    for name in ("config.json", "lycoris_config.json"):
        path = folder / name
        path.write_text("mine")
        refused(layerprobe, tmp_path, made, f"config/new/{name} exists already", "--force")
        path.rename(tmp_path / "kept")
        for make in (lambda at: at.symlink_to("../../kept"), os.mkfifo, os.mkdir):
            make(path)
            for force in FORCED:
                refused(layerprobe, tmp_path, [*made, *force], f"config/new/{name} is a", "choose another name")
            path.unlink() if not path.is_dir() else path.rmdir()
    folder.rmdir()
    folder.touch()
    for force in FORCED:
        refused(layerprobe, tmp_path, [*made, *force], "config/new is no folder")
    folder.unlink()
    folder.parent.rmdir()
    monkeypatch.chdir(world / "run")
    for force in FORCED:
        refused(layerprobe, world, [*made, *force], "config/new lies in the run folder")


def test_the_api_goes_by_the_same_rules(world: Path, tmp_path: Path) -> None:
    run = api.load(world / "run")
    before = everything(world)
    plan = api.plan(run, params=60_000)
    for force in (False, True):
        with fails("lies in the run folder"):
            plan.write(world / "run" / "config.json", force=force)
        with fails("lies in the run folder"):
            export(run, world / "run" / "new.csv", force=force)
        with fails("is a pipe"):
            export(run, world / "pipe.csv", force=force)
    with fails("expected a name that ends in .jsonl"):
        export(run, tmp_path / "x.npz")
    with fails("lies in the run folder"):
        merge([world / "run", world / "other"], world / "run" / "new")
    assert everything(world) == before and os.listdir(tmp_path) == []
    export(run, tmp_path / "x.jsonl")
    with fails("exists already"):
        export(run, tmp_path / "x.jsonl")
    export(run, tmp_path / "x.jsonl", force=True)


def test_a_run_is_one_also_when_its_manifest_is_damaged(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "run", tmp_path / "run")
    manifest = tmp_path / "run" / "manifest.json"
    manifest.write_text(manifest.read_text()[:-9])
    with fails("lies in the run folder"):
        require_file(tmp_path / "run" / "new.html")
    manifest.write_text('{"name": "a web app"}')
    require_file(tmp_path / "run" / "new.html")
    manifest.unlink()
    os.mkfifo(manifest)  # which nobody writes to
    require_folder(tmp_path / "run")


def test_what_the_program_made_is_told_by_its_content(world: Path, drawn: dict[str, bytes], tmp_path: Path) -> None:
    page = (world / "own.html").read_bytes()
    made = {"page.html": page, "page.HTM": page, **drawn}
    write_files({tmp_path / name: content for name, content in made.items()})
    assert {Path(name).suffix.lower() for name in made} == MARKS.keys()
    for name in made:
        assert is_own(tmp_path / name), name
        (tmp_path / name).write_text("an article about simpletuner-layerprobe\n" * 1000)
        assert not is_own(tmp_path / name), name
    assert not is_own(tmp_path / "absent.html")


def test_errors_name_what_was_asked_for(
    layerprobe: Command, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk that gives out is never that of a temporary name."""
    real = open

    def full(path: object, mode: str = "r", *rest: Any, **more: Any) -> Any:
        if "x" in mode:
            raise OSError(28, "No space left on device", str(path))
        return real(path, mode, *rest, **more)  # type: ignore[call-overload]

    monkeypatch.setattr(files, "open", full, raising=False)
    monkeypatch.setattr("simpletuner_layerprobe.run.folder.open", full, raising=False)
    for name in ("report --out", "compare --out", "export FILE"):
        ending, arguments = FILES[name]
        target = tmp_path / f"x{ending}" if name == "export FILE" else tmp_path / "deep" / "new" / f"x{ending}"
        refused(layerprobe, tmp_path, arguments(world, target), target, "No space left on device")
    for name in ("import RUN", "merge OUT"):
        target = tmp_path / "deep" / "made"
        refused(layerprobe, tmp_path, NEW_FOLDERS[name](world, target), target, "No space left on device")
