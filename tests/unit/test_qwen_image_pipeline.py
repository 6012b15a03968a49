"""A prompt and a seed become what diffusers' pipeline makes of them: the same latent, and the same picture."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImagePipeline
from paralleldit.parallel_backend.attention.kernels import KERNELS
from paralleldit.parallel_backend.attention.usp import AttentionCore
from paralleldit.parallel_backend.distributed.axis import Axis
from paralleldit.parallel_backend.distributed.ledger import Ledger
from paralleldit.parallel_backend.engine.model import build_family
from paralleldit.parallel_backend.families.condition import Condition
from paralleldit.parallel_backend.sampling.driver import SamplingJob
from paralleldit.parallel_backend.sampling.driver import run as run_sampler
from paralleldit.parallel_backend.strategies.guidance import Guidance
from paralleldit.parallel_backend.strategies.prompt_batches import one_by_one
from paralleldit.parallel_backend.strategies.sequence import SequenceParallel
from paralleldit.parallel_backend.strategies.weighted_prompts import WeightedPrompt
from paralleldit.parallel_backend.text.encoders import load_text_encoders
from paralleldit.parallel_backend.vae.decode import decode
from paralleldit.parallel_backend.vae.load import load_vae
from paralleldit.parallel_backend.weights.load import load_transformer
from paralleldit.tests.tiny_qwen_image import tiny_transformer, write_pipeline
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

ALONE = Axis("alone", [0], None, Ledger())
PROMPT, SEED, STEPS, ROWS, COLUMNS = "a red fox", 5, 4, 8, 12
SCHEDULE = {
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "max_image_seq_len": 8192,
    "shift_terminal": 0.02,
}
"""As the scheduler of the published models has it."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("qwen-image"), tiny_transformer())


@torch.no_grad()
def of_pipeline(folder: Path) -> tuple[Tensor, Tensor, Tensor]:
    """The sampled latent `[1, 16, 1, h, w]`, the picture `[1, 3, H, W]`, 0 to 1, and the noise levels."""
    pipeline = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULE),
        vae=AutoencoderKLQwenImage.from_pretrained(folder / "vae"),
        text_encoder=Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "text_encoder"),
        tokenizer=Qwen2Tokenizer.from_pretrained(folder / "tokenizer"),
        transformer=tiny_transformer(),
    )
    pipeline.set_progress_bar_config(disable=True)
    kept: list[Tensor] = []

    def keep(_pipeline: object, _step: int, _time: Tensor, given: dict[str, Tensor]) -> dict[str, Tensor]:
        kept.append(given["latents"])
        return given

    picture = pipeline(
        PROMPT,
        true_cfg_scale=1.0,
        height=8 * ROWS,
        width=8 * COLUMNS,
        num_inference_steps=STEPS,
        generator=torch.manual_seed(SEED),
        output_type="pt",
        callback_on_step_end=keep,
        return_dict=False,
    )[0]
    latent = pipeline._unpack_latents(kept[-1], 8 * ROWS, 8 * COLUMNS, 8)
    return latent, picture, pipeline.scheduler.sigmas


@torch.no_grad()
def of_ranks(folder: Path, sigmas: Tensor) -> tuple[Tensor, Tensor]:
    """The same two of one rank."""
    tokens = load_text_encoders(folder, device="cpu", dtype=torch.float32).encode(PROMPT).tensors()
    family = build_family(load_transformer(folder, device="cpu"), folder)
    predict = SequenceParallel(family, ALONE, AttentionCore(ALONE, ALONE, KERNELS["sdpa"])).predict
    sampling = family.model_sampling(None)
    guidance = Guidance(one_by_one(predict), sampling, ALONE, [WeightedPrompt.plain(Condition(tokens))], [], 1.0)
    shape = 1, 16, 1, ROWS, COLUMNS
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(SEED))
    job = SamplingJob("euler", sampling, sigmas, noise, torch.zeros(shape), SEED)
    sampled = run_sampler(lambda x, sigma, _: guidance.denoised(x, sigma), job)
    vae = load_vae(folder, device="cpu", dtype=torch.float32)
    picture = decode(vae, family.process_out(sampled), ALONE)
    assert picture is not None
    return sampled, picture[:, 0].movedim(-1, 1)


def test_the_pipelines_latent_and_picture(folder):
    *wanted, sigmas = of_pipeline(folder)
    for found, expected in zip(of_ranks(folder, sigmas), wanted, strict=True):
        assert found.shape == expected.shape
        assert (found - expected).norm() / expected.norm() <= 1e-5
