"""Tiny random denoisers, and the parts of SimpleTuner's model object beside the denoiser that a step asks for."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any
from unittest import mock

import torch
from torch import nn

MODELS = "simpletuner.helpers.models."
Denoiser = Callable[[], nn.Module]
Prepare = Callable[[Any], None]


def tiny(path: str, *, redrawn: bool = False, **config: Any) -> Denoiser:
    """The class "folder.module:Class" of SimpleTuner's models with this config.

    redrawn: with every parameter drawn anew, so that gates that start at zero do not hide the blocks.
    """
    return partial(_tiny, path, redrawn, **config)


def _tiny(path: str, redrawn: bool, **config: Any) -> nn.Module:
    model: nn.Module = loaded(path)(**config)
    return with_parameters_drawn(model) if redrawn else model


def loaded(path: str) -> Any:
    module, name = path.split(":")
    return getattr(importlib.import_module(MODELS + module), name)


def with_parameters_drawn(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1)
    return model


# Denoisers that their class alone does not make.


def ideogram(**config: Any) -> nn.Module:
    made = loaded("ideogram.transformer:Ideogram4Config")(**config)
    return with_parameters_drawn(loaded("ideogram.transformer:Ideogram4Transformer")(made))


def ace_step(**config: Any) -> nn.Module:
    """The encoder of the lyrics has 100 million parameters whatever the config says; it is not part of a block."""
    from py3langid.langid import LanguageIdentifier
    from simpletuner.helpers.models.ace_step import transformer

    # SimpleTuner asks for py3langid>=0.2.2, but makes its model object with a name that 0.4 no longer has.
    if not hasattr(LanguageIdentifier, "from_pickled_model"):
        LanguageIdentifier.from_pickled_model = LanguageIdentifier.from_model_file
    lyrics = partial(transformer.LyricEncoder, output_size=16, attention_heads=2, linear_units=32, num_blocks=1)
    with mock.patch.object(transformer, "LyricEncoder", lyrics):
        return transformer.ACEStepTransformer2DModel(**config)


# What a step asks for beside the denoiser; each of these functions gets SimpleTuner's model object.


def autocast(model: Any) -> None:
    """accelerate runs the forward of a bfloat16 run under autocast; some families count on it."""
    dtype = model.config.weight_dtype
    model.model.forward = torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16)(model.model.forward)


def in_float32(*names: str) -> Prepare:
    """These parts of the denoiser, by the end of their names, stay in float32 in a bfloat16 run."""

    def prepare(model: Any) -> None:
        for name, module in model.model.named_modules():
            if name.endswith(names):
                module.float()

    return prepare


def flow_schedule(model: Any) -> None:
    """As Trainer.init_noise_schedule does once the prediction type is known."""
    model.setup_training_noise_schedule()


def wan_vae(model: Any) -> None:
    """The tiny VAE that encodes a given frame."""
    from diffusers import AutoencoderKLWan

    model.vae = AutoencoderKLWan(base_dim=4, num_res_blocks=1).to(model.config.weight_dtype).eval()


def timesteps_of_tokens(model: Any) -> None:
    """SimpleTuner 4.10.1 sets this switch of Wan TI2V too early and its own constructor turns it off again."""
    model._wan_expand_timesteps = True


def speech(layers: int, width: int) -> Prepare:
    """Speech features in place of an audio file, which only FFmpeg can read."""

    def prepare(model: Any) -> None:
        window = loaded("infinitetalk.audio:window_audio_embeddings")
        model.encode_audio = lambda path, frames: window(torch.randn(1, frames, layers, width))

    return prepare


@cache
def _ltx2_vaes() -> tuple[nn.Module, nn.Module]:
    with torch.device("meta"):
        audio = loaded("ltxvideo2.audio_autoencoder:AutoencoderKLLTX2Audio")()
        return audio, loaded("ltxvideo2.autoencoder:AutoencoderKLLTX2Video")(temporal_compression_ratio=8)


def ltx2_parts(newer: bool) -> Prepare:
    """The ratios of the VAEs, and the text connectors; newer: those of LTX 2.3."""

    def prepare(model: Any) -> None:
        model.audio_vae, model.vae = _ltx2_vaes()
        model.connectors = loaded("ltxvideo2.connectors:LTX2TextConnectors")(
            caption_channels=20,
            text_proj_in_factor=3,
            video_connector_num_attention_heads=2,
            video_connector_attention_head_dim=12 if newer else 10,
            video_connector_num_layers=1,
            video_connector_num_learnable_registers=3,
            audio_connector_num_attention_heads=2,
            audio_connector_attention_head_dim=8 if newer else 10,
            audio_connector_num_layers=1,
            audio_connector_num_learnable_registers=3,
            per_modality_projections=newer,
            video_hidden_dim=24,
            audio_hidden_dim=16,
            rope_type="split",
        ).to(model.config.weight_dtype)

    return prepare


def split_prompts(model: Any) -> None:
    """Z-Image Omni: a text for every image and one behind them, as SimpleTuner's pipeline splits a prompt.

    Its training code (4.10.1) gives the denoiser a single text, which it refuses if there is a reference image.
    """
    whole = model._prepare_prompt_list

    def split(*args: Any) -> list[list[torch.Tensor]]:
        return [[text[:2], text[2:5], text[5:]] for (text,) in whole(*args)]

    model._prepare_prompt_list = split


def word_tokenizer(words: Sequence[str], **settings: Any) -> Any:
    """A tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    numbers = {word: number for number, word in enumerate(dict.fromkeys(["<unk>", *words]))}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **settings)


def omnigen_processor(model: Any) -> None:
    """SimpleTuner's own processor and collator; only the tokenizer is of the test."""
    from diffusers.pipelines.omnigen.processor_omnigen import OmniGenMultiModalProcessor

    special = ["<|user|>", "<|end|>", "<|assistant|>", "<|diffusion|>"]
    tokenizer = word_tokenizer([*special, *OMNIGEN_WORDS], additional_special_tokens=special)
    model.processor = OmniGenMultiModalProcessor(tokenizer)
    model.processor.collator = loaded("omnigen.collator:OmniGenTrainingCollator")()


OMNIGEN_PROMPTS = ("a red boat", "two small dogs in the snow near a house")
OMNIGEN_WORDS = ("Generate an image according to the following instructions " + " ".join(OMNIGEN_PROMPTS)).split()


def cosmos3_reasoner(**sizes: int) -> Prepare:
    """The language model whose keys and values the denoiser attends to."""

    def prepare(model: Any) -> None:
        model.text_tokenizer = word_tokenizer(
            ["<|im_end|>", "<|vision_start|>", "a", "cat", "on", "the", "mat"],
            eos_token="<|im_end|>",
            chat_template="{% for message in messages %}{{ message['content'] }} {% endfor %}",
        )
        dtype = model.config.weight_dtype
        config = loaded("cosmos3.reasoner:Cosmos3ReasonerConfig")(**sizes)
        model.reasoner = loaded("cosmos3.reasoner:Cosmos3Reasoner")(config).to(dtype)
        model._reasoner_component_cache_key = (
            model._reasoner_component_id(),
            str(torch.device(model.accelerator.device)),
            dtype,
            getattr(model.config, "revision", None),
        )

    return prepare
