"""Files that others wrote, and files of our own: whole or not there."""

from __future__ import annotations

import json
import os

import pytest
from failing import fails

from simpletuner_layerprobe import files
from simpletuner_layerprobe.files import json_bytes, read_object, write_files


def test_write_and_read(tmp_path):
    path = tmp_path / "new" / "lycoris_config.json"
    write_files({path: json_bytes({"b": 1, "a": "ß"})})
    assert read_object(path, "a config") == {"b": 1, "a": "ß"}
    assert path.read_text(encoding="utf-8") == '{\n  "b": 1,\n  "a": "ß"\n}\n'
    assert os.listdir(path.parent) == [path.name]


def test_write_does_not_overwrite(tmp_path):
    path = tmp_path / "lycoris_config.json"
    path.write_text("mine")
    with fails("exists already; it is not overwritten without --force"):
        write_files({path: b"{}", tmp_path / "other": b""})
    assert path.read_text() == "mine"
    write_files({path: b"{}"}, force=True)
    assert read_object(path, "a config") == {} and os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[]", "holds a JSON list; expected a config, a JSON object"),
        (b'{"a": "\\ud800"}', "is not JSON"),
        (b'{"a": ' * 2000 + b"1" + b"}" * 2000, "is not JSON"),
        (b'{"a": ' * 60 + b"1" + b"}" * 60, "over 50 lists and objects in each other"),
    ],
)
def test_what_is_no_json_object(tmp_path, content, text):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with fails(text):
        read_object(path, "a config")


def test_what_cannot_be_read(tmp_path, monkeypatch):
    with fails("No such file or directory; expected a config"):
        read_object(tmp_path / "absent.json", "a config")
    with fails("cannot read"):
        read_object(tmp_path, "a config")
    monkeypatch.setattr(files, "MAX_JSON_BYTES", 10)
    (tmp_path / "large.json").write_text(json.dumps({"name": "longer"}))
    with fails("takes over 10 bytes"):
        read_object(tmp_path / "large.json", "a config")


@pytest.mark.parametrize("before", [None, "mine"])
def test_all_files_or_none_where_the_disk_gives_out_between_two(tmp_path, monkeypatch, before):
    rename, renamed = os.replace, []

    def once(source, target):
        if renamed:
            raise OSError(28, "No space left on device", str(source), None, str(target))
        renamed.append(target)
        rename(source, target)

    monkeypatch.setattr(os, "replace", once)
    folder = tmp_path if before else tmp_path / "new"
    if before:
        (folder / "a").write_text(before)
    with fails(f"cannot write {folder / 'b'}: No space left on device"):
        write_files({folder / "a": b"1", folder / "b": b"2"}, force=True)
    assert os.listdir(tmp_path) == (["a"] if before else [])
    assert not before or (folder / "a").read_text() == before


def test_an_interruption_leaves_no_temporary_file(tmp_path, monkeypatch):
    def interrupted(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_files({tmp_path / "a": b"1"})
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "config").write_text("a file")
    with fails("cannot write"):
        write_files({tmp_path / "config" / "mine" / "a": b""})
    assert os.listdir(tmp_path) == ["config"]
