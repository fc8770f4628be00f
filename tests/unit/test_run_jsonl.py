from __future__ import annotations

import bz2
import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from failing import fails, no_file_can_be_opened
from hypothesis import given, settings
from hypothesis import strategies as st

from simpletuner_layerprobe.run import article as jsonl
from simpletuner_layerprobe.run.article import MAX_LINE_BYTES, export_jsonl, import_jsonl
from simpletuner_layerprobe.run.manifest import MAX_BLOCKS, Manifest, Module, Stream
from simpletuner_layerprobe.run.records import Rows, Run, ShardWriter, create_run, open_run

GOOD = b'{"timestep": 0.5, "encoder_hidden_states": [0.25, 0.5], "hidden_states": [0.1, 0.2, 0.3]}\n'
EXPORT_MANIFEST = Manifest(
    schema=1,
    family="",
    flavour="",
    model_class="",
    streams=(Stream("image", ("a", "b")), Stream("text", ("a",))),
    tokens=("last", "mean"),
    modules=(),
    versions={},
    settings={},
    fingerprint="",
    created="",
    source="probe",
)


def recorded(folder: Path, manifest: Manifest, distances: dict[tuple[str, str], Any]) -> Run:
    """A run of the probe with one shard of these distances and sigmas 0, 0.25, 0.5, ..."""
    count = len(next(iter(distances.values())))
    create_run(folder, manifest)
    ShardWriter(folder, manifest, 0).write(
        Rows(
            sigma_N=np.arange(count) / 4,
            loss_N=np.zeros(count, np.float32),
            width_N=np.zeros(count, np.int32),
            height_N=np.zeros(count, np.int32),
            text_tokens_N=np.zeros(count, np.int32),
            caption_dropped_N=np.zeros(count, np.int8),
            backend_N=np.zeros(count, np.int16),
            backends=("photos",),
            distances={key: np.asarray(value, np.float32) for key, value in distances.items()},
        )
    )
    return open_run(folder)


def lines(records: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def record(sigma: Any = 0.5, text: Any = (0.25, 0.5), image: Any = (0.1, 0.2, 0.3)) -> dict[str, Any]:
    return {"timestep": sigma, "encoder_hidden_states": text, "hidden_states": image}


def everything(run: Run) -> list[tuple[Any, ...]]:
    """The run's rows as bytes and dtypes, to compare bit by bit."""
    found = []
    for rows in run.rows():
        arrays = {**rows.columns(), **{"/".join(key): value for key, value in rows.distances.items()}}
        found.append(tuple((key, a.dtype.str, a.shape, a.tobytes()) for key, a in sorted(arrays.items())))
    return found


FINITE = st.floats(allow_nan=False, allow_infinity=False)
NUMBERS = st.one_of(FINITE, st.floats(0, 1, width=32), st.integers(-3, 3))


@st.composite
def record_files(draw: st.DrawFn) -> bytes:
    text, image = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    narrow = draw(st.booleans())
    number = st.floats(0, 1, width=32) if narrow else NUMBERS
    one = st.builds(
        record,
        st.floats(0, 1) | st.sampled_from([0, 1]),
        st.lists(number, min_size=text, max_size=text),
        st.lists(number, min_size=image, max_size=image),
    )
    return lines(draw(st.lists(one, min_size=1, max_size=7)))


@given(record_files(), st.sampled_from(["", ".gz", ".bz2"]))
@settings(deadline=None, max_examples=40)
def test_import_export_import_is_bit_identical(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, suffix: str
) -> None:
    folder = tmp_path_factory.mktemp("files")
    (folder / "in.jsonl").write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonl, "ROWS_PER_SHARD", 3)
        first = import_jsonl(folder / "in.jsonl", folder / "first")
        count = content.count(b"\n")
        assert export_jsonl(first, folder / f"out.jsonl{suffix}") == (count, 0)
        second = import_jsonl(folder / f"out.jsonl{suffix}", folder / "second")
    assert len(first.shards) == -(-count // 3)
    assert everything(first) == everything(second)
    assert first.manifest.difference(second.manifest) == []
    # and the numbers are those that json alone finds in the file
    records = [json.loads(line) for line in content.splitlines()]
    for key, column in (("hidden_states", "image"), ("encoder_hidden_states", "text")):
        found = [list(map(float, sample)) for rows in first.rows() for sample in rows.distances[column, "last"]]
        assert found == [one[key] for one in records]
    assert [sigma for rows in first.rows() for sigma in rows.sigma_N] == [one["timestep"] for one in records]


def test_a_record_file_of_the_article_s_form_comes_back_byte_by_byte(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    content = lines(
        [
            record(random.random(), text_L.tolist(), image_L.tolist())
            for text_L, image_L in zip(
                random.random((4, 37), np.float32), random.random((4, 38), np.float32), strict=True
            )
        ]
    )
    (tmp_path / "in.jsonl").write_bytes(content)
    run = import_jsonl(tmp_path / "in.jsonl", tmp_path / "run")
    assert export_jsonl(run, tmp_path / "out.jsonl") == (4, 0)
    assert (tmp_path / "out.jsonl").read_bytes() == content


def test_what_an_imported_run_says_of_itself(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(GOOD + GOOD)
    modules = (Module("x_blocks.0.ff", "Linear", (8, 4)),)
    paths = {"image": ["x.0", "x.1", "y.0"], "text": ("x.0", "x.1")}
    run = import_jsonl(
        tmp_path / "in",
        tmp_path / "run",
        tokens="mean",
        modules=modules,
        family="flux",
        flavour="dev",
        model_class="FluxTransformer2DModel",
        block_paths=paths,
    )
    manifest = run.manifest
    assert run.path == tmp_path / "run"
    assert run.sample_count() == 2
    assert manifest.streams == (Stream("image", ("x.0", "x.1", "y.0")), Stream("text", ("x.0", "x.1")))
    assert (manifest.family, manifest.flavour, manifest.source) == ("flux", "dev", "import")
    assert (manifest.tokens, manifest.modules, manifest.fingerprint) == (("mean",), modules, "")
    (rows,) = run.rows()
    assert rows.backends == ()
    assert set(rows.distances) == {("image", "mean"), ("text", "mean")}
    assert np.isnan(rows.loss_N).all()
    assert not rows.width_N.any()
    assert not rows.height_N.any()
    unknown = np.array([-1, -1])
    for column_N in (rows.text_tokens_N, rows.caption_dropped_N, rows.backend_N):
        np.testing.assert_array_equal(column_N, unknown)


def test_blocks_are_counted_from_zero_if_nothing_is_known(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(GOOD)
    manifest = import_jsonl(tmp_path / "in", tmp_path / "run").manifest
    assert manifest.stream("image").blocks == tuple(f"transformer_blocks.{i}" for i in range(3))
    assert manifest.stream("text").blocks == ("transformer_blocks.0", "transformer_blocks.1")


def test_float64_is_kept_only_where_float32_would_change_a_value(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(lines([record(0.5, [0.5, 1e300], [0.25, float(np.float32(0.1))])]))
    (rows,) = import_jsonl(tmp_path / "in", tmp_path / "run").rows()
    assert rows.distances["text", "last"].dtype == np.float64
    assert rows.distances["text", "last"].tolist() == [[0.5, 1e300]]
    assert rows.distances["image", "last"].dtype == np.float32


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress])
def test_the_compression_is_told_by_content_not_by_name(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    (tmp_path / "in.bz2").write_bytes(pack(GOOD * 3))
    assert import_jsonl(tmp_path / "in.bz2", tmp_path / "run").sample_count() == 3


def test_what_a_record_may_have_besides(tmp_path: Path) -> None:
    extra = json.dumps({"prompt": "a\nb", **record(), "seed": None}).encode()
    (tmp_path / "in").write_bytes(b"\xef\xbb\xbf" + extra + b"\r\n\n  \n" + extra)
    assert import_jsonl(tmp_path / "in", tmp_path / "run").sample_count() == 2


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(GOOD)
    (tmp_path / "run").mkdir()
    assert import_jsonl(tmp_path / "in", tmp_path / "run").sample_count() == 1
    assert import_jsonl(tmp_path / "in", tmp_path / "new" / "deep" / "run").sample_count() == 1
    assert sorted(os.listdir(tmp_path)) == ["in", "new", "run"]


def test_a_relative_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").write_bytes(GOOD)
    monkeypatch.chdir(tmp_path)
    assert import_jsonl("in", "run").path == Path("run")
    assert export_jsonl(open_run("run"), "out") == (1, 0)


BAD_LINES: dict[str, tuple[bytes, str]] = {
    "text": (b"hello\n", "not JSON (Expecting value, column 1)"),
    "cut off": (GOOD[:-9], "not JSON"),
    "bytes": (b"\xff\xfe\xff\n", "not JSON"),
    "too deep": (b"[" * 100_000 + b"\n", "not JSON"),
    "a number too long": (b'{"timestep": ' + b"1" * 5000 + b"}\n", "not JSON"),
    "a list": (b"[1]\n", "a list of 1; expected an object"),
    "no timestep": (b'{"encoder_hidden_states": [1], "hidden_states": [1]}\n', "lacks 'timestep'"),
    "no text": (b'{"timestep": 0, "hidden_states": [1]}\n', "lacks 'encoder_hidden_states'"),
    "no image": (b'{"timestep": 0, "encoder_hidden_states": [1]}\n', "lacks 'hidden_states'"),
    "timestep above": (lines([record(1.0000001)]), "timestep is 1.0000001; expected a number in [0, 1]"),
    "timestep of the model": (lines([record(999)]), "timestep is 999"),
    "timestep below": (lines([record(-0.1)]), "timestep is -0.1"),
    "timestep NaN": (lines([record(float("nan"))]), "timestep is NaN"),
    "timestep true": (lines([record(True)]), "timestep is true"),
    "timestep text": (lines([record("0.5" * 99)]), "timestep is"),
    "timestep null": (lines([record(None)]), "timestep is null"),
    "timestep list": (lines([record([0.5])]), "timestep is a list of 1"),
    "NaN": (lines([record(text=[0.1, float("nan")])]), "encoder_hidden_states[1] is NaN; expected a finite"),
    "Infinity": (lines([record(image=[-float("inf"), 1, 1])]), "hidden_states[0] is -Infinity"),
    "beyond float64": (GOOD.replace(b"0.25", b"1e999"), "encoder_hidden_states[0] is Infinity"),
    "a whole number beyond float64": (GOOD.replace(b"0.3", b"9" * 400), "hidden_states[2] is a whole number"),
    "true": (lines([record(image=[0, True, 0])]), "hidden_states[1] is true"),
    "a string": (lines([record(image=[0, "0.5", 0])]), 'hidden_states[1] is "0.5"'),
    "null": (lines([record(image=[0, 0, None])]), "hidden_states[2] is null"),
    "a list in a list": (lines([record(image=[[0.1, 0.2, 0.3]])]), "hidden_states[0] is a list of 3"),
    "an object": (lines([record(image={"0": 1})]), "hidden_states is an object; expected 1 to 4096 numbers"),
    "no numbers": (lines([record(text=[])]), "encoder_hidden_states is a list of 0"),
    "too many numbers": (
        lines([record(text=[0] * (MAX_BLOCKS + 1))]),
        "is a list of 4097; expected 1 to 4096",
    ),
    "fewer": (lines([record(image=[0.1, 0.2])]), "hidden_states has 2 numbers; the records before have 3"),
    "more": (lines([record(text=[0.1] * 3)]), "has 3 numbers; the records before have 2"),
    "too long": (b" " * (MAX_LINE_BYTES + 1) + GOOD, f"over {MAX_LINE_BYTES} bytes long"),
}


@pytest.mark.parametrize("how", BAD_LINES)
def test_a_bad_line_is_named_and_nothing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setattr(jsonl, "ROWS_PER_SHARD", 2)  # two shards are written before the bad line comes
    line, text = BAD_LINES[how]
    (tmp_path / "in").write_bytes(GOOD * 4 + line)
    with fails(f"{tmp_path / 'in'}, line 5: ") as found:
        import_jsonl(tmp_path / "in", tmp_path / "deep" / "er" / "run")
    assert text in str(found.value)
    assert len(str(found.value)) < len(str(tmp_path)) + 200
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.parametrize("content", [b"", b"\n \n", gzip.compress(b""), bz2.compress(b"\n")])
def test_a_file_without_records_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "in").write_bytes(content)
    with fails("has no records"):
        import_jsonl(tmp_path / "in", tmp_path / "run")
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.parametrize(
    "content",
    [
        gzip.compress(GOOD * 99)[:-10],
        gzip.compress(GOOD)[:12] + b"x" * 50,
        gzip.compress(GOOD)[:-5] + b"xxxxx",
        b"\x1f\x8bxx",
        bz2.compress(GOOD * 99)[:-10],
        b"BZh9 is no bzip2 file",
    ],
)
def test_a_damaged_archive_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "in").write_bytes(content)
    with fails("the file is damaged"):
        import_jsonl(tmp_path / "in", tmp_path / "run")
    assert os.listdir(tmp_path) == ["in"]


def test_a_source_that_is_no_file_is_refused(tmp_path: Path) -> None:
    with fails(f"cannot read {tmp_path / 'absent'}: No such file"):
        import_jsonl(tmp_path / "absent", tmp_path / "run")
    with fails("Is a directory"):
        import_jsonl(tmp_path, tmp_path / "run")
    assert os.listdir(tmp_path) == []


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(GOOD)
    import_jsonl(tmp_path / "in", tmp_path / "run")
    before = everything(open_run(tmp_path / "run"))
    for taken in ("run", "in"):
        with fails("exists already and is not an empty folder"):
            import_jsonl(tmp_path / "in", tmp_path / taken)
    assert everything(open_run(tmp_path / "run")) == before
    assert sorted(os.listdir(tmp_path)) == ["in", "run"]


def test_a_folder_that_the_system_does_not_open(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(GOOD)
    with fails(f"cannot look into {tmp_path}: Too many open files"), no_file_can_be_opened():
        import_jsonl(tmp_path / "in", tmp_path)


class BlockPaths(Mapping[str, tuple[str, ...]]):
    """Block paths that do something else while the import asks for them."""

    def __init__(self, meanwhile: Callable[[], None]) -> None:
        self.meanwhile = meanwhile
        self.paths = {"image": ("a", "b", "c"), "text": ("a", "b")}

    def __getitem__(self, name: str) -> tuple[str, ...]:
        self.meanwhile()
        return self.paths[name]

    def __iter__(self) -> Any:
        return iter(self.paths)

    def __len__(self) -> int:
        return len(self.paths)


def test_a_folder_that_is_taken_meanwhile_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(GOOD)

    def take() -> None:
        (tmp_path / "new" / "run").mkdir(parents=True, exist_ok=True)
        (tmp_path / "new" / "run" / "theirs").touch()

    with fails("cannot make the run folder"):
        import_jsonl(tmp_path / "in", tmp_path / "new" / "run", block_paths=BlockPaths(take))
    assert [path.name for path in (tmp_path / "new").rglob("*")] == ["run", "theirs"]


def test_an_interrupted_import_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(GOOD)

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_jsonl(tmp_path / "in", tmp_path / "new" / "run", block_paths=BlockPaths(interrupt))
    assert os.listdir(tmp_path) == ["in"]


def test_block_paths_must_fit_the_records(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(GOOD)
    with fails("the records have 3 image distances; the model has 2 such blocks"):
        import_jsonl(tmp_path / "in", tmp_path / "run", block_paths={"image": ["a", "b"], "text": ["a", "b"]})
    with fails("the records have 2 text distances; the model has 0 such blocks"):
        import_jsonl(tmp_path / "in", tmp_path / "run", block_paths={"image": ["a", "b", "c"]})
    with fails("tokens is 'first'; expected one of last, mean"):
        import_jsonl(tmp_path / "in", tmp_path / "run", tokens="first")
    assert os.listdir(tmp_path) == ["in"]


DISTANCES = {
    ("image", "last"): [[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]],
    ("text", "last"): [[0.1], [0.2], [0.3]],
    ("image", "mean"): [[0.7, 0.8], [0.9, 1.0], [0.0, 0.5]],
    ("text", "mean"): [[0.4], [0.5], [0.6]],
}


def test_export_writes_the_reading_that_was_asked_for(tmp_path: Path) -> None:
    run = recorded(tmp_path / "run", EXPORT_MANIFEST, DISTANCES)
    for tokens in ("last", "mean"):
        assert export_jsonl(run, tmp_path / tokens, tokens) == (3, 0)
        records = [json.loads(line) for line in (tmp_path / tokens).read_text().splitlines()]
        assert [list(one) for one in records] == [["timestep", "encoder_hidden_states", "hidden_states"]] * 3
        assert [one["timestep"] for one in records] == [0, 0.25, 0.5]
        for key, stream in (("hidden_states", "image"), ("encoder_hidden_states", "text")):
            read_NL = np.array([one[key] for one in records])
            np.testing.assert_array_equal(read_NL, np.array(DISTANCES[stream, tokens], np.float32))


@pytest.mark.parametrize(("suffix", "unpack"), [(".gz", gzip.decompress), (".bz2", bz2.decompress)])
def test_export_compresses_by_suffix_and_gives_the_same_bytes_again(
    tmp_path: Path, suffix: str, unpack: Callable[[bytes], bytes]
) -> None:
    run = recorded(tmp_path / "run", EXPORT_MANIFEST, DISTANCES)
    for name in ("plain", f"a{suffix}", f"b{suffix}"):
        export_jsonl(run, tmp_path / name)
    packed = (tmp_path / f"a{suffix}").read_bytes()
    assert packed == (tmp_path / f"b{suffix}").read_bytes()
    assert unpack(packed) == (tmp_path / "plain").read_bytes()


def test_samples_with_a_distance_that_is_not_finite_are_skipped_and_counted(tmp_path: Path) -> None:
    distances = {key: np.array(value) for key, value in DISTANCES.items()}
    distances["image", "last"][0, 1] = np.inf
    distances["text", "last"][2, 0] = np.nan
    distances["text", "mean"][:] = np.nan
    run = recorded(tmp_path / "run", EXPORT_MANIFEST, distances)
    assert export_jsonl(run, tmp_path / "out") == (1, 2)
    assert json.loads((tmp_path / "out").read_text())["timestep"] == 0.25
    with fails("none of its 3 samples has finite distances"):
        export_jsonl(run, tmp_path / "out.gz", "mean")
    assert sorted(os.listdir(tmp_path)) == ["out", "run"]


def test_a_run_without_text_exports_images_alone(tmp_path: Path) -> None:
    manifest = replace(EXPORT_MANIFEST, streams=EXPORT_MANIFEST.streams[:1], tokens=("last",))
    run = recorded(tmp_path / "run", manifest, {("image", "last"): [[0.5, 0.25]]})
    assert export_jsonl(run, tmp_path / "out") == (1, 0)
    assert (tmp_path / "out").read_bytes() == b'{"timestep": 0.0, "hidden_states": [0.5, 0.25]}\n'


def test_export_refuses_what_it_cannot_write(tmp_path: Path) -> None:
    run = recorded(tmp_path / "run", EXPORT_MANIFEST, DISTANCES)
    (tmp_path / "out").write_bytes(b"mine")
    with fails("out exists already"):
        export_jsonl(run, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b"mine"
    with fails("has no reading 'first'; it has: last, mean"):
        export_jsonl(run, tmp_path / "new", "first")
    with fails("cannot write"):
        export_jsonl(run, tmp_path / "absent" / "new")
    for streams, text in (
        (("text",), "no stream 'image'"),
        (("image", "audio"), "has a stream 'audio'; the record format knows image and text only"),
    ):
        manifest = replace(EXPORT_MANIFEST, streams=tuple(Stream(name, ("a",)) for name in streams))
        with fails(text):
            export_jsonl(create_run(tmp_path / text[:8], manifest), tmp_path / "new")
    with fails("has no samples"):
        export_jsonl(create_run(tmp_path / "empty", EXPORT_MANIFEST), tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["out", "out.gz", "out.bz2"])
def test_a_broken_shard_leaves_no_half_export(tmp_path: Path, name: str) -> None:
    run = recorded(tmp_path / "run", EXPORT_MANIFEST, DISTANCES)
    shard = run.shards[0].read_bytes()
    half, three = np.float64(0.5).tobytes(), np.float64(3).tobytes()
    broken = run.shards[0].with_name("rank00001-000000.safetensors")
    broken.write_bytes(shard.replace(b'"rank":"0"', b'"rank":"1"').replace(half, three))
    with fails("rank00001-000000.safetensors is damaged"):
        export_jsonl(open_run(tmp_path / "run"), tmp_path / name)
    assert os.listdir(tmp_path) == ["run"]


def test_the_run_half_imports_no_torch() -> None:
    code = "import sys, simpletuner_layerprobe.run.article; print({'torch', 'simpletuner'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "set()\n"
