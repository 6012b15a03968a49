"""Stable Diffusion XL's U-Net as it is loaded: what it is told in numbers, LoRAs, what diffusers' pipeline samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
from paralleldit.parallel_backend.adapters.lora.file import read_lora
from paralleldit.parallel_backend.attention.kernels import KERNELS
from paralleldit.parallel_backend.attention.usp import AttentionCore
from paralleldit.parallel_backend.distributed.axis import Axis
from paralleldit.parallel_backend.distributed.ledger import Ledger
from paralleldit.parallel_backend.engine.model import Transformer
from paralleldit.parallel_backend.errors import UserError
from paralleldit.parallel_backend.families.condition import Condition
from paralleldit.parallel_backend.files import open_checkpoint
from paralleldit.parallel_backend.sampling.driver import SamplingJob
from paralleldit.parallel_backend.sampling.driver import run as run_sampler
from paralleldit.parallel_backend.strategies.guidance import Guidance
from paralleldit.parallel_backend.strategies.prompt_batches import one_by_one
from paralleldit.parallel_backend.strategies.row_parallel import RowParallel
from paralleldit.parallel_backend.strategies.weighted_prompts import WeightedPrompt
from paralleldit.tests import tiny_unet
from paralleldit.tests.tiny_unet import BASE, CPU, REFINER
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

RANK, ALPHA, STRENGTH = 2, 3.0, 0.7
LAYERS = {
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q": (
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    ),
    "lora_unet_down_blocks_2_attentions_1_transformer_blocks_1_ff_net_0_proj": (
        "down_blocks.2.attentions.1.transformer_blocks.1.ff.net.0.proj"
    ),
    "unet.mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_out": (
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0"
    ),
    "lora_unet_output_blocks_2_0_in_layers_2": "up_blocks.0.resnets.2.conv1",
    "lora_unet_input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
    "lora_unet_up_blocks_0_upsamplers_0_conv": "up_blocks.0.upsamplers.0.conv",
    "lora_unet_time_embed_0": "time_embedding.linear_1",
}
"""What trainers call a layer, and diffusers."""


@pytest.mark.parametrize("model", [BASE, REFINER])
def test_embedded_numbers_behind_the_pooled_vector_are_those_of_the_prompt(model):
    view, given = tiny_unet.family(model), tiny_unet.condition(2)
    try:
        *_, pooled, embedded = view.make_prelude(given)
        whole = replace(given, tensors={**given.tensors, "pooled": torch.cat((pooled, embedded), dim=1)}, size=None)
        view.check_condition(whole)
        for found, expected in zip(view.make_prelude(whole), view.make_prelude(given), strict=True):
            assert torch.equal(found, expected)
    finally:
        view.uninstall()


def test_a_pooled_vector_of_another_width_is_refused():
    view, given = tiny_unet.family(), tiny_unet.condition(1)
    try:
        with pytest.raises(UserError, match="a pooled vector of width 13; this Stable Diffusion XL model takes 12"):
            view.check_condition(replace(given, tensors={**given.tensors, "pooled": torch.zeros(1, 13)}))
    finally:
        view.uninstall()


def lora(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A LoRA's file that changes all `LAYERS`, and the changed weights of the model."""
    draw = torch.Generator().manual_seed(3)
    file, changed = {}, dict(weights)
    for called, layer in LAYERS.items():
        weight = weights[f"{layer}.weight"]
        up = torch.randn(weight.shape[0], RANK, *[1] * (weight.ndim - 2), generator=draw) * 0.2
        down = torch.randn(RANK, *weight.shape[1:], generator=draw) * 0.2
        file |= {f"{called}.lora_up.weight": up, f"{called}.lora_down.weight": down}
        file[f"{called}.alpha"] = torch.tensor(ALPHA)
        change = (up.flatten(1) @ down.flatten(1)).view(weight.shape)
        changed[f"{layer}.weight"] = weight + STRENGTH * ALPHA / RANK * change
    return file, changed


def test_loras_of_linear_layers_and_convolutions_change_the_prediction_as_merged_ones_do(tmp_path: Path):
    network = tiny_unet.of_files()
    weights = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    file, changed = lora(weights)
    save_file(tiny_unet.original_weights(weights), tmp_path / "model.safetensors")
    save_file(tiny_unet.original_weights(changed), tmp_path / "merged.safetensors")
    save_file(file, tmp_path / "lora.safetensors")
    loaded, merged = (Transformer(tmp_path / f"{name}.safetensors", CPU) for name in ("model", "merged"))
    read = read_lora(open_checkpoint(tmp_path / "lora.safetensors"), loaded.names)
    assert not read.strange
    latent, given = torch.randn(1, 4, 9, 7), tiny_unet.condition(1)

    def prediction(model: Transformer) -> Tensor:
        with torch.inference_mode():
            return model.family.forward(latent, torch.tensor([401.0]), given)

    plain, expected = prediction(loaded), prediction(merged)
    loaded.adapted.put([change.times(STRENGTH) for change in read.changes], "lora")
    found = prediction(loaded)
    assert float((found - expected).norm() / expected.norm()) <= 1e-5
    assert float((plain - expected).norm() / expected.norm()) > 0.01
    loaded.adapted.take_off()
    assert torch.equal(prediction(loaded), plain)


STEPS, CFG, HEIGHT, WIDTH = 4, 5.0, 104, 72


@torch.no_grad()
def of_pipeline(noise: Tensor, prompts: Sequence[Condition]) -> tuple[Tensor, Tensor]:
    """The latent that the pipeline samples by Euler from `noise` of variance 1, and its noise levels."""
    positive, negative = prompts
    pipeline = StableDiffusionXLPipeline(
        vae=None,
        text_encoder=None,
        text_encoder_2=CLIPTextModelWithProjection(
            CLIPTextConfig(projection_dim=tiny_unet.POOLED, num_hidden_layers=1)
        ),
        tokenizer=None,
        tokenizer_2=None,
        unet=tiny_unet.network(),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        ),
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    latent = pipeline(
        prompt_embeds=positive["tokens"],
        pooled_prompt_embeds=positive["pooled"],
        negative_prompt_embeds=negative["tokens"],
        negative_pooled_prompt_embeds=negative["pooled"],
        guidance_scale=CFG,
        height=HEIGHT,
        width=WIDTH,
        original_size=positive.size,
        crops_coords_top_left=positive.crop,
        target_size=positive.size,
        num_inference_steps=STEPS,
        latents=noise.clone(),
        output_type="latent",
        return_dict=False,
    )[0]
    return latent, pipeline.scheduler.sigmas


def test_the_latent_of_diffusers_pipeline():
    noise = torch.randn(1, 4, HEIGHT // 8, WIDTH // 8, generator=torch.Generator().manual_seed(5))
    prompts = [tiny_unet.condition(1, seed) for seed in (5, 6)]
    expected, sigmas = of_pipeline(noise, prompts)
    view, alone = tiny_unet.family(), Axis("alone", [0], None, Ledger())
    predict = RowParallel(view, alone, AttentionCore(alone, alone, KERNELS["sdpa"])).predict
    sampling, sides = view.model_sampling(None), [[WeightedPrompt.plain(each)] for each in prompts]
    guidance = Guidance(one_by_one(predict), sampling, alone, *sides, CFG)
    # The pipeline starts with noise of a little more than the first level.
    start = noise * (sigmas[0] ** 2 + 1).sqrt()
    job = SamplingJob("euler", sampling, sigmas, torch.zeros_like(noise), start, seed=0)
    try:
        with torch.inference_mode():
            found = run_sampler(lambda x, sigma, _: guidance.denoised(x, sigma), job)
    finally:
        view.uninstall()
    assert float((found - expected).norm() / expected.norm()) <= 1e-5
