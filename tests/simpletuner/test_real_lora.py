"""PEFT's LoRA with a rank per module, trained by the real SimpleTuner from the files that `layerprobe lokr` writes."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file
from test_real_run import RUN

from simpletuner_layerprobe.cli import main

# torchao, which diffusers imports, has a string with a stray backslash.
pytestmark = pytest.mark.filterwarnings("ignore:invalid escape sequence:SyntaxWarning")


def test_simpletuner_trains_the_ranks_that_were_planned(simpletuner, tiny, monkeypatch, capsys):
    folder = tiny(max_train_steps=2, train_batch_size=2)
    result = simpletuner.run(folder, "tiny-probe")
    assert result.code == 0, result.log[-3000:]
    monkeypatch.chdir(folder)
    assert (
        main(
            ["lokr", str(RUN), "--preset", "article", "--algo", "lora", "--rank", "12", "--env", "tiny-lora", "--json"]
        )
        == 0
    )
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
