"""Runs that are paired sample by sample, in SimpleTuner's own loop: one noise seed, and adapters on the base."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
from real import TESTS
from safetensors.torch import load_file, save_file
from test_real_run import assert_one_line_error, of_rank, set_options
from test_real_sd3 import distances

from simpletuner_layerprobe.run.load import RunData, load_run
from simpletuner_layerprobe.training.sigmas import image_sigma

PAIRED = {"caption_dropout_probability": 0, "layerprobe_noise_seed": 7, "layerprobe_sigmas": "stratified"}


def by_place(run: RunData, rank: int = 0) -> dict[tuple[int, int], dict[str, np.ndarray]]:
    """(image, repeat) -> its sigma, loss, caption and distances, in one rank's samples."""
    of = of_rank(run, rank)
    places = list(zip(run.facts["image"][of].tolist(), run.facts["repeat"][of].tolist(), strict=True))
    assert len(set(places)) == len(places)
    facts = {name: run.facts[name] for name in ("caption_words", "caption_characters", "crop_top", "crop_left")}
    columns = {"sigma": run.sigma, "loss": run.loss, **facts, **distances(run)}
    return {place: {name: values[n] for name, values in columns.items()} for n, place in zip(of, places, strict=True)}


def run_in(folder, simpletuner, name: str, **options: object) -> RunData:
    set_options(folder, layerprobe_dir=name, **options)
    result = simpletuner.run(folder, "tiny-probe", log=f"{name}.txt")
    assert result.code == 0, result.log[-4000:]
    return load_run(folder / name)


def test_a_noise_seed_pairs_runs_whatever_ran_before(simpletuner, tiny):
    folder = tiny(layerprobe_samples=24, mixed_precision="no", **PAIRED)
    plain = by_place(run_in(folder, simpletuner, "plain"))
    assert "noise seed 7: each repeat of an image" in (folder / "plain.txt").read_text()
    assert len({image for image, _ in plain}) > 2 and len({row["sigma"].item() for row in plain.values()}) == 24
    for (image, repeat), row in plain.items():
        assert abs(row["sigma"] - image_sigma(image, repeat, seed=7, stratified=True)) < 1e-7

    # Another order of the images, two at a time.
    pairs = run_in(folder, simpletuner, "pairs", train_batch_size=2, seed=5)
    compared(plain, by_place(pairs), at_least=12, atol=3e-6)
    # The order of the first run, broken off and taken up again, which starts with its first images again.
    run_in(folder, simpletuner, "broken", train_batch_size=1, seed=0, layerprobe_samples=5)
    broken = run_in(folder, simpletuner, "broken", layerprobe_samples=24)
    assert len(broken.files) == 2
    assert "images in another order than the 5 samples" in (folder / "broken.txt").read_text()
    compared(plain, by_place(broken), at_least=12, atol=0)

    # Two ranks. Which images each gets is SimpleTuner's affair; some may come to both.
    set_options(folder, layerprobe_dir="ranks")
    for started in simpletuner.start_ranks(folder, "tiny-probe", 2):
        result = started.result()
        assert result.code == 0, result.log[-4000:]
    ranks = load_run(folder / "ranks")
    for rank in (0, 1):
        compared(plain, by_place(ranks, rank), at_least=6, atol=3e-6)

    other = by_place(run_in(folder, simpletuner, "other", layerprobe_noise_seed=8, layerprobe_samples=6))
    assert not {row["sigma"].item() for row in other.values()} & {row["sigma"].item() for row in plain.values()}
    set_options(folder, layerprobe_noise_seed="none", layerprobe_samples=9)
    result = simpletuner.run(folder, "tiny-probe")
    assert_one_line_error(result, "settings.noise_seed: absent here, 8 in the run")


def compared(a: dict, b: dict, at_least: int, atol: float) -> None:
    both = a.keys() & b.keys()
    assert len(both) >= at_least
    for place in both:
        for name, value in a[place].items():
            if name in ("sigma", "caption_words", "caption_characters", "crop_top", "crop_left"):
                assert value == b[place][name], name
            else:
                np.testing.assert_allclose(value, b[place][name], rtol=0, atol=atol, err_msg=name)


def test_what_a_noise_seed_cannot_fix_is_said(simpletuner, tiny):
    folder = tiny(max_train_steps=2, layerprobe_noise_seed=7)
    result = simpletuner.run(folder, "tiny-probe")
    assert_one_line_error(result, "caption_dropout_probability is 0.1", "set caption_dropout_probability to 0")
    set_options(folder, layerprobe_sigmas="training", caption_dropout_probability=0)
    result = simpletuner.run(folder, "tiny-probe")
    assert_one_line_error(result, "layerprobe_noise_seed fixes the noise levels, and layerprobe_sigmas is 'training'")


def trained(folder: Path, simpletuner, name: str, **options: object) -> Path:
    """The adapter file of two steps of training, too large steps on purpose."""
    set_options(folder, layerprobe=False, max_train_steps=2, num_train_epochs=0, output_dir=name, **TRAINING, **options)
    result = simpletuner.run(folder, "tiny-probe", log=f"{name}.txt")
    assert result.code == 0, result.log[-4000:]
    set_options(folder, layerprobe=True, max_train_steps=6, output_dir="output/tiny-probe")
    return folder / name / "pytorch_lora_weights.safetensors"


TRAINING = {"learning_rate": 0.005, "optimizer": "optimi-adamw"}


def test_a_lycoris_adapter_on_the_base(simpletuner, tiny):
    folder = tiny(max_train_steps=6, mixed_precision="no", **PAIRED)
    file = trained(folder, simpletuner, "training")
    base_run = run_in(folder, simpletuner, "base")
    adapted_run = run_in(folder, simpletuner, "adapted", layerprobe_adapter=str(file))
    base, adapted = by_place(base_run), by_place(adapted_run)
    assert "what is recorded is the adapted model" in (folder / "adapted.txt").read_text()
    assert adapted_run.manifest.settings["adapter"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert adapted_run.manifest.modules == base_run.manifest.modules
    assert adapted_run.manifest.fingerprint == base_run.manifest.fingerprint
    assert base.keys() == adapted.keys() and len(base) == 6
    changes = [np.abs(adapted[place]["image.last"] - base[place]["image.last"]).max() for place in base]
    assert min(changes) > 1e-4

    # The same by LyCORIS's own merge into the weights of a diffusers model.
    environment = folder / "config" / "tiny-probe"
    shutil.copytree(folder / "pipeline", folder / "merged")
    config = environment / "lycoris_config.json"
    done = simpletuner.script(TESTS / "merge_lycoris.py", folder / "merged" / "transformer", config, file)
    assert done.returncode == 0, done.stderr
    options = {"pretrained_model_name_or_path": "merged", "layerprobe_adapter": "none"}
    merged = by_place(run_in(folder, simpletuner, "by_merging", **options))
    compared(merged, adapted, at_least=6, atol=2e-6)

    # An adapter that changes nothing.
    tensors = load_file(file)
    zero = folder / "zero.safetensors"
    save_file({key: value if key.endswith(".alpha") else value * 0 for key, value in tensors.items()}, zero)
    options = {"pretrained_model_name_or_path": "pipeline", "layerprobe_adapter": str(zero)}
    compared(base, by_place(run_in(folder, simpletuner, "zero", **options)), at_least=6, atol=1e-6)

    # What does not fit is named, and a run goes on with its own adapter only.
    set_options(folder, layerprobe_dir="adapted", max_train_steps=8)
    assert_one_line_error(simpletuner.run(folder, "tiny-probe"), "settings.adapter: ", " here, ")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"factor": 4}))
    set_options(folder, layerprobe_dir="none_yet", layerprobe_adapter=str(file))
    result = simpletuner.run(folder, "tiny-probe")
    assert_one_line_error(result, "does not fit the network that lycoris_config.json makes",
                          "have another shape, such as lycoris_transformer_blocks_0_", "in the file")  # fmt: skip
    save_file({f"lycoris_other_{key}": value for key, value in tensors.items()}, zero)
    set_options(folder, layerprobe_adapter=str(zero))
    result = simpletuner.run(folder, "tiny-probe")
    assert_one_line_error(result, "tensors are not in it, such as lycoris_other_", "are not in the file, such as")
    set_options(folder, layerprobe_adapter=str(config))
    assert_one_line_error(simpletuner.run(folder, "tiny-probe"), "is no safetensors file")
    set_options(folder, layerprobe_adapter="nowhere.safetensors")
    assert_one_line_error(simpletuner.run(folder, "tiny-probe"), "cannot read nowhere.safetensors: No such file")
    assert not (folder / "none_yet").exists()


def test_a_lora_on_the_base(simpletuner, tiny):
    folder = tiny(max_train_steps=6, mixed_precision="no", lora_type="standard", lora_rank=4, lora_alpha=8, **PAIRED)
    set_options(folder, lycoris_config=None, lora_dropout=0.5)
    file = trained(folder, simpletuner, "training")
    base_run = run_in(folder, simpletuner, "base")
    adapted_run = run_in(folder, simpletuner, "adapted", layerprobe_adapter=str(file))
    base, adapted = by_place(base_run), by_place(adapted_run)
    assert adapted_run.manifest.modules == base_run.manifest.modules
    assert adapted_run.manifest.fingerprint == base_run.manifest.fingerprint
    assert min(np.abs(adapted[place]["image.last"] - base[place]["image.last"]).max() for place in base) > 1e-4

    # The same by hand: weight + alpha / rank * B A.
    shutil.copytree(folder / "pipeline", folder / "merged")
    weights = folder / "merged" / "transformer" / "diffusion_pytorch_model.safetensors"
    merged, tensors = {name: value.float() for name, value in load_file(weights).items()}, load_file(file)
    for key in [key for key in tensors if key.endswith(".lora_A.weight")]:
        update = tensors[key.replace("lora_A", "lora_B")].double() @ tensors[key].double()
        name = key.removeprefix("transformer.").replace(".lora_A.weight", ".weight")
        merged[name] = (merged[name].double() + 8 / 4 * update).float()
    save_file(merged, weights, metadata={"format": "pt"})
    options = {"pretrained_model_name_or_path": "merged", "layerprobe_adapter": "none"}
    compared(by_place(run_in(folder, simpletuner, "by_merging", **options)), adapted, at_least=6, atol=2e-6)

    # Another alpha, a matrix of another model, and a file without one.
    set_options(folder, pretrained_model_name_or_path="pipeline", layerprobe_adapter=str(file), lora_alpha=4)
    set_options(folder, layerprobe_dir="adapted", max_train_steps=8)
    result = simpletuner.run(folder, "tiny-probe")
    assert_one_line_error(result, "settings.adapter_alpha: 4.0 here, 8.0 in the run")
    set_options(folder, layerprobe_dir="none_yet")
    key = next(key for key in tensors if key.endswith(".lora_B.weight"))
    wrong = folder / "wrong.safetensors"
    save_file(tensors | {key: tensors[key][:-1].contiguous()}, wrong)
    set_options(folder, layerprobe_adapter=str(wrong), lora_alpha=8)
    result = simpletuner.run(folder, "tiny-probe")
    assert_one_line_error(result, "does not fit the modules of this model", f"such as {key}: (", ") in the file, (")
    save_file({name: value for name, value in tensors.items() if name != key}, wrong)
    result = simpletuner.run(folder, "tiny-probe")
    assert_one_line_error(result, "does not fit the LoRA that this config makes", f"such as {key}")
    assert not (folder / "none_yet").exists()
