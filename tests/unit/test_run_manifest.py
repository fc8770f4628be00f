from __future__ import annotations

import json
import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from failing import fails, no_file_can_be_opened

from simpletuner_layerprobe import __version__
from simpletuner_layerprobe.run import manifest as manifest_module
from simpletuner_layerprobe.run.manifest import (
    MAX_BLOCKS,
    MAX_MANIFEST_BYTES,
    Manifest,
    Module,
    Stream,
    Target,
    create_run,
    new_run_id,
    read_manifest,
    utc_now,
    write_manifest,
)

BASE = Manifest(
    schema=3,
    run_id="0123456789abcdef",
    family="sd3",
    flavour="large",
    model_class="SD3Transformer2DModel",
    streams=(
        Stream("image", ("transformer_blocks.0", "transformer_blocks.1")),
        Stream("text", ("transformer_blocks.0",)),
    ),
    targets=(Target("transformer_blocks.*", ("ff*",), ("*",)),),
    readings=("last", "mean"),
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
    assert len(text.splitlines()) == len(fields(Manifest)) + 2  # one field per line, and the braces
    assert json.loads(text)["modules"][0] == [names[0], "Linear", [2432, 2432]]


def test_a_manifest_that_could_not_be_read_back_is_not_written(tmp_path: Path) -> None:
    with fails(f"at most {MAX_MANIFEST_BYTES}"):
        write_manifest(tmp_path, replace(BASE, settings={"long": "x" * MAX_MANIFEST_BYTES}))
    assert os.listdir(tmp_path) == []


def test_settings_are_json_values_of_their_own() -> None:
    given_settings: dict[str, object] = {"pair": (1, 2)}
    manifest = replace(BASE, settings=given_settings)
    given_settings["pair"] = 3
    assert manifest.settings == {"pair": [1, 2]}


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("schema", 4, "upgrade simpletuner-layerprobe"),
        ("schema", 2, "the run has schema 2, of a version before 0.2; this one reads 3: record it anew"),
        ("schema", 0, "schema is 0"),
        ("run_id", "0123456789ABCDEF", "run_id is '0123456789ABCDEF'; expected 16 hexadecimal digits"),
        ("schema", True, "schema is True"),
        ("family", None, "family is None"),
        ("model_class", "x" * 5000, "at most 4096"),
        ("family", "two\nlines", "family is 'two\\nlines'"),
        ("streams", (), "streams is ()"),
        ("streams", ("image",), "a tuple of 1 to 4096 Stream"),
        ("streams", (Stream("image", ("a",)), Stream("image", ("a",))), "names 'image' twice"),
        ("streams", (Stream("im.age", ("a",)),), "streams is 'im.age'"),
        ("streams", (Stream("image", ("a", "a")),), "streams.image names 'a' twice"),
        ("streams", (Stream("image", ("",)),), "streams.image is ''; expected paths or patterns"),
        ("readings", (), "readings is ()"),
        ("readings", ("first",), "readings is 'first'; expected the name of a reading"),
        ("readings", ("last", "last"), "names 'last' twice"),
        ("readings", ("update_norm_last",), "expected last or mean among them"),
        ("readings", ("last", "pair3_last"), "readings is 'pair3_last'; expected a span of at most the 2 blocks"),
        ("targets", [], "targets is []"),
        ("targets", (Target("a.*", "ff*", ()),), "targets is 'ff*'"),  # type: ignore[arg-type]
        ("modules", ("ff",), "a tuple of 0 to 200000 Module"),
        ("modules", (Module("a", "Linear", ()), Module("a", "Linear", ())), "names 'a' twice"),
        ("modules", (Module(1, "Linear", ()),), "module name is 1"),  # type: ignore[arg-type]
        ("modules", (Module("a", "Linear", (1,) * 9),), "a tuple of 0 to 8 int"),
        ("modules", (Module("a", "Linear", (-1,)),), "shape of module 'a' is (-1,)"),
        ("modules", (Module("a", "Linear", (True,)),), "shape of module 'a'"),
        ("modules", (Module("a", "", ()),) * 200_001, "0 to 200000 Module"),
        ("versions", [], "versions is []"),
        ("versions", {"torch": 2}, "versions.torch is 2"),
        ("versions", {1: "2"}, "versions key is 1"),
        ("settings", None, "settings is None"),
        ("settings", {"shift": float("nan")}, "JSON cannot hold"),
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
        ({"schema": 7}, f"schema 7; layerprobe {__version__} reads 3: upgrade"),
        ({"extra": 1}, "unknown field 'extra'"),
        ({"streams": {"image": "abc"}}, "streams.image is 'abc'"),
        ({"streams": {"a\nb": []}}, "streams key is 'a\\nb'"),
        ({"streams": {"image": ["a"] * (MAX_BLOCKS + 1)}}, f"1 to {MAX_BLOCKS}"),
        ({"readings": [["last"]]}, "readings is (('last',),)"),
        ({"targets": [["a.*", ["ff"]]]}, "lists of three"),
        ({"modules": 7}, "lists of three"),
        ({"modules": ["abc"]}, "shape of module 'a' is 'c'"),
        ({"modules": [["a", "Linear", [1.0]]]}, "shape of module 'a' is (1.0,)"),
    ],
)
def test_bad_json_is_refused(change: dict[str, Any], text: str) -> None:
    with fails(text):
        Manifest.from_json({**BASE.to_json(), **change})


def test_a_missing_field_and_another_kind_of_value_are_refused() -> None:
    value = BASE.to_json()
    del value["readings"]
    with fails("lacks readings"):
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
        ({"fingerprint": "01"}, ["fingerprint: '00ff' here, '01' in the run"]),
        ({"run_id": "f" * 16}, []),
        ({"readings": ("last",)}, ["readings: 2 here, 1 in the run"]),
        (
            {"readings": ("last", "update_norm_mean")},
            ["readings: 1 of 2 differ, first 'mean' here, 'update_norm_mean' in the run"],
        ),
        ({"targets": ()}, ["targets: 1 here, 0 in the run"]),
        ({"streams": BASE.streams[:1]}, ["streams.text: ['transformer_blocks.0'] here, absent in the run"]),
        ({"streams": BASE.streams[::-1]}, []),
        (
            {"streams": (Stream("image", ("transformer_blocks.0", "x")), Stream("text", ("a", "b")))},
            [
                "streams.image: 1 of 2 differ, first 'transformer_blocks.1' here, 'x' in the run",
                "streams.text: 1 here, 2 in the run",
            ],
        ),
        ({"modules": ()}, ["modules: 2 here, 0 in the run"]),
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
    assert line.startswith("modules: 1 of 2 differ, first ['transformer_blocks.0.attn.to_q', 'Linear', [64, 32]] here")


def test_a_difference_is_one_short_line_whatever_the_values() -> None:
    nested = {"shift": 3.0, "keep": True, "a\nb": "long\n" * 1000}
    (line,) = BASE.difference(replace(BASE, settings={**BASE.settings, "nested": nested}))
    assert line.startswith("settings.nested.a\\nb: absent here, 'long\\n")
    assert len(line) < 150
    assert "\n" not in line


def test_columns_come_image_first_and_without_pairs_that_are_too_long() -> None:
    what = replace(BASE, streams=BASE.streams[::-1], readings=("mean", "pair2_last"))
    assert list(what.columns()) == [("image", "mean"), ("image", "pair2_last"), ("text", "mean")]
    assert what.columns()["image", "pair2_last"] == (("transformer_blocks.0", "transformer_blocks.1"),)


def test_ablations_have_the_columns_of_whole_blocks_or_of_the_text() -> None:
    streams = (Stream("text", ("t.0", "j.0")), Stream("image", ("j.0", "i.0")))
    what = replace(BASE, streams=streams, readings=("mean", "ablation_text", "ablation"))
    assert what.blocks == ("t.0", "j.0", "i.0")
    assert what.columns() == {
        ("image", "mean"): (("j.0", "j.0"), ("i.0", "i.0")),
        ("text", "mean"): (("t.0", "t.0"), ("j.0", "j.0")),
        ("text", "ablation_text"): (("t.0", "t.0"), ("j.0", "j.0")),
        ("block", "ablation"): (("t.0", "t.0"), ("j.0", "j.0"), ("i.0", "i.0")),
    }
    with fails("the manifest's readings is 'ablation_text'; expected a reading of the streams image"):
        replace(BASE, streams=BASE.streams[:1], readings=("mean", "ablation_text"))
    with fails("another name than 'block', which stands for whole blocks"):
        replace(BASE, streams=(Stream("block", ("b.0",)),))


# The run folder


def test_a_run_is_made_or_gone_on_with(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "run"
    assert create_run(folder, BASE) == BASE
    other = replace(BASE, run_id=new_run_id(), created=utc_now(), versions={})
    assert create_run(folder, other) == BASE  # the run's own id and story
    (folder / "report.html").touch()
    assert create_run(folder, BASE) == BASE
    with fails("holds another run: family: 'flux' here, 'sd3' in the run; use its settings or another folder"):
        create_run(folder, replace(BASE, family="flux"))


def test_a_folder_that_is_not_a_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    with fails("holds other files ('mine') and no manifest.json; choose a new folder"):
        create_run(tmp_path, BASE)
    with fails("mine is a file; expected a folder"):
        create_run(tmp_path / "mine", BASE)
    with fails("cannot make the run folder"):
        create_run(tmp_path / "mine" / "run", BASE)
    assert os.listdir(tmp_path) == ["mine"]


def test_of_ranks_that_make_the_run_at_once_the_first_ones_manifest_is_everybody_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its manifest appears between the other's look into the folder and its own writing."""
    (tmp_path / ".layerprobe-00ff.tmp").touch()  # the first one's, not complete yet
    later = replace(BASE, run_id=new_run_id())
    write = manifest_module.write_manifest

    def write_after_the_first(folder: Any, manifest: Manifest) -> None:
        write(folder, BASE)
        write(folder, manifest)

    monkeypatch.setattr(manifest_module, "write_manifest", write_after_the_first)
    assert create_run(tmp_path, later) == BASE
