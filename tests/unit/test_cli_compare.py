from __future__ import annotations

import json
from pathlib import Path

import pytest
from synthetic_run import FLUX_DEV, SD35_LARGE, write_run

from simpletuner_layerprobe.cli import main


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "a", SD35_LARGE, 2000, peaks=[("image", 35)])
    write_run(folder / "b", SD35_LARGE, 2000, seed=1, peaks=[("image", 35), ("text", 10)], flavour="medium")
    return str(folder / "a"), str(folder / "b")


def test_changes_as_text_json_and_page(
    runs: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *runs, "--out", str(tmp_path / "page.html")]) == 0
    said = capsys.readouterr().out
    assert f"A  {runs[0]}: sd3 large, 2,000 samples" in said and "differs: flavour: large in A, medium in B" in said
    assert "Text stream: 1 of 37 blocks changed, 10 of 370 cells" in said
    line = next(line.split() for line in said.splitlines() if line.startswith("  10  transformer_blocks.10  0"))
    assert line[4].startswith("+0.") and "< 1e-6" in " ".join(line) and " ".join(line).endswith("0 to 1")
    assert "Image stream: 0 of 38 blocks changed, 0 of 380 cells" in said
    assert "Factors (preset article): 1 changed" in said and said.endswith(f"written: {tmp_path / 'page.html'}\n")
    assert main(["compare", *runs, "--json", "--out", str(tmp_path / "folder"), "--bins", "5", "--tokens", "mean"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["bins"], found["tokens"], found["samples"]) == (5, "mean", {"a": 2000, "b": 2000})
    assert [i for i, changed in enumerate(found["streams"]["text"]["levels"]["changed"]) if changed] == [10]
    assert found["factors"]["verdict"][10] == "changed"
    for page in (tmp_path / "page.html", tmp_path / "folder" / "compare.html"):
        assert page.read_text().startswith("<!doctype html>")


def test_nothing_changed_is_no_error(runs: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", runs[0], runs[0]]) == 0
    said = capsys.readouterr().out
    assert "Image stream: 0 of 38 blocks changed, 0 of 380 cells" in said and "0 changed" in said


def test_problems_are_one_line(runs: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "flux", FLUX_DEV, 30)
    for second, text in ((tmp_path / "flux", "A has 38, B has 57"), (tmp_path / "none", "does not exist")):
        assert main(["compare", runs[0], str(second), "--out", str(tmp_path / "page.html")]) == 1
        said = capsys.readouterr()
        assert said.out == "" and said.err.count("\n") == 1 and text in said.err
    assert not (tmp_path / "page.html").exists()


def test_export_tells_formats_by_their_names(
    runs: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    starts = {"t.csv": b"sigma,loss,", "T.csv.gz": b"\x1f\x8b", "t.csv.bz2": b"BZh", "t.parquet": b"PAR1"}
    for name, start in (*starts.items(), ("t.jsonl", b'{"timestep": ')):
        assert main(["export", runs[0], str(tmp_path / name)]) == 0
        assert capsys.readouterr().out == f"2,000 samples written to {tmp_path / name}\n"
        assert (tmp_path / name).read_bytes().startswith(start)
    with pytest.raises(SystemExit) as left:
        main(["export", runs[0], str(tmp_path / "new.csv"), "--tokens", "last"])
    said = capsys.readouterr().err
    assert left.value.code == 2 and said.count("\n") == 1 and "--tokens: a table has all readings" in said
    assert not (tmp_path / "new.csv").exists()
