"""A run as arrays, and as a table."""

from __future__ import annotations

import bz2
import gzip
import os
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from failing import fails
from synthetic_run import (
    FLUX_DEV,
    SD35_LARGE,
    manifest,
    rows,
    write_ablated_run,
    write_extra_run,
    write_rows,
    write_run,
)

from simpletuner_layerprobe.run.load import RunData, load_run
from simpletuner_layerprobe.run.manifest import create_run
from simpletuner_layerprobe.run.records import RecordWriter
from simpletuner_layerprobe.run.rows import FACTS
from simpletuner_layerprobe.run.table import export_table, is_table

BLOCKS = {"text": ("b.0",), "image": ("b.0", "c.0")}
FORMULAS = ["=1+1", "plain", "", "@SUM", "'quoted"]


@pytest.fixture
def run(tmp_path: Path) -> RunData:
    """Five samples; the first two facts of each kind are known."""
    facts = {
        "image": [2**64 - 1, 1, 0, 0, 0],
        "caption_words": [0, 7, -1, -1, -1],
        "width": [512, 1024, 0, 0, 0],
        "dropped": [1, 0, -1, -1, -1],
        "backend": FORMULAS,
    }
    distances = {
        ("image", "last"): np.arange(10, dtype=np.float32).reshape(5, 2) / 10,
        ("text", "last"): np.array([[0.1], [np.nan], [np.inf], [-np.inf], [1e-20]], np.float32),
    }
    what = manifest(BLOCKS, readings=("last",))
    return write_rows(tmp_path / "run", what, rows(np.arange(5) / 4, distances, facts))


def test_what_a_run_gives(run: RunData) -> None:
    assert (run.samples, run.readings, run.images) == (5, ("last",), None)
    assert list(run.streams) == ["image", "text"] and run.streams["image"] == ("b.0", "c.0")
    assert run.sigma.tolist() == [0, 0.25, 0.5, 0.75, 1] and run.loss.tolist() == [0.5] * 5
    assert run.facts.keys() == FACTS.keys()
    assert run.distances("image").dtype == np.float32
    np.testing.assert_array_equal(run.distances("image"), np.arange(10, dtype=np.float32).reshape(5, 2) / 10)
    assert run.distances("text") is run.distances("text", "last")
    for array in (run.sigma, run.facts["image"], run.distances("text")):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
    with fails("the run has no stream 'audio'; it has: text, image"):
        run.distances("audio")
    with fails("has no reading 'mean' of text; it has: last"):
        run.distances("text", "mean")


def test_an_ablation_is_of_whole_blocks_or_of_the_text(tmp_path: Path) -> None:
    run = write_ablated_run(tmp_path / "run", BLOCKS, 12, (0.5, 0.1))
    assert run.distances("block", "ablation").shape == (12, 2)
    assert run.distances("text", "ablation_text_change").shape == (12, 1)
    assert np.isnan(run.distances("block", "ablation")).all(axis=1).tolist() == [False, True, True] * 4
    assert "block.ablation.c.0" in run.to_pandas()
    with fails("has no reading 'ablation' of image"):
        run.distances("image", "ablation")
    with fails("has no reading 'mean' of block"):
        run.distances("block", "mean")


def test_images_are_counted_where_all_are_known(tmp_path: Path) -> None:
    assert write_run(tmp_path / "known", BLOCKS, 60, images=7).images == 7
    assert write_run(tmp_path / "unknown", BLOCKS, 60).images is None
    create_run(tmp_path / "empty", manifest(BLOCKS))
    empty = load_run(tmp_path / "empty")
    assert empty.images is None and empty.samples == 0 and empty.distances("text").shape == (0, 1)
    assert len(empty.to_pandas()) == 0


def test_a_run_stays_as_it_was_when_it_was_loaded(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", BLOCKS, 30, files=1)
    with RecordWriter(run.path, run.manifest, 0) as writer:
        writer.write(rows([0.5], {key: np.ones((1, len(b)), np.float32) for key, b in run.manifest.columns().items()}))
    assert run.distances("image", "mean").shape == (30, 2) and load_run(run.path).samples == 31


def test_the_further_readings(tmp_path: Path) -> None:
    run = write_extra_run(tmp_path / "run", FLUX_DEV, 12, pairs=3, seam=19)
    assert run.distances("image", "pair3_last").shape == (12, 55)
    assert np.isnan(run.distances("image", "pair3_last")).any(axis=0).sum() == 2
    table = run.to_pandas()
    assert "image.pair2_mean.single_transformer_blocks.36" in table and table.shape[0] == 12


def test_loading_174_000_samples_takes_a_part_of_a_second(tmp_path: Path) -> None:
    """CPU time, so that a busy machine matters less; on two free cores it takes 0.2 s."""
    what = create_run(tmp_path, manifest(SD35_LARGE))
    distances = {key: np.full((100, len(blocks)), 0.5, np.float32) for key, blocks in what.columns().items()}
    with RecordWriter(tmp_path, what, 0) as writer:
        writer.write(rows(np.linspace(0, 1, 100), distances))
        head = writer.path.read_bytes()
        writer.write(rows(np.linspace(0, 1, 100), distances))
        batch = writer.path.read_bytes()[len(head) :]
        with open(writer.path, "ab") as file:
            file.writelines([batch] * 1738)
    before = time.process_time()
    run = load_run(tmp_path)
    assert run.distances("image").shape == (174_000, 38)
    assert time.process_time() - before < 2


# Tables


def test_a_table_has_one_row_per_sample_and_what_is_not_known_is_missing(run: RunData) -> None:
    table = run.to_pandas()
    assert list(table) == ["sigma", "loss", *FACTS, "image.last.b.0", "image.last.c.0", "text.last.b.0"]
    assert table["image"].dtype == "UInt64" and table["image"][0] == 2**64 - 1
    assert table["dropped"].tolist()[:2] == [True, False]
    for name in ("image", "caption_words", "width", "dropped"):
        assert table[name].isna().tolist() == [False, False, True, True, True], name
    assert table["backend"].isna().tolist() == [False, False, True, False, False]
    assert table["repeat"].isna().all()
    assert table["text.last.b.0"].dtype == np.float32
    np.testing.assert_array_equal(table["text.last.b.0"], run.distances("text")[:, 0])


def test_parquet_holds_the_same_table(run: RunData, tmp_path: Path) -> None:
    assert is_table("a.PARQUET") and is_table("a.csv.gz") and not is_table("a.jsonl")
    assert export_table(run, tmp_path / "run.parquet") == 5
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "run.parquet"), run.to_pandas())


@pytest.mark.parametrize(("suffix", "unpack"), [("", bytes), (".gz", gzip.decompress), (".bz2", bz2.decompress)])
def test_csv_gives_every_number_back_and_no_spreadsheet_formula(
    run: RunData, tmp_path: Path, suffix: str, unpack: type
) -> None:
    export_table(run, tmp_path / f"run.csv{suffix}")
    text = unpack((tmp_path / f"run.csv{suffix}").read_bytes()).decode()
    assert text.count("\n") == 6 and "\r" not in text
    read = pd.read_csv(tmp_path / f"run.csv{suffix}", keep_default_na=False, na_values=[""], dtype={"backend": str})
    for name in ("image.last.b.0", "image.last.c.0"):
        np.testing.assert_array_equal(read[name].astype(np.float32), run.to_pandas()[name])
    assert read["backend"].fillna("").tolist() == ["'=1+1", "plain", "", "'@SUM", "''quoted"]
    assert [line.split(",")[-1] for line in text.splitlines()[1:]] == ["0.1", "", "inf", "-inf", "1e-20"]


def test_a_table_is_complete_or_absent(run: RunData, tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text("mine")
    with fails("mine.csv exists already; it is not overwritten without --force"):
        export_table(run, tmp_path / "mine.csv")
    create_run(tmp_path / "empty", manifest(BLOCKS))
    with fails("has no samples"):
        export_table(load_run(tmp_path / "empty"), tmp_path / "out.csv")
    with fails("cannot write"):
        export_table(run, tmp_path / "absent" / "out.parquet")
    assert sorted(os.listdir(tmp_path)) == ["empty", "mine.csv", "run"]
