"""What a file is that is not what a loader asked for, by its keys: what to call it, and which node takes it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from ..errors import UserError
from .checkpoint import Checkpoint


class Kind(NamedTuple):
    """Files of which each of the patterns `keys` matches some key."""

    title: str
    keys: tuple[str, ...]
    remedy: str


_ENCODERS = "Text encoders are for ComfyUI's own Load CLIP, or for Parallel Text Encode as part of a pipeline folder."
_NOT_SERVED = "Load it with ComfyUI's own loader, or choose a model of a family that the ranks know."


def _model(title: str, *keys: str) -> Kind:
    return Kind(f"a model of {title}, a family that the ranks do not know", keys, _NOT_SERVED)


_START = r"^(model\.diffusion_model\.|diffusion_model\.|net\.)?"

KINDS = (
    Kind(
        "a LoRA",
        (r"lora(_(up|down|A|B)\b|\d*\.(up|down)\.|_linear_layer\.)|\.(hada_w1_a|lokr_w[12](_a)?)$",),
        "Choose it in Parallel LoRA (models/loras), after the loader of its model.",
    ),
    Kind(
        "an IP-Adapter",
        (r"^(image_proj|ip_adapter|ip_adapter_proj_model)\.|^double_blocks\.\d+\.processor\.ip_adapter_",),
        "Choose it in Parallel IP-Adapter (models/ipadapter).",
    ),
    Kind(
        "a ControlNet",
        (r"^(control_model\.|controlnet_blocks\.|controlnet_down_blocks\.|zero_convs\.|input_hint_block\.)",),
        "Choose it in Parallel ControlNet Loader (models/controlnet).",
    ),
    _model("Flux.2 (Black Forest Labs)", _START + r"double_stream_modulation_img\.lin(ear)?\.weight$"),
    _model("Chroma", _START + r"distilled_guidance_layer\."),
    _model("HunyuanVideo 1.5", _START + r"cond_type_embedding\.weight$"),
    _model(
        "HunyuanImage",
        _START + r"txt_in\.individual_token_refiner\.",
        _START + r"byt5_in\.",
    ),
    _model("Qwen-Image 2.1", _START + r"txt_in\.text_norm\.weight$"),
    _model("another Qwen-Image", _START + r"txt_norm\.weight$", _START + r"img_in\.weight$"),
    _model("LTX-2", _START + r"audio_adaln_single\.linear\.weight$"),
    _model("LTX-Video", _START + r"adaln_single\.emb\.", _START + r"patchify_proj\.weight$"),
    _model("Z-Image or Lumina 2", _START + r"cap_embedder\.1\.weight$"),
    _model("Krea 2", _START + r"txtfusion\.projector\.weight$"),
    _model("MiniMax H3", _START + r"video_patch_proj\.weight$"),
    _model("HiDream", _START + r"(caption_projection\.0\.linear|t_embedder1\.mlp\.0)\.weight$"),
    _model("OmniGen 2", _START + r"time_caption_embed\."),
    _model("Cosmos or Anima", _START + r"blocks\.0\.mlp\.layer1\.weight$"),
    _model("ACE-Step", _START + r"(genre_embedder|encoder\.lyric_encoder)\."),
    _model("Hunyuan3D", _START + r"latent_in\.weight$"),
    _model("AuraFlow", _START + r"double_layers\.0\.attn\.w1q\.weight$"),
    _model("Kandinsky 5", _START + r"visual_transformer_blocks\.0\."),
    _model("SeedVR 2", _START + r"blocks\.\d+\.mlp\.all\.proj_in_gate\.weight$"),
    _model("another Stable Diffusion XL", _START + r"(input|down)_blocks\.", _START + r"(label_emb|add_embedding)\."),
    _model("Stable Diffusion 1 or 2", _START + r"(input_blocks\.0\.0|down_blocks\.0\.attentions\.0)\."),
    Kind(
        "a diffusion model",
        (_START + r"(double_blocks|joint_blocks|transformer_blocks|single_transformer_blocks|blocks)\.0\.",),
        "Choose it in Parallel Loader (models/diffusion_models).",
    ),
    Kind(
        "a T5 text encoder",
        (r"(^|\.)(encoder\.)?block\.0\.layer\.0\.SelfAttention\.q\.weight$",),
        _ENCODERS,
    ),
    Kind(
        "a language model, as a text encoder",
        (r"^(model\.|language_model\.|model\.language_model\.)*layers\.0\.self_attn\.q_proj\.",),
        _ENCODERS,
    ),
    Kind(
        "a CLIP vision model",
        (r"(^|\.)(vision_model|visual)\.",),
        "Choose it in ComfyUI's own Load CLIP Vision (models/clip_vision).",
    ),
    Kind(
        "a CLIP text encoder",
        (r"(^|\.)(text_model\.encoder\.layers|transformer\.resblocks)\.0\.",),
        _ENCODERS,
    ),
    Kind(
        "a VAE",
        (
            r"^(first_stage_model\.|vae\.)?(decoder|encoder)\.(conv_in|conv1|mid|middle|mid_block|blocks|layers|up_blocks)\.",
        ),
        "Choose it in Parallel VAE Loader (models/vae).",
    ),
    Kind(
        "an upscale model",
        (r"^(body\.0\.rdb1|model\.1\.sub\.0\.RDB1|layers\.0\.residual_group)\.",),
        "Choose it in ComfyUI's own Load Upscale Model (models/upscale_models).",
    ),
)
"""The first that fits is it. A model of a family that the ranks know never comes here, unless a loader of other files
was given it."""


def kind_of(keys: Iterable[str]) -> Kind | None:
    """What a file of these keys is."""
    keys = list(keys)
    return next((kind for kind in KINDS if all(any(re.search(each, key) for key in keys) for each in kind.keys)), None)


def refuse_others(checkpoint: Checkpoint, wanted: str) -> None:
    """Raise `UserError` for a file that is known to be something else than `wanted`, a title in `KINDS`."""
    kind = kind_of(checkpoint.tensors)
    if kind is not None and kind.title != wanted:
        raise UserError(f"{checkpoint.source} is {kind.title}; {wanted} was asked for.", kind.remedy)
