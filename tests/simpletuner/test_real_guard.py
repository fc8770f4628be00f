"""The guard in normal trainings of the real SimpleTuner: what it says, what it stops, and that it changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from simpletuner_layerprobe.cli import main

# torchao, which diffusers imports, has a string with a stray backslash.
pytestmark = pytest.mark.filterwarnings("ignore:invalid escape sequence:SyntaxWarning")

GUARD = "layerprobe: guard: "
ADAPTER = Path("output", "tiny-probe", "pytorch_lora_weights.safetensors")
SAME = {"PYTHONHASHSEED": "0"}


@pytest.fixture
def training(tiny: Callable[..., Path]) -> Callable[..., Path]:
    """A function that makes the tiny environment one that trains two steps: `training(layerprobe_guard="stop")`."""

    def make(lycoris: dict[str, Any] | None = None, **options: Any) -> Path:
        folder = tiny(layerprobe=False, max_train_steps=2, train_batch_size=2, seed=7, **options)
        if lycoris is not None:
            write_lycoris(folder, lycoris)
        return folder

    return make


def write_lycoris(folder: Path, preset: dict[str, Any]) -> None:
    path = folder / "config" / "tiny-probe" / "lycoris_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"factor": 4, "apply_preset": preset}))


def said(result: Any) -> list[str]:
    return [line.partition(GUARD)[2] for line in result.log.splitlines() if GUARD in line]


def test_a_good_config_is_one_line_and_trains_bit_for_bit_as_without(simpletuner, training):
    folder = training()
    trained = {}
    # The first one fills the caches, with draws of its own.
    for name, mode in [("cold", "warn"), ("looked at", "warn"), ("not looked at", "off")]:
        result = simpletuner.run(folder, "tiny-probe", argv=[f"--layerprobe_guard={mode}"], environment=SAME)
        assert result.code == 0, result.log[-3000:]
        assert len(said(result)) == (mode == "warn")
        trained[name] = load_file(folder / ADAPTER)
        if mode == "warn":
            config = str(folder / "config" / "tiny-probe" / "lycoris_config.json")
            arguments = [
                "check-config",
                config,
                "--model",
                str(folder / "pipeline"),
                "--adapter",
                str(folder / ADAPTER),
            ]
            assert main(arguments) == 0, "the file that was trained comes from its config"
        (folder / ADAPTER).unlink()
    looked_at, not_looked_at = trained["looked at"], trained["not looked at"]
    assert any(tensor.any() for name, tensor in looked_at.items() if name.endswith("lokr_w2"))
    assert looked_at.keys() == not_looked_at.keys()
    assert all(torch.equal(tensor, not_looked_at[name]) for name, tensor in looked_at.items())


def test_a_config_that_matches_nothing(simpletuner, training):
    folder = training({"target_module": ["WanAttention"]}, layerprobe_guard="stop")
    result = simpletuner.run(folder, "tiny-probe")
    assert result.code != 0 and "Traceback" not in result.log
    assert "layerprobe: error: layerprobe_guard stops this training before its first step" in result.log
    assert not (folder / ADAPTER).exists()
    result = simpletuner.run(folder, "tiny-probe", argv=["--layerprobe_guard=warn"], log="warn.txt")
    assert any("nothing would train" in line for line in said(result))
    assert "nothing in the model matches WanAttention" in said(result)
    assert "layerprobe: error" not in result.log, "what comes then is SimpleTuner's own"


def test_the_articles_form_leaks_and_a_checkpoint_of_another_config(simpletuner, training):
    preset = {
        "target_module": ["JointTransformerBlock"],
        "use_fnmatch": True,
        "name_algo_map": {"transformer_blocks.0.*": {"factor": 2}, "transformer_blocks.1.*": {"factor": 8}},
    }
    folder = training(preset, checkpoint_step_interval=1, resume_from_checkpoint="latest")
    result = simpletuner.run(folder, "tiny-probe")
    assert result.code == 0, result.log[-3000:]
    lines = said(result)
    assert "LyCORIS builds the classes in target_module before it looks at name_algo_map" in " ".join(lines)
    assert any(line.startswith("transformer_blocks.") and "meant lokr factor" in line for line in lines)
    # Now with names alone: another network than that of the checkpoint.
    write_lycoris(folder, {**preset, "target_module": []})
    result = simpletuner.run(folder, "tiny-probe", argv=["--layerprobe_guard=stop", "--max_train_steps=3"], log="b.txt")
    assert result.code != 0 and "Traceback" not in result.log
    assert "it would resume from" in result.line("layerprobe: error") and "checkpoint-2" in result.log


def test_a_lora_of_pefts(simpletuner, training):
    folder = training(lora_type="standard", lora_rank=3, lycoris_config=None)
    result = simpletuner.run(folder, "tiny-probe")
    assert result.code == 0, result.log[-3000:]
    trained = load_file(folder / ADAPTER)
    numbers = sum(tensor.numel() for name, tensor in trained.items() if ".lora_" in name)
    (line,) = said(result)
    assert line.endswith(f"of rank 3), {numbers:,} trainable parameters")
