"""Ranks that would do different work find out before they start, all with the same error."""

import contextlib

import pytest
import torch
from paralleldit.parallel_backend.engine.agreement import file_key
from paralleldit.parallel_backend.engine.engine import Engine
from paralleldit.parallel_backend.errors import UserError
from paralleldit.parallel_backend.files.states import FileStates
from paralleldit.parallel_backend.layout.layout import Layout
from paralleldit.parallel_backend.protocol.messages import Adapters, LoraRef, ModelRef, VaeRef
from paralleldit.tests.ranks.stale_flux import HEADS, WIDTH, request_of, run_of
from paralleldit.tests.tiny_models import CPU, TINY_MODELS
from safetensors.torch import save_file

SEED = {"seed": 43}
LAYOUT = {"layout": Layout(ring_degree=3)}
LATENT = {"latent": torch.zeros(1, 16, 8, 8)}


def refusal(world, folders, odd_rank, fields, odd_tensors):
    """The error of a rank that works in `folders[rank]`; the `odd_rank` has another request or tensors."""
    request, tensors = request_of(Layout(ulysses_degree=3), 2, (8, 8), "euler")
    request = request.model_copy(update={"model": ModelRef(path="model.safetensors")})
    run, _ = run_of(request)
    if world.rank == odd_rank:
        request, tensors = request.model_copy(update=fields), {**tensors, **odd_tensors}
    engine = Engine(CPU)
    with contextlib.chdir(folders[world.rank]):
        try:
            engine.handle(request, tensors, run)
        except UserError as error:
            return error.message
        return None


@pytest.fixture
def folders(tmp_path):
    """One for each rank; in all of them the same file, broken in the same way."""
    folders = [tmp_path / str(rank) for rank in range(3)]
    for folder in folders:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(bytes(100_000))
    return folders


@pytest.mark.parametrize(
    ("odd_rank", "fields", "tensors", "what"),
    [
        (2, SEED, {}, "the request: rank 0 has another than rank 2;"),
        (1, LAYOUT, {}, "the request: rank 0 has another than rank 1;"),
        (0, {}, LATENT, "the request: rank 0 has another than rank 1, 2;"),
    ],
    ids=["seed", "layout", "tensors"],
)
def test_another_request_is_refused_with_the_ranks_that_have_it(ranks, folders, odd_rank, fields, tensors, what):
    (message,) = set(ranks.run(3, refusal, folders, odd_rank, fields, tensors))
    assert f"disagree on {what}" in message


@pytest.mark.parametrize("change", ["another", "shorter", "missing"])
def test_another_file_is_refused_with_the_ranks_that_have_it(ranks, folders, change):
    file = folders[1] / "model.safetensors"
    if change == "missing":
        file.unlink()
    else:
        file.write_bytes(bytes(60_000) + b"\1" * 40_000 if change == "another" else bytes(99_999))
    (message,) = set(ranks.run(3, refusal, folders, None, {}, {}))
    assert "disagree on the file model.safetensors: rank 0 has another than rank 1;" in message


def test_ranks_that_agree_meet_the_fault_of_their_file_together(ranks, folders):
    (message,) = set(ranks.run(3, refusal, folders, None, {}, {}))
    assert "model.safetensors is not a valid safetensors file" in message


def refused_and_again(world, layout, other, fields):
    """The error of a request with other `fields`, and what the same engine then samples with the model `other`."""
    engine, message = Engine(CPU), None
    request, tensors = request_of(layout, 2, (8, 8), "euler")
    request = request.model_copy(update={"model": ModelRef(path=other)})
    try:
        engine.handle(request.model_copy(update=fields), tensors, run_of(request)[0])
    except UserError as error:
        message = error.message
    return message, engine.handle(request, tensors, run_of(request)[0])[1]["latent"]


@pytest.mark.parametrize("fault", ["weights", "LoRA"])
def test_what_a_rank_finds_in_its_part_of_a_file_is_refused_by_all(ranks, tmp_path, fault):
    model = TINY_MODELS["flux dev"].make(HEADS)
    model.save_pretrained(tmp_path / "right")
    model.single_transformer_blocks[-1].proj_out.weight.data[0, 0] = 1e6
    model.save_pretrained(tmp_path / "large")
    # Each stage finds another layer that this LoRA does not fit.
    layers = {"transformer_blocks.0.attn.to_q": WIDTH - 1, "single_transformer_blocks.1.attn.to_q": WIDTH + 1}
    lora = {f"transformer.{name}.lora_A.weight": torch.ones(2, width) for name, width in layers.items()}
    lora |= {f"transformer.{name}.lora_B.weight": torch.ones(WIDTH, 2) for name in layers}
    save_file(lora, tmp_path / "lora.safetensors")
    fields, words = {
        "weights": ({"model": ModelRef(path=str(tmp_path / "large"), weight_dtype="fp16")}, "proj_out.weight holds"),
        "LoRA": ({"adapters": Adapters(files=(LoraRef(path=str(tmp_path / "lora.safetensors")),))}, "A LoRA changes"),
    }[fault]
    layout = Layout(pipefusion_degree=2, num_patches=2)
    (one, latent), (other, same) = ranks.run(2, refused_and_again, layout, str(tmp_path / "right"), fields)
    assert words in one
    assert one == other
    assert torch.equal(latent, same)


def test_of_a_pipeline_folder_the_own_component_counts(tmp_path):
    for part in ("transformer", "vae", "text_encoder"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text("{}")
    refs = [ModelRef(path=str(tmp_path)), VaeRef(path=str(tmp_path))]
    before = [file_key(ref, FileStates()) for ref in refs]
    (tmp_path / "text_encoder" / "config.json").write_text("{ }")
    assert [file_key(ref, FileStates()) for ref in refs] == before
    (tmp_path / "vae" / "config.json").write_text("{ }")
    assert [file_key(ref, FileStates()) == key for ref, key in zip(refs, before, strict=True)] == [True, False]
