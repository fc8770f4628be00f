"""The guard of normal trainings: real networks of LyCORIS and PEFT on small models, beside what their configs say."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import save_file

from simpletuner_layerprobe import plugin
from simpletuner_layerprobe.errors import ConfigError
from simpletuner_layerprobe.lokr import guard as words
from simpletuner_layerprobe.lokr.network import fresh_wrapper
from simpletuner_layerprobe.training.guard import guarded
from simpletuner_layerprobe.training.options import guard_mode

BLOCKS = 2
NAMED = {
    "algo": "lokr",
    "multiplier": 1,
    "linear_dim": 10000,
    "linear_alpha": 1,
    "full_matrix": True,
    "apply_preset": {
        "target_module": [],
        "use_fnmatch": True,
        "name_algo_map": {"transformer_blocks.0.*": {"factor": 2}, "transformer_blocks.1.*": {"factor": 4}},
    },
}
ARTICLES_FORM = NAMED | {
    "factor": 1,
    "apply_preset": NAMED["apply_preset"] | {"target_module": ["JointTransformerBlock"]},
}


class Training:
    """What the guard sees of SimpleTuner's Trainer, with a real denoiser and what really was put on it."""

    def __init__(self, folder: Path, config: dict[str, Any] | None = None, **options: Any) -> None:
        self.denoiser = SD3Transformer2DModel(
            sample_size=4,
            in_channels=4,
            out_channels=4,
            num_layers=BLOCKS,
            num_attention_heads=2,
            attention_head_dim=8,
            joint_attention_dim=12,
            caption_projection_dim=16,
            pooled_projection_dim=10,
            pos_embed_max_size=4,
        ).requires_grad_(False)
        self.folder, self.written = folder, config
        (folder / "lycoris.json").write_text(json.dumps(config))
        self.config = SimpleNamespace(
            model_type="lora",
            lora_type="lycoris" if config else "standard",
            lycoris_config=str(folder / "lycoris.json"),
            lora_rank=4,
            init_lora=None,
            peft_lora_target_modules=None,
            resume_from_checkpoint=None,
            output_dir=str(folder / "output"),
            **options,
        )
        self.accelerator = SimpleNamespace(is_main_process=True)
        self.model = SimpleNamespace(
            get_trained_component=lambda: self.denoiser, MODEL_TYPE=SimpleNamespace(value="transformer")
        )

    def lycoris(self) -> None:
        """As SimpleTuner makes it, in a new process: LyCORIS keeps presets in a class."""
        wrapper = fresh_wrapper()
        rest = json.loads(json.dumps(self.written))
        numbers = [int(rest.pop(key)) for key in ("multiplier", "linear_dim", "linear_alpha")]
        wrapper.LycorisNetwork.apply_preset(rest["apply_preset"])
        self.accelerator._lycoris_wrapped_network = wrapper.create_lycoris(self.denoiser, *numbers, **rest)
        self.accelerator._lycoris_wrapped_network.apply_to()

    def lora(self, **settings: Any) -> None:
        self.model.lora_config = LoraConfig(**{"r": 4, "target_modules": ["to_q", "to_k", "to_v"], **settings})
        inject_adapter_in_model(self.model.lora_config, self.denoiser)

    def guard(self, mode: str = "warn", make: Any = None) -> None:
        guarded(self, mode, plugin.verdicts, make or (self.lycoris if self.written else self.lora))


def lines(capsys: Any) -> list[str]:
    """What the guard printed; LyCORIS prints too."""
    start = "layerprobe: guard: "
    return [line.removeprefix(start) for line in capsys.readouterr().out.splitlines() if line.startswith(start)]


def test_a_network_as_written_is_one_line(tmp_path, capsys):
    training = Training(tmp_path, NAMED)
    training.guard("stop")
    (line,) = lines(capsys)
    network = training.accelerator._lycoris_wrapped_network
    numbers = sum(parameter.numel() for parameter in network.parameters())
    assert f": {len(network.loras)} modules, {numbers:,} trainable parameters, as " in line


def test_off_looks_at_nothing(tmp_path, capsys):
    Training(tmp_path, ARTICLES_FORM).guard("off")
    assert lines(capsys) == []


def test_a_network_that_matches_nothing(tmp_path, capsys):
    config = NAMED | {"apply_preset": {"target_module": ["WanAttention"]}}
    training = Training(tmp_path, config)
    training.guard("warn")
    said = lines(capsys)
    assert any("nothing would train" in line for line in said)
    assert any("nothing in the model matches WanAttention" in line for line in said)
    with pytest.raises(ConfigError, match="nothing would train") as stopped:
        Training(tmp_path, config).guard("stop")
    assert "\n" not in str(stopped.value)


def test_the_leak_of_the_articles_form_is_named(tmp_path, capsys):
    training = Training(tmp_path, ARTICLES_FORM)
    training.guard("warn")
    said = lines(capsys)
    assert "LyCORIS builds the classes in target_module before it looks at name_algo_map" in " ".join(said)
    assert any("... and" in line for line in said), "the modules are many, and are not all listed"
    assert len(said) < 14
    with pytest.raises(ConfigError, match=r"\d+ of \d+ modules"):
        Training(tmp_path, ARTICLES_FORM).guard("stop")


def test_a_network_of_another_factor_than_the_file_says(tmp_path, capsys):
    """Whatever makes the difference: the network is looked at, and not rebuilt from the file."""
    training = Training(tmp_path, NAMED)
    changed = json.loads(json.dumps(NAMED))
    changed["apply_preset"]["name_algo_map"]["transformer_blocks.0.*"]["factor"] = 4

    def make() -> None:
        training.written = changed
        training.lycoris()

    training.guard("warn", make)
    said = lines(capsys)
    (first, *_) = [line for line in said if line.startswith("transformer_blocks.0.")]
    assert "meant lokr factor 2" in first


def test_patterns_without_a_module_are_said_and_stop_nothing(tmp_path, capsys):
    config = json.loads(json.dumps(NAMED))
    config["apply_preset"]["name_algo_map"] |= {f"blocks.{number}.*": {"factor": 2} for number in range(5)}
    Training(tmp_path, config).guard("stop")
    said = lines(capsys)
    assert said[1:] == [
        "nothing in the model matches blocks.0.*",
        "nothing in the model matches blocks.1.*",
        "nothing in the model matches blocks.2.*",
        "... and 2 more like this",
    ]


def test_lora_as_asked(tmp_path, capsys):
    training = Training(tmp_path)
    training.guard("stop")
    (line,) = lines(capsys)
    numbers = sum(weight.numel() for weight in training.denoiser.parameters() if weight.requires_grad)
    assert line == f"PEFT LoRA: {3 * BLOCKS} modules ({3 * BLOCKS} of rank 4), {numbers:,} trainable parameters"


def test_lora_of_another_rank_than_asked(tmp_path, capsys):
    training = Training(tmp_path)
    training.guard("warn", lambda: training.lora(rank_pattern={"transformer_blocks.1.attn.to_q": 2}))
    assert "transformer_blocks.1.attn.to_q: rank 2, meant 4" in lines(capsys)
    again = Training(tmp_path)
    with pytest.raises(ConfigError, match="1 modules"):
        again.guard("stop", lambda: again.lora(rank_pattern={"transformer_blocks.1.attn.to_q": 2}))


def test_loras_ranks_of_a_file(tmp_path, capsys):
    path = tmp_path / "ranks.safetensors"
    held = {"transformer_blocks.0.attn.to_q": 2, "transformer_blocks.0.attn.to_out.0": 3}
    save_file({f"transformer.{name}.lora_down.weight": torch.zeros(rank, 0) for name, rank in held.items()}, path)
    training = Training(tmp_path)
    training.config.init_lora = str(path)
    training.guard("warn", lambda: training.lora(r=2, target_modules=["transformer_blocks.0.attn.to_q"]))
    said = lines(capsys)
    assert "lora_rank 4 has no effect: the ranks are those of init_lora" in said
    assert "transformer_blocks.0.attn.to_out.0: in the file of init_lora, and no adapter here" in said
    # Another program's names: SimpleTuner renames them, and no rank is compared.
    save_file({"diffusion_model.x.lora_A.weight": torch.zeros(2, 4)}, path)
    again = Training(tmp_path)
    again.config.init_lora = str(path)
    again.guard("stop", lambda: again.lora(r=2))


def test_targets_of_loras_that_no_module_is_called_by(tmp_path, capsys):
    training = Training(tmp_path)
    training.config.peft_lora_target_modules = ["to_q", "to_kv"]
    training.guard("warn", lambda: training.lora(target_modules=["to_q", "to_kv"]))
    assert "nothing in the model is called to_kv (peft_lora_target_modules)" in lines(capsys)


def test_full_trainings_are_left_alone(tmp_path, capsys):
    training = Training(tmp_path)
    training.config.model_type = "full"
    made: list[int] = []
    training.guard("stop", lambda: made.append(1))
    assert made == [1] and lines(capsys) == []


def test_an_error_in_the_guard_ends_no_training(tmp_path, capsys, monkeypatch):
    def broken(*arguments: Any) -> None:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(words, "lycoris_verdict", broken)
    training = Training(tmp_path, NAMED)
    training.guard("stop")
    assert lines(capsys) == ["could not look at this training, which goes on: RuntimeError: no such thing"]
    assert training.accelerator._lycoris_wrapped_network.loras
    # A denoiser that cannot be looked at is one line, and the training goes on.
    training = Training(tmp_path, NAMED)
    training.model.get_trained_component = lambda: None
    training.guard("stop")
    assert len(lines(capsys)) == 1 and training.accelerator._lycoris_wrapped_network.loras
    # So does a config that check-config would refuse.
    monkeypatch.undo()
    training = Training(tmp_path, NAMED)
    training.config.lycoris_config = str(tmp_path / "gone.json")
    training.guard("stop")
    assert lines(capsys)[0].startswith("could not look at this training, which goes on: FileNotFoundError")


def test_an_error_of_simpletuners_is_its_own(tmp_path):
    def fails() -> None:
        raise ValueError("SimpleTuner's own")

    with pytest.raises(ValueError, match="SimpleTuner's own"):
        Training(tmp_path, NAMED).guard("warn", fails)


def test_no_random_number_is_drawn(tmp_path):
    training = Training(tmp_path, ARTICLES_FORM)
    seen = []

    def make() -> None:
        training.lycoris()
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        seen.append((random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()))

    training.guard("warn", make)
    (before,) = seen
    assert before[:2] == (random.getstate(), np.random.get_state()[1].tolist())
    assert torch.equal(before[2], torch.get_rng_state())


def checkpoint(training: Training, number: int, tensors: dict[str, torch.Tensor]) -> None:
    folder = training.folder / "output" / f"checkpoint-{number}"
    folder.mkdir(parents=True)
    save_file(tensors, folder / "pytorch_lora_weights.safetensors")


def test_the_adapter_that_it_resumes_from(tmp_path, capsys):
    before = Training(tmp_path, NAMED)
    before.lycoris()
    saved = {
        key: tensor.contiguous() for key, tensor in before.accelerator._lycoris_wrapped_network.state_dict().items()
    }
    checkpoint(before, 9, saved)
    fitting = Training(tmp_path, NAMED)
    fitting.config.resume_from_checkpoint = "latest"
    fitting.guard("stop")
    assert len(lines(capsys)) == 1

    first = next(key for key in saved if key.endswith("lokr_w2"))
    other = {**saved, first: torch.zeros(3, 3), "crepa_projector.weight": torch.zeros(1), "stray": torch.zeros(1)}
    gone = next(key for key in saved if key.endswith("lokr_w1"))
    del other[gone]
    checkpoint(before, 10, other)
    training = Training(tmp_path, NAMED)
    training.config.resume_from_checkpoint = "latest"
    training.guard("warn")
    said = " ".join(lines(capsys))
    assert "checkpoint-10" in said, "9 comes before 10"
    assert f"1 of its {len(saved) + 1 - 1} tensors are not in it, such as stray" in said
    assert f"1 of its {len(saved)} are not in the file, such as {gone}" in said
    assert f"1 have another shape, such as {first}: (3, 3) in the file" in said
    stopping = Training(tmp_path, NAMED)
    stopping.config.resume_from_checkpoint = "checkpoint-10"
    with pytest.raises(ConfigError, match=r"it would resume from .*checkpoint-10"):
        stopping.guard("stop")
    named = Training(tmp_path, NAMED)
    named.config.resume_from_checkpoint = "checkpoint-9"
    named.guard("stop")


@pytest.mark.parametrize(("full", "said"), [(True, 0), (False, 1)])
def test_another_alpha_than_in_the_checkpoint(tmp_path, capsys, full, said):
    """It loads without a word. The scale of full matrices is 1, whatever the alpha is."""
    config = NAMED | {"linear_dim": 2, "full_matrix": full}
    before = Training(tmp_path, config)
    before.lycoris()
    state = before.accelerator._lycoris_wrapped_network.state_dict()
    checkpoint(before, 1, {key: tensor.to(torch.bfloat16).contiguous() for key, tensor in state.items()})
    for alpha, more in ((1, 0), (5, said)):
        training = Training(tmp_path, config | {"linear_alpha": alpha, "linear_dim": 20000 if full else 2})
        training.config.resume_from_checkpoint = "latest"
        training.guard("warn")
        assert (
            len([line for line in lines(capsys) if "another alpha" in line and "1 in the file, 5 here" in line]) == more
        )


def test_the_lora_that_it_resumes_from(tmp_path, capsys):
    before = Training(tmp_path)
    before.lora()
    saved = {
        f"transformer.{name.replace('.default', '')}": weight.detach().clone()
        for name, weight in before.denoiser.named_parameters()
        if ".lora_" in name
    }
    checkpoint(before, 1, saved)
    fitting = Training(tmp_path)
    fitting.config.resume_from_checkpoint = "latest"
    fitting.guard("stop")
    other = Training(tmp_path)
    other.config.resume_from_checkpoint, other.config.lora_rank = "latest", 8
    with pytest.raises(ConfigError, match=rf"{6 * BLOCKS} have another shape"):
        other.guard("stop", lambda: other.lora(r=8))


def test_a_training_that_begins_anew(tmp_path, capsys):
    training = Training(tmp_path, NAMED)
    training.config.resume_from_checkpoint = "latest"
    training.guard("stop")
    assert len(lines(capsys)) == 1


def test_other_processes_are_silent_and_stop_as_well(tmp_path, capsys):
    config = NAMED | {"apply_preset": {"target_module": ["WanAttention"]}}
    training = Training(tmp_path, config)
    training.accelerator.is_main_process = False
    with pytest.raises(ConfigError):
        training.guard("stop")
    assert lines(capsys) == []


def test_a_word_that_is_no_mode():
    with pytest.raises(ConfigError, match="layerprobe_guard is 'halt'; it must be one of off, warn, stop"):
        guard_mode(SimpleNamespace(layerprobe_guard="halt"))
