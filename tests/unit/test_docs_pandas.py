from __future__ import annotations

import re
from pathlib import Path

import pytest
from synthetic_run import SD35_LARGE, write_run

from simpletuner_layerprobe.cli import main

PAGE = Path(__file__).parents[2] / "docs" / "pandas.md"


def test_the_example_runs_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (commands,) = re.findall(r"```\n(layerprobe .*?)```", PAGE.read_text(), re.DOTALL)
    write_run(tmp_path / "output" / "sd35-probe" / "layerprobe", SD35_LARGE, 3000)
    monkeypatch.chdir(tmp_path)
    for line in commands.splitlines():
        assert main(line.split()[1:]) == 0
    capsys.readouterr()
    dropped = code.replace('run["caption_dropped"].astype(bool)', "(run.index % 2 == 0)")  # none is dropped in this run
    exec(dropped, {})
    assert len(re.findall(r"^transformer_blocks\.\d+ +", capsys.readouterr().out, re.M)) == 5
