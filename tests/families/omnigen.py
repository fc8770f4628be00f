from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from family_case import BATCH, Case, StreamReference, Tape, joint, taped_forwards
from torch import nn

PROMPTS = ["a red boat", "two small dogs in the snow near a house"]
# SimpleTuner puts "<|user|> Generate an image according to the following instructions" before the prompt and
# "<|end|> <|assistant|> <|diffusion|>" behind it: 9 + 3 words. Shorter texts are padded on the left.
WORDS = [12 + 3, 12 + 9]
TEXT = max(WORDS)
IMAGE = 3 * 5
PATHS = [f"layers.{i}" for i in range(3)]


def denoiser() -> nn.Module:
    from simpletuner.helpers.models.omnigen.transformer import OmniGenTransformer2DModel

    return OmniGenTransformer2DModel(
        in_channels=4,
        patch_size=2,
        hidden_size=48,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=40,
        num_layers=len(PATHS),
        pad_token_id=0,
        vocab_size=64,
        rope_scaling={"short_factor": [1.0] * 12, "long_factor": [1.0] * 12},
        pos_embed_max_size=16,
        time_step_dim=16,
    )


def prepare_model(model: Any) -> None:
    """A tokenizer of whole words; the processor and the collator are SimpleTuner's."""
    from diffusers.pipelines.omnigen.processor_omnigen import OmniGenMultiModalProcessor
    from simpletuner.helpers.models.omnigen.collator import OmniGenTrainingCollator
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    special = ["<|user|>", "<|end|>", "<|assistant|>", "<|diffusion|>"]
    words = ["<unk>", *special, "Generate", "an", "image", "according", "to", "the", "following", "instructions"]
    words = list(dict.fromkeys(words + " ".join(PROMPTS).split()))
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", additional_special_tokens=special)
    model.processor = OmniGenMultiModalProcessor(fast)
    model.processor.collator = OmniGenTrainingCollator()
    if model.config.weight_dtype is torch.bfloat16:
        # The noisy latents are float32; accelerate runs the denoiser's forward under autocast.
        model.model.forward = torch.autocast("cpu", dtype=torch.bfloat16)(model.model.forward)


def raw_batch(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "latent_batch": torch.randn(BATCH, 4, 6, 10),
        "prompt_embeds": None,
        "data_backend_id": "photographs",
        "prompts": PROMPTS,
    }


def tape(model: nn.Module) -> Any:
    from simpletuner.helpers.models.omnigen.transformer import OmniGenBlock

    return taped_forwards(model, (OmniGenBlock,))


def reference(tape: Tape, prepared: Mapping[str, Any], model: nn.Module) -> dict[str, StreamReference]:
    for crossing in tape.crossings:
        assert crossing.arguments["hidden_states"].shape[1] == TEXT + 1 + IMAGE
    return {
        "image": joint(tape, PATHS, "hidden_states", [(TEXT + 1, TEXT + 1 + IMAGE)] * BATCH),
        "text": joint(tape, PATHS, "hidden_states", [(TEXT - words, TEXT) for words in WORDS]),
    }


def sigma(prepared: Mapping[str, Any]) -> torch.Tensor:
    """How much noise there is in the noisy latents, solved from them."""
    latents, noise, noisy = (prepared[name].double() for name in ("latents", "noise", "noisy_latents"))
    return (((noisy - latents) * (noise - latents)).sum((1, 2, 3)) / (noise - latents).square().sum((1, 2, 3))).float()


CASES = [
    Case(
        family="omnigen",
        flavour="v1",
        denoiser=denoiser,
        raw_batch=raw_batch,
        tape=tape,
        reference=reference,
        blocks={"image": len(PATHS), "text": len(PATHS)},
        sigma=sigma,
        prepare_model=prepare_model,
    )
]
