"""PEFT's LoRA with a rank per module, trained by the real SimpleTuner from the files that `layerprobe lokr` writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from test_real_run import RUN, set_options

from simpletuner_layerprobe import load
from simpletuner_layerprobe.cli import main
from simpletuner_layerprobe.lokr.own import Own
from simpletuner_layerprobe.lokr.size import STATES

# torchao, which diffusers imports, has a string with a stray backslash.
pytestmark = pytest.mark.filterwarnings("ignore:invalid escape sequence:SyntaxWarning")


def counted_by_the_probe(folder: Path) -> None:
    """What the probe keeps as its own config's size is what a command counts without it."""
    run = load(folder / RUN)
    kept = dict(run.own.training)
    assert kept.pop("parameters") == Own(run.manifest, kept).parameters


def test_simpletuner_trains_the_ranks_that_were_planned(simpletuner, tiny, monkeypatch, capsys):
    folder = tiny(max_train_steps=2, train_batch_size=2)
    result = simpletuner.run(folder, "tiny-probe")
    assert result.code == 0, result.log[-3000:]
    counted_by_the_probe(folder)
    monkeypatch.chdir(folder)
    asked = ["--preset", "article", "--algo", "lora", "--rank", "12", "--env", "tiny-lora", "--json"]
    assert main(["lokr", str(RUN), *asked]) == 0
    planned = json.loads(capsys.readouterr().out)
    targets = json.loads((folder / "config" / "tiny-lora" / "lora_target_modules.json").read_text())
    result = simpletuner.run(folder, "tiny-lora", log="lora.txt")
    assert result.code == 0, result.log[-3000:]
    trained = load_file(folder / "output" / "tiny-lora" / "pytorch_lora_weights.safetensors")
    ranks = {
        name.removeprefix("transformer.").removesuffix(".lora_A.weight"): tensor.shape[0]
        for name, tensor in trained.items()
        if name.endswith(".lora_A.weight")
    }
    shapes = load_file(folder / "config" / "tiny-lora" / "lora_ranks.safetensors")
    assert set(ranks) == set(targets)
    assert ranks == {
        name.removeprefix("transformer.").removesuffix(".lora_down.weight"): tensor.shape[0]
        for name, tensor in shapes.items()
    }
    assert len(set(ranks.values())) > 3
    assert sum(tensor.numel() for tensor in trained.values()) == planned["parameters"]
    # Every up matrix starts at zero, so one that is not was trained.
    assert any(tensor.any() for name, tensor in trained.items() if name.endswith(".lora_B.weight"))


def test_the_runs_own_size_is_what_simpletuner_trains(simpletuner, tiny):
    """A LoRA's modules are SimpleTuner's defaults for the model, which no option names; the probe keeps them."""
    folder = tiny(max_train_steps=2, lora_type="standard", lora_rank=4)
    result = simpletuner.run(folder, "tiny-probe")
    assert result.code == 0, result.log[-3000:]
    kept = json.loads((folder / RUN / "training.json").read_text())
    assert (kept["lora_type"], kept["lora_rank"], kept["optimizer"]) == ("standard", 4, "adamw_bf16")
    own = load(folder / RUN).own
    counted_by_the_probe(folder)
    set_options(folder, layerprobe=False, output_dir="output/trained")
    result = simpletuner.run(folder, "tiny-probe", log="trained.txt")
    assert result.code == 0, result.log[-3000:]
    trained = load_file(folder / "output" / "trained" / "pytorch_lora_weights.safetensors")
    assert own.parameters == sum(tensor.numel() for name, tensor in trained.items() if ".lora_" in name) > 0


def test_what_optimizers_keep_is_what_the_table_says(simpletuner, tiny):
    """Every optimizer of this SimpleTuner, with its own settings; those that cannot step here are left out."""
    folder = tiny()
    result = simpletuner.run(folder, "tiny-probe", setup="setups.py:optimizer_states")
    assert result.code == 0, result.log[-3000:]
    kept = json.loads((folder / "states.json").read_text())
    assert {"torch-adamw", "adamw_bf16", "optimi-lion", "prodigy", "sdnq-adamw", "ao-adamw8bit"} <= kept.keys()
    for name, (half, whole) in kept.items():
        for measured, said in zip((half, whole), STATES.get(name, (None, None)), strict=True):
            if measured is not None and name != "soap":
                assert said == pytest.approx(measured, abs=0.08), name
