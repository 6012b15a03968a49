"""Prompts to conditioning, by the text encoders of a diffusers folder. Never asks a hub."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PreTrainedTokenizerBase,
)

from ..errors import UserError
from ..files.checkpoint import open_checkpoint
from ..files.regular import check_regular, open_regular
from .recipes import FAMILIES, EncoderSpec, LoadedEncoder, TextConditioning, TextFamily


@dataclass(frozen=True)
class TextEncoders:
    """The text encoders of one folder on this rank's device."""

    family: TextFamily
    parts: tuple[LoadedEncoder, ...]

    @property
    def default_length(self) -> int:
        """Tokens of the main encoder: what its tokenizer's folder says, at most the family's default."""
        return min(self.parts[self.family.main_part].tokenizer.model_max_length, self.family.default_length)

    @torch.no_grad()
    def encode(
        self,
        prompt: str,
        prompt_2: str | None = None,
        max_length: int | None = None,
        warn: Callable[[str], None] | None = None,
    ) -> TextConditioning:
        """Encode `prompt`, or `prompt_2` where it is given for the main encoder, padded or cut to `max_length` tokens.

        Equals `encode_prompt` of the family's pipeline in diffusers. Raises UserError for a `max_length` below 1.
        `warn` hears what is cut off; by default the log does.
        """
        length = self.default_length if max_length is None else max_length
        if length < 1:
            raise UserError(f"max_length is {length}, but a prompt needs at least 1 token.")
        parts = tuple(replace(part, warn=warn) for part in self.parts) if warn else self.parts
        return self.family.encode(parts, prompt, prompt_2 or prompt, length)


def load_text_encoders(
    folder: str | Path,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    check_cancelled: Callable[[], None] = lambda: None,
) -> TextEncoders:
    """Load the text encoders and tokenizers of a diffusers pipeline's `folder`.

    `check_cancelled` is called before each encoder is read. Raises UserError for a pipeline without a row in FAMILIES,
    and for a missing or broken encoder.
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
    parts = []
    for part in family.parts:
        check_cancelled()
        parts.append(_load_part(folder, part, device, dtype))
    check_cancelled()
    return TextEncoders(family, tuple(parts))


def _family(folder: Path) -> TextFamily:
    pipeline = _read_json(folder / "model_index.json").get("_class_name")
    for family in FAMILIES:
        if pipeline in family.pipelines:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.pipelines)
    raise UserError(f"{folder} is a {pipeline}, whose prompts cannot be encoded here; known are {known}.")


def _load_part(folder: Path, part: EncoderSpec, device: torch.device | str, dtype: torch.dtype) -> LoadedEncoder:
    place = folder / part.folder
    found = _read_json(place / "config.json").get("model_type")
    if found not in part.model_types:
        expected = " or ".join(part.model_types)
        raise UserError(f"{place} holds a model of the type {found}, expected was {expected}.")
    open_checkpoint(place)  # names what is wrong with the files
    for own in (place, folder / part.tokenizer_folder):
        check_regular(own)
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
    known = encoder.get_input_embeddings().num_embeddings
    if len(tokenizer) > known:
        raise UserError(
            f"{folder / part.tokenizer_folder} has {len(tokenizer)} tokens, {place} knows {known}.",
            "Take both from the same model.",
        )
    return LoadedEncoder(encoder.to(device).eval().requires_grad_(False), tokenizer)


def _check_tokenizer(place: Path, tokenizer: type[PreTrainedTokenizerBase]) -> None:
    # Without a vocabulary transformers makes an empty tokenizer and says nothing.
    files = tokenizer.vocab_files_names.values()
    if not any((place / file).is_file() for file in files):
        raise UserError(f"{place} holds no tokenizer: there is none of {', '.join(files)}.")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        with open_regular(file) as opened:
            content = json.loads(opened.read().decode("utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{file} does not exist.", "Give the folder of a diffusers pipeline.") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} is not a JSON object.")
    return content
