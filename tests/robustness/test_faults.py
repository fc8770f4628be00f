"""Damaged and hostile run folders: one line, nothing executed, followed or written; and disks that refuse."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from failing import fails
from faults.table import record
from synthetic_run import manifest, read_rows, rows, write_run

from simpletuner_layerprobe.errors import RunError
from simpletuner_layerprobe.run.article import import_article
from simpletuner_layerprobe.run.load import RunData, load_run
from simpletuner_layerprobe.run.manifest import create_run
from simpletuner_layerprobe.run.records import RecordWriter

BLOCKS = {"image": ("a.0", "a.1", "a.2"), "text": ("a.0", "a.1", "a.2")}


@pytest.fixture
def run(tmp_path: Path) -> RunData:
    """Sixty samples in three stream files of twenty."""
    return write_run(tmp_path / "run", BLOCKS, 60)


def refused(run: RunData, *parts: str) -> str:
    """The line with which the command line ends, the test's own folder left out; nothing in the folder changes."""
    before = {path: path.lstat().st_mtime_ns for path in run.path.parent.rglob("*")}
    with fails(parts[0]) as error:
        read_everything(run.path)
    line = f"layerprobe: error: {error.value}"
    assert all(part in line for part in parts), line
    assert {path: path.lstat().st_mtime_ns for path in run.path.parent.rglob("*")} == before
    return line.replace(f"{run.path.parent}/", "")


def read_everything(folder: Path) -> int:
    again = load_run(folder)
    for reading in again.readings:
        assert len(again.distances("image", reading)) == again.samples
    return again.samples


def test_a_stream_file_cut_at_any_byte(run):
    """What a killed process leaves; of a file that was closed, somebody else's cut is no different."""
    path = run.files[0].path
    data = path.read_bytes()
    places = [0, 1, 7, 8, 9, len(data) // 3, len(data) // 2, len(data) - 9, len(data) - 8, len(data) - 1]
    for place in places:
        path.write_bytes(data[:place])
        kept = 20 if place >= len(data) - 8 else 0
        assert read_everything(run.path) == 40 + kept, place
    record(
        "stream file cut at 10 places: its whole batches stay", tried=len(places), committed=40, lost=0, seen="nothing"
    )


def test_flipped_bits_in_a_stream_file(run):
    path = run.files[1].path
    data = path.read_bytes()
    draw = np.random.default_rng(1)
    unnoticed = 0
    for bit in draw.integers(0, 8 * (len(data) - 8), 60).tolist():
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            assert read_everything(run.path) == 60  # padding between the columns
            unnoticed += 1
        except RunError:
            line = refused(run, f"{path.name} is damaged in", "move it out of the folder to read the run without it")
    assert unnoticed < 20
    os.rename(path, path.with_suffix(".damaged"))
    assert read_everything(run.path) == 40  # what it tells the user to do
    record("stream file with one flipped bit", tried=60, committed=40, lost=0, seen=line)


def test_foreign_files_and_links(run, tmp_path):
    for name in ("notes.txt", "model.arrows", ".DS_Store", "rank-0.arrows"):
        (run.path / name).write_bytes(b"\x80\x04cos\nsystem\n(S'touch pwned'\ntR.")
    assert read_everything(run.path) == 60
    secret = tmp_path / "secret"
    secret.write_bytes(run.files[0].path.read_bytes())
    link = run.path / run.files[0].path.name.replace("rank-0000", "rank-0009")
    link.symlink_to(secret)
    line = refused(run, "rank-0009", "holds no links")
    link.unlink()
    os.mkfifo(link)
    refused(run, "not a plain file")  # and it does not wait for somebody to write
    link.unlink()
    text = (run.path / "manifest.json").read_bytes()
    (run.path / "manifest.json").unlink()
    (tmp_path / "elsewhere").write_bytes(text)
    (run.path / "manifest.json").symlink_to(tmp_path / "elsewhere")
    refused(run, "holds no links")
    (run.path / "manifest.json").unlink()
    (run.path / "manifest.json").write_bytes(text)
    (tmp_path / "link").symlink_to(run.path)
    assert read_everything(tmp_path / "link") == 60  # the folder itself may be a link: the user named it
    record(
        "foreign files (ignored); links and pipes in place of stream files", tried=7, committed=60, lost=0, seen=line
    )


def test_manifests_of_other_versions(run):
    path = run.path / "manifest.json"
    value = json.loads(path.read_text())
    for schema, text in (
        (1, "of a version before 0.2; this one reads 3: record it anew"),
        (99, "upgrade simpletuner-la"),
    ):
        path.write_text(json.dumps(value | {"schema": schema}))
        line = refused(run, f"schema {schema}", text)
    record("manifest of an older or newer schema", tried=2, committed=60, lost=0, seen=line)


def test_a_flipped_bit_in_the_manifest_is_noticed_or_only_tells_another_story(run):
    path = run.path / "manifest.json"
    data = path.read_bytes()
    story = (b'"run_id"', b'"versions"', b'"created"', b'"source"')
    for place, byte in enumerate(data):
        path.write_bytes(data[:place] + bytes([byte ^ 1 << place % 7]) + data[place + 1 :])
        try:
            read_everything(run.path)
        except RunError:
            continue
        line = data[data.rfind(b"\n", 0, place) + 1 :].split(b"\n")[0]
        assert line.startswith(story) or data[place : place + 1].isspace(), line


# Disks that refuse


def test_a_folder_that_refuses_to_be_written(tmp_path):
    if os.geteuid():
        pytest.skip("changing the user needs root")
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents[:3]:
        parent.chmod(0o755)
    made = write_run(tmp_path / "run", BLOCKS, 20)
    read = read_rows(made.path, made.manifest)
    os.seteuid(65534)
    try:
        assert load_run(made.path).samples == 20
        with fails("Permission denied") as error:
            RecordWriter(made.path, made.manifest, 0).write(read)
        with fails("Permission denied"):
            create_run(tmp_path / "new", made.manifest)
    finally:
        os.seteuid(0)
    line = f"layerprobe: error: {error.value}".replace(f"{tmp_path}/", "")
    record("folder that may not be written", tried=2, committed=20, lost=0, seen=line)


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own, which root alone can make."""
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], capture_output=True
    ).returncode:
        pytest.skip("mounting needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def numbered(first: int, count: int) -> object:
    """Rows whose sigma and distances say which they are."""
    number_N = np.arange(first, first + count)
    columns = manifest(BLOCKS).columns()
    values = {key: np.repeat(number_N[:, None], len(blocks), 1).astype(np.float32) for key, blocks in columns.items()}
    return rows(number_N / 2**20, values)


def test_a_full_disk_then_room(tmp_path):
    """What was committed stays, what was refused is not there; the same rows are written again once there is room."""
    with small_disk(tmp_path / "disk", "200k") as disk:
        what = create_run(disk / "run", manifest(BLOCKS))
        writer = RecordWriter(disk / "run", what, 0)
        committed, error = 0, None
        while error is None:
            try:
                writer.write(numbered(committed, 10))
                committed += 10
            except RunError as refused:
                error = str(refused)
        assert committed > 200 and "No space left on device" in error and "\n" not in error
        for _ in range(3):  # it is still full: a session tries again and again
            with fails("No space left on device"):
                writer.write(numbered(committed, 10))
        assert load_run(disk / "run").samples == committed
        subprocess.run(["mount", "-o", "remount,size=1m", str(disk)], check=True)
        writer.write(numbered(committed, 10))
        writer.close()
        read = read_rows(disk / "run", what)
        assert (read.sigma_N * 2**20).tolist() == list(range(committed + 10))
        assert (read.distances["text", "mean"][:, 2] == np.arange(committed + 10)).all()
        assert len(list((disk / "run").glob("*.arrows"))) == 2
    line = f"layerprobe: error: {error.replace(f'{tmp_path}/disk/', '')}"
    record("disk full in a flush (tmpfs of 200 kB), then room made", tried=4, committed=committed, lost=0, seen=line)


def test_a_full_disk_and_an_import(tmp_path):
    with small_disk(tmp_path / "disk", "128k") as disk:
        line = json.dumps({"timestep": 0.5, "hidden_states": [0.5] * 50}) + "\n"
        (tmp_path / "records").write_text(line * 5000)
        with fails("No space left on device"):
            import_article(tmp_path / "records", disk / "run")
        assert os.listdir(disk) == []


class Disk:
    """Fails the `at`-th of the calls by which a writer gets at the disk; counts them all. Writes are short."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int, lasting: bool) -> None:
        self.at, self.lasting, self.count, self.failed = at, lasting, 0, 0
        for name in ("open", "write", "fsync", "ftruncate", "unlink"):
            patch.setattr(os, name, self.failing(name, getattr(os, name)))

    def failing(self, name, call):
        def wrapped(*arguments, **options):
            self.count += 1
            if self.count - 1 == self.at or (self.lasting and self.at < self.count <= self.at + 7):
                self.failed += 1
                if name == "write":
                    call(arguments[0], arguments[1][: len(arguments[1]) // 3])  # a part of it gets to the disk
                raise OSError(errno.EIO, "Input/output error")
            if name == "write" and len(arguments[1]) > 700:
                return call(arguments[0], arguments[1][:700])
            return call(*arguments, **options)

        return wrapped


@pytest.mark.parametrize("lasting", [False, True])
def test_a_disk_that_fails_at_any_call_loses_and_doubles_nothing(tmp_path, monkeypatch, lasting):
    """A session that writes the same rows again until they are taken; a call fails once, or seven in a row."""
    at = tried = committed = 0
    error = ""
    while True:
        folder = tmp_path / str(at)
        what = create_run(folder, manifest(BLOCKS))
        with monkeypatch.context() as patch:
            disk = Disk(patch, at, lasting)
            writer = RecordWriter(folder, what, 0)
            for first in range(0, 50, 10):
                while True:
                    try:
                        writer.write(numbered(first, 10))
                        break
                    except RunError as refused:
                        error = str(refused)
                assert (read_rows(folder, what).sigma_N * 2**20).tolist() == list(range(first + 10))
            writer.close()
        assert (read_rows(folder, what).sigma_N * 2**20).tolist() == list(range(50))
        if not disk.failed:
            break
        assert "Input/output error" in error and "\n" not in error
        committed += 50
        tried += disk.failed
        at += 1
    assert at > 30
    name = "seven calls in a row" if lasting else "one call"
    fault = f"input/output error at every call of the writer, {name}; the same rows are written again"
    record(
        fault, tried=tried, committed=committed, lost=0, seen="layerprobe: error: cannot write ...: Input/output error"
    )
