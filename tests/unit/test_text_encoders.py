"""Prompts become what the pipelines of diffusers make of them, from local files alone."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import (
    CogVideoXPipeline,
    FluxPipeline,
    HunyuanDiTPipeline,
    HunyuanVideoPipeline,
    MochiPipeline,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    QwenImagePipeline,
    StableDiffusion3Pipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UniPCMultistepScheduler,
    WanPipeline,
    ZImagePipeline,
)
from paralleldit.parallel_backend.errors import UserError
from paralleldit.parallel_backend.text.encoders import load_text_encoders
from paralleldit.tests.tiny_hunyuanvideo import write_text_encoders
from paralleldit.tests.tiny_qwen_image import write_text_encoder
from paralleldit.tests.tiny_zimage import qwen_config, qwen_tokenizer
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    LlamaModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

CLIP_LENGTH = 10
T5_LENGTH = 14


def save_tokenizers(place: Path, t5_length: int | None) -> None:
    """Letter by letter, as both kinds do for words they do not know."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    CLIPTokenizer(
        vocab={piece: index for index, piece in enumerate(pieces)}, merges=[], model_max_length=CLIP_LENGTH
    ).save_pretrained(place / "tokenizer")
    scores = [(piece, 0.0) for piece in ("<pad>", "</s>", "<unk>", "▁", *letters)]
    length = {} if t5_length is None else {"model_max_length": t5_length}
    T5Tokenizer(vocab=scores, extra_ids=0, **length).save_pretrained(place / "tokenizer_2")


def clip_config(width: int, projection: int = 16) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=54,
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CLIP_LENGTH,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        projection_dim=projection,
    )


def save_flux(place: Path, t5_length: int | None = T5_LENGTH) -> Path:
    save_tokenizers(place, t5_length)
    torch.manual_seed(0)
    t5 = T5Config(vocab_size=32, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=3, feed_forward_proj="gated-gelu")
    CLIPTextModel(clip_config(16)).save_pretrained(place / "text_encoder")
    T5EncoderModel(t5).save_pretrained(place / "text_encoder_2")
    (place / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    return place


@pytest.fixture(scope="module")
def flux_folder(tmp_path_factory) -> Path:
    return save_flux(tmp_path_factory.mktemp("flux"))


@pytest.fixture
def offline(monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a hub was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def pipeline_of(folder: Path, dtype: torch.dtype) -> FluxPipeline:
    return FluxPipeline(
        scheduler=None,
        vae=None,
        transformer=None,
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        tokenizer_2=T5Tokenizer.from_pretrained(folder / "tokenizer_2"),
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=dtype),
        text_encoder_2=T5EncoderModel.from_pretrained(folder / "text_encoder_2", dtype=dtype),
    )


PROMPTS = {
    "short": ("red fox", None, None),
    "two prompts": ("red fox", "blue", None),
    "empty": ("", None, None),
    "too long": ("a red fox jumps over the lazy dog", None, None),
    "own length": ("red fox", None, 30),
}


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_conditioning_equals_the_flux_pipeline(flux_folder, dtype):
    encoders = load_text_encoders(flux_folder, device="cpu", dtype=dtype)
    pipeline = pipeline_of(flux_folder, dtype)
    for name, (prompt, prompt_2, length) in PROMPTS.items():
        ours = encoders.encode(prompt, prompt_2, length)
        with torch.no_grad():
            tokens, pooled, _ = pipeline.encode_prompt(prompt, prompt_2, max_sequence_length=length or T5_LENGTH)
        assert ours.tokens.shape == (1, length or T5_LENGTH, 24), name
        assert torch.equal(ours.tokens, tokens), name
        assert torch.equal(ours.pooled, pooled), name


def save_sd3(place: Path) -> Path:
    save_flux(place)
    for folder in ("tokenizer", "text_encoder"):
        (place / f"{folder}_2").rename(place / f"{folder}_3")
    shutil.copytree(place / "tokenizer", place / "tokenizer_2")
    for folder, width, projection in (("text_encoder", 6, 5), ("text_encoder_2", 10, 12)):
        CLIPTextModelWithProjection(clip_config(width, projection)).save_pretrained(place / folder)
    (place / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusion3Pipeline"}))
    return place


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_conditioning_equals_the_sd3_pipeline(dtype, tmp_path):
    folder = save_sd3(tmp_path)
    encoders = load_text_encoders(folder, device="cpu", dtype=dtype)
    clips = {
        name: CLIPTextModelWithProjection.from_pretrained(folder / name, dtype=dtype)
        for name in ("text_encoder", "text_encoder_2")
    }
    pipeline = StableDiffusion3Pipeline(
        scheduler=None,
        vae=None,
        transformer=None,
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        tokenizer_2=CLIPTokenizer.from_pretrained(folder / "tokenizer_2"),
        tokenizer_3=T5Tokenizer.from_pretrained(folder / "tokenizer_3"),
        text_encoder_3=T5EncoderModel.from_pretrained(folder / "text_encoder_3", dtype=dtype),
        **clips,
    )
    for name, (prompt, prompt_2, length) in PROMPTS.items():
        ours = encoders.encode(prompt, prompt_2, length)
        with torch.no_grad():
            tokens, _, pooled, _ = pipeline.encode_prompt(
                prompt,
                prompt,
                prompt_2,
                do_classifier_free_guidance=False,
                max_sequence_length=length or T5_LENGTH,
            )
        assert ours.tokens.shape == (1, CLIP_LENGTH + (length or T5_LENGTH), 24), name
        assert torch.equal(ours.tokens, tokens), name
        assert ours.pooled is not None
        assert torch.equal(ours.pooled, pooled), name


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("pipeline_class", [StableDiffusionXLPipeline, StableDiffusionXLImg2ImgPipeline])
def test_conditioning_equals_the_sdxl_pipelines(pipeline_class, tmp_path):
    """The base model's, and the refiner's of one encoder."""
    save_tokenizers(tmp_path, None)
    shutil.rmtree(tmp_path / "tokenizer_2")
    shutil.copytree(tmp_path / "tokenizer", tmp_path / "tokenizer_2")
    torch.manual_seed(0)
    CLIPTextModelWithProjection(clip_config(10, 12)).save_pretrained(tmp_path / "text_encoder_2")
    is_base = pipeline_class is StableDiffusionXLPipeline
    if is_base:
        CLIPTextModel(clip_config(6)).save_pretrained(tmp_path / "text_encoder")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": pipeline_class.__name__}))
    encoders = load_text_encoders(tmp_path, device="cpu", dtype=torch.float32)
    pipeline = pipeline_class(
        vae=None,
        text_encoder=CLIPTextModel.from_pretrained(tmp_path / "text_encoder") if is_base else None,
        text_encoder_2=CLIPTextModelWithProjection.from_pretrained(tmp_path / "text_encoder_2"),
        tokenizer=CLIPTokenizer.from_pretrained(tmp_path / "tokenizer") if is_base else None,
        tokenizer_2=CLIPTokenizer.from_pretrained(tmp_path / "tokenizer_2"),
        unet=None,
        scheduler=None,
        add_watermarker=False,
    )
    for name in ("short", "two prompts", "empty", "too long"):
        prompt, prompt_2, _ = PROMPTS[name]
        ours = encoders.encode(prompt, prompt_2).tensors()
        with torch.no_grad():
            tokens, _, pooled, _ = pipeline.encode_prompt(prompt, prompt_2, do_classifier_free_guidance=False)
        assert ours.keys() == {"tokens", "pooled"}
        assert torch.equal(ours["tokens"], tokens), name
        assert torch.equal(ours["pooled"], pooled), name


def save_pixart(place: Path, pipeline: str) -> Path:
    save_flux(place)
    for folder in ("tokenizer", "text_encoder"):
        shutil.rmtree(place / folder)
        (place / f"{folder}_2").rename(place / folder)
    (place / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    return place


def save_hunyuandit(place: Path) -> Path:
    save_flux(place)
    for folder in ("tokenizer", "text_encoder"):
        shutil.rmtree(place / folder)
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "fox", "a", "lazy", "dog"]
    BertTokenizer(vocab={piece: index for index, piece in enumerate(pieces)}).save_pretrained(place / "tokenizer")
    bert = BertConfig(
        vocab_size=10,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=80,
    )
    BertModel(bert).save_pretrained(place / "text_encoder")
    config = place / "text_encoder_2" / "config.json"
    config.write_text(config.read_text().replace('"model_type": "t5"', '"model_type": "mt5"'))
    (place / "model_index.json").write_text(json.dumps({"_class_name": "HunyuanDiTPipeline"}))
    return place


MASKED_PROMPTS = ["red fox", "", "  A Red fox ", "a red fox jumps over the lazy dog"]


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("pipeline_class", [PixArtAlphaPipeline, PixArtSigmaPipeline])
def test_conditioning_equals_the_pixart_pipelines(pipeline_class, tmp_path):
    folder = save_pixart(tmp_path, pipeline_class.__name__)
    encoders = load_text_encoders(folder, device="cpu", dtype=torch.float32)
    pipeline = pipeline_class(
        tokenizer=T5Tokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder=T5EncoderModel.from_pretrained(folder / "text_encoder"),
        vae=None,
        transformer=None,
        scheduler=None,
    )
    for prompt in MASKED_PROMPTS:
        for length in (T5_LENGTH, 30):
            ours = encoders.encode(prompt, max_length=length).tensors()
            with torch.no_grad():
                tokens, mask, *_ = pipeline.encode_prompt(prompt, False, max_sequence_length=length)
            assert ours.keys() == {"tokens", "mask"}
            assert torch.equal(ours["tokens"], tokens), prompt
            assert torch.equal(ours["mask"], mask.float()), prompt


@pytest.mark.usefixtures("offline")
def test_conditioning_equals_the_hunyuandit_pipeline(tmp_path):
    folder = save_hunyuandit(tmp_path)
    encoders = load_text_encoders(folder, device="cpu", dtype=torch.float32)
    pipeline = HunyuanDiTPipeline(
        tokenizer=BertTokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder=BertModel.from_pretrained(folder / "text_encoder"),
        tokenizer_2=T5Tokenizer.from_pretrained(folder / "tokenizer_2"),
        text_encoder_2=T5EncoderModel.from_pretrained(folder / "text_encoder_2"),
        vae=None,
        transformer=None,
        scheduler=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    for prompt in MASKED_PROMPTS:
        ours = encoders.encode(prompt, max_length=256).tensors()
        for index, suffix in enumerate(("", "_2")):
            with torch.no_grad():
                tokens, _, mask, _ = pipeline.encode_prompt(
                    prompt, do_classifier_free_guidance=False, text_encoder_index=index
                )
            assert torch.equal(ours[f"tokens{suffix}"], tokens), prompt
            assert torch.equal(ours[f"mask{suffix}"], mask.float()), prompt
        assert len(ours) == 4


def save_wan(place: Path) -> Path:
    save_tokenizers(place, None)
    shutil.rmtree(place / "tokenizer")
    (place / "tokenizer_2").rename(place / "tokenizer")
    torch.manual_seed(0)
    umt5 = UMT5Config(vocab_size=32, d_model=20, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    UMT5EncoderModel(umt5).save_pretrained(place / "text_encoder")
    (place / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    return place


@pytest.mark.usefixtures("offline")
def test_conditioning_equals_the_wan_pipeline(tmp_path):
    folder = save_wan(tmp_path)
    encoders = load_text_encoders(folder, device="cpu", dtype=torch.float32)
    pipeline = WanPipeline(
        tokenizer=T5Tokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder=UMT5EncoderModel.from_pretrained(folder / "text_encoder"),
        vae=None,
        scheduler=UniPCMultistepScheduler(),
    )
    for prompt in (*MASKED_PROMPTS, "fox &amp;amp; dog\n in  &lt;snow&gt;"):
        ours = encoders.encode(prompt).tensors()
        with torch.no_grad():
            tokens, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=512)
        assert ours.keys() == {"tokens"}
        assert torch.equal(ours["tokens"], tokens), prompt
        assert tokens.shape == (1, 512, 20)


@pytest.mark.usefixtures("offline")
def test_conditioning_equals_the_zimage_pipeline(tmp_path):
    tokenizer = qwen_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    torch.manual_seed(0)
    Qwen3Model(qwen_config(len(tokenizer))).save_pretrained(tmp_path / "text_encoder")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "ZImagePipeline"}))
    encoders = load_text_encoders(tmp_path, device="cpu", dtype=torch.float32)
    pipeline = ZImagePipeline(
        tokenizer=Qwen2Tokenizer.from_pretrained(tmp_path / "tokenizer"),
        text_encoder=Qwen3Model.from_pretrained(tmp_path / "text_encoder"),
        vae=None,
        transformer=None,
        scheduler=None,
    )
    for prompt, max_length in (("", None), ("a red fox", None), ("A fox,\n  in snow!", None), ("a red fox", 9)):
        ours = encoders.encode(prompt, max_length=max_length).tensors()
        with torch.no_grad():
            (tokens,), _ = pipeline.encode_prompt(
                prompt,
                device=torch.device("cpu"),
                do_classifier_free_guidance=False,
                max_sequence_length=max_length or 512,
            )
        assert ours.keys() == {"tokens"}
        assert torch.equal(ours["tokens"], tokens[None]), prompt


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(("kind", "length"), [(CogVideoXPipeline, 226), (MochiPipeline, 256)])
def test_conditioning_equals_the_video_pipelines_of_t5(tmp_path, kind, length):
    save_tokenizers(tmp_path, None)
    shutil.rmtree(tmp_path / "tokenizer")
    (tmp_path / "tokenizer_2").rename(tmp_path / "tokenizer")
    torch.manual_seed(0)
    T5EncoderModel(T5Config(vocab_size=32, d_model=20, d_kv=8, d_ff=32, num_layers=2, num_heads=2)).save_pretrained(
        tmp_path / "text_encoder"
    )
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": kind.__name__}))
    encoders = load_text_encoders(tmp_path, device="cpu", dtype=torch.float32)
    tokenizer = T5Tokenizer.from_pretrained(tmp_path / "tokenizer")
    encoder = T5EncoderModel.from_pretrained(tmp_path / "text_encoder")
    pipeline = kind(tokenizer=tokenizer, text_encoder=encoder, vae=None, transformer=None, scheduler=None)
    for prompt in MASKED_PROMPTS:
        ours = encoders.encode(prompt).tensors()
        with torch.no_grad():
            tokens, mask, *_ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)
        assert torch.equal(ours["tokens"], tokens), prompt
        assert tokens.shape == (1, length, 20)
        assert ours.keys() == ({"tokens"} if mask is None else {"tokens", "mask"})
        assert mask is None or torch.equal(ours["mask"], mask.float())


@pytest.mark.usefixtures("offline")
def test_conditioning_equals_the_hunyuanvideo_pipeline(tmp_path):
    write_text_encoders(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "HunyuanVideoPipeline"}))
    encoders = load_text_encoders(tmp_path, device="cpu", dtype=torch.float32)
    pipeline = HunyuanVideoPipeline(
        tokenizer=PreTrainedTokenizerFast.from_pretrained(tmp_path / "tokenizer"),
        text_encoder=LlamaModel.from_pretrained(tmp_path / "text_encoder"),
        tokenizer_2=CLIPTokenizer.from_pretrained(tmp_path / "tokenizer_2"),
        text_encoder_2=CLIPTextModel.from_pretrained(tmp_path / "text_encoder_2"),
        vae=None,
        transformer=None,
        scheduler=None,
    )
    for prompt, max_length in (("", None), ("a red fox in snow!", None), ("a red fox", 2)):
        ours = encoders.encode(prompt, max_length=max_length).tensors()
        with torch.no_grad():
            tokens, pooled, mask = pipeline.encode_prompt(
                prompt,
                device=torch.device("cpu"),
                max_sequence_length=max_length or 256,
            )
        assert ours.keys() == {"tokens", "pooled"}
        assert 0 < mask.sum() < 256
        assert torch.equal(ours["tokens"], tokens[mask.bool()][None]), prompt
        assert torch.equal(ours["pooled"], pooled), prompt


@pytest.mark.usefixtures("offline")
def test_conditioning_equals_the_qwen_image_pipeline(tmp_path):
    torch.manual_seed(0)
    write_text_encoder(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "QwenImagePipeline"}))
    encoders = load_text_encoders(tmp_path, device="cpu", dtype=torch.float32)
    pipeline = QwenImagePipeline(
        tokenizer=Qwen2Tokenizer.from_pretrained(tmp_path / "tokenizer"),
        text_encoder=Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "text_encoder"),
        vae=None,
        transformer=None,
        scheduler=None,
    )
    for prompt, max_length in (("", None), ("A fox,\n  in snow!", None), ("a red fox", 160)):
        ours = encoders.encode(prompt, max_length=max_length).tensors()
        with torch.no_grad():
            tokens, mask = pipeline.encode_prompt(
                prompt, device=torch.device("cpu"), max_sequence_length=max_length or 1024
            )
        assert mask is None
        assert ours.keys() == {"tokens"}
        assert ours["tokens"].shape == tokens.shape
        torch.testing.assert_close(ours["tokens"], tokens, rtol=0, atol=1e-6)


def test_what_is_cut_off_is_logged(flux_folder, caplog):
    load_text_encoders(flux_folder, device="cpu", dtype=torch.float32).encode("abcdefghijklmnop")
    assert "18 tokens, only the first 14" in caplog.text
    assert "18 tokens, only the first 10" in caplog.text


def test_what_is_cut_off_is_told_to_whoever_asks(flux_folder):
    told = []
    load_text_encoders(flux_folder, device="cpu", dtype=torch.float32).encode("abcdefghijklmnop", warn=told.append)
    assert [text.partition(" are used")[0] for text in told] == [
        "The prompt has 18 tokens, only the first 14",
        "The prompt has 18 tokens, only the first 10",
    ]


@pytest.mark.parametrize(("saved", "expected"), [(14, 14), (512, 512), (4096, 512), (None, 512)])
def test_the_default_length_is_the_tokenizers_where_it_makes_sense(saved, expected, tmp_path):
    encoders = load_text_encoders(save_flux(tmp_path, saved), device="cpu", dtype=torch.float32)
    assert encoders.default_length == expected
    assert encoders.encode("fox").tokens.shape == (1, expected, 24)


def test_a_length_without_tokens_is_refused(flux_folder):
    with pytest.raises(UserError, match="max_length is 0"):
        load_text_encoders(flux_folder, device="cpu", dtype=torch.float32).encode("fox", max_length=0)


def edit_tensors(file: Path, edit: Callable[[dict], object]) -> None:
    state = load_file(file)
    edit(state)
    save_file(state, file, metadata={"format": "pt"})


def drop_clip_tensor(folder: Path) -> None:
    edit_tensors(folder / "text_encoder/model.safetensors", lambda state: state.pop(max(state)))


def cut_clip_tensor(folder: Path) -> None:
    def cut(state: dict) -> None:
        state[max(state)] = state[max(state)][:3].clone()

    edit_tensors(folder / "text_encoder/model.safetensors", cut)


def swap_encoders(folder: Path) -> None:
    shutil.rmtree(folder / "text_encoder")
    shutil.copytree(folder / "text_encoder_2", folder / "text_encoder")


def swap_tokenizer(folder: Path) -> None:
    shutil.rmtree(folder / "tokenizer_2")
    letters = [(chr(code), 0.0) for code in range(200, 300)]
    T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters], extra_ids=0).save_pretrained(
        folder / "tokenizer_2"
    )


def empty_tokenizer(folder: Path) -> None:
    for file in (folder / "tokenizer_2").iterdir():
        file.unlink()


BROKEN = {
    "no index": (lambda folder: (folder / "model_index.json").unlink(), "model_index.json does not exist"),
    "no JSON": (lambda folder: (folder / "model_index.json").write_text("{"), "model_index.json cannot be read"),
    "other pipeline": (
        lambda folder: (folder / "model_index.json").write_text('{"_class_name": "LattePipeline"}'),
        "is a LattePipeline, .* known are FluxPipeline",
    ),
    "no encoder": (lambda folder: shutil.rmtree(folder / "text_encoder_2"), "no subfolder text_encoder_2"),
    "no tokenizer": (lambda folder: shutil.rmtree(folder / "tokenizer"), "no subfolder tokenizer"),
    "empty tokenizer": (empty_tokenizer, "tokenizer_2 holds no tokenizer: there is none of spiece.model, tokenizer"),
    "broken tokenizer": (
        lambda folder: (folder / "tokenizer/tokenizer.json").write_text("{"),
        "text_encoder cannot be loaded",
    ),
    "other tokenizer": (swap_tokenizer, "tokenizer_2 has 103 tokens, .*text_encoder_2 knows 32"),
    "other encoder": (swap_encoders, "text_encoder holds a model of the type t5, expected was clip_text_model"),
    "no weights": (lambda folder: (folder / "text_encoder/model.safetensors").unlink(), "No safetensors weights"),
    "truncated": (lambda folder: os.truncate(folder / "text_encoder_2/model.safetensors", 5000), "truncated"),
    "tensor missing": (drop_clip_tensor, "text_encoder lacks 1 of its encoder's tensors"),
    "tensor of another shape": (cut_clip_tensor, "text_encoder cannot be loaded"),
}


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(("damage", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_folder_is_named(damage: Callable[[Path], object], message: str, flux_folder, tmp_path):
    folder = tmp_path / "flux"
    shutil.copytree(flux_folder, folder)
    damage(folder)
    with pytest.raises(UserError, match=message):
        load_text_encoders(folder, device="cpu", dtype=torch.float32)
