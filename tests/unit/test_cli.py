"""What the commands have in common, and those without a plan: status, heatmap, findings, import, export, merge ..."""

from __future__ import annotations

import ast
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from command_line import TINY, Result, assert_one_line, in_a_process, snapshot
from synthetic_run import SD35_LARGE, manifest, records, rows, sd3_modules, write_rows, write_run

from simpletuner_layerprobe.cli import parser
from simpletuner_layerprobe.commands import output
from simpletuner_layerprobe.errors import ProbeError
from simpletuner_layerprobe.run.load import load_run
from simpletuner_layerprobe.run.manifest import create_run

Command = Callable[..., Result]


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import sys, simpletuner_layerprobe.cli as cli; cli.parser();"
        "print(sorted({'numpy', 'scipy', 'torch', 'matplotlib', 'pyarrow', 'lycoris'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert in_a_process("--help", stdout=subprocess.PIPE).returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.3  # CPU seconds, not the clock's


def test_every_command_has_help_with_an_example_and_few_options(layerprobe: Command) -> None:
    (commands,) = (action for action in parser()._actions if action.nargs == "A...")
    assert " ".join(commands.choices) == (  # type: ignore[arg-type]
        "doctor status heatmap findings report compare lokr trial check-config classes adapter import export merge"
    )
    listed = layerprobe("--help").out
    for name in commands.choices:  # type: ignore[union-attr]
        shown = layerprobe(name, "--help")
        assert shown.code == 0 and f"example:\n  layerprobe {name}" in shown.out and f"  {name} " in listed
        options = re.findall(r"^  (?:-h, )?(--[\w-]+)(?= |$)", shown.out, re.MULTILINE)
        assert len(options) <= 12, (name, options)
    every = layerprobe("lokr", "--help-all").out
    assert "--contrast F " in every and "--contrast F " not in layerprobe("lokr", "--help").out
    assert "how the plan is made, with --help-all:\n  --critical, --per-stream," in layerprobe("lokr", "--help").out


def test_a_reader_that_has_gone_is_no_traceback(tiny_run: Path) -> None:
    command = [sys.executable, "-m", "simpletuner_layerprobe.cli", "status", str(tiny_run)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert (process.wait(), said) == (1, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_under_stdout_is_one_line(tiny_run: Path) -> None:
    with open("/dev/full", "w") as full:
        done = in_a_process("status", str(tiny_run), stdout=full)
    assert done.returncode == 1
    assert done.stderr == "layerprobe: error: No space left on device\n"


@pytest.mark.parametrize(
    ("error", "result"),
    [
        (KeyboardInterrupt(), Result(130, "", "layerprobe: interrupted\n")),
        (ProbeError("first\n  second"), Result(1, "", "layerprobe: error: first second\n")),
    ],
)
def test_what_ends_a_command_is_one_line(
    layerprobe: Command, monkeypatch: pytest.MonkeyPatch, error: BaseException, result: Result
) -> None:
    def refused(path: str, tokens: str) -> None:
        raise error

    monkeypatch.setattr("simpletuner_layerprobe.run.load.load_run", refused)
    assert layerprobe("status", "run") == result


def test_a_name_that_the_terminal_cannot_show_is_escaped(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = in_a_process("status", str(tmp_path / "lauf-ä"), env=environment, stdout=subprocess.PIPE)
    assert done.returncode == 1
    assert "lauf-\\xe4 does not exist" in done.stderr and done.stderr.count("\n") == 1


# Bad input: one line, exit code 1 or 2, nothing written


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("status", "RUN", "--bins", "0"), "--bins: '0' is not a whole number from 1 to 1000"),
        (("status", "RUN", "--preset", "much"), "--preset: the preset is 'much'; expected article"),
        (("check-config", "OUT"), "one of the arguments --run --model is required"),
        (("export",), "the following arguments are required: RUN"),
    ],
)
def test_a_bad_option_is_one_line_that_names_it(
    layerprobe: Command, tiny_run: Path, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    before = snapshot(tmp_path)
    paths = {"RUN": str(tiny_run), "OUT": str(tmp_path / "out.json")}
    result = layerprobe(*(paths.get(argument, argument) for argument in arguments))
    assert_one_line(result, 2, said, f"(see layerprobe {arguments[0]} --help)")
    assert snapshot(tmp_path) == before


def run_commands(run: Path, out: Path) -> list[tuple[object, ...]]:
    """Every command that reads a run."""
    return [
        ("status", run),
        ("heatmap", run, "--out", out),
        ("findings", run),
        ("report", run, "--out", f"{out}.html"),
        ("lokr", run, "--preset", "article", "--out", f"{out}.json"),
        ("compare", run, run, "--out", f"{out}.html"),
        ("export", run, f"{out}.jsonl"),
    ]


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("missing", "run does not exist; expected"),
        ("without a manifest", "run has no manifest.json"),
        ("empty", "no samples"),
        ("schema 2", "schema 2"),
        ("damaged", "{file}"),
        ("one reading", "'mean'"),
    ],
)
def test_a_run_that_is_none_is_one_line_of_every_command(
    layerprobe: Command, tmp_path: Path, what: str, said: str
) -> None:
    run, file = tmp_path / "run", ""
    if what == "without a manifest":
        run.mkdir()
    elif what == "empty":
        create_run(run, manifest(TINY, modules=sd3_modules(6)))
    elif what != "missing":
        files = write_run(run, TINY, 400, readings=("last",), modules=sd3_modules(6)).files
        if what == "damaged":
            file = str(files[-1].path)
            data = bytearray(files[-1].path.read_bytes())
            data[len(data) // 2] ^= 0xFF
            files[-1].path.write_bytes(data)
        elif what == "schema 2":
            path = run / "manifest.json"
            path.write_text(path.read_text().replace('"schema": 3', '"schema": 2'))
    before = snapshot(tmp_path)
    for command in run_commands(run, tmp_path / "out"):
        tokens = ("--tokens", "mean") if what == "one reading" else ()
        assert_one_line(layerprobe(*command, *tokens), 1, said.format(file=file))
    assert snapshot(tmp_path) == before


# status


def facts_of(shown: Result) -> dict[str, str]:
    assert (shown.code, shown.err) == (0, "")
    said = shown.out.partition("\n\nVerdict\n")[0]
    return dict(line.split(None, 1) for line in said.splitlines() if not line.startswith(" "))


def test_status_tells_what_the_run_holds(layerprobe: Command, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", SD35_LARGE, 60, sigmas=[0.05] * 20 + [0.3] * 30 + [1.0] * 10, images=12)
    shown = layerprobe("status", run.path)
    facts = facts_of(shown)
    assert facts["model"] == "sd3 large, 38 blocks"
    assert facts["samples"] == "60 samples of 12 images (rank 0: 40, rank 1: 20)"
    assert facts["streams"] == "image 38 blocks, text 37 blocks"
    assert facts["readings"] == "last, mean"
    assert facts["modules"] == "no module table"
    assert facts["backends"] == "photos: 60"
    assert facts["non-finite"] == "none"
    assert facts["size"].endswith("in 3 stream files")
    said, _, verdict = shown.out.partition("\n\nVerdict\n")
    assert [line.split()[0] for line in verdict.splitlines()] == ["enough", "blocks", "weighting", "now"]
    bars = [line.split() for line in said.splitlines() if line.startswith(" ")]
    assert [bar[:3] for bar in bars[:2]] == [["0", "-", "0.1"], ["0.1", "-", "0.2"]]
    assert [bar[3] for bar in bars] == ["20", "0", "0", "30", "0", "0", "0", "0", "0", "10"]
    assert [bar[4].count("#") for bar in bars] == [27, 0, 0, 40, 0, 0, 0, 0, 0, 14]
    assert bars[1][4] == "(none)"


def test_status_counts_what_is_not_finite_not_known_and_cut_off(layerprobe: Command, tmp_path: Path) -> None:
    what = manifest({"image": ("blocks.0",)}, readings=("last",), family="", flavour="", targets=())
    distance_NL = np.array([[np.nan], [0.5], [0.4]], dtype=np.float32)
    facts = {"backend": ["", "", ""], "image": [0, 1, 2]}
    run = write_rows(tmp_path / "run", what, rows([0.2, 0.4, 0.5], {("image", "last"): distance_NL}, facts), files=3)
    last = run.files[-1].path
    os.truncate(last, last.stat().st_size - 100)
    shown = facts_of(layerprobe("status", run.path))
    assert shown["non-finite"] == "image last: 1"
    assert shown["backends"] == "unknown: 2"
    assert shown["model"] == "unknown, 1 block"
    assert shown["samples"].startswith("2 samples (rank 0: ") and "1 stream file cut off" in shown["samples"]


def test_a_file_of_records_is_a_run_too(layerprobe: Command, tiny_run: Path, tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl.gz"
    assert layerprobe("export", tiny_run, file, "--facts").code == 0
    facts = facts_of(layerprobe("status", file))
    assert facts["samples"] == "400 samples of 40 images"
    assert facts["size"].endswith("in 1 file")
    assert_one_line(layerprobe("report", file), 1, "name the page with --out")


@pytest.mark.parametrize("samples", [2, 60])
def test_status_does_not_guess_from_too_few_samples(layerprobe: Command, tmp_path: Path, samples: int) -> None:
    run = write_run(tmp_path / "run", TINY, samples, images=samples, modules=sd3_modules(6)).path
    shown = layerprobe("status", run).out
    assert "not enough for all of the article's plan: " in shown and "all would take" not in shown
    assert "fewer than 10 samples in a sigma bin.\n" in shown


HOSTILE = "ph\x1b[2Jo\nsettled  \u202eé日本\x9b"
SHOWN = "ph\\x1b[2Jo\\nsettled  \\u202eé日本\\x9b"


def test_what_a_run_calls_things_stays_text_on_the_terminal(layerprobe: Command, tmp_path: Path) -> None:
    odd = tmp_path / "ru\x1b[1mn\u2066"
    run = write_run(odd, TINY, 400, images=40, facts={"backend": [HOSTILE, "b\rc"] * 200}).path
    assert layerprobe("export", run, tmp_path / "r.jsonl", "--facts").code == 0
    for command in (("status", run), ("status", tmp_path / "r.jsonl"), ("findings", run), ("compare", run, run)):
        shown = layerprobe(*command)
        assert shown.code == 0 and all(line.isprintable() for line in shown.out.split("\n")), shown
        assert command[0] != "status" or SHOWN in shown.out
    for command in (("status", odd / "no\x1bne"), ("status", run, "--bins", "\x1b[1m"), ("export", run, run)):
        shown = layerprobe(*command)
        assert shown.code in (1, 2) and shown.err[:-1].isprintable() and "\\x1b" in shown.err


def test_commands_print_through_one_function() -> None:
    """`say` escapes what a terminal would act on; print would not."""
    commands = Path(output.__file__).parent
    printing = {
        (path.name, node.lineno)
        for path in commands.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
    }
    assert {name for name, _ in printing} == {"output.py"} and len(printing) == 3


# heatmap


def test_heatmap_writes_the_figures_and_the_arrays(layerprobe: Command, tiny_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "figures"
    arguments = ("heatmap", tiny_run, "--out", out, "--tokens", "mean", "--bins", "5", "--format", "svg")
    shown = layerprobe(*arguments)
    names = ["figure1_streams.svg", "figure2_combined.svg", "figure3_factors.svg", "heatmap.npz"]
    assert (shown.code, shown.err) == (0, "")
    assert shown.out.split() == [str(out / name) for name in names]
    assert sorted(os.listdir(out)) == names
    with np.load(out / "heatmap.npz", allow_pickle=False) as arrays:
        assert arrays["image_mean"].shape == arrays["image_error"].shape == (5, 6)
        assert arrays["combined_mean"].shape == (5, 5)
        assert str(arrays["reading"]) == "mean"
        assert arrays["image_count"].sum() == 400
    assert b"400 samples of 40 images" in (out / names[0]).read_bytes()
    first = snapshot(out)
    assert layerprobe(*arguments).code == 0
    assert snapshot(out) == first


def test_heatmap_says_what_it_cannot_draw_and_which_bins_are_empty(layerprobe: Command, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", {"image": ("blocks.0",)}, 30, sigmas=[0.15, 0.55, 0.95] * 10)
    shown = layerprobe("heatmap", run.path, "--out", tmp_path / "out")
    assert shown.code == 0
    assert sorted(os.listdir(tmp_path / "out")) == ["figure1_streams.png", "heatmap.npz"]
    assert shown.err.startswith(
        "layerprobe: warning: 7 of 10 sigma bins have no samples "
        "(0 - 0.1, 0.2 - 0.3, 0.3 - 0.4, 0.4 - 0.5, 0.6 - 0.7, ...) and count as 0,"
    )
    assert "; not every figure can be drawn: all 1 blocks have the same contribution" in shown.err
    assert shown.err.count("\n") == 1


# findings


def test_findings_in_words_and_as_json(layerprobe: Command, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", SD35_LARGE, 1000, peaks=[("image", 35)], images=50).path
    said = layerprobe("findings", run).out
    assert said.startswith("sd3 large, 1,000 samples of 50 images\n")
    assert "Critical blocks, image stream\n  block 35 changes the hidden states" in said
    assert (
        said.count("\nnothing of  ") == 1 and "data backend (all samples come from one data backend (photos))" in said
    )
    told = layerprobe("findings", run, "--json", "--tokens", "mean").json
    assert (told["samples"], told["images"]) == (1000, 50)
    assert [section["kind"] for section in told["sections"]][:2] == ["critical", "critical"]
    assert told["sections"][0]["findings"][0]["blocks"] == ["transformer_blocks.35"]


def test_status_as_json_has_what_the_words_say(layerprobe: Command, tiny_run: Path) -> None:
    told, said = layerprobe("status", tiny_run, "--json").json, layerprobe("status", tiny_run).out
    assert (told["samples"], told["images"], sum(told["samples_by_sigma"])) == (400, 40, 400)
    assert len(told["streams"]["image"]) == 6 and told["modules"] == len(sd3_modules(6))
    assert all(f"{name:<12}{sentence}.\n" in said for name, sentence in told["verdict"].items())
    assert all(f"{command}\n" in said for command in told["commands"].values()) and len(told["commands"]) == 3


# Which run


def test_the_folder_that_a_run_lies_in_names_it(layerprobe: Command, tiny_run: Path, tmp_path: Path) -> None:
    for i in range(len(run_commands(tiny_run, tmp_path))):
        command = run_commands(tiny_run, tmp_path / str(i))[i]
        again = layerprobe(command[0], tiny_run.parent, *command[2:])
        assert (again.code, again.err) == (0, ""), command
    assert layerprobe("merge", tiny_run.parent, tiny_run, tmp_path / "both").code == 0
    assert_one_line(layerprobe("status", tmp_path / "output"), 1, "output has no manifest.json")


def test_the_newest_run_is_taken_and_said(
    layerprobe: Command, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert layerprobe("status").out.startswith("newest run  output/probe/layerprobe\n")
    assert layerprobe("status", "--json").json["run"] == "output/probe/layerprobe"
    write_run(tmp_path / "other", TINY, 40)
    for file in (tmp_path / "other").iterdir():
        os.utime(file, (2e9, 2e9))
    assert layerprobe("findings").out.startswith("newest run  other, of 2 below this folder\n")
    shown = layerprobe("report")
    assert shown.out.splitlines() == ["newest run  other, of 2 below this folder", "other/report.html"]
    for file in tiny_run.iterdir():
        os.utime(file, (2e9, 2e9))
    assert_one_line(layerprobe("status"), 2, "give RUN: other and output/probe/layerprobe below", "of the same time")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert_one_line(layerprobe("lokr"), 2, "give RUN, or --model for a plan without a run: there is no run below")
    monkeypatch.setattr("simpletuner_layerprobe.run.newest.MOST_FOLDERS", 2)
    monkeypatch.chdir(tmp_path)
    assert_one_line(layerprobe("heatmap", "--out", "x"), 1, "more than 2 folders here", "name the run")


def test_a_mistyped_command_or_choice_is_guessed(layerprobe: Command, tiny_run: Path) -> None:
    assert_one_line(layerprobe("staus", tiny_run), 2, "invalid choice: 'staus'; did you mean status?")
    said = layerprobe("lokr", tiny_run, "--direction", "unifrom")
    assert_one_line(said, 2, "'unifrom'; did you mean uniform?")
    assert_one_line(layerprobe("xyzzy"), 2, "invalid choice: 'xyzzy' (choose from", "status")


# Tables


def test_tables_fit_the_terminal_and_say_what_they_leave_out(
    layerprobe: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 80 columns where nothing is known of a terminal; COLUMNS and --wide say otherwise."""
    blocks = {"image": SD35_LARGE["image"][:12], "text": SD35_LARGE["text"][:11]}
    run, other = (
        write_run(tmp_path / str(seed), blocks, 400, modules=sd3_modules(12), images=10, seed=seed).path
        for seed in (1, 9)
    )
    config = tmp_path / "config.json"
    assert layerprobe("lokr", run, "--preset", "article", "--out", config).code == 0
    tables = [
        ("lokr", run, "--preset", "article"),
        ("lokr", run, "--params", "700k", "--per-stream", "--freeze", "3-5"),
        ("check-config", config, "--run", run),
        ("classes", "--run", run),
        ("compare", run, other),
        ("status", run),
        ("findings", run),
    ]
    for command in tables:
        widths = {}
        for columns in ("", "120"):
            monkeypatch.setenv("COLUMNS", columns)
            shown = layerprobe(*command, keep_columns=True)
            assert shown.code == 0, shown
            widths[columns] = widest(shown.out)
            assert widths[columns] <= int(columns or 80), (command, columns)
        assert widest(layerprobe(*command, "--wide", keep_columns=True).out) >= widths["120"]
    monkeypatch.setenv("COLUMNS", "80")
    said = layerprobe(*tables[1], keep_columns=True).out
    assert "left out to fit (--wide shows all): agree, 95% interval" in said and "NOT settled" in said
    assert "left out" not in layerprobe(*tables[1], "--wide", keep_columns=True).out


def widest(text: str) -> int:
    """The longest line but the sentences below a plan or a check, and what is to be copied or names a file."""
    lines = text.partition("\nby       ")[0].partition("\nLyCORIS ")[0].splitlines()
    return max(len(line) for line in lines if "layerprobe lokr" not in line and os.sep not in line)


# import, export and merge


def test_a_bad_record_is_one_line_with_its_number(layerprobe: Command, tmp_path: Path) -> None:
    source = tmp_path / "records.jsonl"
    source.write_text('{"timestep": 0.5, "encoder_hidden_states": [0.1], "hidden_states": [0.1, 0.2]}\n{not json\n')
    before = snapshot(tmp_path)
    assert_one_line(layerprobe("import", source, tmp_path / "deep" / "run"), 1, str(source), "line 2")
    assert snapshot(tmp_path) == before


def test_records_survive_export_and_import(layerprobe: Command, tiny_run: Path, tmp_path: Path) -> None:
    file, copy = tmp_path / "records.jsonl.gz", tmp_path / "copy"
    shown = layerprobe("export", tiny_run, file, "--tokens", "mean", "--facts")
    assert shown == Result(0, f"400 samples of 40 images written to {file}\n", "")
    shown = layerprobe("import", file, copy, "--tokens", "mean")
    assert shown == Result(0, f"400 samples of 40 images imported into {copy}\n", "")
    first, second = load_run(tiny_run), load_run(copy)
    assert records(second, "mean") == records(first, "mean")
    for name in ("image", "width", "backend", "dropped"):
        assert first.facts[name].tolist() == second.facts[name].tolist()
    assert_one_line(layerprobe("export", tiny_run, file), 1, "exists already")
    assert_one_line(layerprobe("import", file, copy), 1, "exists already")


def test_what_no_record_can_hold_is_left_out_and_said(layerprobe: Command, tmp_path: Path) -> None:
    what = manifest({"image": ("b.0", "b.1")}, readings=("last",))
    distance_NL = np.array([[np.nan, 0.1], [0.5, 0.2]], dtype=np.float32)
    run = write_rows(tmp_path / "run", what, rows([0.2, 0.4], {("image", "last"): distance_NL}))
    shown = layerprobe("export", run.path, tmp_path / "records.jsonl")
    assert shown.out == f"1 of 2 samples written to {tmp_path / 'records.jsonl'}\n"
    assert shown.err == "layerprobe: warning: 1 sample left out: a record cannot hold distances that are not finite\n"


def test_export_tells_formats_by_their_names(layerprobe: Command, tiny_run: Path, tmp_path: Path) -> None:
    starts = {"t.csv": b"sigma,loss,", "T.csv.gz": b"\x1f\x8b", "t.csv.bz2": b"BZh", "t.parquet": b"PAR1"}
    for name, start in (*starts.items(), ("t.jsonl", b'{"timestep": ')):
        shown = layerprobe("export", tiny_run, tmp_path / name)
        assert shown.out == f"400 samples of 40 images written to {tmp_path / name}\n"
        assert (tmp_path / name).read_bytes().startswith(start)
    for option in (("--tokens", "last"), ("--facts",)):
        result = layerprobe("export", tiny_run, tmp_path / "new.csv", *option)
        assert_one_line(result, 1, "is a table, which has all readings and facts")
    assert not (tmp_path / "new.csv").exists()


def test_merged_runs_count_what_is_in_both_once(layerprobe: Command, tiny_run: Path, tmp_path: Path) -> None:
    a, b = (write_run(tmp_path / name, TINY, 100, seed=seed).path for seed, name in enumerate("ab"))
    shown = layerprobe("merge", a, b, tmp_path / "both")
    assert shown.code == 0 and shown.out.endswith(f"200 samples merged into {tmp_path / 'both'}\n")
    again = layerprobe("merge", tmp_path / "both", a, tmp_path / "all")
    assert again.out.endswith(f"200 samples merged into {tmp_path / 'all'}\n")
    assert "warning: " in again.err and "100 samples are in the runs before it or in it twice" in again.err
    whole = "400 samples of 40 images"
    same = layerprobe("merge", tiny_run, tiny_run, tmp_path / "same")
    assert same.out == f"{tiny_run}: {whole}\n" * 2 + f"{whole} merged into {tmp_path / 'same'}\n"


# doctor


def test_doctor_prints_the_checks_and_says_what_to_do(layerprobe: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    from simpletuner_layerprobe.api import doctor

    good = doctor.Check(name="plugin", ok=True, detail="active", remedy="")
    bad = doctor.Check(name="SimpleTuner", ok=False, detail="not installed", remedy="pip install simpletuner")
    monkeypatch.setattr(doctor, "checks", lambda: [good])
    assert layerprobe("doctor") == Result(0, "ok       plugin  active\n", "")
    monkeypatch.setattr(doctor, "checks", lambda: [good, bad])
    shown = layerprobe("doctor")
    assert_one_line(shown, 1, "1 of 2 checks failed")
    assert "MISSING  SimpleTuner  not installed\n" in shown.out
    assert "-> pip install simpletuner\n" in shown.out
