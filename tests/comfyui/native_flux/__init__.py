"""Nodes for the tests only.

A tiny diffusers Flux, or a tiny file, as a MODEL that ComfyUI itself samples, to compare with: ComfyUI's own loader
takes every Flux, Z-Image or Qwen-Image for one of the full width. What tiny models would make of a text or a picture:
ComfyUI knows none but those of full size.
"""

import json
import zlib
from pathlib import Path

import comfy.clip_vision
import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import comfy.utils
import folder_paths
import torch
from comfy.ldm.flux.model import FluxParams


class NativeFluxLoader:
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "load"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"pipeline": ("STRING", {})}}

    def load(self, pipeline):
        folder = Path(folder_paths.get_folder_paths("diffusers")[0]) / pipeline / "transformer"
        config = json.loads((folder / "config.json").read_text())
        weights = comfy.utils.load_torch_file(str(next(folder.glob("*.safetensors"))))
        heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
        model_config = comfy.model_detection.model_config_from_unet_config(
            {
                "image_model": "flux",
                "in_channels": 16,
                "out_channels": 16,
                "patch_size": 2,
                "vec_in_dim": config["pooled_projection_dim"],
                "context_in_dim": config["joint_attention_dim"],
                "hidden_size": heads * head_dim,
                "mlp_ratio": 4.0,
                "num_heads": heads,
                "depth": config["num_layers"],
                "depth_single_blocks": config["num_single_layers"],
                "axes_dim": config["axes_dims_rope"],
                "theta": 10000,
                "qkv_bias": True,
                "guidance_embed": config["guidance_embeds"],
                **({"txt_ids_dims": []} if "txt_ids_dims" in FluxParams.__dataclass_fields__ else {}),
            }
        )
        model_config.set_inference_dtype(torch.float32, None)
        original = comfy.model_detection.convert_diffusers_mmdit(weights, "")
        model = model_config.get_model(original, "")
        model.load_model_weights(original, "")
        device = comfy.model_management.get_torch_device()
        return (comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=device),)


class NativeFileLoader:
    """A model's file, by the config that ComfyUI's detection gives of one of the full width."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "load"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"file": ("STRING", {}), "config": ("STRING", {}), "kind": ("STRING", {})}}

    def load(self, file, config, kind):
        weights = comfy.utils.load_torch_file(folder_paths.get_full_path("diffusion_models", file))
        config = json.loads(config)
        known = getattr(comfy.supported_models, kind, comfy.model_detection.model_config_from_unet_config)
        model_config = known(config)
        model_config.set_inference_dtype(torch.float32, None)
        model = model_config.get_model(weights, "")
        model.load_model_weights(weights, "")
        device = comfy.model_management.get_torch_device()
        return (comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=device),)


class TinyClip:
    """Stands in for the text encoders of Qwen models: other texts, and texts with other pictures, become others."""

    RETURN_TYPES = ("CLIP",)
    FUNCTION = "load"
    CATEGORY = "tests"

    def __init__(self, width=0):
        self.width = width

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"width": ("INT", {})}}

    def load(self, width):
        return (TinyClip(width),)

    def tokenize(self, text, images=(), **kwargs):
        return {"text": text, "pictures": [float(image.mean()) for image in images]}

    def encode_from_tokens_scheduled(self, tokens, **kwargs):
        said = repr(sorted(tokens.items())).encode()
        generator = torch.Generator().manual_seed(zlib.crc32(said))
        length = 5 + zlib.crc32(said) % 7 + 4 * len(tokens["pictures"])
        return [[torch.randn(1, length, self.width, generator=generator), {}]]


class TinyVision:
    RETURN_TYPES = ("CLIP_VISION_OUTPUT",)
    FUNCTION = "embed"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"seed": ("INT", {})}}

    def embed(self, seed):
        generator = torch.Generator().manual_seed(seed)
        output = comfy.clip_vision.Output()
        output["image_embeds"] = torch.randn(1, 20, generator=generator)
        output["penultimate_hidden_states"] = torch.randn(1, 7, 28, generator=generator)
        return (output,)


NODE_CLASS_MAPPINGS = {
    "NativeFluxLoader": NativeFluxLoader,
    "NativeFileLoader": NativeFileLoader,
    "TinyClip": TinyClip,
    "TinyVision": TinyVision,
}
