"""Three hundred command lines of clumsy and hostile users.

Whatever is typed, a command ends with 0, 1, 2 or 130, says at most one line on stderr and nothing that a terminal would
act on, changes none of its inputs and takes less than ten seconds of CPU time.

In the tables `@name` is an input (see `inputs`), `OUT` a folder of the command's own.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import lzma
import os
import shlex
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import TINY
from safetensors.numpy import save_file
from synthetic_run import manifest, rows, sd3_modules, write_ablated_run, write_rows, write_run

from simpletuner_layerprobe.cli import main
from simpletuner_layerprobe.run.manifest import create_run

# torchao, which diffusers imports, has a string with a stray backslash.
pytestmark = pytest.mark.filterwarnings("ignore:invalid escape sequence:SyntaxWarning")

MODULES = sd3_modules(6)
MOST_SECONDS = 10.0
GOOD = {"algo": "lokr", "multiplier": 1, "linear_dim": 10000, "linear_alpha": 1, "full_matrix": True, "factor": 4}


def names(*patterns: str, **settings: Any) -> dict[str, Any]:
    """A preset that names these modules."""
    settings = settings or {"factor": 4}
    return {"use_fnmatch": True, "target_module": [], "name_algo_map": dict.fromkeys(patterns, settings)}


EVERY = {"apply_preset": names("transformer_blocks.*")}
CONFIGS: dict[str, dict[str, Any]] = {
    "good": GOOD | EVERY,
    "other": GOOD | {"apply_preset": names("single_transformer_blocks.*")},
    "part": GOOD | {"apply_preset": names("transformer_blocks.0.*")},
    "facter": GOOD | EVERY | {"facter": 8},
    "inside": GOOD | {"apply_preset": names("transformer_blocks.*", facter=2)},
    "no-algo": {key: value for key, value in GOOD.items() if key != "algo"},
    "algo": GOOD | {"algo": "lorka"},
    "algo-number": GOOD | {"algo": 7},
    "zero": GOOD | EVERY | {"multiplier": 0.5},
    "factor": GOOD | {"factor": 0},
    "factor-text": GOOD | {"factor": "four"},
    "factor-huge": GOOD | {"factor": 10**30},
    "dim-text": GOOD | {"linear_dim": "many"},
    "dim-list": GOOD | {"linear_dim": [1]},
    "dim-huge": GOOD | EVERY | {"algo": "lora", "linear_dim": 2**62},
    "alpha-null": GOOD | {"linear_alpha": None},
    "dropout-list": GOOD | EVERY | {"module_dropout": [1]},
    "dropout-text": GOOD | EVERY | {"rank_dropout": "much"},
    "preset-list": GOOD | {"apply_preset": []},
    "preset-key": GOOD | {"apply_preset": {"target_modul": []}},
    "preset-names": GOOD | {"apply_preset": {"name_algo_map": ["a"]}},
    "preset-target": GOOD | {"apply_preset": {"target_module": "Attention"}},
    "preset-file": GOOD | {"preset": "/dev/zero"},
    "preset-path": GOOD | {"preset": "../../nowhere.toml"},
    "preset-number": GOOD | {"preset": 3},
    "regex": GOOD | {"apply_preset": {"target_module": [], "target_name": ["(a+"]}},
    "regex-slow": GOOD | {"apply_preset": {"target_module": [], "target_name": ["transformer_blocks.(((.+)+)+)+!"]}},
    "many": GOOD | {"apply_preset": names(*(f"blocks.{number}.ff" for number in range(50_000)))},
    "escape": GOOD | {"apply_preset": names("transformer_blocks.0.*", "\x1b[2Jblock\nok  \u202e")},
}
TEXTS = {
    "empty.json": b"",
    "list.json": b"[1, 2]",
    "string.json": b'"lokr"',
    "null.json": b"null",
    "cut.json": b'{"algo": "lokr", ',
    "nan.json": b'{"algo": "lokr", "multiplier": NaN, "linear_dim": 4, "linear_alpha": 1}',
    "infinite.json": b'{"algo": "lokr", "multiplier": 1e999, "linear_dim": 4, "linear_alpha": 1}',
    "digits.json": b'{"algo": "lokr", "multiplier": ' + b"9" * 5000 + b"}",
    "deep.json": b'{"a":' * 20_000 + b"1" + b"}" * 20_000,
    "lists.json": b"[" * 100_000,
    "surrogate.json": b'{"algo": "\\ud800"}',
    "latin.json": '{"algo": "é"}'.encode("latin-1"),
    "utf16.json": json.dumps(GOOD).encode("utf-16"),
    "bom.json": b"\xef\xbb\xbf" + json.dumps(GOOD).encode(),
    "twice.json": json.dumps(GOOD | EVERY).replace('"factor": 4', '"factor": 2, "factor": 4').encode(),
    "yaml.json": b"algo: lokr\nfactor: 4\n",
    "noise.bin": np.random.default_rng(0).bytes(4000),
    "zeros.bin": bytes(4000),
    "text.txt": b"hello\n",
    "picture.png": b"\x89PNG\r\n\x1a\n" + bytes(100),
    "empty.safetensors": b"",
    "huge.safetensors": (2**60).to_bytes(8, "little") + b"{}",
}
RECORD = b'{"timestep": 0.5, "encoder_hidden_states": [0.1], "hidden_states": [0.1, 0.2]}\n'
RECORDS = {
    "two": RECORD + RECORD.replace(b"0.2]", b"2]"),
    "negative": RECORD + RECORD.replace(b"0.2]", b"-0.1]"),
    "sigma": RECORD.replace(b"0.5", b"1.5"),
    "nan": RECORD.replace(b"0.2]", b"NaN]"),
    "text": RECORD.replace(b"0.2]", b'"0.2"]'),
    "true": RECORD.replace(b"0.2]", b"true]"),
    "short": RECORD + RECORD.replace(b", 0.2]", b"]"),
    "none": RECORD.replace(b"hidden_states", b"other_states"),
    "number": b"3\n",
    "list": b"[0.1, 0.2]\n",
    "not": RECORD + b"{not json\n",
    "deep": b'{"timestep":' + b"[" * 50_000 + b"\n",
    "digits": RECORD.replace(b"0.5", b"9" * 5000),
    "long": b"[" * (5 * 2**20),
    "wide": b'{"timestep": 0.5, "hidden_states": [' + b"0," * 5000 + b"0]}\n",
    "csv": b"timestep,image\n0.5,0.1\n",
    "image": RECORD.replace(b"}", b', "image": {"a": 1}}'),
    "width": RECORD.replace(b"}", b', "width": -1}'),
    "loss": RECORD.replace(b"}", b', "loss": 1e300}'),
    "blank": RECORD + b"\n" * 2**23,
    "escape": RECORD.replace(b"}", b', "backend": "\\u001b[2J\\n\\u202e"}') * 3,
}


def damage(folder: Path, change: Callable[[bytes], bytes], name: str = "") -> None:
    """Change the manifest, or the first file whose name begins so."""
    path = next(iter(sorted(folder.glob(f"{name}*")))) if name else folder / "manifest.json"
    path.write_bytes(change(path.read_bytes()))


def flipped(data: bytes) -> bytes:
    return data[:900] + bytes([data[900] ^ 0xFF]) + data[901:]


@pytest.fixture(autouse=True)
def in_a_wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no line wraps."""
    monkeypatch.setenv("COLUMNS", "1000")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs, files of records, configs and adapters, good and bad."""
    folder = tmp_path_factory.mktemp("inputs")
    write_run(folder / "run", TINY, 400, flavour="medium", modules=MODULES, images=40, seed=1, files=2)
    (folder / "run" / "config.json").write_text(json.dumps({"model_family": "sd3", "output_dir": "output"}))
    write_run(folder / "bare", TINY, 400, images=40, seed=1, files=1)
    write_run(folder / "one", TINY, 1, images=1, modules=MODULES, files=1)
    write_run(folder / "mean", TINY, 200, readings=("mean",), modules=MODULES, images=20, files=1)
    write_run(folder / "wide", {"image": tuple(f"b.{i}" for i in range(9))}, 200, modules=(), files=1)
    write_ablated_run(folder / "ablated", TINY, 300, [0.3, 0.0, 0.1, 0.2, 0.25, 0.05], modules=MODULES)
    odd = {"backend": ["a\x1b[2J\nb\u202e é日本"] * 400}
    write_run(folder / "escape", TINY, 400, modules=MODULES, images=40, files=1, facts=odd)
    create_run(folder / "none", manifest(TINY, modules=MODULES))
    shape = manifest(TINY, readings=("last",), modules=MODULES)
    nan = {(name, "last"): np.full((40, len(blocks)), np.nan, np.float32) for name, blocks in TINY.items()}
    write_rows(folder / "nan", shape, rows(np.linspace(0, 1, 40), nan))
    (folder / "folder").mkdir()
    for name, change in {
        "cut": lambda data: data[: len(data) // 2],
        "blank": lambda data: b"",
        "listed": lambda data: b"[]",
        "binary": lambda data: TEXTS["noise.bin"],
        "deep": lambda data: TEXTS["deep.json"],
        "infinite": lambda data: data.replace(b'"schema": 3', b'"schema": NaN'),
        "newer": lambda data: data.replace(b'"schema": 3', b'"schema": 99'),
        "older": lambda data: data.replace(b'"schema": 3', b'"schema": 2'),
        "edited": lambda data: data.replace(b'"flavour": "large"', b'"flavour": "other"'),
        "lacking": lambda data: data.replace(b'"readings"', b'"readngs"'),
        "hostile": lambda data: data.replace(b'"flavour": "large"', b'"flavour": "\\u001b[2J"'),
    }.items():
        write_run(folder / f"manifest-{name}", TINY, 20, modules=MODULES, files=1)
        damage(folder / f"manifest-{name}", change)
    for name, change in {"flipped": flipped, "noise": lambda data: TEXTS["noise.bin"]}.items():
        write_run(folder / f"stream-{name}", TINY, 200, modules=MODULES, files=1)
        damage(folder / f"stream-{name}", change, "rank-")
    write_run(folder / "stream-torn", TINY, 200, modules=MODULES, images=20)
    damage(folder / "stream-torn", lambda data: data[:-40], "rank-")
    write_run(folder / "stream-foreign", TINY, 20, modules=MODULES, files=1)
    foreign = next(iter(write_run(folder / "foreign", {"image": ("c.0",)}, 20, files=1).files)).path
    shutil.move(foreign, folder / "stream-foreign" / foreign.name)
    write_run(folder / "linked", TINY, 20, modules=MODULES, files=1)
    (folder / "linked" / "manifest.json").rename(folder / "elsewhere.json")
    (folder / "linked" / "manifest.json").symlink_to(folder / "elsewhere.json")
    (folder / "piped").mkdir()
    os.mkfifo(folder / "piped" / "manifest.json")
    (folder / "dangling").symlink_to(folder / "nowhere")
    for name, config in CONFIGS.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
    for name, data in TEXTS.items():
        (folder / name).write_bytes(data)
    for name, data in RECORDS.items():
        (folder / f"{name}.jsonl").write_bytes(data)
    (folder / "good.jsonl.gz").write_bytes(gzip.compress(RECORD * 20))
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(RECORD * 20)[:-20])
    (folder / "cut.jsonl.bz2").write_bytes(bz2.compress(RECORD * 20)[:-20])
    (folder / "xz.jsonl.xz").write_bytes(lzma.compress(RECORD))
    with zipfile.ZipFile(folder / "zip.jsonl.zip", "w") as file:
        file.writestr("records.jsonl", RECORD)
    for name, bomb in (("bomb.gz", gzip.GzipFile), ("bomb.bz2", bz2.BZ2File)):
        with bomb(folder / name, "wb") as file:  # type: ignore[operator]
            for _ in range(50 if name == "bomb.gz" else 10):
                file.write(b"\n" * 2**20)
    linear = {module.name: module.shape for module in MODULES if module.type == "Linear"}
    tensors = {}
    for name, (height, width) in linear.items():
        if name.startswith("transformer_blocks"):
            key = f"lycoris_{name.replace('.', '_')}"
            tensors[f"{key}.lokr_w1"] = np.ones((4, 4), np.float32)
            tensors[f"{key}.lokr_w2"] = np.ones((height // 4, width // 4), np.float32)
            tensors[f"{key}.alpha"] = np.ones((), np.float32)
    save_file(tensors, folder / "adapter.safetensors")
    save_file({key.replace("_0_", "_9_"): value for key, value in tensors.items()}, folder / "strange.safetensors")
    save_file({key: np.full_like(value, np.nan) for key, value in tensors.items()}, folder / "nan.safetensors")
    save_file({"a\x1b[2J\nb": np.ones(2, np.float32)}, folder / "escape.safetensors")
    main(
        ["check-config", str(folder / "good.json"), "--run", str(folder / "run")]
    )  # torch and LyCORIS are imported once
    return folder


def state(folder: Path) -> dict[str, object]:
    """What lies below a folder, with the content of small files; pipes are named and not read."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        small = path.is_file() and status.st_size < 2**20
        content = hashlib.sha256(path.read_bytes()).hexdigest() if small else ""
        found[str(path.relative_to(folder))] = (status.st_mode, status.st_size, status.st_mtime_ns, content)
    return found


@dataclass(frozen=True)
class Said:
    code: int
    out: str
    err: str
    seconds: float


def run_here(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> Said:
    """The command in this process; an exception that it lets out fails the test."""
    capsys.readouterr()
    started = time.process_time()
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = int(stop.code or 0)
    seconds = time.process_time() - started
    return Said(code, *capsys.readouterr(), seconds)


def words_of(line: str, inputs: Path, out: Path) -> list[str]:
    return [
        str(inputs / word[1:]) if word.startswith("@") else word.replace("OUT", str(out)) for word in shlex.split(line)
    ]


def assert_well_behaved(said: Said, code: int, expected: str) -> None:
    assert said.code == code, said
    assert said.err.count("\n") <= 1 and said.err in ("", said.err.rstrip("\n") + "\n"), said
    assert all(line.isprintable() for line in (said.out + said.err).split("\n")), said
    assert "Traceback" not in said.out + said.err
    if code:
        assert said.err.startswith("layerprobe: error: "), said
    else:
        assert said.err == "" or said.err.startswith("layerprobe: warning: "), said
    for part in expected.split(" ... "):
        assert part in said.out + said.err, (part, said)
    assert said.seconds < MOST_SECONDS, said


# Bad runs, for every command that reads one: (input, exit code, words)
READERS = (
    "status {}",
    "heatmap {} --out OUT/figures",
    "findings {}",
    "report {} --out OUT/page.html",
    "compare @run {}",
    "lokr {}",
    "check-config @good.json --run {}",
    "export {} OUT/records.jsonl",
    "merge {0} {0} OUT/merged",
)
RUNS = (
    ("@missing", "does not exist"),
    ("@dangling", "is not a folder"),
    ("@folder", "has no manifest.json"),
    ("@manifest-cut", "is not JSON"),
    ("@manifest-blank", "is not JSON"),
    ("@manifest-listed", "the manifest is a list"),
    ("@manifest-binary", "is not JSON"),
    ("@manifest-deep", "is not JSON"),
    ("@manifest-infinite", "NaN is not a JSON number"),
    ("@manifest-newer", "upgrade simpletuner-layerprobe"),
    ("@manifest-older", "record it anew"),
    ("@manifest-edited", "manifest.json and the records do not fit"),
    ("@manifest-lacking", "the manifest lacks readings"),
    ("@manifest-hostile", "expected a printable string"),
    ("@stream-flipped", "is damaged in"),
    ("@stream-noise", "is damaged in its schema"),
    ("@stream-foreign", "belongs to another run"),
    ("@linked", "holds no links"),
    ("@piped", "is not a plain file"),
)
FILES = (
    ("@empty.json", "has no records"),
    ("@text.txt", "line 1: not JSON"),
    ("@noise.bin", "line 1: not JSON"),
    ("@picture.png", "line 1: not JSON"),
    ("@good.json", "line 1: lacks"),
    ("@bomb.gz", "mostly blank lines"),
    ("@xz.jsonl.xz", "is a xz file"),
)
# Everything else: (command line, exit code, words)
COMMANDS = (
    # no command, or not one
    ("", 2, "the following arguments are required: COMMAND"),
    ("statsu @run", 2, "invalid choice: 'statsu'"),
    ("'' @run", 2, "invalid choice: ''"),
    ("STATUS @run", 2, "invalid choice: 'STATUS'"),
    ("'sta\x1btus' @run", 2, "invalid choice: 'sta\\x1btus'"),
    ("'日本' @run", 2, "invalid choice: '日本'"),
    ("--bins 5 status @run", 2, "invalid choice: '5'"),
    ("--nonsense", 2, "COMMAND"),
    ("--version", 0, "layerprobe 0."),
    ("--help", 0, "commands:"),
    ("status --help", 0, "example:"),
    ("help", 2, "invalid choice: 'help'"),
    ("status", 2, "give RUN: there is no run below the current folder"),
    ("status @run @run", 2, "unrecognized arguments"),
    ("status @run --nonsense", 2, "unrecognized arguments: --nonsense"),
    ("status @run --bins", 2, "--bins: expected one argument"),
    ("status ''", 1, "manifest.json"),
    ("status /dev/null", 1, "expected"),
    ("status 'a\nb'", 1, "a b does not exist"),
    ("status '\x1b[2J'", 1, "\\x1b[2J does not exist"),
    ("status 'a\u202eb'", 1, "a\\u202eb does not exist"),
    # status
    ("status @run", 0, "400 samples of 40 images"),
    ("status @one", 0, "1 sample of 1 image ... fewer than 5 images"),
    ("status @bare", 0, "no module table"),
    ("status @mean", 0, "readings    mean"),
    ("status @stream-torn", 0, "cut off in its last flush"),
    ("status @escape", 0, "a\\x1b[2J\\nb\\u202e é日本: 400"),
    ("status @escape.jsonl", 0, "\\x1b[2J\\n\\u202e: 3"),
    ("status @ablated", 0, "ablation"),
    ("status @nan", 0, "image last: 40 ... no plan can be made: no stream"),
    ("status @none", 1, "no samples"),
    ("status @good.jsonl.gz", 0, "20 samples"),
    ("status @run --bins 0", 2, "is not a whole number from 1 to 1000"),
    ("status @run --bins -1", 2, "is not a whole number"),
    ("status @run --bins 1.5", 2, "is not a whole number"),
    ("status @run --bins 1e3", 2, "is not a whole number"),
    ("status @run --bins nan", 2, "is not a whole number"),
    ("status @run --bins 1000000000000000000000", 2, "is not a whole number"),
    ("status @run --bins ''", 2, "is not a whole number"),
    ("status @run --bins 1000", 0, "400 samples"),
    ("status @run --bins 1", 0, "400 samples"),
    ("status @run --tokens first", 2, "invalid choice: 'first'"),
    ("status @mean --tokens last", 1, "has no reading 'last'"),
    ("status @run --preset 0", 2, "the preset is '0'"),
    ("status @run --preset -5", 2, "the preset is '-5'"),
    ("status @run --preset ''", 2, "the preset is ''"),
    ("status @run --preset 1e9", 2, "the preset is '1e9'"),
    ("status @run --preset 400", 0, "plan of 400"),
    ("status @run --preset 9999999999999999999M", 2, "the preset is"),
    ("status @run --preset 20kB", 0, "plan of 20kB"),
    ("status @bare --preset 1M", 0, "no plan can be made: there is no module table"),
    # findings
    ("findings @run", 0, "400 samples of 40 images"),
    ("findings @one", 0, "not enough"),
    ("findings @one --json", 0, '"samples": 1'),
    ("findings @escape --json", 0, '"samples": 400'),
    ("findings @escape", 0, "a\\x1b[2J\\nb\\u202e é日本"),
    ("findings @none", 1, "no samples"),
    ("findings @nan", 1, "no stream (image, text) has a sample with finite distances"),
    ("findings @run --bins 1000", 0, "not enough samples"),
    ("findings @run --bins x", 2, "is not a whole number"),
    ("findings @run --reading ablation", 1, "was recorded without ablation"),
    ("findings @run --reading angel", 2, "invalid choice: 'angel'"),
    ("findings @ablated --reading ablation", 0, "300 samples of 20 images"),
    ("findings @ablated --reading ablation_text", 0, "300 samples"),
    ("findings @mean --tokens last", 1, "has no reading 'last'"),
    ("findings @run --out OUT/x", 2, "unrecognized arguments"),
    ("findings @missing --json", 1, "does not exist"),
    # heatmap
    ("heatmap @run", 2, "the following arguments are required: --out"),
    ("heatmap @run --out OUT/f --format gif", 2, "invalid choice: 'gif'"),
    ("heatmap @run --out OUT/f --reading pairs", 1, "layerprobe_block_pairs"),
    ("heatmap @run --out OUT/f --reading update_norm", 1, "layerprobe_residual"),
    ("heatmap @run --out OUT/f --reading ablation", 1, "without ablation"),
    ("heatmap @run --out OUT/f --bins 2000", 2, "from 1 to 1000"),
    ("heatmap @none --out OUT/f", 1, "no samples"),
    ("heatmap @nan --out OUT/f", 0, "numbers not finite"),
    ("heatmap @one --out OUT/f --format svg", 0, "9 of 10 sigma bins have no samples"),
    ("heatmap @mean --out OUT/f --tokens last", 1, "has no reading 'last'"),
    # report
    ("report @run --out OUT/page.html --bins 999", 0, "of 999 sigma bins have no samples"),
    ("report @one --out OUT/page.html", 0, "9 of 10 sigma bins have no samples"),
    ("report @bare --out OUT/page.html", 0, "page.html"),
    ("report @escape --out OUT/page.html", 0, "page.html"),
    ("report @none --out OUT/page.html", 1, "no samples"),
    ("report @nan --out OUT/page.html", 1, "no stream (image, text) has a sample with finite"),
    ("report @good.jsonl.gz", 1, "name the page with --out"),
    ("report @run --out OUT/page.html --preset many", 2, "the preset is 'many'"),
    ("report @run --out OUT/page.html --preset 20k", 0, "page.html"),
    ("report @run --bins 0", 2, "is not a whole number"),
    ("report @run --tokens all", 2, "invalid choice: 'all'"),
    # compare
    ("compare @run", 2, "the following arguments are required: B"),
    ("compare @run @run", 0, "not paired: the runs have no noise seed"),
    ("compare @run @bare", 0, "note: flavour"),
    ("compare @run @wide", 1, "different streams"),
    ("compare @run @one", 0, "not enough samples: no sigma bin has 20"),
    ("compare @run @none", 1, "no samples"),
    ("compare @run @nan", 0, "not enough samples"),
    ("compare @run @run --bins 1000", 0, "no sigma bin has 20 with finite distances in both runs; take fewer bins"),
    ("compare @run @mean", 1, "has no reading 'last'"),
    ("compare @run @mean --tokens mean", 0, "note: "),
    ("compare @run @run --preset x", 2, "the preset is 'x'"),
    ("compare @run @run --preset 20k", 0, "preset 20k"),
    ("compare @run @run --json", 0, '"preset": "article"'),
    ("compare @run @good.jsonl.gz", 1, "blocks"),
    ("compare @run @run @run", 2, "unrecognized arguments"),
    ("compare @one @one --json", 0, '"samples_a": 1'),
    # lokr: what is asked for
    ("lokr", 2, "give RUN, or --model"),
    ("lokr @run", 1, "the size of what the run's own config trains is not known ... give --params N"),
    ("lokr @bare", 1, "there is no module table"),
    ("lokr @run --preset article", 0, "verified: LyCORIS"),
    ("lokr @bare --preset article", 0, "not verified, parameters unknown: the run has no module table"),
    ("lokr @bare --out OUT/x.json", 1, "there is no module table"),
    ("lokr @bare --json", 1, "there is no module table"),
    ("lokr @bare --freeze 1", 1, "there is no module table"),
    ("lokr @bare --critical 0,3-4 --preset article", 0, "critical"),
    ("lokr @bare --critical 99 --preset article", 1, "critical block 99 does not exist"),
    ("lokr @wide --preset article", 0, "b.8"),
    ("lokr @one --preset article", 1, "all 5 blocks have the same contribution"),
    ("lokr @none --preset article", 1, "no samples"),
    ("lokr @nan --preset article", 1, "no stream (image, text) has a sample with finite distances"),
    ("lokr @good.jsonl.gz --preset article", 1, "all 1 blocks have the same contribution"),
    ("lokr @wide --params 1M", 1, "no module table"),
    ("lokr @run --params 1 --out OUT/x.json", 1, "nothing is written: the budget is 1 parameters ... --closest"),
    ("lokr @run --params 1KiB --out OUT/x.json", 1, "nothing is written: the budget is 512 parameters"),
    ("lokr @run --params 1B --out OUT/x.json", 1, "the largest plan of this kind has"),
    ("lokr @run --params 1 --env new", 1, "nothing is written"),
    ("lokr @run --params 1", 0, "warning: the config has 10,688 parameters, the budget is 1"),
    ("lokr @run --params 1 --closest --out OUT/x.json", 0, "written: "),
    ("lokr @run --params 0", 2, "'0' is neither a number of parameters"),
    ("lokr @run --params -1", 2, "--params: "),
    ("lokr @run --params 1.5.5M", 2, "neither a number of parameters"),
    ("lokr @run --params 400XB", 2, "neither a number of parameters"),
    ("lokr @run --params 1e6", 2, "neither a number of parameters"),
    ("lokr @run --params inf", 2, "neither a number of parameters"),
    ("lokr @run --params ' '", 2, "neither a number of parameters"),
    ("lokr @run --params '٣M'", 2, "neither a number of parameters"),
    ("lokr @run --params 99999999999999999999", 2, "neither a number of parameters"),
    ("lokr @run --params @folder", 2, "neither a number of parameters"),
    ("lokr @run --params @missing", 2, "neither a number of parameters"),
    ("lokr @run --params @run", 2, "neither a number of parameters"),
    ("lokr @run --size 1KiB", 2, "unrecognized arguments: --size"),
    ("lokr @run --params 20k --preset article", 2, "not allowed with argument"),
    ("lokr @run --preset 400M", 2, "invalid choice: '400M'"),
    ("lokr @run --out OUT/a.json --env b", 2, "not allowed with argument"),
    ("lokr @run --algo lora --out OUT/x.json", 2, "use --env, not --out"),
    ("lokr @run --algo dora", 2, "invalid choice: 'dora'"),
    ("lokr @run --env new --preset article", 0, "next: simpletuner train env=new"),
    ("lokr @run --env ''", 1, "''"),
    ("lokr @run --env ../new", 1, "../new"),
    ("lokr @run --env 'a\x1bb'", 1, "a\\x1bb"),
    ("lokr @bare --env new", 1, "there is no module table"),
    ("lokr @run --critical 1-3 --preset article", 0, "verified: LyCORIS"),
    ("lokr @run --critical 3-1", 2, "is not a list of block numbers"),
    ("lokr @run --critical 1,", 2, "is not a list of block numbers"),
    ("lokr @run --critical -1", 2, "--critical"),
    ("lokr @run --critical some", 2, "is not a list of block numbers"),
    ("lokr @run --critical 6 --preset article", 1, "critical block 6 does not exist; the blocks are 0 to 5"),
    ("lokr @run --critical 0-999999 --preset article", 1, "does not exist"),
    ("lokr @run --critical 1 --freeze 1 --preset article", 1, "block 1 is frozen and critical"),
    ("lokr @run --critical 1 --algo loha --preset article", 0, "critical"),
    ("lokr @run --freeze 0-5 --preset article", 1, "all blocks are frozen"),
    ("lokr @run --freeze 9 --preset article", 1, "frozen block 9 does not exist"),
    ("lokr @run --freeze x", 2, "is not a list of block numbers"),
    ("lokr @run --freeze least:0", 2, "with a whole number from 1"),
    ("lokr @run --freeze least:99 --preset article", 1, "99"),
    ("lokr @run --freeze least:1,least:2", 2, "expected least:N once"),
    ("lokr @run --contrast 0", 2, "is not a number from 1 to 30"),
    ("lokr @run --contrast nan", 2, "is not a number from 1 to 30"),
    ("lokr @run --contrast inf", 2, "is not a number from 1 to 30"),
    ("lokr @run --contrast -3", 2, "is not a number"),
    ("lokr @run --contrast 1e400", 2, "is not a number"),
    ("lokr @run --rank 0", 2, "is not a whole number from 1"),
    ("lokr @run --rank 4", 1, "rank"),
    ("lokr @run --rank 99999999", 2, "is not a whole number from 1"),
    ("lokr @run --direction up", 2, "invalid choice: 'up'"),
    ("lokr @run --direction uniform", 1, "own config trains is not known"),
    ("lokr @run --per-stream", 1, "own config trains is not known"),
    ("lokr @run --by ablation --preset article", 1, "was recorded without ablation of whole blocks"),
    ("lokr @run --by angles", 2, "invalid choice: 'angles'"),
    ("lokr @ablated --by ablation --tokens mean", 2, "leave it out with --by ablation"),
    ("lokr @mean --tokens last --preset article", 1, "has no reading 'last'"),
    ("lokr @run --precision int8-quanto", 2, "--precision goes with --model"),
    ("lokr @run --clip-percentile 0.9", 2, "unrecognized arguments: --clip-percentile"),
    ("lokr --model sd99 --params 1M", 1, "there is no architecture 'sd99'"),
    ("lokr --model @folder --params 1M", 1, "there is no architecture"),
    ("lokr --model @empty.json --params 1M", 1, "is not JSON"),
    ("lokr --model @good.json --params 1M", 1, "has no _class_name"),
    ("lokr --model '' --params 1M", 1, "there is no architecture"),
    ("lokr --model 'flux\x1b[1m:x' --params 1M", 1, "there is no architecture"),
    ("lokr --model sd35-large --env new", 2, "--env takes the options of a probe run"),
    ("lokr --model sd35-large --freeze least:2", 2, "go by what was measured: give RUN"),
    # lokr: as large as another config
    ("lokr @run --params @good.json", 0, "verified: LyCORIS"),
    ("lokr @run --params @twice.json", 0, "factor is written more than once; the last counts"),
    ("lokr @run --params @other.json", 1, "gives no module of this model an adapter"),
    ("lokr @run --params @many.json", 1, "has 50,000 names"),
    ("lokr @run --params @deep.json", 1, "is not JSON"),
    ("lokr @run --params @empty.json", 1, "is not JSON"),
    ("lokr @run --params @noise.bin", 1, "is not JSON"),
    ("lokr @run --params @adapter.safetensors", 1, "is not JSON"),
    ("lokr @run --params @factor.json", 1, "the factor in"),
    ("lokr @run --params /dev/null", 2, "neither a number of parameters"),
    # check-config
    ("check-config", 2, "the following arguments are required: LYCORIS_CONFIG"),
    ("check-config @good.json", 2, "one of the arguments --run --model is required"),
    ("check-config @good.json --run @run --model sd35-large", 2, "not allowed with argument"),
    ("check-config @good.json --run @run --precision int8-quanto", 2, "--precision goes with --model"),
    ("check-config @good.json --run @run", 0, "reach  41 of the model's 43 linear and convolutional layers; 2 get no"),
    ("check-config @part.json --run @run", 0, "reach  7 of the model's 43 linear and convolutional layers; 36 get no"),
    ("check-config @good.json --run @bare", 1, "the run has no module table"),
    ("check-config @other.json --run @run", 1, "reach  0 of the model's 43 ... gives no module of this model"),
    ("check-config @facter.json --run @run", 0, "facter has no effect ... did you mean factor?"),
    ("check-config @inside.json --run @run", 0, "0 of 41 modules wrong"),
    ("check-config @twice.json --run @run", 0, "factor is written more than once; the last counts"),
    ("check-config @zero.json --run @run", 1, "multiplier 0.5 is cut to 0 by SimpleTuner"),
    ("check-config @escape.json --run @run", 0, "nothing in the model matches \\x1b[2Jblock\\nok  \\u202e"),
    ("check-config @many.json --run @run", 1, "has 50,000 names"),
    ("check-config @no-algo.json --run @run", 1, "has no algo"),
    ("check-config @algo.json --run @run", 1, "'lorka'"),
    ("check-config @algo-number.json --run @run", 1, "the algo in"),
    ("check-config @factor.json --run @run", 1, "the factor in"),
    ("check-config @factor-text.json --run @run", 1, "the factor in"),
    ("check-config @factor-huge.json --run @run", 1, "the factor in"),
    ("check-config @dim-text.json --run @run", 1, "linear_dim in"),
    ("check-config @dim-list.json --run @run", 1, "linear_dim in"),
    ("check-config @dim-huge.json --run @run", 1, "LyCORIS"),
    ("check-config @alpha-null.json --run @run", 1, "linear_alpha in"),
    ("check-config @dropout-list.json --run @run", 1, "module_dropout in"),
    ("check-config @dropout-text.json --run @run", 1, "rank_dropout in"),
    ("check-config @preset-list.json --run @run", 1, "expected an object"),
    ("check-config @preset-key.json --run @run", 1, "did you mean target_module?"),
    ("check-config @preset-names.json --run @run", 1, "expected an object"),
    ("check-config @preset-target.json --run @run", 1, "expected a list of strings"),
    ("check-config @preset-file.json --run @run", 1, "nor a TOML file"),
    ("check-config @preset-path.json --run @run", 1, "nor a TOML file"),
    ("check-config @preset-number.json --run @run", 1, "expected the name of a preset"),
    ("check-config @regex.json --run @run", 1, "is not a regular expression"),
    ("check-config @empty.json --run @run", 1, "is not JSON"),
    ("check-config @list.json --run @run", 1, "holds a JSON list"),
    ("check-config @string.json --run @run", 1, "holds a JSON str"),
    ("check-config @null.json --run @run", 1, "holds a JSON NoneType"),
    ("check-config @cut.json --run @run", 1, "is not JSON"),
    ("check-config @nan.json --run @run", 1, "multiplier in"),
    ("check-config @infinite.json --run @run", 1, "multiplier in"),
    ("check-config @digits.json --run @run", 1, "is not JSON"),
    ("check-config @deep.json --run @run", 1, "is not JSON"),
    ("check-config @lists.json --run @run", 1, "is not JSON"),
    ("check-config @surrogate.json --run @run", 1, "is not JSON"),
    ("check-config @latin.json --run @run", 1, "is not JSON"),
    ("check-config @utf16.json --run @run", 1, "byte order mark"),
    ("check-config @bom.json --run @run", 1, "byte order mark"),
    ("check-config @yaml.json --run @run", 1, "is not JSON"),
    ("check-config @noise.bin --run @run", 1, "is not JSON"),
    ("check-config @folder --run @run", 1, "cannot read"),
    ("check-config @missing --run @run", 1, "cannot read"),
    ("check-config /dev/null --run @run", 1, "is not JSON"),
    ("check-config /dev/zero --run @run", 1, "takes over"),
    ("check-config @run --run @good.json", 1, "line 1: lacks"),
    ("check-config @good.json --model sd99", 1, "there is no architecture 'sd99'"),
    ("check-config @good.json --model @noise.bin", 1, "is not JSON"),
    ("check-config @good.json --run @run --adapter @adapter.safetensors", 0, "41 of 41 modules the same"),
    ("check-config @good.json --run @run --adapter @strange.safetensors", 1, "does not come from"),
    ("check-config @good.json --run @run --adapter @text.txt", 1, "is not a safetensors file"),
    ("check-config @good.json --run @run --adapter @missing", 1, "cannot read"),
    ("check-config @many.json --run @run --adapter @adapter.safetensors", 1, "has 50,000 names"),
    # classes
    ("classes", 2, "one of the arguments --model --run is required"),
    ("classes --run @run", 0, "JointTransformerBlock"),
    ("classes --run @run --json", 0, '"classes"'),
    ("classes --run @bare", 1, "no module table"),
    ("classes --run @none", 0, "JointTransformerBlock"),
    ("classes --run @manifest-binary", 1, "is not JSON"),
    ("classes --run @run --model x", 2, "not allowed with argument"),
    ("classes --run @run --precision int8-quanto", 2, "--precision goes with --model"),
    ("classes --model '../..'", 1, "there is no architecture"),
    ("classes --model @list.json", 1, "holds a JSON list"),
    ("classes --model nonsense:@good.json", 1, "there is no architecture"),
    # adapter
    ("adapter", 2, "the following arguments are required: FILE"),
    ("adapter @adapter.safetensors", 0, "lokr, 41 modules"),
    ("adapter @adapter.safetensors --run @run", 0, "lokr, 41 modules"),
    ("adapter @adapter.safetensors --run @bare", 0, "lokr, 41 modules"),
    ("adapter @adapter.safetensors --run @run --json", 0, '"algo": "lokr"'),
    ("adapter @adapter.safetensors --run @run --config @good.json", 0, "the planned parameters everywhere"),
    ("adapter @adapter.safetensors --run @run --config @many.json", 1, "has 50,000 names"),
    ("adapter @adapter.safetensors --config @good.json", 1, "give --run or --model"),
    ("adapter @adapter.safetensors --run @missing", 1, "does not exist"),
    ("adapter @adapter.safetensors --run @wide", 0, "lokr"),
    ("adapter @adapter.safetensors --model @missing", 1, "there is no architecture"),
    ("adapter @strange.safetensors --run @run", 1, "is an adapter of another model"),
    ("adapter @nan.safetensors --run @run", 1, "numbers that are not finite"),
    ("adapter @escape.safetensors", 1, "a\\x1b[2J\\nb"),
    ("adapter @empty.safetensors", 1, "is not a safetensors file"),
    ("adapter @huge.safetensors", 1, "is not a safetensors file"),
    ("adapter @noise.bin", 1, "is not a safetensors file"),
    ("adapter @zeros.bin", 1, "is not a safetensors file"),
    ("adapter @good.json", 1, "is not a safetensors file"),
    ("adapter @folder", 1, "cannot read"),
    ("adapter @missing", 1, "cannot read"),
    ("adapter @run", 1, "cannot read"),
    # import
    ("import", 2, "the following arguments are required: FILE, RUN"),
    ("import @good.jsonl.gz", 2, "the following arguments are required: RUN"),
    ("import @good.jsonl.gz OUT/run", 0, "20 samples imported"),
    ("import @good.jsonl.gz OUT/deep/er/run --tokens mean", 0, "20 samples imported"),
    ("import @good.jsonl.gz OUT/run --tokens both", 2, "invalid choice: 'both'"),
    ("import @good.jsonl.gz OUT/run --model sd99", 1, "there is no architecture 'sd99'"),
    ("import @good.jsonl.gz @run", 1, "exists already"),
    ("import @good.jsonl.gz @text.txt", 1, "is no folder, and stays as it is"),
    ("import @good.jsonl.gz @text.txt/run", 1, "cannot"),
    ("import @cut.jsonl.gz OUT/run", 1, "the file is damaged"),
    ("import @cut.jsonl.bz2 OUT/run", 1, "the file is damaged"),
    ("import @xz.jsonl.xz OUT/run", 1, "is a xz file"),
    ("import @zip.jsonl.zip OUT/run", 1, "is a zip file"),
    ("import @bomb.gz OUT/run", 1, "mostly blank lines"),
    ("import @bomb.bz2 OUT/run", 1, "mostly blank lines"),
    ("import @blank.jsonl OUT/run", 1, "mostly blank lines"),
    ("import @two.jsonl OUT/run", 1, "line 2: hidden_states[1] is 2; expected a number in [0, 1]"),
    ("import @negative.jsonl OUT/run", 1, "line 2: hidden_states[1] is -0.1; expected a number in [0, 1]"),
    ("import @sigma.jsonl OUT/run", 1, "line 1: timestep is 1.5"),
    ("import @nan.jsonl OUT/run", 1, "line 1: hidden_states[1] is NaN"),
    ("import @text.jsonl OUT/run", 1, 'line 1: hidden_states[1] is "0.2"'),
    ("import @true.jsonl OUT/run", 1, "line 1: hidden_states[1] is true"),
    ("import @short.jsonl OUT/run", 1, "line 2: hidden_states has 1 numbers; the records before have 2"),
    ("import @none.jsonl OUT/run", 1, "line 1: lacks 'hidden_states'"),
    ("import @number.jsonl OUT/run", 1, "line 1: 3; expected an object"),
    ("import @list.jsonl OUT/run", 1, "line 1: a list of 2"),
    ("import @not.jsonl OUT/run", 1, "line 2: not JSON"),
    ("import @deep.jsonl OUT/run", 1, "line 1: not JSON"),
    ("import @digits.jsonl OUT/run", 1, "line 1: not JSON"),
    ("import @long.jsonl OUT/run", 1, "line 1: over"),
    ("import @wide.jsonl OUT/run", 1, "expected 1 to 4096 numbers"),
    ("import @csv.jsonl OUT/run", 1, "line 1: not JSON"),
    ("import @image.jsonl OUT/run", 1, "line 1: image is an object"),
    ("import @width.jsonl OUT/run", 1, "line 1: width is -1"),
    ("import @loss.jsonl OUT/run", 1, "line 1: loss is 1e+300"),
    ("import @escape.jsonl OUT/run", 0, "3 samples imported"),
    ("import @noise.bin OUT/run", 1, "line 1: not JSON"),
    ("import @empty.json OUT/run", 1, "has no records"),
    ("import @folder OUT/run", 1, "cannot read"),
    ("import @missing OUT/run", 1, "cannot read"),
    ("import @run OUT/run", 1, "cannot read"),
    ("import /dev/null OUT/run", 1, "has no records"),
    # export and merge
    ("export @run", 2, "the following arguments are required: FILE"),
    ("export @one --facts OUT/r.jsonl.gz", 0, "1 sample of 1 image written"),
    ("export @escape OUT/r.csv", 0, "400 samples of 40 images written"),
    ("export @run OUT/r.csv --facts", 1, "is a table"),
    ("export @run OUT/r.csv --tokens mean", 1, "is a table"),
    ("export @mean OUT/r.jsonl --tokens last", 1, "has no reading 'last'"),
    ("export @none OUT/r.jsonl", 1, "no samples"),
    ("export @none OUT/r.parquet", 1, "no samples"),
    ("export @nan OUT/r.jsonl", 1, "has finite distances"),
    ("merge", 2, "the following arguments are required: RUN, OUT"),
    ("merge @run @bare OUT/m", 1, "merge runs of one model and one config"),
    ("merge @run @run OUT/m", 0, "counted once"),
    ("merge @run @missing OUT/m", 1, "does not exist"),
    ("merge @run @good.jsonl.gz OUT/m", 1, "is not a folder"),
    ("merge @run @wide OUT/m", 1, "merge runs of one model and one config"),
    ("merge @none @none OUT/m", 1, "none of the runs"),
    # trial
    ("trial", 2, "the following arguments are required: PART"),
    ("trial start", 2, "invalid choice: 'start'"),
    ("trial new OUT/t", 2, "the following arguments are required"),
    ("trial new OUT/t --run @run --params 1M --held-out new --steps 0", 2, "is not a whole number from 1"),
    ("trial new OUT/t --run @run --params 0 --held-out new --steps 9", 2, "neither a number of parameters"),
    ("trial new OUT/t --run @run --params @good.json --held-out new --steps 9", 2, "neither a number of parameters"),
    ("trial new OUT/t --run @run --params 1M --held-out new --steps 9 --seeds 0", 2, "is not a whole number"),
    ("trial new OUT/t --run @run --params 1M --held-out new --steps 9 --contrast 99", 2, "is not a number from 1"),
    ("trial new OUT/t --run @run --params 1M --held-out new --steps 9 --learning-rates 1", 2, "two or more different"),
    ("trial new OUT/t --run @run --params 1M --held-out new --steps 9 --learning-rates 1,nan", 2, "learning rates"),
    ("trial new OUT/t --run @run --params 1M --held-out new --steps 9 --arms everything", 1, "there is no arm"),
    ("trial new OUT/t --run @bare --params 1M --held-out new --steps 9", 1, "config.json"),
    ("trial new OUT/t --run @missing --params 1M --held-out new --steps 9", 1, "does not exist"),
    ("trial new OUT/t --run @run --params 20k --held-out new --steps 9", 1, "data_backend_config"),
    ("trial run @missing", 1, "@missing"),
    ("trial run @run", 1, "trial.json"),
    ("trial report @folder", 1, "trial.json"),
    ("trial report @text.txt", 1, "text.txt"),
    ("trial report @run --json", 1, "trial.json"),
    ("trial report '\x1b[2J'", 1, "\\x1b[2J"),
)
CASES = (
    *((reader.format(run), 1, words) for run, words in RUNS for reader in READERS),
    *((reader.format(file), 1, words) for file, words in FILES for reader in READERS if "merge" not in reader),
    *COMMANDS,
)


def test_there_are_three_hundred_and_none_twice() -> None:
    lines = [line for line, _, _ in CASES]
    assert len(lines) == len(set(lines)) >= 300


@pytest.mark.parametrize(("line", "code", "expected"), CASES, ids=[repr(line) for line, _, _ in CASES])
def test_a_command_line_ends_well(
    line: str,
    code: int,
    expected: str,
    inputs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    before = state(inputs)
    said = run_here(words_of(line, inputs, tmp_path), capsys)
    assert_well_behaved(said, code, expected.replace("@", f"{inputs}/"))
    assert state(inputs) == before
    assert code == 0 or not list(tmp_path.iterdir())  # an error leaves nothing behind


@pytest.mark.parametrize(
    "line",
    ["statsu", "status @missing", "lokr @run --params @many.json", "check-config @facter.json --run @run"],
)
def test_a_process_of_its_own_says_the_same(
    line: str, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = words_of(line, inputs, tmp_path)
    here = run_here(words, capsys)
    command = [sys.executable, "-m", "simpletuner_layerprobe.cli", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (here.code, here.out, here.err)
