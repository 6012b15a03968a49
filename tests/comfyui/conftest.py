"""One ComfyUI for all tests that queue prompts: its models are tiny, of random weights."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    from paralleldit.tests import tiny_cogvideox, tiny_hunyuanvideo, tiny_qwen_image, tiny_sd3, tiny_wan, tiny_zimage
    from paralleldit.tests.comfyui.host import prepare
    from paralleldit.tests.tiny_flux import write_pipeline

    folder = tmp_path_factory.mktemp("comfyui")
    pipelines = tmp_path_factory.mktemp("pipelines")
    tiny = write_pipeline(pipelines / "tiny")
    guided = write_pipeline(pipelines / "guided", guidance_embeds=True)
    sd3 = tiny_sd3.tiny_transformer(heads=2, layers=2, dual=(0,), qk_norm="rms_norm", side=16)
    piped_sd3 = tiny_sd3.write_pipeline(pipelines / "sd3", sd3)
    video = write_video_vae(pipelines / "video")
    wan = tiny_wan.tiny_transformer()
    piped_wan = tiny_wan.write_pipeline(pipelines / "wan", wan)
    hunyuanvideo = tiny_hunyuanvideo.tiny_transformer()
    piped_hunyuanvideo = tiny_hunyuanvideo.write_pipeline(pipelines / "hunyuanvideo", hunyuanvideo)
    cogvideox = tiny_cogvideox.tiny_transformer()
    piped_cogvideox = tiny_cogvideox.write_pipeline(pipelines / "cogvideox", cogvideox)
    zimage = tiny_zimage.tiny_transformer()
    piped_zimage = tiny_zimage.write_pipeline(pipelines / "zimage", zimage)
    qwen = tiny_qwen_image.tiny_transformer()
    piped_qwen = tiny_qwen_image.write_pipeline(pipelines / "qwen", qwen)
    files = [
        tiny_sd3.write_original(pipelines / "sd3.safetensors", sd3),
        tiny_wan.write_original(pipelines / "wan.safetensors", wan),
        tiny_cogvideox.write_original(pipelines / "cogvideox.safetensors", cogvideox),
        tiny_hunyuanvideo.write_original(pipelines / "hunyuanvideo.safetensors", hunyuanvideo),
        tiny_zimage.write_original(pipelines / "zimage.safetensors", zimage),
        tiny_qwen_image.write_original(pipelines / "qwen.safetensors", qwen),
    ]
    pipes = {
        "tiny": tiny,
        "guided": guided,
        "sd3": piped_sd3,
        "video": video,
        "wan": piped_wan,
        "hunyuanvideo": piped_hunyuanvideo,
        "cogvideox": piped_cogvideox,
        "zimage": piped_zimage,
        "qwen": piped_qwen,
    }
    prepare(folder / "base", pipes, files)
    write_loras(folder / "base" / "models" / "loras", tiny / "transformer", sd3, zimage)
    write_ip_adapters(folder / "base" / "models" / "ipadapter", tiny / "transformer", sd3)
    return folder / "base"


def write_video_vae(folder: Path) -> Path:
    import diffusers
    import torch
    from paralleldit.tests.tiny_vaes import CASES

    name, config = CASES["AutoencoderKLWan (2.1)"]
    torch.manual_seed(0)
    getattr(diffusers, name)(**config).save_pretrained(folder / "vae")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline", "vae": ["diffusers", name]}))
    return folder


def write_loras(folder: Path, flux: Path, sd3: Any, zimage: Any) -> None:
    """LoRAs of some formats for these models, by the names of their original files and by those of diffusers."""
    from diffusers import FluxTransformer2DModel
    from paralleldit.tests import lora_files, tiny_sd3
    from paralleldit.tests.unit.cross_attention_original_layout import original_weights
    from paralleldit.tests.unit.flux_original_layout import original_layout

    folder.mkdir()
    flux_weights = FluxTransformer2DModel.from_pretrained(flux).state_dict()
    for name, weights, original, last in (
        ("flux", flux_weights, original_layout(flux_weights), "norm_out.linear"),
        ("sd3", sd3.state_dict(), tiny_sd3.original_layout(sd3.state_dict()), "norm_out.linear"),
        ("zimage", zimage.state_dict(), original_weights(dict(zimage.state_dict())), "all_final_layer.2-1.linear"),
    ):
        for format, prefix, matrices in (
            ("kohya", "lora_unet_", original),
            ("lokr", "lora_unet_", original),
            ("dora_of_outputs", "lora_unet_", original),
            ("peft", "transformer.", weights),
            ("loha", "transformer.", weights),
        ):
            modules = [
                key.removesuffix(".weight")
                for key, each in matrices.items()
                if re.search(r"(blocks|layers|refiner)\.\d", key) and each.ndim == 2
            ]
            modules.append("final_layer.linear" if prefix == "lora_unet_" else last)
            names = {
                f"{each}.weight": prefix + (each.replace(".", "_") if prefix[-1] == "_" else each) for each in modules
            }
            tensors, _ = lora_files.merged(matrices, names, lora_files.FORMATS[format])
            save_file(tensors, folder / f"{name} {format}.safetensors")


def write_ip_adapters(folder: Path, flux: Path, sd3: Any) -> None:
    """For both models, by the names of their makers (Flux) and of diffusers' files (SD3)."""
    from diffusers import FluxTransformer2DModel
    from paralleldit.tests.ranks.test_ip_adapter import flux_adapter, sd3_adapter, xlabs_names

    folder.mkdir()
    model = FluxTransformer2DModel.from_pretrained(flux)
    save_file(xlabs_names(flux_adapter(model.config["num_layers"], 2, model.inner_dim)), folder / "flux.safetensors")
    sites = sd3.config.num_layers + len(sd3.config.dual_attention_layers)
    parts = sd3_adapter(sites, 1, sd3.inner_dim, sd3.config.attention_head_dim)
    tensors = {f"{part}.{name}": tensor for part, own in parts.items() for name, tensor in own.items()}
    save_file(tensors, folder / "sd3.safetensors")


@pytest.fixture(scope="session")
def host(base) -> Iterator[Any]:
    from paralleldit.tests.comfyui.host import Host

    running = Host(base, base.parent / "runtime")
    yield running
    running.stop()


@pytest.fixture
def demo() -> dict[str, Any]:
    from paralleldit.tests.comfyui.graphs import NAME, demo_with

    return demo_with(NAME)
