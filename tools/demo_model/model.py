"""The demo model's parts in one place: a small Flux.1 transformer with its text encoders, and the flow-match maths."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from torch import nn
from torch.nn import functional as F
from transformers import CLIPTextModel, T5EncoderModel

from .checkpoint import TARGET
from .scenes import COLOURS, SHAPES
from .text import CLIP_LENGTH, T5_LENGTH, WIDTH, kept_clip_tokenizer, new_clip, new_t5, t5_tokenizer, token_ids

LABELS = (1 + len(SHAPES), 1 + len(COLOURS))
TAP_BLOCK = 3
"""The single block after which image tokens must tell what they will show (see `DemoModel.label_head`)."""


def new_transformer() -> FluxTransformer2DModel:
    """3 double and 6 single blocks of 6 heads x 32."""
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=3,
        num_single_layers=6,
        attention_head_dim=32,
        num_attention_heads=6,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )
    width = transformer.inner_dim
    for block in transformer.transformer_blocks:
        for norm in (block.norm1, block.norm1_context):
            _start_modulation(cast(Any, norm).linear, width, gates=(2, 5))
    for block in transformer.single_transformer_blocks:
        _start_modulation(cast(Any, block).norm.linear, width, gates=(2,))
    nn.init.zeros_(transformer.norm_out.linear.weight)
    nn.init.zeros_(transformer.norm_out.linear.bias)
    nn.init.zeros_(transformer.proj_out.weight)
    nn.init.zeros_(transformer.proj_out.bias)
    return transformer


def _start_modulation(linear: nn.Linear, width: int, gates: tuple[int, ...]) -> None:
    """Start near plain residual blocks: no shift, no scale, gates at 0.3."""
    nn.init.normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
    for gate in gates:
        nn.init.constant_(linear.bias[gate * width : (gate + 1) * width], 0.3)


class DemoModel(nn.Module):
    """Transformer and text encoders, trained together.

    `label_head` is used in training only: from the image tokens half-way through the transformer it predicts which
    shape and colour each token will show. That teaches the binding of words to places much sooner than the picture
    loss alone (the idea of representation alignment, Yu et al. 2024, with the drawn truth in place of an encoder).
    """

    def __init__(self) -> None:
        super().__init__()
        self.clip_tokenizer, self.t5_tokenizer = kept_clip_tokenizer(TARGET), t5_tokenizer()
        self.transformer = new_transformer()
        self.clip = new_clip(self.clip_tokenizer)
        self.t5 = new_t5(self.t5_tokenizer)
        self.label_head = nn.Sequential(
            nn.LayerNorm(self.transformer.inner_dim), nn.Linear(self.transformer.inner_dim, sum(LABELS))
        )

    def load_exported(self, folder: Path) -> None:
        """Take the weights of a diffusers folder; the label head, which no export holds, stays as it is."""
        self.transformer.load_state_dict(FluxTransformer2DModel.from_pretrained(folder / "transformer").state_dict())
        self.load_exported_text(folder)

    def load_exported_text(self, folder: Path) -> None:
        """Take the text encoders of a diffusers folder."""
        self.clip.load_state_dict(CLIPTextModel.from_pretrained(folder / "text_encoder").state_dict())
        self.t5.load_state_dict(T5EncoderModel.from_pretrained(folder / "text_encoder_2").state_dict())

    def tokenize(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        return (
            token_ids(self.clip_tokenizer, captions, CLIP_LENGTH),
            token_ids(self.t5_tokenizer, captions, T5_LENGTH),
        )

    def read(self, clip_ids: torch.Tensor, t5_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the text encoders make of tokenized captions: pooled `[B, 128]` and tokens `[B, T, 128]`."""
        return self.clip(clip_ids).pooler_output, self.t5(t5_ids).last_hidden_state

    @torch.no_grad()
    def read_all(self, captions: list[str], batch: int = 1024) -> tuple[torch.Tensor, torch.Tensor]:
        """As `read`, of captions as they are said."""
        device = self.label_head[1].weight.device
        ids = [each.split(batch) for each in self.tokenize(captions)]
        pooled, text = zip(
            *(self.read(clip.to(device), t5.to(device)) for clip, t5 in zip(*ids, strict=True)), strict=True
        )
        return torch.cat(pooled), torch.cat(text)

    def forward(
        self, tokens: torch.Tensor, sigma: torch.Tensor, pooled: torch.Tensor, text: torch.Tensor, side: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Noisy image tokens `[B, S, 64]` of a `side`-wide grid to velocity `[B, S, 64]` and labels `[B, S, L]`.

        `pooled`, `text`: of `read`.
        """
        transformer = self.transformer
        temb = transformer.time_text_embed(sigma * 1000, pooled)
        text = transformer.context_embedder(text)
        image = transformer.x_embedder(tokens)
        ids = torch.cat([torch.zeros(text.shape[1], 3), image_ids(tokens.shape[1] // side, side)]).to(tokens.device)
        rotary = transformer.pos_embed(ids)
        for block in transformer.transformer_blocks:
            text, image = block(hidden_states=image, encoder_hidden_states=text, temb=temb, image_rotary_emb=rotary)
        seen: list[torch.Tensor] = []
        for block in transformer.single_transformer_blocks:
            text, image = block(hidden_states=image, encoder_hidden_states=text, temb=temb, image_rotary_emb=rotary)
            seen.append(image)
        labels = self.label_head(seen[TAP_BLOCK - 1])
        return transformer.proj_out(transformer.norm_out(image, temb)), labels


def image_ids(rows: int, columns: int) -> torch.Tensor:
    """Rotary positions `[rows * columns, 3]` as the Flux pipeline gives them."""
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1] += torch.arange(rows)[:, None]
    ids[..., 2] += torch.arange(columns)[None, :]
    return ids.reshape(-1, 3)


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Latents `[B, 16, H, W]` to tokens of 2 x 2: `[B, H/2 * W/2, 64]`."""
    return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpack(tokens: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Tokens `[B, rows * columns, 64]` back to latents `[B, 16, 2 rows, 2 columns]`."""
    return F.pixel_shuffle(tokens.transpose(1, 2).reshape(len(tokens), -1, rows, columns), 2)


def shifted(t: torch.Tensor, shift: float) -> torch.Tensor:
    """Move noise levels in 0..1 toward noise: the static shift of the flow-match scheduler."""
    return shift * t / (1 + (shift - 1) * t)


def label_loss(logits: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Cross entropy of the predicted shape and colour of each token against their true shares `[B, S, L]`."""
    shape, colour = logits.split(LABELS, dim=-1)
    shape_truth, colour_truth = shares.split(LABELS, dim=-1)
    return (
        -(shape.log_softmax(-1) * shape_truth).sum(-1).mean() - (colour.log_softmax(-1) * colour_truth).sum(-1).mean()
    )
