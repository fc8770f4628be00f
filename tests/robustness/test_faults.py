"""Damaged and hostile run folders through the command line: one line, and nothing executed, followed or written."""

from __future__ import annotations

import bz2
import gzip
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from failing import fails
from faults.table import record
from synthetic_run import manifest, write_run

from simpletuner_layerprobe.cli import main
from simpletuner_layerprobe.errors import ProbeError
from simpletuner_layerprobe.lokr.config import read_config, read_options
from simpletuner_layerprobe.lokr.proof import check_config
from simpletuner_layerprobe.run.article import MAX_LINE_BYTES, import_jsonl
from simpletuner_layerprobe.run.manifest import Module
from simpletuner_layerprobe.run.records import Run, create_run, open_run

BLOCKS = {"image": ("a.0", "a.1", "a.2"), "text": ("a.0", "a.1", "a.2")}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return write_run(tmp_path / "run", BLOCKS, 60)


def refused(run: Run, capsys: pytest.CaptureFixture[str], *parts: str) -> str:
    """The line that `layerprobe status` ends with, the test's own folder left out."""
    before = {path: path.lstat().st_mtime_ns for path in run.path.parent.rglob("*")}
    assert main(["status", str(run.path)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("layerprobe: error: ") and error.isascii()
    assert all(part in error for part in parts), error
    assert {path: path.lstat().st_mtime_ns for path in run.path.parent.rglob("*")} == before
    return error.strip().replace(f"{run.path.parent}/", "")


def test_a_shard_cut_at_any_byte(run, capsys):
    path, rest = run.shards[0], sum(open_run(run.path).samples_per_rank().values())
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    places = [0, 1, 7, 8, 9, header - 1, header, header + 1, (header + len(data)) // 2, len(data) - 1]
    for place in places:
        path.write_bytes(data[:place])
        line = refused(run, capsys, path.name, "move it out of the folder")
    path.unlink()
    assert open_run(run.path).sample_count() == rest - 20  # what it tells the user to do
    record("shard cut at 10 places (header, its end, data)", tried=len(places), committed=40, lost=0, seen=line)


def test_flipped_bits_in_a_shard(run, capsys):
    path = run.shards[1]
    data = path.read_bytes()
    draw = np.random.default_rng(1)
    for bit in draw.integers(0, 8 * len(data), 60).tolist():
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        line = refused(run, capsys, path.name)
    damaged = bytearray(data)
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    line = refused(run, capsys, "is damaged (the checksum of")
    path.write_bytes(data)
    assert sum(map(len, open_run(run.path).rows())) == 60
    record("shard with one flipped bit, anywhere", tried=61, committed=40, lost=0, seen=line)


def test_foreign_files_and_links(run, capsys, tmp_path):
    shards = run.path / "shards"
    for name in ("notes.txt", "model.safetensors", ".DS_Store", "rank0-0.safetensors"):
        (shards / name).write_bytes(b"\x80\x04cos\nsystem\n(S'touch pwned'\ntR.")
    assert sum(map(len, open_run(run.path).rows())) == 60
    capsys.readouterr()
    secret = tmp_path / "secret"
    secret.write_bytes(run.shards[0].read_bytes())
    (shards / "rank00009-000000.safetensors").symlink_to(secret)
    line = refused(run, capsys, "rank00009", "holds no links")
    (shards / "rank00009-000000.safetensors").unlink()
    os.mkfifo(shards / "rank00009-000000.safetensors")
    refused(run, capsys, "not a plain file")  # and it does not wait for somebody to write
    (shards / "rank00009-000000.safetensors").unlink()
    text = (run.path / "manifest.json").read_bytes()
    (run.path / "manifest.json").unlink()
    (tmp_path / "elsewhere").write_bytes(text)
    (run.path / "manifest.json").symlink_to(tmp_path / "elsewhere")
    refused(run, capsys, "holds no links")
    (run.path / "manifest.json").unlink()
    (run.path / "manifest.json").write_bytes(text)
    (tmp_path / "link").symlink_to(run.path)
    assert open_run(tmp_path / "link").sample_count() == 60  # the folder itself may be one: the user named it
    record("foreign files (ignored); links and pipes in place of shards", tried=7, committed=60, lost=0, seen=line)


def test_a_newer_manifest(run, capsys):
    path = run.path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 99}))
    line = refused(run, capsys, "schema 99", "upgrade simpletuner-layerprobe")
    record("manifest of a newer schema", tried=1, committed=60, lost=0, seen=line)


def test_a_flipped_bit_in_the_manifest_is_noticed_or_only_tells_another_time(run):
    path = run.path / "manifest.json"
    data = path.read_bytes()
    told = [
        place for place, _ in enumerate(data) if b'"versions"' in data[: place + 10] and b'"source"' not in data[:place]
    ]
    unnoticed = []
    for place, byte in enumerate(data):
        path.write_bytes(data[:place] + bytes([byte ^ 1 << place % 7]) + data[place + 1 :])
        try:
            list(open_run(run.path).rows())
        except ProbeError:
            continue
        else:
            unnoticed.append(place)
    spaces = [place for place in unnoticed if data[place : place + 1].isspace()]
    inside = {place for place in unnoticed if place not in spaces}
    assert all(data[:place].rfind(b'"created"') > 0 or place in told for place in inside)


def test_a_header_that_claims_too_much_takes_no_memory(run, capsys):
    for shape, end in (([2**60], 2**63), ([2**31, 2**31], 8), ([-1], 0)):
        header = json.dumps({"sigma": {"dtype": "F64", "shape": shape, "data_offsets": [0, end]}}).encode()
        run.shards[0].write_bytes(struct.pack("<Q", len(header)) + header)
        refused(run, capsys, run.shards[0].name)
    run.shards[0].write_bytes(struct.pack("<Q", 2**62) + b"{}")
    refused(run, capsys, "is not a shard (a header of 4611686018427387904 bytes")


@pytest.mark.parametrize("suffix", ["gz", "bz2"])
def test_a_bomb_of_one_endless_line_is_refused_in_little_memory(tmp_path, suffix):
    size = 400 * 1024 * 1024 if suffix == "gz" else 32 * 1024 * 1024
    with (gzip.GzipFile if suffix == "gz" else bz2.BZ2File)(tmp_path / "bomb", "wb", compresslevel=1) as file:
        for _ in range(size // 2**22):
            file.write(b"[" * 2**22)
    code = (
        "import sys\n"
        "from simpletuner_layerprobe.cli import main\n"
        "code = main(['import', sys.argv[1], sys.argv[2]])\n"
        # Not ru_maxrss: that starts with what the process had that started this one.
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))\n"
        "sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "bomb"), str(tmp_path / "run")], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert f"line 1: over {MAX_LINE_BYTES} bytes long" in done.stderr
    assert int(done.stdout) < 200 * 1024  # kB
    assert os.listdir(tmp_path) == ["bomb"]


def test_hostile_names_stay_text(tmp_path, capsys):
    script = "<script>alert(1)</script>\"'&amp;"
    blocks = {"image": (f"a.{script}", "a.1"), "text": (f"a.{script}", "a.1")}
    made = write_run(tmp_path / "run", blocks, 40, family=script, flavour=script)
    assert main(["report", str(made.path)]) == 0
    page = (made.path / "report.html").read_text()
    assert "<script>alert" not in page and "&lt;script&gt;alert" in page
    for bad in ("\x1b[2J", "a\u202eb", "a\nb", "a\x00b"):
        with fails("expected a printable string"):
            manifest(BLOCKS, family=bad)


def test_a_report_replaces_no_file_that_a_link_points_to(run, tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("mine")
    (run.path / "report.html").symlink_to(mine)
    assert main(["report", str(run.path)]) == 0
    assert mine.read_text() == "mine" and not (run.path / "report.html").is_symlink()


def test_options_in_a_run_folder_are_data(run, tmp_path, capsys):
    (run.path / "config.json").symlink_to("/dev/zero")
    with fails("holds no links"):
        read_options(run.path)
    (run.path / "config.json").unlink()
    (run.path / "config.json").write_text('{"a":' + "[" * 60 + "]" * 60 + "}")
    with fails("over 50 lists and objects in each other"):
        read_options(run.path)
    (run.path / "config.json").write_text('{"a": "\\ud800"}')
    with fails("is not JSON"):
        read_options(run.path)
    for name in ("../../x", "a/b", "a\x00b", "/etc/x", "..", "-x"):
        command = ["lokr", str(run.path), "--unverified", f"--env={name}", "--config-dir", str(tmp_path / "config")]
        assert main(command) == 1
        capsys.readouterr()
    assert not (tmp_path / "config").exists()


MODULES = (Module("blocks", "ModuleList", ()), Module("blocks.aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "Linear", (8, 8)))


@pytest.mark.parametrize(
    ("preset", "changes", "text"),
    [
        ({"target_name": ["blocks.(a+)+$b"]}, {}, "take over 1 s to match"),
        ({"target_name": ["(" * 3000]}, {}, "is not a regular expression"),
        ({"target_name": ["a{99999999999}"]}, {}, "is not a regular expression"),
        ({}, {"linear_dim": 2**70}, "linear_dim in"),
        ({}, {"linear_dim": 2**60, "algo": "lora"}, "LyCORIS"),
        ({}, {"factor": 10**30}, "the factor in"),
        ({}, {"preset": "/dev/zero"}, "nor a TOML file"),
    ],
)
def test_hostile_lycoris_configs(tmp_path, monkeypatch, preset, changes, text):
    monkeypatch.setattr("simpletuner_layerprobe.lokr.proof.MATCH_SECONDS", 1.0)
    config = {"algo": "lokr", "multiplier": 1, "linear_dim": 100, "linear_alpha": 1, "apply_preset": preset} | changes
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    with fails(text):
        check_config(read_config(path), MODULES)


def test_a_config_of_endless_size_is_not_read(tmp_path):
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(10**12)
    with fails("takes over 33554432 bytes"):
        read_config(tmp_path / "config.json")


def test_a_folder_that_refuses_to_be_written(tmp_path):
    if os.geteuid():
        pytest.skip("changing the user needs root")
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents[:3]:
        parent.chmod(0o755)
    made = write_run(tmp_path / "run", BLOCKS, 20)
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from simpletuner_layerprobe.errors import ProbeError\n"
        "from simpletuner_layerprobe.run.manifest import read_manifest\n"
        "from simpletuner_layerprobe.run.records import ShardWriter, create_run, open_run\n"
        "run = open_run(sys.argv[1]); rows = next(run.rows())\n"
        "os.setuid(65534)\n"
        "assert run.sample_count() == 20\n"
        "new = run.path.parent / 'new'\n"
        "write = lambda: ShardWriter(run.path, run.manifest, 0).write(rows)\n"
        "for do in (write, lambda: create_run(new, run.manifest)):\n"
        "    try:\n"
        "        do()\n"
        "    except ProbeError as error:\n"
        "        print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(made.path)], capture_output=True, text=True)
    lines = done.stdout.replace(f"{tmp_path}/", "").splitlines()
    assert done.returncode == 0 and len(lines) == 2, done.stderr
    assert all("Permission denied" in line for line in lines), lines
    record("folder that may not be written", tried=2, committed=20, lost=0, seen=f"layerprobe: error: {lines[0]}")


def test_a_limit_on_file_sizes_leaves_no_half_shard(tmp_path):
    import resource

    made = write_run(tmp_path / "run", BLOCKS, 20, shards=1)
    (rows,) = made.rows()
    from simpletuner_layerprobe.run.records import ShardWriter

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with fails("File too large"):
            ShardWriter(made.path, made.manifest, 0).write(rows)
        with fails("File too large"):
            create_run(tmp_path / "new", manifest({"image": tuple(map(str, range(900)))}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(made.path / "shards") == ["rank00000-000000.safetensors"]
    assert os.listdir(tmp_path / "new") == []
    assert open_run(made.path).sample_count() == 20


def test_importing_hostile_records_writes_nothing(tmp_path):
    (tmp_path / "records").write_bytes(b"\x80\x04cos\nsystem\n(S'touch pwned'\ntR.")
    with fails("line 1: not JSON"):
        import_jsonl(tmp_path / "records", tmp_path / "deep" / "run")
    assert os.listdir(tmp_path) == ["records"]
