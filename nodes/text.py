"""Parallel Text Encode: prompts to CONDITIONING, by the text encoders of a diffusers folder, in the ranks."""

from __future__ import annotations

from typing import Any

from ..parallel_backend.protocol.messages import EncodeText, TextRef
from . import model_files
from .layout_choice import LayoutChoice
from .request.conditioning import entry_of
from .session import session
from .widgets import LAYOUT_INPUT, check_characters, verdict

WHAT = "The pipeline folder"
MAX_LENGTH = 4096


class ParallelDiTTextEncode:
    CATEGORY = "ParallelDiT"
    SEARCH_ALIASES = (
        "clip text encode",
        "prompt",
        "text encoder",
        "t5",
        "clip",
    )
    DESCRIPTION = (
        "Encodes a prompt with the text encoders of a diffusers pipeline folder. For single text encoder files use "
        "ComfyUI's own CLIP loaders: their conditioning serves Parallel Sampler just as well."
    )
    RETURN_TYPES = ("CONDITIONING",)
    OUTPUT_TOOLTIPS = ("For the positive or negative input of Parallel Sampler.",)
    FUNCTION = "encode"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "text_encoders": (
                    model_files.names(),
                    {"tooltip": "A diffusers pipeline folder in models/diffusers with its tokenizers and encoders."},
                ),
                "text": (
                    "STRING",
                    {"multiline": True, "dynamicPrompts": True, "tooltip": "The prompt, for all text encoders."},
                ),
                "guidance": (
                    "FLOAT",
                    {
                        "default": 3.5,
                        "min": 0.0,
                        "max": 100.0,
                        "step": 0.1,
                        "tooltip": "The distilled guidance of models that have it (Flux dev). Others ignore it.",
                    },
                ),
                "max_length": (
                    "INT",
                    {
                        "default": 0,
                        "advanced": True,
                        "min": 0,
                        "max": MAX_LENGTH,
                        "tooltip": "Tokens of the long text encoder (T5). 0: as many as the model's own pipeline uses.",
                    },
                ),
            },
            "optional": {
                "text_2": (
                    "STRING",
                    {
                        "multiline": True,
                        "dynamicPrompts": True,
                        "default": "",
                        "advanced": True,
                        "tooltip": "Another prompt for the long text encoder (T5). Empty: the same as text.",
                    },
                ),
                "layout": LAYOUT_INPUT,
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, text_encoders: str) -> bool | str:
        return verdict(lambda name: model_files.resolve(name, (), WHAT), text_encoders)

    def encode(
        self,
        text_encoders: str,
        text: str,
        guidance: float,
        max_length: int,
        text_2: str = "",
        layout: LayoutChoice | None = None,
    ) -> tuple[list[Any]]:
        for what, written in (("text", text), ("text_2", text_2)):
            check_characters(what, written)
        message = EncodeText(
            id=0,
            text=TextRef(path=str(model_files.resolve(text_encoders, (), WHAT))),
            prompt=text,
            prompt_2=text_2 or None,
            max_length=max_length or None,
        )
        client = session.client_for(layout)
        reply = session.with_living(client, lambda client: session.ask(client, message))
        return (entry_of(reply.tensors, guidance),)
