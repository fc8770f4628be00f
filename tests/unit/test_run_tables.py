from __future__ import annotations

import bz2
import csv
import gzip
import io
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from failing import fails
from synthetic_run import manifest, write_run

from simpletuner_layerprobe.run.records import Rows, Run, ShardWriter, create_run, open_run
from simpletuner_layerprobe.run.tables import GROUP_ROWS, distance_columns, export_csv, export_parquet

BLOCKS = {"image": ("a.0", "a.1"), "text": ("a.0",)}
FACTS = ["sigma", "loss", "width", "height", "text_tokens", "caption_dropped", "backend"]
HOSTILE = ("=cmd|' /C calc'!A0", 'a "quoted",\r\nname', "+1", "'x", "half \ud800", "plain")


def odd_run(folder: Path) -> Run:
    """A float32 and a float64 shard with unknown values, distances that are not finite and hostile backends."""
    what = manifest(BLOCKS, tokens=("last", "mean"))
    create_run(folder, what)
    random = np.random.default_rng(0)
    for dtype in (np.float32, np.float64):
        distances = {
            (stream, reading): random.random((6, len(paths))).astype(dtype)
            for stream, paths in BLOCKS.items()
            for reading in ("last", "mean")
        }
        distances["image", "last"][:3, 1] = np.nan, np.inf, -np.inf
        distances["text", "mean"] = distances["text", "mean"].astype(np.float32)
        ShardWriter(folder, what, rank=0).write(
            Rows(
                sigma_N=random.random(6),
                loss_N=np.array([0.1, np.nan, 1e-30, 3, 4, 5], np.float32),
                width_N=np.array([0, 1024, 1, 2, 3, 4], np.int32),
                height_N=np.array([768, 0, 1, 2, 3, 4], np.int32),
                text_tokens_N=np.array([-1, 0, 77, 1, 2, 3], np.int32),
                caption_dropped_N=np.array([-1, 0, 1, 0, 0, 1], np.int8),
                backend_N=np.array([-1, 0, 1, 2, 3, 4], np.int16),
                backends=HOSTILE,
                distances=distances,
            )
        )
    return open_run(folder)


def expected(run: Run) -> dict[str, list[object]]:
    """The table as plain Python values, null as None, straight from the shards."""
    table: dict[str, list[object]] = {}
    unknown = {"width": 0, "height": 0, "text_tokens": -1, "caption_dropped": -1, "backend": -1}
    for part in run.rows():
        for name, values_N in part.columns().items():
            found: list[object] = [None if name in unknown and v == unknown[name] else v for v in values_N.tolist()]
            if name == "loss":
                found = [None if v != v else v for v in values_N.tolist()]
            if name == "backend":
                found = [None if v is None else part.backends[v] for v in found]  # type: ignore[call-overload]
            if name == "caption_dropped":
                found = [None if v is None else bool(v) for v in found]
            table.setdefault(name, []).extend(found)
        for (stream, reading), values_NL in part.distances.items():
            for column, block in enumerate(BLOCKS[stream]):
                table.setdefault(f"{stream}.{reading}.{block}", []).extend(values_NL[:, column].tolist())
    return table


def same(found: list[object], wanted: list[object]) -> bool:
    return len(found) == len(wanted) and all(a == b or (a != a and b != b) for a, b in zip(found, wanted, strict=True))


def test_parquet_holds_the_very_numbers(tmp_path: Path) -> None:
    run = odd_run(tmp_path / "run")
    assert export_parquet(run, tmp_path / "run.parquet") == 12
    table = pyarrow.parquet.read_table(tmp_path / "run.parquet")
    wanted = expected(run)
    wanted["backend"] = [v if v is None else str(v).replace("\ud800", "\\ud800") for v in wanted["backend"]]
    assert sorted(table.column_names) == sorted(wanted) and table.column_names[:7] == FACTS
    for name, values in wanted.items():
        assert same(table[name].to_pylist(), values), name
    types = {field.name: str(field.type) for field in table.schema}
    assert types["image.last.a.0"] == types["sigma"] == "double"  # one shard has it in float64
    assert types["text.mean.a.0"] == types["loss"] == "float"
    assert types["caption_dropped"] == "bool" and types["backend"] == "string" and types["width"] == "int32"


@pytest.mark.parametrize(
    ("name", "unpack"), [("run.csv", bytes), ("run.csv.gz", gzip.decompress), ("run.csv.bz2", bz2.decompress)]
)
def test_csv_reads_back_as_the_very_numbers(tmp_path: Path, name: str, unpack: type[bytes]) -> None:
    run = odd_run(tmp_path / "run")
    assert export_csv(run, tmp_path / name) == 12
    text = unpack((tmp_path / name).read_bytes()).decode()
    head, *body = csv.reader(io.StringIO(text, newline=""))
    assert head[:7] == FACTS and len(body) == 12
    wanted = expected(run)
    dtypes = {
        f"{stream}.{reading}.{block}": [np.float32] * 6
        + [np.float64 if (stream, reading) != ("text", "mean") else np.float32] * 6
        for (stream, reading), _ in distance_columns(run.manifest).items()
        for block in BLOCKS[stream]
    }
    for column, title in enumerate(head):
        texts = [row[column] for row in body]
        if title in dtypes:
            read = [float(kind(one)) for kind, one in zip(dtypes[title], texts, strict=True)]
            assert same(read, wanted[title]), title
        elif title == "backend":
            names = [v if v is None else str(v).replace("\ud800", "\\ud800") for v in wanted[title]]
            assert texts == ["" if v is None else f"'{v}" if v[0] in "=+-@\t\r'" else v for v in names]
        elif title == "caption_dropped":
            assert texts == [{None: "", True: "true", False: "false"}[v] for v in wanted[title]]  # type: ignore[index]
        else:
            kind = np.float32 if title == "loss" else float
            assert [None if t == "" else float(kind(t)) for t in texts] == wanted[title]
    assert {"nan", "inf", "-inf"} <= {cell for row in body for cell in row}
    longest = max(len(row[head.index("text.mean.a.0")]) for row in body)
    assert longest <= 13  # the shortest text of a float32, not the 17 digits of the same number as float64


def test_many_small_shards_share_row_groups(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", BLOCKS, GROUP_ROWS + 500, shards=40)
    assert export_parquet(run, tmp_path / "run.parquet") == GROUP_ROWS + 500
    file = pyarrow.parquet.ParquetFile(tmp_path / "run.parquet")
    assert file.num_row_groups == 2
    sigma_N = np.concatenate([part.sigma_N for part in run.rows()])
    np.testing.assert_array_equal(file.read(["sigma"])["sigma"].to_numpy(), sigma_N)


def test_every_reading_has_columns(tmp_path: Path) -> None:
    what = replace(
        manifest({"image": ("a.0", "a.1", "a.2")}, tokens=("last",)), schema=2, extra=("update_norm_last", "pair2_last")
    )
    assert distance_columns(what) == {
        ("image", "last"): ("image.last.a.0", "image.last.a.1", "image.last.a.2"),
        ("image", "update_norm_last"): tuple(f"image.update_norm_last.a.{i}" for i in range(3)),
        ("image", "pair2_last"): ("image.pair2_last.a.0", "image.pair2_last.a.1"),
    }


@pytest.mark.parametrize(
    ("export", "name"), [(export_csv, "t.csv"), (export_csv, "t.csv.gz"), (export_parquet, "t.parquet")]
)
def test_a_table_is_complete_or_absent(tmp_path: Path, export: type[export_csv], name: str) -> None:  # type: ignore[valid-type]
    run = write_run(tmp_path / "run", BLOCKS, 50)
    (tmp_path / name).write_bytes(b"mine")
    with fails(f"{name} exists already; export to another name"):
        export(run, tmp_path / name)
    assert (tmp_path / name).read_bytes() == b"mine"
    (tmp_path / name).unlink()
    with fails("cannot write"):
        export(run, tmp_path / "absent" / name)
    with fails("has no samples"):
        export(create_run(tmp_path / "empty", manifest(BLOCKS)), tmp_path / name)
    last = run.shards[-1]
    data = bytearray(last.read_bytes())
    data[-20:] = b"\xff" * 20
    last.write_bytes(data)
    with fails("is damaged"):
        export(open_run(tmp_path / "run"), tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["empty", "run"]


def test_without_pyarrow_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run", BLOCKS, 50)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with fails("Parquet files need pyarrow, which is not installed; pip install pyarrow, or export to a .csv file"):
        export_parquet(run, tmp_path / "t.parquet")
    assert export_csv(run, tmp_path / "t.csv") == 50
