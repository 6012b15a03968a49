"""The pack's nodes for ComfyUI's graph."""

from __future__ import annotations

from typing import Any

from .cache import ParallelDiTCache
from .controlnet import ParallelDiTControlNetApply, ParallelDiTControlNetLoader
from .ip_adapter import ParallelDiTIPAdapter
from .layout import ParallelDiTLayout
from .loader import ParallelDiTLoader
from .lora import ParallelDiTLora
from .redundancy import ParallelDiTRedundancy
from .sampler import ParallelDiTSampler
from .session.activity import noted
from .status import ParallelDiTStatus, ParallelDiTUnload
from .text import ParallelDiTTextEncode
from .vae import ParallelDiTVAEDecode, ParallelDiTVAEEncode, ParallelDiTVAEEncodeForInpaint, ParallelDiTVAELoader

NODE_CLASS_MAPPINGS: dict[str, Any] = {
    node.__name__: node
    for node in (
        ParallelDiTLoader,
        ParallelDiTLayout,
        ParallelDiTLora,
        ParallelDiTCache,
        ParallelDiTRedundancy,
        ParallelDiTControlNetLoader,
        ParallelDiTControlNetApply,
        ParallelDiTIPAdapter,
        ParallelDiTTextEncode,
        ParallelDiTSampler,
        ParallelDiTVAELoader,
        ParallelDiTVAEDecode,
        ParallelDiTVAEEncode,
        ParallelDiTVAEEncodeForInpaint,
        ParallelDiTStatus,
        ParallelDiTUnload,
    )
}
for _node in NODE_CLASS_MAPPINGS.values():
    setattr(_node, _node.FUNCTION, noted(getattr(_node, _node.FUNCTION)))

NODE_DISPLAY_NAME_MAPPINGS = {
    "ParallelDiTLoader": "Parallel Loader",
    "ParallelDiTLayout": "Parallel Layout",
    "ParallelDiTLora": "Parallel LoRA",
    "ParallelDiTCache": "Parallel Cache",
    "ParallelDiTRedundancy": "Parallel Redundancy",
    "ParallelDiTControlNetLoader": "Parallel ControlNet Loader",
    "ParallelDiTControlNetApply": "Parallel ControlNet Apply",
    "ParallelDiTIPAdapter": "Parallel IP-Adapter",
    "ParallelDiTTextEncode": "Parallel Text Encode",
    "ParallelDiTSampler": "Parallel Sampler",
    "ParallelDiTVAELoader": "Parallel VAE Loader",
    "ParallelDiTVAEDecode": "Parallel VAE Decode",
    "ParallelDiTVAEEncode": "Parallel VAE Encode",
    "ParallelDiTVAEEncodeForInpaint": "Parallel VAE Encode (for Inpainting)",
    "ParallelDiTStatus": "Parallel Status",
    "ParallelDiTUnload": "Parallel Unload",
}
