"""The article's record format, in and out."""

from __future__ import annotations

import bz2
import gzip
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from failing import fails, no_file_can_be_opened
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_run import manifest, rows, write_rows

from simpletuner_layerprobe.run import article, article_lines, load
from simpletuner_layerprobe.run.article import export_article, import_article
from simpletuner_layerprobe.run.article_lines import BLOCK_BYTES
from simpletuner_layerprobe.run.load import RunData, load_article, load_run
from simpletuner_layerprobe.run.manifest import MAX_BLOCKS, Module, Stream, Target, create_run
from simpletuner_layerprobe.run.rows import FACTS, UNKNOWN, image_hash

GOOD = b'{"timestep": 0.5, "encoder_hidden_states": [0.25, 0.5], "hidden_states": [0.1, 0.2, 0.3]}\n'
KEYS = {"image": "hidden_states", "text": "encoder_hidden_states"}
BLOCKS = {"image": ("a", "b"), "text": ("a",)}
DISTANCES = {
    ("image", "last"): [[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]],
    ("text", "last"): [[0.1], [0.2], [0.3]],
    ("image", "mean"): [[0.7, 0.8], [0.9, 1.0], [0.0, 0.5]],
    ("text", "mean"): [[0.4], [0.5], [0.6]],
}


def recorded(folder: Path, distances: Any = DISTANCES, **changes: Any) -> RunData:
    """A run of the probe with these distances and sigmas 0, 0.25, 0.5, ..."""
    count = len(next(iter(distances.values())))
    values = {key: np.asarray(value, np.float32) for key, value in distances.items()}
    facts = changes.pop("facts", {})
    return write_rows(folder, manifest(BLOCKS, **changes), rows(np.arange(count) / 4, values, facts))


def record(sigma: Any = 0.5, text: Any = (0.25, 0.5), image: Any = (0.1, 0.2, 0.3), **facts: Any) -> dict[str, Any]:
    return {"timestep": sigma, "encoder_hidden_states": text, "hidden_states": image, **facts}


def lines(records: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def everything(run: RunData) -> dict[str, Any]:
    """The run's columns with their dtypes, to compare bit by bit."""
    columns = {"sigma": run.sigma, "loss": run.loss, **run.facts}
    columns |= {f"{stream}": run.distances(stream, run.readings[0]) for stream in run.streams}
    return {
        name: (column.dtype, column.shape, column.tolist() if column.dtype == object else column.tobytes())
        for name, column in columns.items()
    }


UNIT = st.floats(0, 1) | st.floats(0, 1, width=32) | st.sampled_from([0, 1, 0.0, -0.0, 5e-324])
SOME_FACTS = st.fixed_dictionaries(
    {},
    optional={
        "image": st.text(max_size=5) | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.none(),
        "caption_words": st.integers(0, 2**31 - 1),
        "width": st.integers(0, 9999),
        "height": st.none() | st.integers(0, 9999),
        "backend": st.text(max_size=9),
        "dropped": st.booleans(),
        "loss": st.floats(-1e30, 1e30) | st.integers(-(2**70), 2**70),
        "prompt": st.text(max_size=5),
    },
)


@st.composite
def record_files(draw: st.DrawFn) -> bytes:
    text, image = draw(st.integers(0, 4)), draw(st.integers(1, 4))
    number = draw(st.sampled_from([UNIT, st.floats(0, 1, width=32)]))
    records = []
    for _ in range(draw(st.integers(1, 7))):
        texts, images = (draw(st.lists(number, min_size=size, max_size=size)) for size in (text, image))
        entry = record(draw(UNIT), texts, images) | draw(SOME_FACTS)
        if not text:
            del entry["encoder_hidden_states"]
        records.append(entry)
    return lines(records)


@given(record_files(), st.sampled_from(["", ".gz", ".bz2"]), st.booleans())
@settings(max_examples=40)
def test_import_export_import_is_bit_identical(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, suffix: str, by_line: bool
) -> None:
    folder = tmp_path_factory.mktemp("files")
    (folder / "in.jsonl").write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(article_lines, "BLOCK_BYTES", 1 + max(map(len, content.splitlines())))
        if by_line:
            patch.setattr(article_lines, "_parsed_by_arrow", lambda *_: None)
        first = import_article(folder / "in.jsonl", folder / "first")
        count = content.count(b"\n")
        assert export_article(first, folder / f"out.jsonl{suffix}", facts=True) == (count, 0)
        second = import_article(folder / f"out.jsonl{suffix}", folder / "second")
        assert everything(first) == everything(second) == everything(load_article(folder / "in.jsonl"))
    assert first.manifest.difference(second.manifest) == []
    # and the numbers are those that json alone reads in the file
    records = [json.loads(line) for line in content.splitlines()]
    for stream in first.streams:
        assert first.distances(stream).tolist() == [entry[KEYS[stream]] for entry in records]
    assert first.sigma.tolist() == [entry["timestep"] for entry in records]
    for name in ("caption_words", "width", "height", "backend", "dropped"):
        known = [entry.get(name) if entry.get(name) is not None else UNKNOWN[name] for entry in records]
        assert first.facts[name].tolist() == known
    loss_N = np.array([entry.get("loss", np.nan) for entry in records], np.float64).astype(np.float32)
    np.testing.assert_array_equal(first.loss, loss_N)
    assert (first.facts["image"] == 0).tolist() == [entry.get("image") is None for entry in records]


def test_what_an_imported_run_says_of_itself(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(GOOD + GOOD)
    known: dict[str, Any] = {
        "family": "flux",
        "flavour": "dev",
        "model_class": "FluxTransformer2DModel",
        "streams": (Stream("text", ("x.0", "x.1")), Stream("image", ("x.0", "x.1", "y.0"))),
        "targets": (Target("x.*", ("ff*",), ("*",)),),
        "modules": (Module("x.0.ff", "Linear", (8, 4)),),
    }
    run = import_article(tmp_path / "in", tmp_path / "run", tokens="mean", **known)
    assert run.path == tmp_path / "run" and run.samples == 2 and run.readings == ("mean",)
    assert {name: getattr(run.manifest, name) for name in known} == known
    assert (run.manifest.source, run.manifest.fingerprint) == ("import", "")
    assert run.streams == {"image": ("x.0", "x.1", "y.0"), "text": ("x.0", "x.1")}
    assert np.isnan(run.loss).all()
    for name in FACTS:
        assert run.facts[name].tolist() == [UNKNOWN[name]] * 2


def test_a_file_is_loaded_without_writing_anything(tmp_path: Path) -> None:
    (tmp_path / "in.bz2").write_bytes(gzip.compress(GOOD * 3))  # the compression is told by content, not by name
    run = load_run(tmp_path / "in.bz2", "mean")
    assert (run.samples, run.readings, run.files) == (3, ("mean",), ())
    assert run.streams["image"] == tuple(f"transformer_blocks.{i}" for i in range(3))
    assert run.distances("text", "mean").tolist() == [[0.25, 0.5]] * 3
    assert os.listdir(tmp_path) == ["in.bz2"]


def test_float64_is_kept_only_where_float32_would_change_a_value(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(lines([record(0.5, [0.5, 0.1], [0.25, float(np.float32(0.1))])]))
    run = import_article(tmp_path / "in", tmp_path / "run")
    assert run.distances("text").dtype == np.float64 and run.distances("text").tolist() == [[0.5, 0.1]]
    assert run.distances("image").dtype == np.float32


def test_images_are_told_apart_by_strings_and_numbers(tmp_path: Path) -> None:
    images = ["a.png", "b.png", "a.png", 0, 1, 1.0, 1.5, "1", "00000000000000ff", 2**70, None]
    (tmp_path / "in").write_bytes(lines([record(image=[0.5] * 3) | {"image": image} for image in images]))
    run = load_article(tmp_path / "in")
    image_N = run.facts["image"].tolist()
    assert image_N[0] == image_N[2] == image_hash("", "a.png") and image_N[4] == image_N[5] == image_N[7]
    assert image_N[8] == 255 and image_N[10] == 0 and len(set(image_N)) == 8
    assert run.images is None
    (tmp_path / "known").write_bytes(b"".join((tmp_path / "in").read_bytes().splitlines(True)[:-1]))
    assert load_article(tmp_path / "known").images == 7


def test_what_a_file_may_have_besides(tmp_path: Path) -> None:
    extra = json.dumps({"prompt": "a\nb", **record(), "seed": None}).encode()
    (tmp_path / "in").write_bytes(b"\xef\xbb\xbf" + extra + b"\r\n\n  \n" + extra)
    assert import_article(tmp_path / "in", tmp_path / "run").samples == 2


def test_an_empty_folder_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").write_bytes(GOOD)
    (tmp_path / "run").mkdir()
    assert import_article(tmp_path / "in", tmp_path / "run").samples == 1
    assert import_article(tmp_path / "in", tmp_path / "new" / "deep" / "run").samples == 1
    assert sorted(os.listdir(tmp_path)) == ["in", "new", "run"]
    monkeypatch.chdir(tmp_path)
    assert import_article("in", "relative").path == Path("relative")
    assert export_article(load_run("relative"), "out") == (1, 0)


BAD_LINES: dict[str, tuple[bytes, str]] = {
    "text": (b"hello\n", "not JSON (Expecting value, column 1)"),
    "too deep": (b"[" * 100_000 + b"\n", "not JSON"),
    "a number too long": (b'{"timestep": ' + b"1" * 5000 + b"}\n", "not JSON"),
    "nothing": (b"null\n", "null; expected an object"),
    "two in a line": (GOOD[:-1] + b"null\n", "not JSON (Extra data, column"),
    "a list": (b"[1]\n", "a list of 1; expected an object"),
    "no timestep": (b'{"encoder_hidden_states": [1], "hidden_states": [1]}\n', "lacks 'timestep'"),
    "no image": (b'{"timestep": 0, "encoder_hidden_states": [1]}\n', "lacks 'hidden_states'"),
    "no text": (
        b'{"timestep": 0, "hidden_states": [1, 1, 1]}\n',
        "encoder_hidden_states has 0 numbers; the records be",
    ),
    "timestep above": (lines([record(1.0000001)]), "timestep is 1.0000001; expected a number in [0, 1]"),
    "timestep NaN": (lines([record(float("nan"))]), "timestep is NaN"),
    "timestep null": (lines([record(None)]), "timestep is null"),
    "timestep true": (lines([record(True)]), "timestep is true"),
    "NaN": (lines([record(text=[0.1, float("nan")])]), "encoder_hidden_states[1] is NaN; expected a number in [0, 1]"),
    "a whole number beyond float64": (GOOD.replace(b"0.3", b"9" * 400), "hidden_states[2] is a whole number"),
    "above 1": (lines([record(image=[0, 1.0000001, 0])]), "hidden_states[1] is 1.0000001; expected a number in [0, 1]"),
    "true": (lines([record(image=[0, True, 0])]), "hidden_states[1] is true"),
    "null": (lines([record(image=[0, 0, None])]), "hidden_states[2] is null"),
    "an object": (lines([record(image={"0": 1})]), "hidden_states is an object; expected 1 to 4096 numbers"),
    "too many numbers": (lines([record(text=[0] * (MAX_BLOCKS + 1))]), "is a list of 4097; expected 1 to 4096"),
    "fewer": (lines([record(image=[0.1, 0.2])]), "hidden_states has 2 numbers; the records before have 3"),
    "an image that is a list": (lines([record() | {"image": [1]}]), "image is a list of 1; expected a string or a"),
    "half a word": (
        lines([record(caption_words=1.5)]),
        "caption_words is 1.5; expected a whole number, 0 to 2147483647",
    ),
    "a negative width": (lines([record(width=-1)]), "width is -1; expected a whole number"),
    "a backend that is a number": (lines([record(backend=1)]), "backend is 1; expected a string"),
    "dropped in words": (lines([record(dropped="yes")]), 'dropped is "yes"; expected true or false'),
    "a loss of NaN": (lines([record(loss=float("nan"))]), "loss is NaN; expected a finite number"),
}


@pytest.mark.parametrize("how", BAD_LINES)
def test_a_bad_line_is_named_and_nothing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setattr(article_lines, "BLOCK_BYTES", 200_000)
    line, text = BAD_LINES[how]
    first = GOOD * 2500  # a batch of them is written before the bad line comes
    (tmp_path / "in").write_bytes(first + line)
    with fails(f"{tmp_path / 'in'}, line 2501: ") as error:
        import_article(tmp_path / "in", tmp_path / "deep" / "er" / "run")
    assert text in str(error.value)
    assert len(str(error.value)) < len(str(tmp_path)) + 200
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.parametrize(
    "content", [b"null", b"null\n", GOOD + b"null", GOOD[:-1] + b"null\n", b"{}null{}\n", b"{\nnull\n}\n"]
)
def test_a_null_that_would_crash_arrow_never_gets_to_it(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "in").write_bytes(content)
    with fails("in, line "):
        load_article(tmp_path / "in")


def test_a_line_that_is_too_long_is_named(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(GOOD * 4 + b" " * (2 * BLOCK_BYTES) + GOOD)
    with fails(f"{tmp_path / 'in'}, line 5: over {BLOCK_BYTES} bytes long"):
        import_article(tmp_path / "in", tmp_path / "run")
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.parametrize("content", [b"", b"\n \n", gzip.compress(b"", mtime=0), bz2.compress(b"\n")])
def test_a_file_without_records_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "in").write_bytes(content)
    with fails("has no records"):
        import_article(tmp_path / "in", tmp_path / "run")
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.parametrize(
    "content",
    [
        gzip.compress(GOOD * 99, mtime=0)[:-10],
        gzip.compress(GOOD, mtime=0)[:12] + b"x" * 50,
        gzip.compress(GOOD, mtime=0)[:-5] + b"xxxxx",
        b"\x1f\x8bxx",
        bz2.compress(GOOD * 99)[:-10],
        b"BZh9 is no bzip2 file",
    ],
)
def test_a_damaged_archive_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "in").write_bytes(content)
    with fails("the file is damaged"):
        import_article(tmp_path / "in", tmp_path / "run")
    assert os.listdir(tmp_path) == ["in"]


def test_a_source_or_a_target_that_is_not_right(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(GOOD)
    with fails(f"cannot read {tmp_path / 'absent'}: No such file"):
        import_article(tmp_path / "absent", tmp_path / "run")
    with fails("Is a directory"):
        import_article(tmp_path, tmp_path / "run")
    with fails(f"cannot look into {tmp_path}: Too many open files"), no_file_can_be_opened():
        import_article(tmp_path / "in", tmp_path)
    with fails("tokens is 'first'; expected one of last, mean"):
        import_article(tmp_path / "in", tmp_path / "run", tokens="first")
    assert os.listdir(tmp_path) == ["in"]
    import_article(tmp_path / "in", tmp_path / "run")
    for taken, said in (("run", "exists already and is not an empty folder; choose a new one"), ("in", "is no folder")):
        with fails(said):
            import_article(tmp_path / "in", tmp_path / taken)
    assert load_run(tmp_path / "run").samples == 1 and sorted(os.listdir(tmp_path)) == ["in", "run"]


def test_a_folder_that_is_taken_meanwhile_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").write_bytes(GOOD)
    create = article.create_run

    def create_after(*arguments: Any) -> Any:
        (tmp_path / "new" / "run").mkdir(parents=True)
        (tmp_path / "new" / "run" / "theirs").touch()
        return create(*arguments)

    monkeypatch.setattr(article, "create_run", create_after)
    with fails("cannot make the run folder"):
        import_article(tmp_path / "in", tmp_path / "new" / "run")
    assert [path.name for path in (tmp_path / "new").rglob("*")] == ["run", "theirs"]


def test_block_counts_must_fit_the_records(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(GOOD)
    image, text = Stream("image", ("a", "b", "c")), Stream("text", ("a", "b"))
    for streams, error in (
        ((Stream("image", ("a", "b")), text), "the records have 3 image distances; the model has 2 such blocks"),
        ((image,), "the records have 2 text distances; the model has 0 such blocks"),
    ):
        with fails(error):
            import_article(tmp_path / "in", tmp_path / "run", streams=streams)
    assert os.listdir(tmp_path) == ["in"]


def test_a_stream_that_records_cannot_have_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(GOOD)
    image, text, audio = Stream("image", ("a", "b", "c")), Stream("text", ("a", "b")), Stream("audio", ("a",))
    run = import_article(tmp_path / "in", tmp_path / "run", streams=(image, audio, text))
    assert run.manifest.streams == (image, text)


def test_more_than_memory_should_hold_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").write_bytes(GOOD * 9)
    monkeypatch.setattr(load, "MAX_LOADED_BYTES", 100)
    with fails("has over 100 bytes of samples; import it into a run folder"):
        load_article(tmp_path / "in")


@pytest.mark.parametrize("suffix", ["gz", "bz2"])
@pytest.mark.parametrize(("piece", "text"), [(b"[", "line 1: over"), (b"\n", "mostly blank lines from here")])
def test_hostile_archives_take_little_memory(tmp_path: Path, suffix: str, piece: bytes, text: str) -> None:
    """Three hundred million empty lines, and a line that does not end."""
    with (gzip.GzipFile if suffix == "gz" else bz2.BZ2File)(tmp_path / "bomb", "wb", compresslevel=1) as file:
        for _ in range(75 if (suffix, piece) == ("gz", b"\n") else 8):
            file.write(piece * 2**22)
    code = (
        "import sys\n"
        "from simpletuner_layerprobe.errors import RunError\n"
        "from simpletuner_layerprobe.run.article import import_article\n"
        "try:\n"
        "    import_article(sys.argv[1], sys.argv[2])\n"
        "except RunError as error:\n"
        "    print(error)\n"
        # Not ru_maxrss: that starts with what the process had that started this one.
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "bomb"), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert text in done.stdout
    assert int(done.stdout.split()[-1]) < 250 * 1024  # kB
    assert os.listdir(tmp_path) == ["bomb"]


# Export


def test_export_writes_the_reading_that_was_asked_for(tmp_path: Path) -> None:
    run = recorded(tmp_path / "run")
    for tokens in ("last", "mean"):
        assert export_article(run, tmp_path / tokens, tokens) == (3, 0)
        records = [json.loads(line) for line in (tmp_path / tokens).read_text().splitlines()]
        assert [list(entry) for entry in records] == [["timestep", "encoder_hidden_states", "hidden_states"]] * 3
        assert [entry["timestep"] for entry in records] == [0, 0.25, 0.5]
        for stream, key in KEYS.items():
            read_NL = np.array([entry[key] for entry in records])
            np.testing.assert_array_equal(read_NL, np.array(DISTANCES[stream, tokens], np.float32))


def test_export_writes_the_facts_that_are_known(tmp_path: Path) -> None:
    facts = {
        "image": [1, 2**64 - 1, 0],
        "caption_words": [0, -1, 7],
        "width": [0, 512, 1024],
        "dropped": [1, 0, -1],
        "backend": ["photos", "", "ü"],
        "repeat": [0, 1, 2],
    }
    run = recorded(tmp_path / "run", facts=facts)
    export_article(run, tmp_path / "out", facts=True)
    records = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert [{key: entry[key] for key in list(entry)[3:]} for entry in records] == [
        {"image": f"{1:016x}", "caption_words": 0, "height": 1024, "backend": "photos", "dropped": True, "loss": 0.5},
        {"image": "f" * 16, "width": 512, "height": 1024, "dropped": False, "loss": 0.5},
        {"caption_words": 7, "width": 1024, "height": 1024, "backend": "ü", "loss": 0.5},
    ]
    loaded = load_article(tmp_path / "out")
    for name in ("image", "caption_words", "width", "height", "dropped", "backend"):
        assert loaded.facts[name].tolist() == run.facts[name].tolist()


@pytest.mark.parametrize(("suffix", "unpack"), [(".gz", gzip.decompress), (".bz2", bz2.decompress)])
def test_export_compresses_by_suffix_and_gives_the_same_bytes_again(
    tmp_path: Path, suffix: str, unpack: Callable[[bytes], bytes]
) -> None:
    run = recorded(tmp_path / "run")
    for name in ("plain", f"a{suffix}", f"b{suffix}"):
        export_article(run, tmp_path / name)
    packed = (tmp_path / f"a{suffix}").read_bytes()
    assert packed == (tmp_path / f"b{suffix}").read_bytes()
    assert unpack(packed) == (tmp_path / "plain").read_bytes()


def test_samples_with_a_distance_that_is_not_finite_are_skipped_and_counted(tmp_path: Path) -> None:
    distances = {key: np.array(value) for key, value in DISTANCES.items()}
    distances["image", "last"][0, 1] = np.inf
    distances["text", "last"][2, 0] = np.nan
    distances["text", "mean"][:] = np.nan
    run = recorded(tmp_path / "run", distances)
    assert export_article(run, tmp_path / "out") == (1, 2)
    assert json.loads((tmp_path / "out").read_text())["timestep"] == 0.25
    with fails("none of its 3 samples has finite distances"):
        export_article(run, tmp_path / "out.gz", "mean")
    assert sorted(os.listdir(tmp_path)) == ["out", "run"]


def test_a_run_without_text_exports_images_alone_and_imports_them(tmp_path: Path) -> None:
    what = manifest({"image": ("a", "b")}, readings=("last",))
    run = write_rows(tmp_path / "run", what, rows([0], {("image", "last"): np.array([[0.5, 0.25]], np.float32)}))
    assert export_article(run, tmp_path / "out") == (1, 0)
    assert (tmp_path / "out").read_bytes() == b'{"timestep": 0.0, "hidden_states": [0.5, 0.25]}\n'
    assert load_article(tmp_path / "out").streams == {"image": ("transformer_blocks.0", "transformer_blocks.1")}
    for further in (b"", b', "x": 1'):  # by Arrow, and line by line
        line = b'{"timestep": 0, "encoder_hidden_states": null, "hidden_states": [1, 0]' + further + b"}\n"
        (tmp_path / "null").write_bytes(line)
        assert list(load_article(tmp_path / "null").streams) == ["image"]


def test_export_refuses_what_it_cannot_write(tmp_path: Path) -> None:
    run = recorded(tmp_path / "run")
    (tmp_path / "out").write_bytes(b"mine")
    with fails("out exists already"):
        export_article(run, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b"mine"
    with fails("tokens is 'pair2_last'; expected one of last, mean"):
        export_article(run, tmp_path / "new", "pair2_last")
    with fails("cannot write"):
        export_article(run, tmp_path / "absent" / "new")
    for blocks, text in (
        ({"text": ("a",)}, "no stream 'image'"),
        ({"image": ("a",), "audio": ("a",)}, "has a stream 'audio'; the record format knows image and text only"),
        (BLOCKS, "has no samples"),
    ):
        create_run(tmp_path / text[:8], manifest(blocks))
        with fails(text):
            export_article(load_run(tmp_path / text[:8]), tmp_path / "new")
    create_run(tmp_path / "mean", manifest(BLOCKS, readings=("mean",)))
    with fails("has no reading 'last' of text; it has: mean"):
        export_article(load_run(tmp_path / "mean"), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_article_s_file_loads_in_seconds(tmp_path: Path) -> None:
    """17,400 records, a tenth of the article's: CPU time, so that a busy machine does not matter."""
    random = np.random.default_rng(0)
    entry = lines([record(0.5, random.random(37, np.float32).tolist(), random.random(38, np.float32).tolist())])
    (tmp_path / "in").write_bytes(entry * 17_400)
    before = time.process_time()
    assert load_article(tmp_path / "in").samples == 17_400
    assert time.process_time() - before < 2
