"""Every family's transformer, as small as it gets and of random weights, beside its stock diffusers forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXTransformer3DModel,
    DDPMScheduler,
    FluxTransformer2DModel,
    HunyuanDiT2DModel,
    HunyuanVideoTransformer3DModel,
    MochiTransformer3DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)
from diffusers.models.embeddings import get_2d_rotary_pos_embed_from_grid, get_3d_rotary_pos_embed
from paralleldit.parallel_backend.families.condition import Condition
from paralleldit.parallel_backend.families.family import TokenFamily
from paralleldit.parallel_backend.families.keys.cogvideox import COGVIDEOX, COGVIDEOX15
from paralleldit.parallel_backend.families.keys.flux import FLUX
from paralleldit.parallel_backend.families.keys.hunyuandit import HUNYUANDIT
from paralleldit.parallel_backend.families.keys.hunyuanvideo import HUNYUANVIDEO
from paralleldit.parallel_backend.families.keys.mochi import MOCHI
from paralleldit.parallel_backend.families.keys.pixart import PIXART_ALPHA, PIXART_SIGMA
from paralleldit.parallel_backend.families.keys.qwen_image import QWEN_IMAGE
from paralleldit.parallel_backend.families.keys.sd3 import SD3
from paralleldit.parallel_backend.families.keys.wan import WAN
from paralleldit.parallel_backend.families.keys.zimage import ZIMAGE
from paralleldit.parallel_backend.families.registry import load_view
from paralleldit.parallel_backend.families.spec import FamilySpec
from paralleldit.parallel_backend.protocol.messages import Conditioning, RunPrompt
from torch import Tensor

GUIDANCE = 2.5
FRAMES = 3
"""Cells of a video's latent."""
CPU = torch.device("cpu")

Draw = Callable[..., Tensor]


@dataclass(frozen=True)
class TinyModel:
    """`build(heads, depth)` makes the diffusers transformer, `condition(draw, batch, text)` a conditioning of `text`
    tokens. `depth`: how many there are of each kind of block; 2 where something depends on there being more than one.

    `frames`: of its latents, where these have any.

    `denoise(model, latent, condition)` is the clean latent that the stock forward predicts at `sigma`, with code of its
    own around it.
    """

    spec: FamilySpec
    build: Callable[[int, int], Any]
    condition: Callable[[Draw, int, int], Condition]
    sigma: float
    denoise: Callable[[Any, Tensor, Condition], Tensor]
    frames: int = 1

    @property
    def family(self) -> type[TokenFamily]:
        return load_view(self.spec)

    def latent(self, draw: Draw, batch: int, height: int, width: int) -> Tensor:
        """A drawn latent."""
        spec = self.spec.latent
        return draw(batch, spec.channels, *([self.frames] if spec.dims == 3 else []), height, width)

    def make(self, heads: int, depth: int = 2) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(11)
            return self.build(heads, depth).eval()

    @lru_cache(maxsize=16)  # noqa: B019 there are eleven of this class, for as long as the process lives
    def make_family(self, heads: int, dtype: torch.dtype = torch.float32, depth: int = 2) -> TokenFamily:
        """The same one at every call, as an engine keeps its models from one run to the next."""
        transformer = self.make(heads, depth)
        return self.family(transformer if dtype == torch.float32 else transformer.to(dtype), dtype, CPU)


def _flux(guidance: bool) -> TinyModel:
    sigma = 0.7

    def build(heads: int, depth: int) -> FluxTransformer2DModel:
        return FluxTransformer2DModel(
            num_layers=depth,
            num_single_layers=depth,
            attention_head_dim=16,
            num_attention_heads=heads,
            joint_attention_dim=24,
            pooled_projection_dim=12,
            guidance_embeds=guidance,
            axes_dims_rope=(4, 6, 6),
        )

    def condition(draw: Draw, batch: int, text: int) -> Condition:
        return Condition({"tokens": draw(batch, text, 24), "pooled": draw(batch, 12)}, guidance=GUIDANCE)

    def denoise(model: Any, latent: Tensor, condition: Condition) -> Tensor:
        batch, channels, height, width = latent.shape
        rows, columns = -(-height // 2), -(-width // 2)
        tokens = whole_patches(latent).view(batch, channels, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5)
        axes = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        ids = torch.stack([torch.zeros(rows, columns), *axes], dim=-1)
        output = model(
            hidden_states=tokens.reshape(batch, rows * columns, channels * 4),
            encoder_hidden_states=condition["tokens"].expand(batch, -1, -1),
            pooled_projections=condition["pooled"].expand(batch, -1),
            timestep=torch.full((batch,), sigma),
            img_ids=ids.reshape(-1, 3),
            txt_ids=torch.zeros(condition["tokens"].shape[1], 3),
            guidance=torch.full((batch,), GUIDANCE) if guidance else None,
        ).sample
        velocity = output.view(batch, rows, columns, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return latent - sigma * velocity.reshape(batch, channels, rows * 2, columns * 2)[..., :height, :width]

    return TinyModel(FLUX, build, condition, sigma, denoise)


def _sd3(dual: bool, qk_norm: str | None) -> TinyModel:
    sigma = 0.7

    def build(heads: int, depth: int) -> SD3Transformer2DModel:
        return SD3Transformer2DModel(
            num_layers=2 * depth,
            attention_head_dim=16,
            num_attention_heads=heads,
            joint_attention_dim=24,
            caption_projection_dim=heads * 16,
            pooled_projection_dim=12,
            pos_embed_max_size=9,
            dual_attention_layers=tuple(range(depth if dual else 0)),
            qk_norm=qk_norm,
        )

    def condition(draw: Draw, batch: int, text: int) -> Condition:
        return Condition({"tokens": draw(batch, text, 24), "pooled": draw(batch, 12)})

    def denoise(model: Any, latent: Tensor, condition: Condition) -> Tensor:
        batch, _, height, width = latent.shape
        velocity = model(
            hidden_states=whole_patches(latent),
            encoder_hidden_states=condition["tokens"].expand(batch, -1, -1),
            pooled_projections=condition["pooled"].expand(batch, -1),
            timestep=torch.full((batch,), sigma * 1000),
        ).sample
        return latent - sigma * velocity[..., :height, :width]

    return TinyModel(SD3, build, condition, sigma, denoise)


def _pixart(spec: FamilySpec, takes_size: bool) -> TinyModel:
    clean_share = _clean_share("linear", 0.0001, 0.02)

    def build(heads: int, depth: int) -> PixArtTransformer2DModel:
        model = PixArtTransformer2DModel(
            num_attention_heads=heads,
            attention_head_dim=24,
            num_layers=2 * depth,
            cross_attention_dim=heads * 24,
            caption_channels=20,
            sample_size=16,
            interpolation_scale=2,
            use_additional_conditions=takes_size,
        )
        for layer in model.transformer_blocks:
            layer.scale_shift_table.data *= 4  # gates that let the attention through
        return model

    def condition(draw: Draw, batch: int, text: int) -> Condition:
        size = (96, 64) if batch == 1 else None
        mask = None if takes_size and batch == 1 else _mask(batch, text)
        tokens = {"tokens": draw(batch, text, 20)}
        return Condition(tokens if mask is None else {**tokens, "mask": mask}, size=size)

    def denoise(model: Any, latent: Tensor, condition: Condition) -> Tensor:
        batch, _, height, width = latent.shape
        noisy = whole_patches(latent) * clean_share**0.5
        told: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if takes_size:
            pixels = condition.size or tuple(8 * side for side in latent.shape[2:])
            told["resolution"] = torch.tensor([pixels] * batch).float()
            told["aspect_ratio"] = torch.tensor([[pixels[0] / pixels[1]]] * batch)
        noise = model(
            noisy,
            encoder_hidden_states=condition["tokens"].expand(batch, -1, -1),
            encoder_attention_mask=None if condition.get("mask") is None else condition["mask"].expand(batch, -1),
            timestep=torch.full((batch,), TIMESTEP),
            added_cond_kwargs=told,
        ).sample[:, :4, :height, :width]
        return latent - (1 / clean_share - 1) ** 0.5 * noise

    return TinyModel(spec, build, condition, (1 / clean_share - 1) ** 0.5, denoise)


def _hunyuandit(takes_size: bool) -> TinyModel:
    clean_share = _clean_share("scaled_linear", 0.00085, 0.03 if takes_size else 0.018)

    def build(heads: int, depth: int) -> HunyuanDiT2DModel:
        return HunyuanDiT2DModel(
            num_attention_heads=heads,
            attention_head_dim=16,
            in_channels=4,
            patch_size=2,
            hidden_size=heads * 16,
            num_layers=2 * depth + 2,
            mlp_ratio=2.0,
            cross_attention_dim=24,
            cross_attention_dim_t5=40,
            pooled_projection_dim=12,
            text_len=5,
            text_len_t5=7,
            use_style_cond_and_image_meta_size=takes_size,
        )

    def condition(draw: Draw, batch: int, text: int) -> Condition:
        return Condition(
            {
                "tokens": draw(batch, 5, 24),
                "mask": _mask(batch, 5),
                "tokens_2": draw(batch, 7, 40),
                "mask_2": _mask(batch, 7),
            },
            size=(96, 64) if batch == 1 else None,
            target_size=(48, 32) if batch == 1 else None,
        )

    def denoise(model: Any, latent: Tensor, condition: Condition) -> Tensor:
        # The ranks load this module too, and do without the pipeline and all its imports.
        from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid

        batch, _, height, width = latent.shape
        noisy = whole_patches(latent) * clean_share**0.5
        grid = (noisy.shape[2] // 2, noisy.shape[3] // 2)
        crop = get_resize_crop_region_for_grid(grid, 32)
        size = condition.size or tuple(8 * side for side in latent.shape[2:])
        told = [*size, *(condition.target_size or size), 0, 0]
        velocity = model(
            noisy,
            torch.full((batch,), float(TIMESTEP)),
            encoder_hidden_states=condition["tokens"].expand(batch, -1, -1),
            text_embedding_mask=condition["mask"].expand(batch, -1),
            encoder_hidden_states_t5=condition["tokens_2"].expand(batch, -1, -1).contiguous(),
            text_embedding_mask_t5=condition["mask_2"].expand(batch, -1),
            image_meta_size=torch.tensor([told] * batch).float(),
            style=torch.zeros(batch, dtype=torch.int64),
            image_rotary_emb=_rotary(crop, grid),
        ).sample[:, :4, :height, :width]
        return clean_share * latent - (1 - clean_share) ** 0.5 * velocity

    return TinyModel(HUNYUANDIT, build, condition, (1 / clean_share - 1) ** 0.5, denoise)


def _wan() -> TinyModel:
    sigma = 0.7

    def build(heads: int, depth: int) -> WanTransformer3DModel:
        model = WanTransformer3DModel(
            num_attention_heads=heads,
            attention_head_dim=12,
            text_dim=20,
            freq_dim=32,
            ffn_dim=64,
            num_layers=2 * depth,
        )
        for layer in model.blocks:
            layer.scale_shift_table.data *= 4  # gates that let the attention through
            for norm in (
                layer.norm2,
                *(getattr(attn, f"norm_{x}") for attn in (layer.attn1, layer.attn2) for x in "qk"),
            ):
                torch.nn.init.normal_(norm.weight, 1.0, 0.3)
        return model

    def condition(draw: Draw, batch: int, text: int) -> Condition:
        # Zeros stand behind a prompt, and are attended to.
        return Condition({"tokens": torch.cat((draw(batch, text, 20), torch.zeros(batch, 3, 20)), dim=1)})

    def denoise(model: Any, latent: Tensor, condition: Condition) -> Tensor:
        batch, *_, height, width = latent.shape
        velocity = model(
            hidden_states=whole_patches(latent),
            timestep=torch.full((batch,), sigma * 1000),
            encoder_hidden_states=condition["tokens"].expand(batch, -1, -1),
        ).sample
        return latent - sigma * velocity[..., :height, :width]

    return TinyModel(WAN, build, condition, sigma, denoise, FRAMES)


class CentredPositions(torch.nn.Module):
    """Qwen-Image's positions by ComfyUI's rule, in the place of diffusers' own.

    They are the same on even grids where no reference is larger than the picture.
    """

    def forward(
        self, shapes: list[list[tuple[int, int, int]]], max_txt_seq_len: int, device: Any
    ) -> tuple[Tensor, Tensor]:
        ids = []
        for number, (frames, rows, columns) in enumerate(shapes[0]):
            axes = (torch.arange(frames) + number, torch.arange(rows) - rows // 2, torch.arange(columns) - columns // 2)
            ids.append(torch.cartesian_prod(*axes))
        start = max(side // 2 for side in shapes[0][0][1:])
        text = torch.arange(start, start + max_txt_seq_len)[:, None].expand(-1, 3)
        return self._turned(torch.cat(ids)), self._turned(text)

    def _turned(self, ids: Tensor) -> Tensor:
        widths = (4, 6, 6)
        angles = [
            ids[:, axis, None] * 10000.0 ** -(torch.arange(0, width, 2) / width) for axis, width in enumerate(widths)
        ]
        angle = torch.cat(angles, dim=1)
        return torch.polar(torch.ones_like(angle), angle)


def _qwen_image(edits: bool) -> TinyModel:
    """`edits`: with references, at time 0."""
    sigma = 0.7

    def build(heads: int, depth: int) -> QwenImageTransformer2DModel:
        model = QwenImageTransformer2DModel(
            num_layers=2 * depth,
            attention_head_dim=16,
            num_attention_heads=heads,
            joint_attention_dim=24,
            axes_dims_rope=(4, 6, 6),
            zero_cond_t=edits,
        )
        for layer in model.transformer_blocks:
            for attn in (f"norm_{added}{x}" for added in ("", "added_") for x in "qk"):
                torch.nn.init.normal_(getattr(layer.attn, attn).weight, 1.0, 0.3)
        torch.nn.init.normal_(model.txt_norm.weight, 1.0, 0.3)
        return model

    def condition(draw: Draw, batch: int, text: int) -> Condition:
        references = (draw(1, 16, 1, 6, 4), draw(batch, 16, 1, 5, 9)) if edits else ()
        return Condition({"tokens": draw(batch, text, 24)}, references=references)

    def denoise(model: Any, latent: Tensor, condition: Condition) -> Tensor:
        batch, channels, frames, height, width = latent.shape
        shapes, tokens = [], []
        for picture in (latent, *condition.references):
            whole = whole_patches(picture.expand(batch, *picture.shape[1:]))
            rows, columns = whole.shape[-2] // 2, whole.shape[-1] // 2
            shapes.append((picture.shape[2], rows, columns))
            cells = whole.reshape(batch, channels, picture.shape[2], rows, 2, columns, 2).permute(0, 2, 3, 5, 1, 4, 6)
            tokens.append(cells.reshape(batch, -1, channels * 4))
        model.pos_embed = CentredPositions()
        output = model(
            hidden_states=torch.cat(tokens, dim=1),
            encoder_hidden_states=condition["tokens"].expand(batch, -1, -1),
            timestep=torch.full((batch,), sigma),
            img_shapes=[shapes] * batch,
        ).sample
        frames, rows, columns = shapes[0]
        cells = output[:, : frames * rows * columns].view(batch, frames, rows, columns, channels, 2, 2)
        velocity = cells.permute(0, 4, 1, 2, 5, 3, 6).reshape(batch, channels, frames, rows * 2, columns * 2)
        return latent - sigma * velocity[..., :height, :width]

    return TinyModel(QWEN_IMAGE, build, condition, sigma, denoise)


def _zimage() -> TinyModel:
    sigma = 0.7

    def build(heads: int, depth: int) -> ZImageTransformer2DModel:
        model = ZImageTransformer2DModel(
            dim=16 * heads,
            n_layers=2 * depth,
            n_refiner_layers=depth,
            n_heads=heads,
            n_kv_heads=heads,
            cap_feat_dim=20,
            axes_dims=(4, 6, 6),
            axes_lens=(1024, 512, 512),
        )
        for name, parameter in model.named_parameters():
            if "norm" in name or "pad" in name:
                torch.nn.init.normal_(parameter, float("norm" in name), 0.3)
        return model

    def condition(draw: Draw, batch: int, text: int) -> Condition:
        return Condition({"tokens": draw(batch, text, 20)})

    def denoise(model: Any, latent: Tensor, condition: Condition) -> Tensor:
        batch, *_, height, width = latent.shape
        output = model(
            list(whole_patches(latent).unsqueeze(2)),
            torch.full((batch,), 1 - sigma),
            list(condition["tokens"].expand(batch, -1, -1)),
        ).sample
        return latent + sigma * torch.stack(output).squeeze(2)[..., :height, :width]

    return TinyModel(ZIMAGE, build, condition, sigma, denoise)


def _hunyuanvideo() -> TinyModel:
    sigma = 0.7

    def build(heads: int, depth: int) -> HunyuanVideoTransformer3DModel:
        model = HunyuanVideoTransformer3DModel(
            num_attention_heads=heads,
            attention_head_dim=16,
            num_layers=depth,
            num_single_layers=depth,
            text_embed_dim=24,
            pooled_projection_dim=12,
            rope_axes_dim=(4, 6, 6),
        )
        for name, parameter in model.named_parameters():
            if "attn.norm" in name:
                torch.nn.init.normal_(parameter, 1.0, 0.3)
        return model

    def condition(draw: Draw, batch: int, text: int) -> Condition:
        return Condition({"tokens": draw(batch, text, 24), "pooled": draw(batch, 12)}, guidance=GUIDANCE)

    def denoise(model: Any, latent: Tensor, condition: Condition) -> Tensor:
        batch, *_, height, width = latent.shape
        velocity = model(
            hidden_states=whole_patches(latent),
            timestep=torch.full((batch,), sigma * 1000),
            encoder_hidden_states=condition["tokens"].expand(batch, -1, -1),
            encoder_attention_mask=torch.ones(batch, condition["tokens"].shape[1]),
            pooled_projections=condition["pooled"].expand(batch, -1),
            guidance=torch.full((batch,), GUIDANCE * 1000),
        ).sample
        return latent - sigma * velocity[..., :height, :width]

    return TinyModel(HUNYUANVIDEO, build, condition, sigma, denoise, FRAMES)


def _cogvideox(newer: bool, turns: bool = True) -> TinyModel:
    """`newer`: 1.5, of two frames to a token; `turns`: as 5B, not 2B."""
    side, clean_share = (8, 6), _clean_share("scaled_linear", 0.00085, 0.012, 1.0 if turns else 3.0)

    def build(heads: int, depth: int) -> CogVideoXTransformer3DModel:
        model = CogVideoXTransformer3DModel(
            num_attention_heads=heads,
            attention_head_dim=16,
            time_embed_dim=24,
            text_embed_dim=20,
            num_layers=2 * depth,
            sample_height=side[0],
            sample_width=side[1],
            sample_frames=9,
            patch_size_t=2 if newer else None,
            use_rotary_positional_embeddings=turns,
        )
        for name, parameter in model.named_parameters():
            if "attn1.norm" in name:
                torch.nn.init.normal_(parameter, float(name.endswith("weight")), 0.3)
        return model

    def condition(draw: Draw, batch: int, text: int) -> Condition:
        return Condition({"tokens": draw(batch, text, 20)})

    def denoise(model: Any, latent: Tensor, condition: Condition) -> Tensor:
        # The ranks load this module too, and do without the pipeline and all its imports.
        from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

        batch, _, frames, height, width = latent.shape
        cells = whole_patches(latent * clean_share**0.5)
        if newer:
            cells = torch.cat((cells, cells[:, :, : frames % 2]), dim=2)
        grid = (cells.shape[-2] // 2, cells.shape[-1] // 2)
        rotary = None
        if newer:
            rotary = get_3d_rotary_pos_embed(
                16, None, grid, (frames + 1) // 2, grid_type="slice", max_size=[max(*grid)] * 2
            )
        elif turns:
            crop = get_resize_crop_region_for_grid(grid, side[1] // 2, side[0] // 2)
            rotary = get_3d_rotary_pos_embed(16, crop, grid, frames)
        text = condition["tokens"].expand(batch, -1, -1)
        # It computes its table for texts of the length of the training alone.
        model.patch_embed.max_text_seq_length, model.patch_embed.sample_width = text.shape[1], 0
        velocity = model(
            hidden_states=cells.transpose(1, 2),
            encoder_hidden_states=text,
            timestep=torch.full((batch,), float(TIMESTEP)),
            image_rotary_emb=rotary,
        ).sample.transpose(1, 2)[:, :, :frames, :height, :width]
        return clean_share * latent - (1 - clean_share) ** 0.5 * velocity

    return TinyModel(
        COGVIDEOX15 if newer else COGVIDEOX, build, condition, (1 / clean_share - 1) ** 0.5, denoise, FRAMES
    )


def _mochi() -> TinyModel:
    sigma = 0.7

    def build(heads: int, depth: int) -> MochiTransformer3DModel:
        model = MochiTransformer3DModel(
            num_attention_heads=heads,
            attention_head_dim=16,
            num_layers=2 * depth,
            pooled_projection_dim=24,
            text_embed_dim=16,
            time_embed_dim=32,
        )
        torch.nn.init.normal_(model.pos_frequencies, 0.0, 0.05)
        for name, parameter in model.named_parameters():
            if "attn1.norm" in name:
                torch.nn.init.normal_(parameter, 1.0, 0.3)
        return model

    def condition(draw: Draw, batch: int, text: int) -> Condition:
        return Condition({"tokens": draw(batch, text, 16)})

    def denoise(model: Any, latent: Tensor, condition: Condition) -> Tensor:
        batch, *_, height, width = latent.shape
        velocity = model(
            hidden_states=whole_patches(latent),
            encoder_hidden_states=condition["tokens"].expand(batch, -1, -1),
            timestep=torch.full((batch,), (1 - sigma) * 1000),
            encoder_attention_mask=torch.ones(batch, condition["tokens"].shape[1]),
        ).sample
        return latent + sigma * velocity[..., :height, :width]

    return TinyModel(MOCHI, build, condition, sigma, denoise, FRAMES)


TIMESTEP = 500


def _rotary(crop: Any, grid: tuple[int, int]) -> Any:
    """As the original model: steps of equal size, the last of which ends where the crop does."""
    axes = [torch.tensor(np.linspace(*ends, count, endpoint=False)) for *ends, count in zip(*crop, grid, strict=True)]
    places = torch.stack(torch.meshgrid(axes[1], axes[0], indexing="xy")).float()
    return get_2d_rotary_pos_embed_from_grid(16, places[:, None], use_real=True)


def _clean_share(beta_schedule: str, beta_start: float, beta_end: float, snr_shift: float | None = None) -> float:
    """Of the variance of the noisy latent at `TIMESTEP`; with an `snr_shift` that of CogVideoX."""
    if snr_shift is not None:
        scheduler = CogVideoXDDIMScheduler(
            beta_schedule=beta_schedule,
            beta_start=beta_start,
            beta_end=beta_end,
            snr_shift_scale=snr_shift,
            rescale_betas_zero_snr=True,
        )
        return float(scheduler.alphas_cumprod[TIMESTEP])
    scheduler = DDPMScheduler(beta_schedule=beta_schedule, beta_start=beta_start, beta_end=beta_end)
    return float(scheduler.alphas_cumprod[TIMESTEP])


def _mask(batch: int, text: int) -> Tensor:
    """Of the texts of a batch, each of another length."""
    lengths = torch.tensor([text // 2 + 1 + number for number in range(batch)])
    return (torch.arange(text) < lengths[:, None]).float()


def tensors_of(side: str, condition: Condition) -> dict[str, Tensor]:
    """The condition's tensors as a request carries them, where its references are the VAE's latents."""
    references = {f"reference.{number}": latent for number, latent in enumerate(condition.references)}
    return {f"{side}.0.{name}": value for name, value in {**condition.tensors, **references}.items()}


def on_device(condition: Condition, device: torch.device, dtype: torch.dtype | None = None) -> Condition:
    """The condition with its tensors on `device`."""
    tensors = {name: value.to(device, dtype) for name, value in condition.tensors.items()}
    return replace(
        condition, tensors=tensors, references=tuple(each.to(device, dtype) for each in condition.references)
    )


def entry_of(condition: Condition) -> Conditioning:
    """The rest of the condition as a request carries it."""
    return Conditioning(
        guidance=condition.guidance,
        size=condition.size,
        target_size=condition.target_size,
        crop=condition.crop,
        aesthetic_score=condition.aesthetic_score,
        references=len(condition.references),
    )


def run_prompt_of(condition: Condition) -> RunPrompt:
    """The same for a step that a sampler of the client asks for."""
    return RunPrompt(
        guidance=condition.guidance,
        size=condition.size,
        target_size=condition.target_size,
        crop=condition.crop,
    )


def whole_patches(latent: Tensor) -> Tensor:
    """The latent with its first row and column again after an odd last one."""
    latent = torch.cat((latent, latent[..., : latent.shape[-2] % 2, :]), dim=-2)
    return torch.cat((latent, latent[..., : latent.shape[-1] % 2]), dim=-1)


TINY_MODELS = {
    "flux dev": _flux(guidance=True),
    "flux schnell": _flux(guidance=False),
    "sd3 medium": _sd3(dual=False, qk_norm=None),
    "sd3.5 medium": _sd3(dual=True, qk_norm="rms_norm"),
    "pixart alpha": _pixart(PIXART_ALPHA, takes_size=True),
    "pixart sigma": _pixart(PIXART_SIGMA, takes_size=False),
    "hunyuandit 1.1": _hunyuandit(takes_size=True),
    "hunyuandit 1.2": _hunyuandit(takes_size=False),
    "wan 2.1": _wan(),
    "z-image": _zimage(),
    "qwen-image": _qwen_image(edits=False),
    "qwen-image edit": _qwen_image(edits=True),
    "hunyuanvideo": _hunyuanvideo(),
    "mochi": _mochi(),
    "cogvideox 2b": _cogvideox(newer=False, turns=False),
    "cogvideox 5b": _cogvideox(newer=False),
    "cogvideox 1.5": _cogvideox(newer=True),
}

ONE_OF_EACH = (
    "flux dev",
    "sd3.5 medium",
    "pixart alpha",
    "hunyuandit 1.1",
    "wan 2.1",
    "z-image",
    "qwen-image",
    "hunyuanvideo",
    "cogvideox 5b",
    "cogvideox 1.5",
    "mochi",
)
"""One model of each family of tokens."""
