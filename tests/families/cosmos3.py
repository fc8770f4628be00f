from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from family_case import BATCH, Case, StreamReference, Tape, angles, noise_share
from torch import nn

BLOCKS = [f"layers.{i}" for i in range(3)]
FRAME = 3 * 5  # tokens of one frame
SOUND = 7
SIZES = {
    "hidden_size": 48,
    "head_dim": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 64,
    "num_hidden_layers": len(BLOCKS),
    "vocab_size": 64,
    "rope_axes_dim": (4, 4, 4),
}


def denoiser(reasoning: bool) -> nn.Module:
    from simpletuner.helpers.models.cosmos3.transformer import Cosmos3OmniTransformer

    return Cosmos3OmniTransformer(
        **SIZES,
        latent_channel=16,
        patch_latent_dim=64,
        sound_gen=True,
        sound_dim=8,
        # SimpleTuner loads a checkpoint that has only the generating half of each layer.
        load_reasoning_layers=reasoning,
    )


def raw_batch(frames: int, sound: bool, first_frame: bool) -> dict[str, Any]:
    batch: dict[str, Any] = {
        "latent_batch": torch.randn(BATCH, 16, frames, 6, 10),
        "data_backend_id": "photographs",
        # The language model gets prompts of two lengths.
        "prompts": ["a cat on the mat", "a cat"],
    }
    if sound:
        batch["audio_latent_batch"] = torch.randn(BATCH, 8, SOUND)
    if first_frame:
        batch["conditioning_latents"] = torch.randn(BATCH, 16, 6, 10)
    return batch


def prepare_model(model: Any) -> None:
    from simpletuner.helpers.models.cosmos3.reasoner import Cosmos3Reasoner, Cosmos3ReasonerConfig
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<|im_end|>", "<|vision_start|>", "a", "cat", "on", "the", "mat"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    model.text_tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        unk_token="<unk>",
        chat_template="{% for message in messages %}{{ message['content'] }} {% endfor %}",
    )
    dtype = model.config.weight_dtype
    model.reasoner = Cosmos3Reasoner(Cosmos3ReasonerConfig(**SIZES)).to(dtype)
    model._reasoner_component_cache_key = (
        model._reasoner_component_id(),
        str(torch.device(model.accelerator.device)),
        dtype,
        getattr(model.config, "revision", None),
    )
    # As from_pretrained leaves it (`_keep_in_fp32_modules`).
    model.model.time_embedder.float()


@contextmanager
def tape(model: nn.Module) -> Iterator[Tape]:
    """The state before each block is what its first norm gets, the state after the last what the last norm gets."""
    result = Tape()
    result.states = []  # type: ignore[attr-defined]
    norms = [*(layer.input_layernorm_moe_gen for layer in model.layers), model.norm_moe_gen]
    handles = [
        norm.register_forward_pre_hook(lambda _, args: result.states.append(args[0].clone()))  # type: ignore[attr-defined]
        for norm in norms
    ]
    try:
        yield result
    finally:
        for handle in handles:
            handle.remove()


def reference(
    tape: Tape, prepared: Mapping[str, Any], model: nn.Module, frames: int, sound: bool, first_frame: bool
) -> dict[str, StreamReference]:
    states = tape.states  # type: ignore[attr-defined]
    count = len(BLOCKS) + 1
    assert len(states) == BATCH * count  # one forward for each sample
    image: StreamReference = []
    for index, path in enumerate(BLOCKS):
        samples = []
        for sample in range(BATCH):
            angle_S = angles(*states[sample * count + index : sample * count + index + 2])
            # The frames one after the other, then the sound; a given first frame is not denoised.
            assert angle_S.shape == (frames * FRAME + SOUND * sound,)
            samples.append((angle_S[FRAME * first_frame : frames * FRAME], None))
        image.append((path, samples))
    return {"image": image}


def sigma(prepared: Mapping[str, Any]) -> torch.Tensor:
    sigma_B = 1 - prepared["timesteps"] / 1000
    # The last frame is never given.
    torch.testing.assert_close(noise_share(prepared, slice(-1, None)), sigma_B, rtol=0, atol=1e-3)
    return sigma_B


CASES = [
    Case(
        family="cosmos3",
        flavour=flavour,
        label=label,
        denoiser=lambda reasoning=reasoning: denoiser(reasoning),
        raw_batch=lambda dtype, shape=shape: raw_batch(*shape),
        tape=tape,
        reference=lambda tape, prepared, model, shape=shape: reference(tape, prepared, model, *shape),
        blocks={"image": len(BLOCKS)},
        sigma=sigma,
        prepare_model=prepare_model,
        scheduler={"_class_name": "UniPCMultistepScheduler", "num_train_timesteps": 1000},
    )
    for flavour, label, reasoning, shape in (
        ("nano", "nano image", False, (1, False, False)),
        ("nano", "nano video with sound", True, (3, True, False)),
        ("super-i2v", "super-i2v", False, (3, False, True)),
    )
]
