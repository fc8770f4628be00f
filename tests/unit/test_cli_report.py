from __future__ import annotations

import json
from pathlib import Path

import pytest
from synthetic_run import SD35_LARGE, manifest, sd3_modules, write_run

from simpletuner_layerprobe.cli import main
from simpletuner_layerprobe.run.records import create_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_run(tmp_path / "run", SD35_LARGE, 1000, peaks=[("image", 35)], modules=sd3_modules(38))
    return tmp_path / "run"


def test_findings_in_words_and_as_json(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["findings", str(run)]) == 0
    said = capsys.readouterr().out
    assert "Critical blocks, image stream\n  block 35 changes the hidden states" in said
    assert main(["findings", str(run), "--json", "--tokens", "mean"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["samples"] == 1000 and found["sections"][0]["findings"][0]["blocks"] == ["transformer_blocks.35"]


def test_the_report_stands_in_the_run_or_where_it_was_asked_for(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(run)]) == 0
    assert main(["report", str(run), "--out", str(tmp_path / "made" / "page.html"), "--bins", "5"]) == 0
    paths = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert paths == [run / "report.html", tmp_path / "made" / "page.html"]
    assert all(path.read_text().startswith("<!doctype html>") for path in paths)


@pytest.mark.parametrize("command", ["findings", "report"])
def test_a_run_without_samples_is_one_line(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    create_run(tmp_path / "run", manifest(SD35_LARGE))
    assert main([command, str(tmp_path / "run")]) == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and "has no samples" in said.err
