from __future__ import annotations

import json
import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from failing import fails, no_file_can_be_opened
from hypothesis import given, settings
from hypothesis import strategies as st

from simpletuner_layerprobe.run.manifest import (
    MAX_BLOCKS,
    MAX_MANIFEST_BYTES,
    Manifest,
    Module,
    Stream,
    is_temporary,
    read_manifest,
    temporary_name,
    utc_now,
    write_manifest,
    write_new_file,
)

BASE = Manifest(
    schema=1,
    family="sd3",
    flavour="large",
    model_class="SD3Transformer2DModel",
    streams=(
        Stream("image", ("transformer_blocks.0", "transformer_blocks.1")),
        Stream("text", ("transformer_blocks.0",)),
    ),
    tokens=("last", "mean"),
    modules=(
        Module("transformer_blocks.0", "JointTransformerBlock", ()),
        Module("transformer_blocks.0.attn.to_q", "Linear", (64, 32)),
    ),
    versions={"simpletuner": "4.10.1"},
    settings={"sigmas": "uniform", "nested": {"shift": 3.0, "keep": True}},
    fingerprint="00ff",
    created="2026-01-01T00:00:00+00:00",
    source="probe",
)

NAMES = st.text(st.characters(exclude_categories=["C", "Z"]), max_size=12)
PLAIN = st.from_regex(r"[A-Za-z0-9_]{1,12}", fullmatch=True)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | NAMES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)
BLOCKS = st.lists(NAMES.filter(bool), min_size=1, max_size=4, unique=True).map(tuple)
MANIFESTS = st.builds(
    Manifest,
    schema=st.just(1),
    extra=st.just(()),
    family=NAMES,
    flavour=NAMES,
    model_class=NAMES,
    streams=st.dictionaries(PLAIN, BLOCKS, min_size=1, max_size=3).map(
        lambda streams: tuple(Stream(*item) for item in streams.items())
    ),
    tokens=st.sampled_from([("last",), ("mean",), ("last", "mean"), ("mean", "last")]),
    modules=st.dictionaries(
        NAMES, st.tuples(NAMES, st.lists(st.integers(0, 2**40 - 1), max_size=8).map(tuple)), max_size=3
    ).map(lambda table: tuple(Module(name, *rest) for name, rest in table.items())),
    versions=st.dictionaries(NAMES, NAMES, max_size=3),
    settings=st.dictionaries(NAMES, JSON_VALUES, max_size=3),
    fingerprint=st.binary(max_size=32).map(bytes.hex),
    created=st.just("2026-01-01T00:00:00+00:00"),
    source=st.sampled_from(["probe", "import"]),
)


@given(MANIFESTS)
@settings(deadline=None, max_examples=40)
def test_json_round_trip_is_the_same_manifest(manifest: Manifest) -> None:
    back = Manifest.from_json(json.loads(json.dumps(manifest.to_json())))
    assert back == manifest
    assert back.difference(manifest) == []
    assert back.identity() == manifest.identity()


def test_written_and_read_back(tmp_path: Path) -> None:
    write_manifest(tmp_path, BASE)
    assert read_manifest(tmp_path) == BASE
    assert os.listdir(tmp_path) == ["manifest.json"]


def test_a_module_table_of_sd35_large_size_stays_small(tmp_path: Path) -> None:
    names = [f"transformer_blocks.{block}.attn.part_{part}" for block in range(38) for part in range(40)]
    modules = tuple(Module(name, "Linear", (2432, 2432)) for name in names)
    write_manifest(tmp_path, replace(BASE, modules=modules))
    text = (tmp_path / "manifest.json").read_text()
    assert len(text) < 70 * len(names)
    # One field per line, and the braces; a run without further readings has no field for them.
    assert len(text.splitlines()) == len(fields(Manifest)) - 1 + 2
    assert json.loads(text)["modules"][0] == [names[0], "Linear", [2432, 2432]]


def test_a_manifest_is_never_replaced(tmp_path: Path) -> None:
    write_manifest(tmp_path, BASE)
    with pytest.raises(FileExistsError):
        write_manifest(tmp_path, replace(BASE, family="flux"))
    assert read_manifest(tmp_path) == BASE
    assert os.listdir(tmp_path) == ["manifest.json"]


def test_a_manifest_that_could_not_be_read_back_is_not_written(tmp_path: Path) -> None:
    with fails(f"at most {MAX_MANIFEST_BYTES}"):
        write_manifest(tmp_path, replace(BASE, settings={"long": "x" * MAX_MANIFEST_BYTES}))
    assert os.listdir(tmp_path) == []


def test_settings_are_json_values_of_their_own() -> None:
    given_settings: dict[str, object] = {"pair": (1, 2)}
    manifest = replace(BASE, settings=given_settings)
    given_settings["pair"] = 3
    assert manifest.settings == {"pair": [1, 2]}


def test_stream_by_name() -> None:
    assert BASE.stream("text").blocks == ("transformer_blocks.0",)
    with fails("no stream 'audio'; it has: image, text"):
        BASE.stream("audio")


def test_created_is_utc() -> None:
    assert utc_now().endswith("+00:00")


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("schema", 3, "upgrade simpletuner-layerprobe"),
        ("schema", 2, "extra is (); expected at least one further reading in schema 2"),
        ("extra", ("pair2_last",), "extra is ('pair2_last',); expected no further readings in schema 1"),
        ("schema", 0, "schema 0"),
        ("schema", True, "schema is True"),
        ("schema", "1", "schema is '1'"),
        ("family", None, "family is None"),
        ("flavour", 3, "flavour is 3"),
        ("model_class", "x" * 5000, "at most 4096"),
        ("family", "two\nlines", "family is 'two\\nlines'"),
        ("created", 1.5, "created is 1.5"),
        ("streams", (), "streams is ()"),
        ("streams", [], "streams is []"),
        ("streams", ("image",), "a tuple of Stream"),
        ("streams", (Stream("image", ("a",)), Stream("image", ("a",))), "naming 'image' twice"),
        ("streams", (Stream("im.age", ("a",)),), "streams is 'im.age'"),
        ("streams", (Stream("image", ()),), "streams.image is ()"),
        ("streams", (Stream("image", ("a", "a")),), "streams.image is naming 'a' twice"),
        ("streams", (Stream("image", ("",)),), "naming a block ''"),
        ("streams", (Stream("image", (7,)),), "streams.image is 7"),  # type: ignore[arg-type]
        ("streams", (Stream("image", tuple(map(str, range(MAX_BLOCKS + 1)))),), f"1 to {MAX_BLOCKS}"),
        ("tokens", (), "tokens is ()"),
        ("tokens", ("first",), "tokens is 'first'; expected of last, mean"),
        ("tokens", ("last", "last"), "naming 'last' twice"),
        ("modules", [], "modules is []"),
        ("modules", ("ff",), "a tuple of Module"),
        ("modules", (Module("a", "Linear", ()), Module("a", "Linear", ())), "naming 'a' twice"),
        ("modules", (Module(1, "Linear", ()),), "module name is 1"),  # type: ignore[arg-type]
        ("modules", (Module("a", None, ()),), "module type is None"),  # type: ignore[arg-type]
        ("modules", (Module("a", "Linear", (1,) * 9),), "at most 8 dimensions"),
        ("modules", (Module("a", "Linear", (-1,)),), "shape of module 'a' is (-1,)"),
        ("modules", (Module("a", "Linear", (2**40,)),), "shape of module 'a'"),
        ("modules", (Module("a", "Linear", (True,)),), "shape of module 'a'"),
        ("modules", (Module("a", "", ()),) * 200_001, "at most 200000"),
        ("versions", [], "versions is []"),
        ("versions", {"torch": 2}, "versions.torch is 2"),
        ("versions", {1: "2"}, "versions key is 1"),
        ("settings", None, "settings is None"),
        ("settings", {"shift": float("nan")}, "JSON cannot hold"),
        ("settings", {"path": Path("x")}, "JSON cannot hold"),
        ("fingerprint", "XYZ", "hexadecimal"),
        ("source", "hand", "one of probe, import"),
    ],
)
def test_each_bad_field_is_refused(field: str, value: Any, text: str) -> None:
    with fails(text):
        replace(BASE, **{field: value})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"schema": 7}, "schema 7; layerprobe 0.1.0 reads schema 1 and 2: upgrade"),
        ({"schema": 2}, "the manifest lacks extra"),
        ({"extra": []}, "unknown field 'extra'"),
        ({"schema": None}, "schema is None"),
        ({"extra": 1}, "unknown field 'extra'"),
        ({"streams": []}, "streams is []"),
        ({"streams": {"image": "abc"}}, "streams.image is 'abc'"),
        ({"streams": {"a\nb": []}}, "streams key is 'a\\nb'"),
        ({"streams": {"a b": "x"}}, "streams is 'a b'"),
        ({"streams": {"image": ["a"] * (MAX_BLOCKS + 1)}}, f"at most {MAX_BLOCKS}"),
        ({"tokens": "last"}, "tokens is 'last'"),
        ({"tokens": [["last"]]}, "tokens is ['last']"),
        ({"modules": {}}, "modules is {}"),
        ({"modules": [["a", "Linear"]]}, "[name, type, shape]"),
        ({"modules": ["abc"]}, "[name, type, shape]"),
        ({"modules": [["a", "Linear", "12"]]}, "shape of module 'a' is '12'"),
        ({"modules": [["a", "Linear", [1.0]]]}, "whole numbers"),
    ],
)
def test_bad_json_is_refused(change: dict[str, Any], text: str) -> None:
    with fails(text):
        Manifest.from_json({**BASE.to_json(), **change})


def test_a_missing_field_and_another_kind_of_value_are_refused() -> None:
    value = BASE.to_json()
    del value["tokens"]
    with fails("lacks tokens"):
        Manifest.from_json(value)
    with fails("a list; expected a JSON object"):
        Manifest.from_json([])


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"{", "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"[" * 200_000, "is not JSON"),
        (b'{"schema": NaN}', "NaN is not a JSON number"),
        (b"[]", "manifest.json: the manifest is a list"),
        (b'{"schema": 99}', "manifest.json: the run has schema 99"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, content: bytes, text: str) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with fails(text):
        read_manifest(tmp_path)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with fails("absent does not exist"):
        read_manifest(tmp_path / "absent")
    with fails("has no manifest.json"):
        read_manifest(tmp_path)
    (tmp_path / "file").touch()
    with fails("is not a folder"):
        read_manifest(tmp_path / "file")


def test_a_huge_manifest_is_refused_by_its_size(tmp_path: Path) -> None:
    with open(tmp_path / "manifest.json", "wb") as file:
        file.truncate(1 << 40)  # sparse: takes no room, and reading it would take a terabyte
    with fails("1099511627776 bytes"):
        read_manifest(tmp_path)


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    write_manifest(tmp_path, BASE)
    (run / "manifest.json").symlink_to(tmp_path / "manifest.json")
    with fails("not a plain file"):
        read_manifest(run)


def test_a_pipe_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "manifest.json")  # opening it would wait for ever
    with fails("not a plain file"):
        read_manifest(tmp_path)


def test_a_manifest_that_the_system_does_not_open(tmp_path: Path) -> None:
    write_manifest(tmp_path, BASE)
    with fails(f"cannot read {tmp_path / 'manifest.json'}: Too many open files"), no_file_can_be_opened():
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("change", "lines"),
    [
        ({}, []),
        ({"versions": {}, "created": "", "source": "import"}, []),
        ({"family": "flux"}, ["family: 'sd3' here, 'flux' in the run"]),
        ({"flavour": "medium"}, ["flavour: 'large' here, 'medium' in the run"]),
        ({"model_class": ""}, ["model_class: 'SD3Transformer2DModel' here, '' in the run"]),
        ({"fingerprint": "01"}, ["fingerprint: '00ff' here, '01' in the run"]),
        ({"tokens": ("last",)}, ["tokens: ('last', 'mean') here, ('last',) in the run"]),
        (
            {"schema": 2, "extra": ("update_norm_last",)},
            [
                "extra (layerprobe_residual, layerprobe_block_pairs): () here, ('update_norm_last',) in the run",
            ],
        ),
        ({"streams": BASE.streams[:1]}, ["streams: ('image', 'text') here, ('image',) in the run"]),
        (
            {"streams": (Stream("image", ("transformer_blocks.0", "x")), Stream("text", ("a", "b")))},
            [
                "streams.image: 1 of 2 differ, first 'transformer_blocks.1' here, 'x' in the run",
                "streams.text: 1 blocks here, 2 in the run",
            ],
        ),
        ({"modules": ()}, ["modules: 2 modules here, 0 in the run"]),
        (
            {"settings": {"sigmas": "training", "nested": {"shift": 3.0}, "new": 1}},
            [
                "settings.nested.keep: True here, absent in the run",
                "settings.new: absent here, 1 in the run",
                "settings.sigmas: 'uniform' here, 'training' in the run",
            ],
        ),
    ],
)
def test_difference_names_what_differs(change: dict[str, Any], lines: list[str]) -> None:
    run = replace(BASE, **change)
    assert BASE.difference(run) == lines
    assert (BASE.identity() == run.identity()) == (not lines)


def test_difference_shows_the_first_module_that_differs() -> None:
    changed = replace(BASE, modules=(BASE.modules[0], replace(BASE.modules[1], shape=(64, 64))))
    (line,) = BASE.difference(changed)
    assert line.startswith("modules: 1 of 2 differ, first Module(name='transformer_blocks.0.attn.to_q'")


def test_a_difference_is_one_short_line_whatever_the_values() -> None:
    nested = {"shift": 3.0, "keep": True, "a\nb": "long\n" * 1000}
    (line,) = BASE.difference(replace(BASE, settings={**BASE.settings, "nested": nested}))
    assert line.startswith("settings.nested.a\\nb: absent here, 'long\\n")
    assert len(line) < 150
    assert "\n" not in line


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


def test_temporary_names_are_known_again() -> None:
    assert is_temporary(temporary_name())
    assert temporary_name() != temporary_name()
    assert not is_temporary("manifest.json")
    assert not is_temporary("x.layerprobe-00.tmp")


def test_further_readings_are_written_and_read_back(tmp_path: Path) -> None:
    extra = ("update_norm_last", "update_cosine_mean", "pair2_mean")
    manifest = replace(BASE, schema=2, extra=extra)
    write_manifest(tmp_path, manifest)
    back = read_manifest(tmp_path)
    assert back == manifest and back.identity() == manifest.identity()
    assert len({one.identity() for one in (BASE, manifest, replace(manifest, extra=extra[:1]))}) == 3
    named = {stream.name: [reading.name for reading in back.readings(stream)] for stream in back.streams}
    # the text stream has one block: there is no pair
    assert named == {"image": ["last", "mean", *extra], "text": ["last", "mean", *extra[:2]]}


@pytest.mark.parametrize(
    ("extra", "text"),
    [
        (("mean",), "extra is 'mean'; expected the name of a further reading"),
        (("pair1_last",), "'pair1_last'"),
        (("pair02_last",), "'pair02_last'"),
        (("update_norm",), "'update_norm'"),
        ((2,), "extra is 2"),
        (("pair3_last",), "extra is 'pair3_last'; expected a span of at most the 2 blocks of a stream"),
        (("pair2_last", "pair2_last"), "naming 'pair2_last' twice"),
        (["pair2_last"], "at least one further reading"),
    ],
)
def test_other_further_readings_are_refused(extra: Any, text: str) -> None:
    with fails(text):
        replace(BASE, schema=2, extra=extra)


def test_a_run_without_further_readings_has_the_bytes_that_it_always_had(tmp_path: Path) -> None:
    write_manifest(tmp_path, BASE)
    text = (tmp_path / "manifest.json").read_text()
    assert text.startswith('{\n"schema": 1,\n"family": "sd3",\n') and "extra" not in text
    # what version 0.1.0 made of it
    assert BASE.identity() == "0aeaf047cc918b914a86e3273070dbb147f419a46b5109989781cc1821bf2c60"
