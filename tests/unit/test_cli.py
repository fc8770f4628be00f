from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic_run import SD35_LARGE, manifest, records, rows, sd3_modules, write_run
from test_analyse_contribution import CRITICAL, notebook, notebook_factors

from simpletuner_layerprobe import __version__
from simpletuner_layerprobe.cli import main
from simpletuner_layerprobe.errors import ProbeError
from simpletuner_layerprobe.lokr import config as lokr_config
from simpletuner_layerprobe.run.records import ShardWriter, create_run, open_run

TINY = {
    "image": tuple(f"transformer_blocks.{i}" for i in range(6)),
    "text": tuple(f"transformer_blocks.{i}" for i in range(5)),
}
COMMANDS = (
    "doctor",
    "status",
    "heatmap",
    "findings",
    "report",
    "compare",
    "lokr",
    "check-config",
    "import",
    "export",
    "merge",
    "compact",
)


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


@pytest.fixture
def layerprobe(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    def run(*arguments: object) -> Result:
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return Result(code, out, err)

    return run


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A probe run of a small SD3-shaped model, with its SimpleTuner options beside it."""
    folder = tmp_path / "output" / "probe" / "layerprobe"
    write_run(folder, TINY, 200, flavour="medium", modules=sd3_modules(6))
    options = {"model_family": "sd3", "output_dir": "output/probe", "layerprobe": True, "seed": 7}
    (folder / "config.json").write_text(json.dumps(options))
    return folder


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every file below a folder with its content, every folder with None."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def assert_one_line(result: Result, code: int, *parts: str) -> None:
    assert result.code == code, result
    assert result.err.startswith("layerprobe: error: ")
    assert result.err.count("\n") == 1 and result.err.endswith("\n"), result.err
    for part in parts:
        assert part in result.err


# What every command has in common


def in_a_process(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "simpletuner_layerprobe.cli", *arguments]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False, **options)


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import sys, simpletuner_layerprobe.cli as cli; cli.parser();"
        "print(sorted({'numpy', 'torch', 'matplotlib', 'safetensors', 'lycoris'} & sys.modules.keys()))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert in_a_process("--help", stdout=subprocess.PIPE).returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.3


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(layerprobe: Callable[..., Result], command: str) -> None:
    assert f"  {command} " in layerprobe("--help").out
    shown = layerprobe(command, "--help")
    assert shown.code == 0
    assert f"example:\n  layerprobe {command}" in shown.out


def test_the_version_is_told(layerprobe: Callable[..., Result]) -> None:
    assert layerprobe("--version") == Result(0, f"layerprobe {__version__}\n", "")


def test_no_command_and_an_unknown_one_are_usage_errors(layerprobe: Callable[..., Result]) -> None:
    assert_one_line(layerprobe(), 2, "COMMAND")
    assert_one_line(layerprobe("train"), 2, "invalid choice: 'train'")


def test_a_reader_that_has_gone_is_no_traceback(tiny: Path) -> None:
    command = [sys.executable, "-m", "simpletuner_layerprobe.cli", "status", str(tiny)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert (process.wait(), said) == (1, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_under_stdout_is_one_line(tiny: Path) -> None:
    with open("/dev/full", "w") as full:
        found = in_a_process("status", str(tiny), stdout=full)
    assert found.returncode == 1
    assert found.stderr == "layerprobe: error: No space left on device\n"


def test_an_interrupt_ends_with_130(
    layerprobe: Callable[..., Result], tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(path: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("simpletuner_layerprobe.run.records.open_run", interrupted)
    assert layerprobe("status", tiny) == Result(130, "", "layerprobe: interrupted\n")


def test_a_name_that_the_terminal_cannot_show_is_escaped(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    found = in_a_process("status", str(tmp_path / "lauf-ä"), env=environment, stdout=subprocess.PIPE)
    assert found.returncode == 1
    assert "lauf-\\xe4 does not exist" in found.stderr and found.stderr.count("\n") == 1


# Bad input: one line, exit code 1 or 2, nothing written


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("lokr", "RUN", "--clip-percentile", "0"), "--clip-percentile: '0' is not a number above 0"),
        (("lokr", "RUN", "--clip-percentile", "100.1"), "--clip-percentile: '100.1'"),
        (("lokr", "RUN", "--clip-percentile", "nan"), "--clip-percentile: 'nan'"),
        (("lokr", "RUN", "--clip-percentile", "high"), "--clip-percentile: 'high'"),
        (("lokr", "RUN", "--max-factor", "0"), "--max-factor: '0' is not a whole number from 1"),
        (("lokr", "RUN", "--max-factor", "2.5"), "--max-factor: '2.5'"),
        (("lokr", "RUN", "--text-weight", "1/0"), "--text-weight: '1/0' is not a number from 0"),
        (("lokr", "RUN", "--text-weight", "-1"), "--text-weight: '-1'"),
        (("lokr", "RUN", "--image-weight", "inf"), "--image-weight: 'inf'"),
        (("lokr", "RUN", "--image-weight", "1e999999999"), "--image-weight: '1e999999999'"),
        (("lokr", "RUN", "--image-weight", "1/2/3"), "--image-weight: '1/2/3'"),
        (("lokr", "RUN", "--bins", "0"), "--bins: '0' is not a whole number from 1 to 1000"),
        (("heatmap", "RUN", "--out", "OUT", "--bins", "1001"), "--bins: '1001'"),
        (("lokr", "RUN", "--critical", "some"), "--critical: 'some' is neither auto nor none nor"),
        (("lokr", "RUN", "--critical", "0,,3"), "--critical: '0,,3'"),
        (("lokr", "RUN", "--critical", "-1"), "--critical: '-1'"),
        (("lokr", "RUN", "--preset", "other"), "--preset: invalid choice: 'other'"),
        (("lokr", "RUN", "--tokens", "first"), "--tokens: invalid choice: 'first'"),
        (("lokr", "RUN", "--out", "OUT", "--env", "x"), "--env: not allowed with argument --out"),
        (("heatmap", "RUN"), "the following arguments are required: --out"),
        (("heatmap", "RUN", "--out", "OUT", "--format", "gif"), "--format: invalid choice: 'gif'"),
        (("check-config", "OUT"), "one of the arguments --run --model is required"),
        (("import", "RUN"), "the following arguments are required: RUN"),
        (("status",), "the following arguments are required: RUN"),
    ],
)
def test_a_bad_option_is_one_line_that_names_it(
    layerprobe: Callable[..., Result], tiny: Path, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    before = snapshot(tmp_path)
    paths = {"RUN": str(tiny), "OUT": str(tmp_path / "out.json")}
    result = layerprobe(*(paths.get(argument, argument) for argument in arguments))
    assert_one_line(result, 2, said, f"(see layerprobe {arguments[0]} --help)")
    assert snapshot(tmp_path) == before


def run_commands(run: Path, out: Path) -> list[tuple[object, ...]]:
    """Every command that reads a run."""
    return [
        ("status", run),
        ("heatmap", run, "--out", out),
        ("lokr", run, "--out", out),
        ("lokr", run, "--env", "weighted", "--config-dir", out),
        ("export", run, out),
    ]


@pytest.mark.parametrize("which", range(5))
def test_a_run_folder_that_is_missing_or_empty_is_one_line(
    layerprobe: Callable[..., Result], tmp_path: Path, which: int
) -> None:
    empty = tmp_path / "empty"
    create_run(empty, manifest(TINY, modules=sd3_modules(6)))
    folder = tmp_path / "folder"
    folder.mkdir()
    before = snapshot(tmp_path)
    for run, said in (
        (tmp_path / "none", "none does not exist; expected"),
        (folder, "folder has no manifest.json"),
        (empty, "empty has no samples"),
    ):
        assert_one_line(layerprobe(*run_commands(run, tmp_path / "out")[which]), 1, said)
        assert snapshot(tmp_path) == before


def test_a_run_of_a_newer_schema_is_one_line_naming_both_versions(
    layerprobe: Callable[..., Result], tiny: Path, tmp_path: Path
) -> None:
    path = tiny / "manifest.json"
    path.write_text(path.read_text().replace('"schema": 1', '"schema": 3'))
    before = snapshot(tmp_path)
    for command in (*run_commands(tiny, tmp_path / "out"), ("check-config", path, "--run", tiny)):
        assert_one_line(layerprobe(*command), 1, "schema 3", "schema 1 and 2", "upgrade")
    assert snapshot(tmp_path) == before


def test_a_broken_shard_is_one_line_naming_the_file(
    layerprobe: Callable[..., Result], tiny: Path, tmp_path: Path
) -> None:
    shard = sorted((tiny / "shards").iterdir())[-1]
    shard.write_bytes(shard.read_bytes()[:-100])
    before = snapshot(tmp_path)
    for command in run_commands(tiny, tmp_path / "out"):
        assert_one_line(layerprobe(*command), 1, str(shard))
    assert snapshot(tmp_path) == before


def record(**changed: Any) -> str:
    whole = {
        "timestep": 0.5,
        "encoder_hidden_states": [0.1] * 5,
        "hidden_states": [0.1 + 0.01 * i for i in range(6)],
    }
    return json.dumps({key: value for key, value in (whole | changed).items() if value is not None})


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([record(), "{not json"], "line 2: not JSON"),
        ([record(), record(encoder_hidden_states=None)], "line 2: lacks 'encoder_hidden_states'"),
        ([record(hidden_states=None)], "line 1: lacks 'hidden_states'"),
        ([record(hidden_states=[0.1] * 5 + [float("nan")])], "line 1: hidden_states[5] is NaN"),
        ([record(), record(hidden_states=[0.1] * 7)], "line 2: hidden_states has 7 numbers"),
        ([record(timestep=1.5)], "line 1: timestep is 1.5"),
        ([record(timestep=-0.1)], "line 1: timestep is -0.1"),
        ([record(timestep=float("nan"))], "line 1: timestep is NaN"),
        ([], "has no records"),
    ],
)
def test_a_bad_record_is_one_line_with_its_number(
    layerprobe: Callable[..., Result], tmp_path: Path, lines: list[str], said: str
) -> None:
    source = tmp_path / "records.jsonl"
    source.write_text("".join(line + "\n" for line in lines))
    before = snapshot(tmp_path)
    assert_one_line(layerprobe("import", source, tmp_path / "deep" / "run"), 1, str(source), said)
    assert snapshot(tmp_path) == before


def test_a_file_of_records_that_is_missing_is_one_line(layerprobe: Callable[..., Result], tmp_path: Path) -> None:
    assert_one_line(layerprobe("import", tmp_path / "none", tmp_path / "run"), 1, "No such file")
    assert not list(tmp_path.iterdir())


def test_a_critical_block_that_does_not_exist_is_one_line(
    layerprobe: Callable[..., Result], tiny: Path, tmp_path: Path
) -> None:
    before = snapshot(tmp_path)
    result = layerprobe("lokr", tiny, "--critical", "0,6", "--out", tmp_path / "out.json")
    assert_one_line(result, 1, "critical block 6 does not exist; the blocks are 0 to 5")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "is not JSON"), ("[1]", "holds a JSON list"), ('{"algo": "lokr"}', "has no multiplier")],
)
def test_a_lycoris_config_that_is_none_is_one_line(
    layerprobe: Callable[..., Result], tiny: Path, tmp_path: Path, text: str, said: str
) -> None:
    path = tmp_path / "lycoris_config.json"
    path.write_text(text)
    assert_one_line(layerprobe("check-config", path, "--run", tiny), 1, str(path), said)


def test_a_reading_that_the_run_has_not_is_one_line(layerprobe: Callable[..., Result], tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", TINY, 20, tokens=("last",)).path
    before = snapshot(tmp_path)
    for command in run_commands(run, tmp_path / "out")[1:]:
        assert_one_line(layerprobe(*command, "--tokens", "mean", *_unproved(command)), 1, "'mean'")
    assert snapshot(tmp_path) == before


def _unproved(command: tuple[object, ...]) -> tuple[str, ...]:
    return ("--unverified",) if command[0] == "lokr" else ()


def test_a_folder_that_cannot_be_made_is_one_line(layerprobe: Callable[..., Result], tiny: Path) -> None:
    result = layerprobe("heatmap", tiny, "--out", tiny / "manifest.json")
    assert_one_line(result, 1, f"{tiny / 'manifest.json'}: File exists")


# status


def test_status_tells_what_the_run_holds(layerprobe: Callable[..., Result], tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", SD35_LARGE, 60, sigmas=[0.05] * 20 + [0.3] * 30 + [1.0] * 10)
    shown = layerprobe("status", run.path)
    assert shown.code == 0 and shown.err == ""
    facts = dict(line.split(None, 1) for line in shown.out.splitlines() if not line.startswith(" "))
    assert facts["model"] == "sd3 large, 38 blocks"
    assert facts["samples"] == "60 (rank 0: 40, rank 1: 20)"
    assert facts["streams"] == "image 38 blocks, text 37 blocks"
    assert facts["readings"] == "last, mean"
    assert facts["modules"] == "no module table"
    assert facts["backends"] == "photos: 60"
    assert facts["non-finite"] == "none"
    assert facts["size"].endswith("in 3 shards")
    bars = [line.split() for line in shown.out.splitlines() if line.startswith(" ")]
    assert [bar[:3] for bar in bars[:2]] == [["0", "-", "0.1"], ["0.1", "-", "0.2"]]
    assert [bar[3] for bar in bars] == ["20", "0", "0", "30", "0", "0", "0", "0", "0", "10"]
    assert [bar[4].count("#") for bar in bars] == [27, 0, 0, 40, 0, 0, 0, 0, 0, 14]
    assert bars[1][4] == "(none)"


def test_status_counts_samples_that_are_not_finite(layerprobe: Callable[..., Result], tmp_path: Path) -> None:
    what = manifest({"image": ("blocks.0",)}, tokens=("last",), family="", flavour="")
    create_run(tmp_path, what)
    distance_NL = np.array([[np.nan], [0.5]], dtype=np.float32)
    ShardWriter(tmp_path, what, rank=0).write(rows([0.2, 0.4], {("image", "last"): distance_NL}))
    shown = layerprobe("status", tmp_path).out
    assert "non-finite  image last: 1\n" in shown
    assert "backends    unknown: 2\n" in shown
    assert "model       unknown, 1 block\n" in shown


# heatmap


def test_heatmap_writes_the_figures_and_the_arrays(
    layerprobe: Callable[..., Result], tiny: Path, tmp_path: Path
) -> None:
    out = tmp_path / "deep" / "figures"
    shown = layerprobe("heatmap", tiny, "--out", out, "--tokens", "mean", "--bins", "5", "--format", "svg")
    names = ["figure1_streams.svg", "figure2_combined.svg", "figure3_factors.svg", "heatmap.npz"]
    assert (shown.code, shown.err) == (0, "")
    assert shown.out.split() == [str(out / name) for name in names]
    assert sorted(os.listdir(out)) == names
    with np.load(out / "heatmap.npz", allow_pickle=False) as arrays:
        assert arrays["image_mean"].shape == (5, 6)
        assert arrays["combined_mean"].shape == (5, 5)
        assert str(arrays["tokens"]) == "mean"
        assert arrays["image_count"].sum() == 200
    first = snapshot(out)
    assert layerprobe("heatmap", tiny, "--out", out, "--tokens", "mean", "--bins", "5", "--format", "svg")
    assert snapshot(out) == first


def test_heatmap_of_one_stream_has_no_combination_and_warns_of_empty_bins(
    layerprobe: Callable[..., Result], tmp_path: Path
) -> None:
    run = write_run(tmp_path / "run", {"image": TINY["image"]}, 30, sigmas=[0.15, 0.55, 0.95] * 10)
    shown = layerprobe("heatmap", run.path, "--out", tmp_path / "out")
    assert shown.code == 0
    assert sorted(os.listdir(tmp_path / "out")) == [
        "figure1_streams.png",
        "figure3_factors.png",
        "heatmap.npz",
    ]
    assert shown.err.startswith(
        "layerprobe: warning: 7 of 10 sigma bins have no samples in the image stream "
        "(0 - 0.1, 0.2 - 0.3, 0.3 - 0.4, 0.4 - 0.5, 0.6 - 0.7, ...);"
    )


def test_heatmap_says_which_figures_it_cannot_draw(layerprobe: Callable[..., Result], tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {"image": ("blocks.0",)}, 30)
    shown = layerprobe("heatmap", run.path, "--out", tmp_path / "out", "--bins", "1")
    assert shown.code == 0
    assert sorted(os.listdir(tmp_path / "out")) == ["figure1_streams.png", "heatmap.npz"]
    assert "layerprobe: warning: not every figure can be drawn: all 1 blocks have the same contribution" in shown.err


# lokr and check-config


def factors_in(path: Path) -> list[int]:
    """The factor of each block's feed-forward in a written config, in the order of the blocks."""
    patterns = json.loads(path.read_text())["apply_preset"]["name_algo_map"]
    return [settings["factor"] for pattern, settings in patterns.items() if pattern.endswith(".ff*")]


def test_lokr_writes_the_articles_factors(layerprobe: Callable[..., Result], tmp_path: Path) -> None:
    peaks = [("image", 0), ("text", 0), ("text", 31), ("image", 35)]
    run = write_run(tmp_path / "run", SD35_LARGE, 300, peaks=peaks, modules=sd3_modules(38))
    expected = notebook_factors(notebook(records(run, "last")))
    for critical in (",".join(map(str, CRITICAL)), "auto"):
        out = tmp_path / f"{critical}.json"
        weights = ("--text-weight", "1/3", "--image-weight", "2/3")
        shown = layerprobe("lokr", run.path, "--preset", "article", "--critical", critical, *weights, "--out", out)
        assert (shown.code, shown.err) == (0, "")
        assert factors_in(out) == expected
        table = [line.split() for line in shown.out.splitlines()[1:39]]
        assert [int(row[0]) for row in table] == list(range(38))
        assert [int(row[3]) for row in table] == expected
    assert shown.out.splitlines()[32].endswith("critical (text)")
    assert shown.out.splitlines()[1].endswith("critical (image, text)")
    assert "contribution of the nearest block" in shown.out.splitlines()[38]


def test_lokr_prints_the_parameters_that_lycoris_makes(
    layerprobe: Callable[..., Result], tiny: Path, tmp_path: Path
) -> None:
    out = tmp_path / "lycoris_config.json"
    shown = layerprobe("lokr", tiny, "--max-factor", "1", "--out", out)
    assert (shown.code, shown.err) == (0, "")

    # Factor 1 is a full matrix and one number; attention has factor 2: 2 x 2 and 32 x 32.
    def block(norm: int, feed_forward: int) -> int:
        return sum(rows * 64 * 64 + 1 for rows in (6, norm, *[4] * feed_forward)) + 2 * (4 + 32 * 32)

    expected = [block(6, 3)] * 5 + [block(2, 2)]
    lines = shown.out.splitlines()
    assert [int(line.split()[4].replace(",", "")) for line in lines[1:7]] == expected
    assert f"{sum(expected):,}" in lines[7] and lines[7].endswith("MB in bf16")
    assert "verified: LyCORIS" in lines[9] and "all 41 modules" in lines[9]
    assert lines[10] == f"written: {out}"
    assert lines[11].startswith(f'next: set "lycoris_config": "{out}"')


def test_lokr_without_a_target_writes_nothing(layerprobe: Callable[..., Result], tiny: Path, tmp_path: Path) -> None:
    before = snapshot(tmp_path)
    shown = layerprobe("lokr", tiny, "--critical", "none")
    assert shown.code == 0
    assert "critical" not in shown.out.replace("contribution", "")
    assert shown.out.splitlines()[-1].startswith("nothing written: add --env NAME")
    assert snapshot(tmp_path) == before


def test_lokr_writes_an_environment_and_never_overwrites_it_unasked(
    layerprobe: Callable[..., Result], tiny: Path, tmp_path: Path
) -> None:
    arguments = ("lokr", tiny, "--env", "weighted", "--config-dir", tmp_path / "config")
    shown = layerprobe(*arguments)
    assert (shown.code, shown.err) == (0, "")
    assert shown.out.splitlines()[-1] == "next: simpletuner train env=weighted"
    folder = tmp_path / "config" / "weighted"
    assert sorted(os.listdir(folder)) == ["config.json", "lycoris_config.json"]
    options = json.loads((folder / "config.json").read_text())
    assert "layerprobe" not in options and options["seed"] == 7 and options["lora_type"] == "lycoris"
    before = snapshot(tmp_path)
    assert_one_line(layerprobe(*arguments, "--max-factor", "3"), 1, "exists already", "--force")
    assert snapshot(tmp_path) == before
    assert layerprobe(*arguments, "--max-factor", "3", "--force").code == 0
    assert max(factors_in(folder / "lycoris_config.json")) == 3


def test_lokr_out_is_never_overwritten_unasked(layerprobe: Callable[..., Result], tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine.json"
    out.write_text("mine")
    before = snapshot(tmp_path)
    assert_one_line(layerprobe("lokr", tiny, "--out", out), 1, f"{out} exists already", "--force")
    assert snapshot(tmp_path) == before
    assert layerprobe("lokr", tiny, "--out", out, "--force").code == 0
    assert len(factors_in(out)) == 6


def test_what_cannot_be_written_is_said_before_the_proof(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text("mine")
    (tmp_path / "config" / "taken").mkdir(parents=True)
    (tmp_path / "config" / "taken" / "config.toml").write_text("seed = 1")
    code = "import sys; from simpletuner_layerprobe.cli import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    for target in (["--out", "mine.json"], ["--env", "taken"], ["--env", "a.b"]):
        shown = subprocess.run(
            [sys.executable, "-c", code, "lokr", str(tiny), *target],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        assert shown.stdout == "False\n" and shown.stderr.count("\n") == 1, shown


def test_an_environment_from_a_run_without_options_is_one_line(
    layerprobe: Callable[..., Result], tiny: Path, tmp_path: Path
) -> None:
    (tiny / "config.json").unlink()
    before = snapshot(tmp_path)
    result = layerprobe("lokr", tiny, "--env", "weighted", "--config-dir", tmp_path / "config")
    assert_one_line(result, 1, "config.json does not exist", "--out")
    assert snapshot(tmp_path) == before


def test_a_run_without_module_table_needs_unverified(layerprobe: Callable[..., Result], tmp_path: Path) -> None:
    source, run, out = tmp_path / "records.jsonl", tmp_path / "run", tmp_path / "out.json"
    source.write_text(record() + "\n" + record(timestep=0.9) + "\n")
    assert layerprobe("import", source, run).out == f"2 samples imported into {run}\n"
    before = snapshot(tmp_path)
    assert_one_line(layerprobe("lokr", run, "--out", out), 1, "has no module table", "--unverified")
    assert_one_line(layerprobe("check-config", source, "--run", run), 1)
    assert snapshot(tmp_path) == before
    shown = layerprobe("lokr", run, "--out", out, "--unverified", "--bins", "1")
    assert (shown.code, shown.err) == (0, "")
    assert "NOT verified: the run has no module table" in shown.out
    assert len(factors_in(out)) == 6
    assert "unknown" in shown.out.splitlines()[1]


def leaking(blocks: Any, factors: Any, targets: Any) -> dict[str, Any]:
    """A config of the form that the article published: whole blocks by class name, then the names."""
    config = ARTICLE_CONFIG(blocks, factors, targets)
    config["apply_preset"]["target_module"] = ["JointTransformerBlock"]
    return config


ARTICLE_CONFIG = lokr_config.article_config


def test_a_config_that_lycoris_builds_otherwise_is_an_error_and_not_a_file(
    layerprobe: Callable[..., Result], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lokr_config, "article_config", leaking)
    before = snapshot(tmp_path)
    for target in (("--out", tmp_path / "out.json"), ("--env", "x", "--config-dir", tmp_path / "config")):
        assert_one_line(layerprobe("lokr", tiny, *target), 1, "modules otherwise than meant")
    assert snapshot(tmp_path) == before


def test_check_config_proves_our_config_and_shows_the_leak_of_the_articles_form(
    layerprobe: Callable[..., Result], tiny: Path, tmp_path: Path
) -> None:
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    assert layerprobe("lokr", tiny, "--out", good).code == 0
    shown = layerprobe("check-config", good, "--run", tiny)
    assert (shown.code, shown.err) == (0, "")
    lines = shown.out.splitlines()
    assert len([line for line in lines if line.startswith("ok     transformer_blocks.")]) == 41
    assert "0 of 41 modules wrong" in lines[-1]
    config = json.loads(good.read_text())
    config["apply_preset"]["target_module"] = ["JointTransformerBlock"]
    bad.write_text(json.dumps(config))
    shown = layerprobe("check-config", bad, "--run", tiny, "--differences")
    assert_one_line(shown, 1, "of 41 modules otherwise than meant")
    lines = shown.out.splitlines()
    wrong = [line for line in lines if line.startswith("WRONG  transformer_blocks.")]
    assert wrong and all("meant lokr factor" in line and ", gets lokr" in line for line in wrong)
    assert not any(line.startswith("ok") for line in lines)
    assert f"{len(wrong)} of 41 modules wrong" in lines[-1]
    assert any(line.startswith("note   ") and "target_module" in line for line in lines)


def test_a_config_that_names_nothing_of_the_model_is_one_line(
    layerprobe: Callable[..., Result], tiny: Path, tmp_path: Path
) -> None:
    path = tmp_path / "other.json"
    config = ARTICLE_CONFIG(["other.0"], [3], [lokr_config.Target("other.*", ("ff*",), ("*",))])
    path.write_text(json.dumps(config))
    shown = layerprobe("check-config", path, "--run", tiny)
    assert_one_line(shown, 1, "gives no module of this model an adapter")
    assert "note   nothing in the model matches other.0.ff*" in shown.out


# import and export


def test_records_survive_export_and_import(layerprobe: Callable[..., Result], tiny: Path, tmp_path: Path) -> None:
    for name in ("records.jsonl", "records.jsonl.gz", "records.jsonl.bz2"):
        shown = layerprobe("export", tiny, tmp_path / name, "--tokens", "mean")
        assert shown == Result(0, f"200 samples written to {tmp_path / name}\n", "")
        copy = tmp_path / f"copy of {name}"
        assert layerprobe("import", tmp_path / name, copy, "--tokens", "mean").code == 0
        assert records(open_run(copy), "mean") == records(open_run(tiny), "mean")
        assert_one_line(layerprobe("export", tiny, tmp_path / name), 1, "exists already")
        assert_one_line(layerprobe("import", tmp_path / name, copy), 1, "exists already")


def test_import_with_a_model_gives_a_run_that_can_be_proved(layerprobe: Callable[..., Result], tmp_path: Path) -> None:
    model = tmp_path / "transformer" / "config.json"
    model.parent.mkdir()
    model.write_text(
        json.dumps(
            {
                "_class_name": "SD3Transformer2DModel",
                "num_layers": 6,
                "attention_head_dim": 32,
                "num_attention_heads": 2,
                "joint_attention_dim": 32,
                "caption_projection_dim": 64,
                "pooled_projection_dim": 64,
                "sample_size": 16,
                "pos_embed_max_size": 16,
            }
        )
    )
    source, run, out = tmp_path / "records.jsonl", tmp_path / "run", tmp_path / "out.json"
    source.write_text("".join(record(timestep=i / 19) + "\n" for i in range(20)))
    assert layerprobe("import", source, run, "--model", tmp_path).code == 0
    found = open_run(run).manifest
    assert (found.family, found.model_class) == ("sd3", "SD3Transformer2DModel")
    shown = layerprobe("lokr", run, "--out", out)
    assert (shown.code, shown.err) == (0, "")
    assert "verified: LyCORIS" in shown.out
    for where in (("--run", run), ("--model", model)):
        assert layerprobe("check-config", out, *where, "--differences").code == 0
    source.write_text(record(hidden_states=[0.1] * 7) + "\n")
    before = snapshot(tmp_path)
    result = layerprobe("import", source, tmp_path / "other", "--model", model)
    assert_one_line(result, 1, "7 image distances; the model has 6")
    result = layerprobe("import", source, tmp_path / "other", "--model", "sd99")
    assert_one_line(result, 1, "no architecture 'sd99'", "sd35-large", "flux-dev")
    assert snapshot(tmp_path) == before


# doctor


def test_doctor_prints_the_checks_and_says_what_to_do(
    layerprobe: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    from simpletuner_layerprobe.training import doctor

    good = doctor.Check(name="plugin", ok=True, detail="active", remedy="")
    bad = doctor.Check(name="SimpleTuner", ok=False, detail="not installed", remedy="pip install simpletuner")
    monkeypatch.setattr(doctor, "checks", lambda: [good])
    assert layerprobe("doctor") == Result(0, "ok       plugin  active\n", "")
    monkeypatch.setattr(doctor, "checks", lambda: [good, bad])
    shown = layerprobe("doctor")
    assert_one_line(shown, 1, "1 of 2 checks failed")
    assert "MISSING  SimpleTuner  not installed\n" in shown.out
    assert "-> pip install simpletuner\n" in shown.out


def test_probe_errors_of_several_lines_become_one(
    layerprobe: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refused(path: str) -> None:
        raise ProbeError("first\n  second")

    monkeypatch.setattr("simpletuner_layerprobe.run.records.open_run", refused)
    assert_one_line(layerprobe("status", tmp_path), 1, "first second")
