"""Prompts to conditioning, by the text encoders of a diffusers folder. Never asks a hub."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
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
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5EncoderModel,
    T5Tokenizer,
)

from ..errors import UserError
from ..weights.checkpoint import open_checkpoint

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextConditioning:
    """What a prompt becomes: `tokens` `[1, St, C]` and what else its models take (families.base.Condition)."""

    tokens: Tensor
    pooled: Tensor | None = None
    mask: Tensor | None = None
    tokens_2: Tensor | None = None
    mask_2: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Those that are there, by name, fp32 on the CPU."""
        return {name: tensor.float().cpu() for name, tensor in vars(self).items() if tensor is not None}


@dataclass(frozen=True)
class Part:
    """One encoder with its tokenizer: the subfolders, what its configuration may have as `model_type`, the classes."""

    folder: str
    tokenizer_folder: str
    model_types: tuple[str, ...]
    encoder: type[PreTrainedModel]
    tokenizer: type[PreTrainedTokenizerBase]


@dataclass(frozen=True)
class LoadedPart:
    encoder: Any
    tokenizer: Any

    def ids(self, prompt: str, length: int) -> Tensor:
        """Token ids `[1, length]`, padded or cut; what is cut is logged."""
        return self._tokenized(prompt, length)[0]

    def masked_tokens(self, prompt: str, length: int) -> tuple[Tensor, Tensor]:
        """What the encoder makes of a prompt without looking at the padding, `[1, length, C]`; 1 where none is."""
        ids, mask = self._tokenized(prompt, length)
        return self.encoder(ids, attention_mask=mask).last_hidden_state, mask

    def _tokenized(self, prompt: str, length: int) -> tuple[Tensor, Tensor]:
        needed = len(self.tokenizer(prompt, verbose=False).input_ids)
        if needed > length:
            log.warning("The prompt has %d tokens, only the first %d are used by this text encoder.", needed, length)
        tokens = self.tokenizer(prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return tokens.input_ids.to(self.encoder.device), tokens.attention_mask.to(self.encoder.device)


Encode = Callable[[tuple[LoadedPart, ...], str, str, int], TextConditioning]


@dataclass(frozen=True)
class TextFamily:
    """The text side of some pipelines: their encoders and how these make one conditioning.

    `encode(parts, prompt, prompt_2, max_length)`; `main_part` is the part whose length `max_length` is.
    """

    pipelines: tuple[str, ...]
    parts: tuple[Part, ...]
    main_part: int
    default_length: int
    encode: Encode


def _encode_flux(parts: tuple[LoadedPart, ...], prompt: str, prompt_2: str, max_length: int) -> TextConditioning:
    clip, t5 = parts
    clip_length = min(clip.tokenizer.model_max_length, clip.encoder.config.max_position_embeddings)
    return TextConditioning(
        # Flux was trained without masking the padding of either encoder.
        tokens=t5.encoder(t5.ids(prompt_2, max_length)).last_hidden_state,
        pooled=clip.encoder(clip.ids(prompt, clip_length)).pooler_output,
    )


def _encode_sd3(parts: tuple[LoadedPart, ...], prompt: str, prompt_2: str, max_length: int) -> TextConditioning:
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


def _encode_pixart(parts: tuple[LoadedPart, ...], prompt: str, prompt_2: str, max_length: int) -> TextConditioning:
    # Its captions were in lower case.
    tokens, mask = parts[0].masked_tokens(prompt_2.lower().strip(), max_length)
    return TextConditioning(tokens=tokens, mask=mask)


HUNYUAN_CLIP_LENGTH = 77


def _encode_hunyuandit(parts: tuple[LoadedPart, ...], prompt: str, prompt_2: str, max_length: int) -> TextConditioning:
    tokens, mask = parts[0].masked_tokens(prompt, HUNYUAN_CLIP_LENGTH)
    tokens_2, mask_2 = parts[1].masked_tokens(prompt_2, max_length)
    return TextConditioning(tokens=tokens, mask=mask, tokens_2=tokens_2, mask_2=mask_2)


def _pixart(pipelines: tuple[str, ...], length: int) -> TextFamily:
    t5 = Part("text_encoder", "tokenizer", ("t5",), T5EncoderModel, T5Tokenizer)
    return TextFamily(pipelines, parts=(t5,), main_part=0, default_length=length, encode=_encode_pixart)


FAMILIES = (
    TextFamily(
        pipelines=("FluxPipeline", "FluxFillPipeline", "FluxKontextPipeline", "FluxControlPipeline"),
        parts=(
            Part("text_encoder", "tokenizer", ("clip_text_model",), CLIPTextModel, CLIPTokenizer),
            Part("text_encoder_2", "tokenizer_2", ("t5",), T5EncoderModel, T5Tokenizer),
        ),
        main_part=1,
        default_length=512,
        encode=_encode_flux,
    ),
    TextFamily(
        pipelines=("StableDiffusion3Pipeline",),
        parts=(
            Part("text_encoder", "tokenizer", ("clip_text_model",), CLIPTextModelWithProjection, CLIPTokenizer),
            Part("text_encoder_2", "tokenizer_2", ("clip_text_model",), CLIPTextModelWithProjection, CLIPTokenizer),
            Part("text_encoder_3", "tokenizer_3", ("t5",), T5EncoderModel, T5Tokenizer),
        ),
        main_part=2,
        default_length=256,
        encode=_encode_sd3,
    ),
    _pixart(("PixArtAlphaPipeline",), length=120),
    _pixart(("PixArtSigmaPipeline",), length=300),
    TextFamily(
        pipelines=("HunyuanDiTPipeline",),
        parts=(
            Part("text_encoder", "tokenizer", ("bert",), BertModel, BertTokenizer),
            Part("text_encoder_2", "tokenizer_2", ("mt5", "t5"), T5EncoderModel, T5Tokenizer),
        ),
        main_part=1,
        default_length=256,
        encode=_encode_hunyuandit,
    ),
)


@dataclass(frozen=True)
class TextEncoders:
    """The text encoders of one folder on this rank's device."""

    family: TextFamily
    parts: tuple[LoadedPart, ...]

    @property
    def default_length(self) -> int:
        """Tokens of the main encoder: what its tokenizer's folder says, at most the family's default."""
        return min(self.parts[self.family.main_part].tokenizer.model_max_length, self.family.default_length)

    @torch.no_grad()
    def encode(self, prompt: str, prompt_2: str | None = None, max_length: int | None = None) -> TextConditioning:
        """Encode `prompt`, or `prompt_2` where it is given for the main encoder, padded or cut to `max_length` tokens.

        Equals `encode_prompt` of the family's pipeline in diffusers. Raises UserError for a `max_length` below 1.
        """
        length = self.default_length if max_length is None else max_length
        if length < 1:
            raise UserError(f"max_length is {length}, but a prompt needs at least 1 token.")
        return self.family.encode(self.parts, prompt, prompt_2 or prompt, length)


def load_text_encoders(folder: str | Path, *, device: torch.device | str, dtype: torch.dtype) -> TextEncoders:
    """Load the text encoders and tokenizers of a diffusers pipeline's `folder`.

    Raises UserError for a pipeline without a row in FAMILIES, and for a missing or broken encoder.
    """
    folder = Path(folder)
    family = _family(folder)
    for part in family.parts:
        for name in (part.folder, part.tokenizer_folder):
            if not (folder / name).is_dir():
                raise UserError(
                    f"{folder} has no subfolder {name}, which the text encoders need.",
                    "Give a whole diffusers folder, or encode the prompt with the host's own nodes.",
                )
    return TextEncoders(family, tuple(_load_part(folder, part, device, dtype) for part in family.parts))


def _family(folder: Path) -> TextFamily:
    pipeline = _read_json(folder / "model_index.json").get("_class_name")
    for family in FAMILIES:
        if pipeline in family.pipelines:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.pipelines)
    raise UserError(f"{folder} is a {pipeline}, whose prompts cannot be encoded here; known are {known}.")


def _load_part(folder: Path, part: Part, device: torch.device | str, dtype: torch.dtype) -> LoadedPart:
    place = folder / part.folder
    found = _read_json(place / "config.json").get("model_type")
    if found not in part.model_types:
        expected = " or ".join(part.model_types)
        raise UserError(f"{place} holds a model of the type {found}, expected was {expected}.")
    open_checkpoint(place)  # names what is wrong with the files
    _check_tokenizer(folder / part.tokenizer_folder, part.tokenizer)
    try:
        tokenizer = part.tokenizer.from_pretrained(folder / part.tokenizer_folder, local_files_only=True)
        loaded: Any = part.encoder.from_pretrained(
            place, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"The text encoder {place} cannot be loaded: {error}") from error
    encoder, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"{place} lacks {len(missing)} of its encoder's tensors, among them {missing[0]}.")
    if len(tokenizer) > encoder.config.vocab_size:
        raise UserError(
            f"{folder / part.tokenizer_folder} has {len(tokenizer)} tokens, {place} knows {encoder.config.vocab_size}.",
            "Take both from the same model.",
        )
    return LoadedPart(encoder.to(device).eval().requires_grad_(False), tokenizer)


def _check_tokenizer(place: Path, tokenizer: type[PreTrainedTokenizerBase]) -> None:
    # Without a vocabulary transformers makes an empty tokenizer and says nothing.
    files = tokenizer.vocab_files_names.values()
    if not any((place / file).is_file() for file in files):
        raise UserError(f"{place} holds no tokenizer: there is none of {', '.join(files)}.")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text("utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{file} does not exist.", "Give the folder of a diffusers pipeline.") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} is not a JSON object.")
    return content
