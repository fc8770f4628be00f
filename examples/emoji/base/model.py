"""The transformer with its three text encoders: what is trained together after the VAE."""

import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from base.steps import mixed_precision
from base.vae import LATENT_CHANNELS, LATENT_SIZE

BLOCKS, WIDTH, HEADS = 14, 144, 6  # 144 = 2^4 * 3^2: many LoKr factors divide it
CLIP_WIDTHS, T5_WIDTH = (64, 96), 192


def new_clip_model(width: int, activation: str, tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=2,
            num_attention_heads=width // 16,
            hidden_act=activation,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def new_t5_model(tokenizer: T5TokenizerFast) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=T5_WIDTH,
            d_kv=32,
            d_ff=512,
            num_layers=2,
            num_heads=6,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            dropout_rate=0.0,
        )
    )


def new_transformer() -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=BLOCKS,
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH // HEADS,
        qk_norm="rms_norm",
        joint_attention_dim=T5_WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=sum(CLIP_WIDTHS),
        pos_embed_max_size=32,
    )


class TextToVelocity(nn.Module):
    def __init__(self, clip: CLIPTokenizer, t5: T5TokenizerFast):
        super().__init__()
        self.clip_1 = new_clip_model(CLIP_WIDTHS[0], "quick_gelu", clip)
        self.clip_2 = new_clip_model(CLIP_WIDTHS[1], "gelu", clip)
        self.t5 = new_t5_model(t5)
        self.transformer = new_transformer()
        self._start_from_zero()

    @torch.no_grad()
    def _start_from_zero(self) -> None:
        """Gates and output at zero, so that every block begins as the identity (Peebles and Xie, 2023)."""
        layers = [self.transformer.norm_out.linear, self.transformer.proj_out]
        for block in self.transformer.transformer_blocks:
            layers += [block.norm1.linear, block.norm1_context.linear]
        for layer in layers:
            layer.weight.zero_()
            layer.bias.zero_()

    def encode_text(self, clip_numbers: Tensor, t5_numbers: Tensor) -> tuple[Tensor, Tensor]:
        """As the pipeline does: both CLIPs' states before the last layer side by side, padded, then T5's states."""
        first = self.clip_1(clip_numbers, output_hidden_states=True)
        second = self.clip_2(clip_numbers, output_hidden_states=True)
        clip = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        clip = F.pad(clip, (0, T5_WIDTH - clip.shape[-1]))
        t5 = self.t5(t5_numbers).last_hidden_state.to(clip.dtype)
        return torch.cat([clip, t5], dim=1), torch.cat([first.text_embeds, second.text_embeds], dim=-1)

    def forward(self, noisy: Tensor, sigma: Tensor, clip_numbers: Tensor, t5_numbers: Tensor) -> Tensor:
        states, pooled = self.encode_text(clip_numbers, t5_numbers)
        return self.transformer(noisy, states, pooled, sigma * 1000, return_dict=False)[0]

    def losses(self, clean: Tensor, noise: Tensor, sigma: Tensor, clip_numbers: Tensor, t5_numbers: Tensor) -> Tensor:
        """Flow matching, one loss per image: (B,)."""
        share = sigma.view(-1, 1, 1, 1)
        with mixed_precision(clean.device):
            velocity = self((1 - share) * clean + share * noise, sigma, clip_numbers, t5_numbers)
        return (velocity.float() - (noise - clean)).square().mean((1, 2, 3))
