"""Per pipeline: its encoders and how they make a conditioning."""

from __future__ import annotations

import html
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    BertModel,
    BertTokenizer,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    LlamaModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Model,
    T5EncoderModel,
    T5Tokenizer,
    UMT5EncoderModel,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextConditioning:
    """What a prompt becomes: `tokens` `[1, St, C]` and what else its models take (families.condition.Condition)."""

    tokens: Tensor
    pooled: Tensor | None = None
    mask: Tensor | None = None
    tokens_2: Tensor | None = None
    mask_2: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Those that are there, by name, fp32 on the CPU."""
        return {name: tensor.float().cpu() for name, tensor in vars(self).items() if tensor is not None}


@dataclass(frozen=True)
class EncoderSpec:
    """One encoder with its tokenizer: the subfolders, what its configuration may have as `model_type`, the classes."""

    folder: str
    tokenizer_folder: str
    model_types: tuple[str, ...]
    encoder: type[PreTrainedModel]
    tokenizer: type[PreTrainedTokenizerBase]


@dataclass(frozen=True)
class LoadedEncoder:
    """`warn`: hears what a user is to know of a prompt."""

    encoder: Any
    tokenizer: Any
    warn: Callable[[str], None] = log.warning

    def ids(self, prompt: str, length: int) -> Tensor:
        """Token ids `[1, length]`, padded or cut, which is said."""
        return self.ids_and_mask(prompt, length)[0]

    def masked_tokens(self, prompt: str, length: int) -> tuple[Tensor, Tensor]:
        """What the encoder makes of a prompt without looking at the padding, `[1, length, C]`; 1 where none is."""
        ids, mask = self.ids_and_mask(prompt, length)
        return self.encoder(ids, attention_mask=mask).last_hidden_state, mask

    def ids_and_mask(self, prompt: str, length: int, pad: bool = True) -> tuple[Tensor, Tensor]:
        """`ids`, and 1 where they are no padding, 0 where they are: `[1, length]` each, or fewer without `pad`."""
        needed = len(self.tokenizer(prompt, verbose=False).input_ids)
        if needed > length:
            name = type(self.encoder).__name__
            self.warn(f"The prompt has {needed} tokens, only the first {length} are used by the text encoder {name}.")
        padding = "max_length" if pad else False
        tokens = self.tokenizer(prompt, padding=padding, max_length=length, truncation=True, return_tensors="pt")
        return tokens.input_ids.to(self.encoder.device), tokens.attention_mask.to(self.encoder.device)


Encode = Callable[[tuple[LoadedEncoder, ...], str, str, int], TextConditioning]


@dataclass(frozen=True)
class TextFamily:
    """The text side of some pipelines: their encoders and how these make one conditioning.

    `encode(parts, prompt, prompt_2, max_length)`; `main_part` is the part whose length `max_length` is.
    """

    pipelines: tuple[str, ...]
    parts: tuple[EncoderSpec, ...]
    main_part: int
    default_length: int
    encode: Encode


def _clip_length(clip: LoadedEncoder) -> int:
    return min(clip.tokenizer.model_max_length, clip.encoder.config.max_position_embeddings)


def _encode_flux(parts: tuple[LoadedEncoder, ...], prompt: str, prompt_2: str, max_length: int) -> TextConditioning:
    clip, t5 = parts
    return TextConditioning(
        # Flux was trained without masking the padding of either encoder.
        tokens=t5.encoder(t5.ids(prompt_2, max_length)).last_hidden_state,
        pooled=clip.encoder(clip.ids(prompt, _clip_length(clip))).pooler_output,
    )


def _encode_sd3(parts: tuple[LoadedEncoder, ...], prompt: str, prompt_2: str, max_length: int) -> TextConditioning:
    *clips, t5 = parts
    encoded = [
        clip.encoder(clip.ids(prompt, clips[0].tokenizer.model_max_length), output_hidden_states=True) for clip in clips
    ]
    of_clips = torch.cat([each.hidden_states[-2] for each in encoded], dim=-1)
    of_t5 = t5.encoder(t5.ids(prompt_2, max_length)).last_hidden_state
    return TextConditioning(
        # The tokens of CLIP, side by side and filled up with zeros to the width of T5's, go before them.
        tokens=torch.cat([F.pad(of_clips, (0, of_t5.shape[-1] - of_clips.shape[-1])), of_t5], dim=1),
        pooled=torch.cat([each.text_embeds for each in encoded], dim=-1),
    )


def _encode_sdxl(parts: tuple[LoadedEncoder, ...], prompt: str, prompt_2: str, max_length: int) -> TextConditioning:
    # The refiner has the second encoder alone, for the first prompt.
    encoded = [
        clip.encoder(clip.ids(text, clip.tokenizer.model_max_length), output_hidden_states=True)
        for clip, text in zip(parts, (prompt, prompt_2), strict=False)
    ]
    return TextConditioning(
        tokens=torch.cat([each.hidden_states[-2] for each in encoded], dim=-1), pooled=encoded[-1].text_embeds
    )


def _encode_pixart(parts: tuple[LoadedEncoder, ...], prompt: str, prompt_2: str, max_length: int) -> TextConditioning:
    # Its captions were in lower case.
    tokens, mask = parts[0].masked_tokens(prompt_2.lower().strip(), max_length)
    return TextConditioning(tokens=tokens, mask=mask)


HUNYUAN_CLIP_LENGTH = 77


def _encode_hunyuandit(
    parts: tuple[LoadedEncoder, ...], prompt: str, prompt_2: str, max_length: int
) -> TextConditioning:
    tokens, mask = parts[0].masked_tokens(prompt, HUNYUAN_CLIP_LENGTH)
    tokens_2, mask_2 = parts[1].masked_tokens(prompt_2, max_length)
    return TextConditioning(tokens=tokens, mask=mask, tokens_2=tokens_2, mask_2=mask_2)


def _encode_wan(parts: tuple[LoadedEncoder, ...], prompt: str, prompt_2: str, max_length: int) -> TextConditioning:
    clean = re.sub(r"\s+", " ", html.unescape(html.unescape(prompt_2))).strip()
    tokens, mask = parts[0].masked_tokens(clean, max_length)
    # The model attends to the zeros, too.
    return TextConditioning(tokens=tokens * mask[..., None])


def _encode_zimage(parts: tuple[LoadedEncoder, ...], prompt: str, prompt_2: str, max_length: int) -> TextConditioning:
    (qwen,) = parts
    message = [{"role": "user", "content": prompt_2}]
    asked = qwen.tokenizer.apply_chat_template(
        message, tokenize=False, add_generation_prompt=True, enable_thinking=True
    )
    ids, mask = qwen.ids_and_mask(asked, max_length)
    hidden = qwen.encoder(ids, attention_mask=mask, output_hidden_states=True).hidden_states[-2]
    # The model fills the text up itself.
    return TextConditioning(tokens=hidden[:, mask[0].bool()])


HUNYUANVIDEO_SYSTEM = (
    "Describe the video by detailing the following aspects: 1. The main content and theme of the video."
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects."
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects."
    "4. background environment, light, style and atmosphere."
    "5. camera angles, movements, and transitions used in the video:"
)
HUNYUANVIDEO_ASKED = (
    "<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
)
HUNYUANVIDEO_BEFORE = 95
"""How many tokens of Llama 3 stand before the prompt."""


def _encode_hunyuanvideo(
    parts: tuple[LoadedEncoder, ...], prompt: str, prompt_2: str, max_length: int
) -> TextConditioning:
    llama, clip = parts
    asked = HUNYUANVIDEO_ASKED.format(HUNYUANVIDEO_SYSTEM, prompt_2)
    ids, mask = llama.ids_and_mask(asked, HUNYUANVIDEO_BEFORE + max_length)
    hidden = llama.encoder(ids, attention_mask=mask, output_hidden_states=True).hidden_states[-3]
    counts = mask[0].bool()
    counts[:HUNYUANVIDEO_BEFORE] = False
    return TextConditioning(
        tokens=hidden[:, counts], pooled=clip.encoder(clip.ids(prompt, _clip_length(clip))).pooler_output
    )


QWEN_IMAGE_TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
QWEN_IMAGE_START = 34
"""The tokens of the template before the prompt, which the model is not shown."""


def _encode_qwen_image(
    parts: tuple[LoadedEncoder, ...], prompt: str, prompt_2: str, max_length: int
) -> TextConditioning:
    (qwen,) = parts
    ids, mask = qwen.ids_and_mask(QWEN_IMAGE_TEMPLATE.format(prompt_2), max_length + QWEN_IMAGE_START, pad=False)
    # Without the layer that makes words of it.
    hidden = qwen.encoder.model(input_ids=ids, attention_mask=mask).last_hidden_state
    return TextConditioning(tokens=hidden[:, QWEN_IMAGE_START:])


def _encode_cogvideox(
    parts: tuple[LoadedEncoder, ...], prompt: str, prompt_2: str, max_length: int
) -> TextConditioning:
    # The model was trained without masking the padding.
    return TextConditioning(tokens=parts[0].encoder(parts[0].ids(prompt_2, max_length)).last_hidden_state)


def _encode_mochi(parts: tuple[LoadedEncoder, ...], prompt: str, prompt_2: str, max_length: int) -> TextConditioning:
    tokens, mask = parts[0].masked_tokens(prompt_2, max_length)
    return TextConditioning(tokens=tokens, mask=mask)


def _pixart(pipelines: tuple[str, ...], length: int) -> TextFamily:
    t5 = EncoderSpec("text_encoder", "tokenizer", ("t5",), T5EncoderModel, T5Tokenizer)
    return TextFamily(pipelines, parts=(t5,), main_part=0, default_length=length, encode=_encode_pixart)


SDXL_ENCODERS = (
    EncoderSpec("text_encoder", "tokenizer", ("clip_text_model",), CLIPTextModel, CLIPTokenizer),
    EncoderSpec("text_encoder_2", "tokenizer_2", ("clip_text_model",), CLIPTextModelWithProjection, CLIPTokenizer),
)


def _sdxl(pipeline: str, parts: tuple[EncoderSpec, ...]) -> TextFamily:
    return TextFamily((pipeline,), parts, main_part=len(parts) - 1, default_length=77, encode=_encode_sdxl)


FAMILIES = (
    TextFamily(
        pipelines=("FluxPipeline", "FluxFillPipeline", "FluxKontextPipeline", "FluxControlPipeline"),
        parts=(
            EncoderSpec("text_encoder", "tokenizer", ("clip_text_model",), CLIPTextModel, CLIPTokenizer),
            EncoderSpec("text_encoder_2", "tokenizer_2", ("t5",), T5EncoderModel, T5Tokenizer),
        ),
        main_part=1,
        default_length=512,
        encode=_encode_flux,
    ),
    TextFamily(
        pipelines=("StableDiffusion3Pipeline",),
        parts=(
            EncoderSpec("text_encoder", "tokenizer", ("clip_text_model",), CLIPTextModelWithProjection, CLIPTokenizer),
            EncoderSpec(
                "text_encoder_2", "tokenizer_2", ("clip_text_model",), CLIPTextModelWithProjection, CLIPTokenizer
            ),
            EncoderSpec("text_encoder_3", "tokenizer_3", ("t5",), T5EncoderModel, T5Tokenizer),
        ),
        main_part=2,
        default_length=256,
        encode=_encode_sd3,
    ),
    _sdxl("StableDiffusionXLPipeline", SDXL_ENCODERS),
    _sdxl("StableDiffusionXLImg2ImgPipeline", SDXL_ENCODERS[1:]),
    _pixart(("PixArtAlphaPipeline",), length=120),
    _pixart(("PixArtSigmaPipeline",), length=300),
    TextFamily(
        pipelines=("HunyuanDiTPipeline",),
        parts=(
            EncoderSpec("text_encoder", "tokenizer", ("bert",), BertModel, BertTokenizer),
            EncoderSpec("text_encoder_2", "tokenizer_2", ("mt5", "t5"), T5EncoderModel, T5Tokenizer),
        ),
        main_part=1,
        default_length=256,
        encode=_encode_hunyuandit,
    ),
    TextFamily(
        pipelines=("WanPipeline",),
        parts=(EncoderSpec("text_encoder", "tokenizer", ("umt5",), UMT5EncoderModel, T5Tokenizer),),
        main_part=0,
        default_length=512,
        encode=_encode_wan,
    ),
    TextFamily(
        pipelines=("ZImagePipeline",),
        parts=(EncoderSpec("text_encoder", "tokenizer", ("qwen3",), Qwen3Model, Qwen2Tokenizer),),
        main_part=0,
        default_length=512,
        encode=_encode_zimage,
    ),
    TextFamily(
        pipelines=("CogVideoXPipeline",),
        parts=(EncoderSpec("text_encoder", "tokenizer", ("t5",), T5EncoderModel, T5Tokenizer),),
        main_part=0,
        default_length=226,
        encode=_encode_cogvideox,
    ),
    TextFamily(
        pipelines=("MochiPipeline",),
        parts=(EncoderSpec("text_encoder", "tokenizer", ("t5",), T5EncoderModel, T5Tokenizer),),
        main_part=0,
        default_length=256,
        encode=_encode_mochi,
    ),
    TextFamily(
        pipelines=("HunyuanVideoPipeline",),
        parts=(
            EncoderSpec("text_encoder", "tokenizer", ("llama",), LlamaModel, PreTrainedTokenizerFast),
            EncoderSpec("text_encoder_2", "tokenizer_2", ("clip_text_model",), CLIPTextModel, CLIPTokenizer),
        ),
        main_part=0,
        default_length=256,
        encode=_encode_hunyuanvideo,
    ),
    TextFamily(
        pipelines=("QwenImagePipeline",),
        parts=(
            EncoderSpec(
                "text_encoder", "tokenizer", ("qwen2_5_vl",), Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
            ),
        ),
        main_part=0,
        default_length=1024,
        encode=_encode_qwen_image,
    ),
)
