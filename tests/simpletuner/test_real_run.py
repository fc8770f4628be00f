"""A probe-only run inside the real SimpleTuner: options, stopping, going on, refusing."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from test_real_sd3 import assert_equal_to_reference

from simpletuner_layerprobe.run.load import RunData, load_run
from simpletuner_layerprobe.run.rows import image_hash

RUN = Path("output", "tiny-probe", "layerprobe")


def run_of(folder: Path) -> RunData:
    return load_run(folder / RUN)


def contents(run: RunData) -> dict[Path, bytes]:
    """The stream files as they are now."""
    return {file.path: file.path.read_bytes() for file in run.files}


def of_rank(run: RunData, rank: int) -> list[int]:
    """The numbers of the run's samples that this rank recorded, in order."""
    starts = np.cumsum([0, *(file.samples for file in run.files)])
    return [
        n
        for file, at in zip(run.files, starts, strict=False)
        if file.rank == rank
        for n in range(at, at + file.samples)
    ]


def samples_per_rank(run: RunData) -> dict[int, int]:
    counts: Counter[int] = Counter()
    for file in run.files:
        counts[file.rank] += file.samples
    return dict(counts)


def wait_for_batches(
    folder: Path,
    count: int,
    log: Callable[[], str],
    ranks: int = 1,
    besides: int = 0,
    ended: Callable[[], bool] = lambda: False,
) -> None:
    """Until each of the ranks has written `count` batches, besides those that the run had. ended: is it over?"""
    end = time.monotonic() + 600
    while True:
        run = run_of(folder) if (folder / RUN / "manifest.json").exists() else None
        batches: Counter[int] = Counter()
        for file in run.files if run else ():
            batches[file.rank] += file.batches
        if all(batches[rank] >= besides + count for rank in range(ranks)):
            return
        assert time.monotonic() < end and not ended(), log()[-4000:]
        time.sleep(0.05)


def set_options(folder: Path, **options: object) -> None:
    path = folder / "config" / "tiny-probe" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | options))


def assert_one_line_error(result, *parts: str) -> None:
    assert result.code == 1
    lines = [line for line in result.log.splitlines() if line.startswith("layerprobe: error: ")]
    assert len(lines) == 1, result.log[-4000:]
    for part in parts:
        assert part in lines[0]
    assert "Traceback" not in result.log


def test_sample_count_is_exact_and_a_second_start_goes_on(simpletuner, tiny):
    folder = tiny(train_batch_size=2, layerprobe_samples=5, layerprobe_sigmas="stratified", num_train_epochs=1)
    result = simpletuner.run(folder, "tiny-probe")
    assert result.code == 0, result.log[-4000:]
    assert run_of(folder).samples == 5
    assert "layerprobe: 5 samples in" in result.line("layerprobe: ")
    files = contents(run_of(folder))

    set_options(folder, layerprobe_samples=10)
    result = simpletuner.run(folder, "tiny-probe")
    assert result.code == 0, result.log[-4000:]
    assert "goes on after 5 samples" in result.log
    assert "5 samples in" in result.line("layerprobe: ")
    assert f", 10 samples of {run_of(folder).images} images in the run" in result.line("layerprobe: ")
    run = run_of(folder)
    assert run.samples == 10
    # Ten consecutive samples of a stratified run fill the ten tenths, across a restart too.
    assert sorted((run.sigma * 10).astype(int)) == list(range(10))
    # New noise and crops: not the first five samples again.
    assert len(np.unique(run.loss)) > 5
    assert files.items() < contents(run).items()

    # The same image counts on over the restart.
    came: Counter[int] = Counter()
    for image, repeat in zip(run.facts["image"].tolist(), run.facts["repeat"].tolist(), strict=True):
        assert repeat == came[image]
        came[image] += 1
    assert run.facts["repeat"].max() > 0

    result = simpletuner.run(folder, "tiny-probe")
    assert result.code == 0
    assert f"has its 10 samples of {run.images} images already" in result.line("layerprobe: ")
    assert run_of(folder).samples == 10

    set_options(folder, layerprobe_sigmas="uniform", layerprobe_samples=20)
    result = simpletuner.run(folder, "tiny-probe")
    assert_one_line_error(result, "sigmas", "'stratified'", "'uniform'")
    assert run_of(folder).samples == 10


def test_the_facts_of_every_sample(simpletuner, tiny):
    folder = tiny(max_train_steps=20, caption_dropout_probability=0.5, layerprobe_flush_seconds=1000)
    result = simpletuner.run(folder, "tiny-probe")
    assert result.code == 0, result.log[-4000:]
    facts = run_of(folder).facts
    captions = {
        image_hash("photographs", str(path)): path.with_suffix(".txt").read_text().splitlines()
        for path in (folder / "photographs").iterdir()
        if path.suffix in (".jpg", ".png")
    }
    seen = set(facts["image"].tolist())  # which of them is SimpleTuner's chance
    assert seen <= set(captions) and run_of(folder).images == len(seen) > 2
    for n, image in enumerate(facts["image"].tolist()):
        lengths = {(len(caption.split()), len(caption)) for caption in captions[image]}
        length = facts["caption_words"][n], facts["caption_characters"][n]
        assert length in (lengths if facts["dropped"][n] == 0 else {(0, 0)})
    assert set(facts["dropped"].tolist()) == {0, 1} and len(set(facts["caption_words"].tolist())) > 2
    assert set(facts["text_tokens"].tolist()) == {-1}  # SD3's text has no mask: a constant is no fact
    assert set(facts["width"].tolist()) == set(facts["height"].tolist()) == {128}
    assert facts["crop_top"].min() >= 0 and facts["crop_left"].min() >= 0
    assert set(facts["backend"].tolist()) == {"photographs"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_with_all_rows_written(simpletuner, tiny, number):
    folder = tiny(max_train_steps=5000, layerprobe_flush_seconds=0.2)
    started = simpletuner.start(folder, "tiny-probe")
    started.wait_for("5000 [")
    wait_for_batches(folder, 2, started.text)
    os.kill(started.pid, number)
    result = started.result()
    assert result.code == 0, result.log[-4000:]
    run = run_of(folder)
    assert 0 < run.samples < 5000
    assert f"layerprobe: {run.samples} samples in" in result.line("layerprobe: ")


def test_everything_that_trains_is_switched_off(simpletuner, tiny):
    folder = tiny(
        model_type="full",
        optimizer="optimi-lion",
        use_ema=True,
        gradient_checkpointing=True,
        gradient_accumulation_steps=2,
        train_batch_size=2,
        max_train_steps=3,
        checkpoint_step_interval=1,
        lr_scheduler="cosine",
        lr_warmup_steps=1,
        caption_dropout_probability=0.5,
        grad_clip_method="value",
    )
    path = folder / "config" / "tiny-probe" / "multidatabackend.json"
    backends = json.loads(path.read_text())
    second = backends[0] | {
        "id": "wide",
        "crop": False,
        "crop_aspect": "preserve",
        "cache_dir_vae": "cache/vae-wide",
        "repeats": 2,
    }
    path.write_text(json.dumps([backends[0], second, backends[1]]))
    result = simpletuner.run(folder, "tiny-probe")
    assert result.code == 0, result.log[-4000:]

    run = run_of(folder)
    assert run.samples >= 3 * 2  # three updates of two batches each
    assert set(run.facts["dropped"]) <= {0, 1}
    assert set(run.facts["backend"]) <= {"photographs", "wide"}
    assert {int(size) for size in run.facts["width"]} != {0}
    for line in (
        "no optimizer: optimizer (was optimi-lion)",
        "use_ema",
        "gradient_checkpointing",
    ):
        assert line in result.log
    assert not list((folder / "output").rglob("checkpoint*"))
    assert not (folder / "output" / "tiny-probe" / "pipeline").exists()
    assert not list((folder / "output" / "tiny-probe").glob("*.safetensors"))


def test_training_sigmas_keep_the_users_schedule(simpletuner, tiny):
    folder = tiny(layerprobe_sigmas="training", flow_custom_timesteps="250,750", max_train_steps=6)
    result = simpletuner.run(folder, "tiny-probe")
    assert result.code == 0, result.log[-4000:]
    assert set(run_of(folder).sigma) <= {0.25, 0.75}


def test_toml_and_command_line(simpletuner, tiny):
    folder = tiny()
    path = folder / "config" / "tiny-probe" / "config.json"
    config = {name: value for name, value in json.loads(path.read_text()).items() if not name.startswith("layerprobe")}
    path.unlink()
    lines = [f"{name} = {json.dumps(value)}" for name, value in config.items()]
    path.with_suffix(".toml").write_text("\n".join(lines) + "\n")
    result = simpletuner.run(folder, "tiny-probe", argv=["--layerprobe", "--layerprobe_samples", "3"])
    assert result.code == 0, result.log[-4000:]
    assert run_of(folder).samples == 3


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"layerprobe_sigmas": "even"}, ["layerprobe_sigmas", "'even'", "uniform, stratified, training"]),
        ({"layerprobe_samples": -1}, ["layerprobe_samples", "-1"]),
        ({"layerprobe_samples": "many"}, ["layerprobe_samples", "many"]),
        ({"layerprobe_flush_seconds": 0}, ["layerprobe_flush_seconds", "above 0"]),
        ({"layerprobe": "maybe"}, ["layerprobe is 'maybe'", "true or false"]),
        ({"model_family": "heartmula"}, ["'heartmula' cannot be probed", "no noise level"]),
        ({"controlnet": True}, ["controlnet", "remove it"]),
    ],
)
def test_what_cannot_be_probed_is_one_line(simpletuner, tiny, options, parts):
    folder = tiny(**options)
    result = simpletuner.run(folder, "tiny-probe")
    assert_one_line_error(result, *parts)
    assert not (folder / RUN).exists()


def test_another_trainer_refuses_the_flag(simpletuner, tiny):
    folder = tiny(max_train_steps=2)
    result = simpletuner.run(folder, "tiny-probe", setup="setups.py:another_trainer")
    assert_one_line_error(
        result, "does not fit SimpleTuner", "Trainer._any_rank_reached_epoch_end is missing", "doctor"
    )
    assert not (folder / RUN).exists()


def test_a_block_that_does_not_report_stops_the_run(simpletuner, tiny):
    folder = tiny(max_train_steps=2)
    result = simpletuner.run(folder, "tiny-probe", setup="setups.py:skipped_block")
    assert_one_line_error(result, "2 of 11 block states", "transformer_blocks.3 (image)", "transformer_blocks.3 (text)")
    assert run_of(folder).samples == 0


def test_the_off_switch_makes_the_option_unknown(simpletuner, tiny):
    folder = tiny(max_train_steps=2)
    result = simpletuner.run(folder, "tiny-probe", environment={"SIMPLETUNER_LAYERPROBE": "0"})
    assert result.code != 0
    assert "unrecognized arguments: --layerprobe" in result.log
    assert not (folder / RUN).exists()


@pytest.mark.parametrize("precision", ["int8-quanto", "int8-torchao"])
def test_a_quantised_base_model(simpletuner, tiny, precision):
    folder = tiny(max_train_steps=3, base_model_precision=precision, quantize_via="cpu")
    result = simpletuner.run(folder, "tiny-probe", setup="taps.py:tap_sd3")
    assert result.code == 0, result.log[-4000:]
    run = run_of(folder)
    assert_equal_to_reference(folder, run, {"image": 6, "text": 5})
    shapes = {module.name: module.shape for module in run.manifest.modules}
    assert shapes["transformer_blocks.0.attn.to_q"] == (96, 96)


def test_an_unknown_family_is_guessed_only_when_asked(simpletuner, tiny, tiny_flux):
    folder = tiny(tiny_flux, max_train_steps=3)
    result = simpletuner.run(folder, "tiny-probe", setup="setups.py:unknown_family")
    assert_one_line_error(result, "'flux' is not supported", "layerprobe_discover")

    set_options(folder, layerprobe_discover=True)
    result = simpletuner.run(folder, "tiny-probe", setup="setups.py:unknown_family_with_taps")
    assert result.code == 0, result.log[-4000:]
    guessed = "transformer_blocks.*, single_transformer_blocks.*"
    assert f"is not in the probe's table; guessed blocks: {guessed}" in result.log
    run = run_of(folder)
    assert [(stream.name, len(stream.blocks)) for stream in run.manifest.streams] == [("image", 7)]
    assert run.manifest.settings["text"] == "unknown"
    reference = np.load(folder / "reference.npz")
    recorded = run.distances("image", "mean")
    np.testing.assert_allclose(recorded[:, :3], reference["image.mean"][:, :3], rtol=0, atol=2e-6)
