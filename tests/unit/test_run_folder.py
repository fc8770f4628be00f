"""Files and folders: complete or absent, and never in place of something else."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from failing import fails

from simpletuner_layerprobe.run.folder import new_folder, write_new_file


def test_a_new_file_is_complete_or_absent(tmp_path: Path) -> None:
    def interrupted(file: Any) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_new_file(tmp_path / "file", interrupted)
    assert os.listdir(tmp_path) == []
    with fails("cannot write"):
        write_new_file(tmp_path / "absent" / "file", lambda file: file.write(b""))
    (tmp_path / "plain").touch()
    with fails("cannot write"):
        write_new_file(tmp_path / "plain" / "file", lambda file: file.write(b""))


def test_a_name_that_is_taken_while_the_file_is_written_stays(tmp_path: Path) -> None:
    path = tmp_path / "file"

    def overtaken(file: Any) -> None:
        file.write(b"second")
        path.write_bytes(b"first")

    with pytest.raises(FileExistsError):
        write_new_file(path, overtaken)
    assert path.read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["file"]


def test_without_hard_links_nothing_is_replaced_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*paths: Any) -> None:
        raise PermissionError(1, "Operation not permitted")  # what exFAT answers

    monkeypatch.setattr(os, "link", refused)
    path = tmp_path / "file"
    write_new_file(path, lambda file: file.write(b"first"))
    assert path.read_bytes() == b"first"
    with pytest.raises(FileExistsError):
        write_new_file(path, lambda file: file.write(b"second"))
    other = tmp_path / "other"
    with pytest.raises(FileExistsError):
        write_new_file(other, lambda file: other.write_bytes(b"first"))
    assert other.read_bytes() == b"first"
    assert sorted(os.listdir(tmp_path)) == ["file", "other"]


def test_a_new_folder_is_complete_or_absent(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "run"

    def interrupted() -> None:
        with new_folder(target) as staging:
            (staging / "half").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert os.listdir(tmp_path) == []
    with new_folder(target):
        pass
    assert os.listdir(tmp_path / "deep") == ["run"]
    with fails("exists already and is not an empty folder; choose a new one"), new_folder(tmp_path / "deep"):
        pass
