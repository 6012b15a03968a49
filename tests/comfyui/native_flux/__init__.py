"""A node for the tests only: a tiny diffusers Flux as a MODEL that ComfyUI itself samples, to compare with.

ComfyUI's own loader takes every Flux for one of the full width.
"""

import json
from pathlib import Path

import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
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


NODE_CLASS_MAPPINGS = {"NativeFluxLoader": NativeFluxLoader}
