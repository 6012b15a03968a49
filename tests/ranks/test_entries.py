"""Several prompts a side, areas, masks, strengths, time ranges and reference pictures, on real ranks."""

from unittest import mock

import pytest
import torch
from diffusers import FluxTransformer2DModel
from paralleldit.parallel_backend.adapters.controlnet.residuals import GivenResiduals
from paralleldit.parallel_backend.attention.kernels import KERNELS
from paralleldit.parallel_backend.attention.usp import AttentionCore
from paralleldit.parallel_backend.distributed.mesh import Mesh
from paralleldit.parallel_backend.engine import sample
from paralleldit.parallel_backend.families.condition import Condition
from paralleldit.parallel_backend.layout.layout import Layout
from paralleldit.parallel_backend.protocol.messages import Conditioning
from paralleldit.parallel_backend.strategies import select
from paralleldit.parallel_backend.strategies.sequence import SequenceParallel
from paralleldit.tests.ranks.stale_flux import HEADS, WIDTH, StaleModel, make_family, relative_error, request_of, run_of
from paralleldit.tests.tiny_models import GUIDANCE, TINY_MODELS

SIZE = (11, 9)
LEFT = torch.linspace(1, 0, SIZE[1]).expand(1, *SIZE)
WHOLE = (
    {"guidance": GUIDANCE, "strength": 0.7},
    {"guidance": GUIDANCE, "region": LEFT},
    {"guidance": GUIDANCE, "region": 1 - LEFT, "strength": 0.4},
)
"""Entries that PipeFusion takes: the picture's weights of three prompts."""
PLACED = (
    {"guidance": GUIDANCE, "end": 0.6},
    {"guidance": 4.0, "area": (6, 5, 2, 4)},
    {"guidance": GUIDANCE, "start": 0.6, "region": LEFT, "area": (11, 6, 0, 0)},
)


def run_with(world, layout, steps, entries, warmup=None):
    """A run of stale_flux.py with these entries in place of its positive prompt, each of a text of another length."""
    request, tensors = request_of(layout, steps, SIZE, "euler")
    draw = torch.Generator().manual_seed(8)
    for index, entry in enumerate(entries):
        tensors[f"positive.{index}.tokens"] = torch.randn(1, 4 + 5 * index, 24, generator=draw)
        tensors[f"positive.{index}.pooled"] = torch.randn(1, 12, generator=draw)
        if "region" in entry:
            tensors[f"positive.{index}.region"] = entry["region"]
    positive = tuple(Conditioning(**{key: entry[key] for key in entry if key != "region"}) for entry in entries)
    request = request.model_copy(update={"positive": positive})
    return sample.sample(request, tensors, make_family(), Mesh(layout), run_of(request)[0])["latent"]


def run_with_stale_model(world, patches, warmup, steps, entries):
    with mock.patch.object(
        select, "SequenceParallel", type("", (StaleModel,), {"patches": patches, "warmup_evaluations": warmup})
    ):
        return run_with(world, Layout(), steps, entries)


@pytest.mark.parametrize(
    ("layout", "entries"),
    [
        (Layout(cfg_degree=2), PLACED),
        (Layout(ulysses_degree=2), PLACED),
        (Layout(ulysses_degree=2, cfg_degree=2), PLACED),
        (Layout(cfg_degree=2, data_degree=2), (*WHOLE, *PLACED)),
        (Layout(distrifusion_degree=2, cfg_degree=2, warmup_steps=4), (*WHOLE, PLACED[1])),
    ],
    ids=str,
)
def test_placed_entries_give_what_one_rank_gives(ranks, layout, entries):
    (alone,) = ranks.once(1, run_with, Layout(), 4, entries)
    (plain,) = ranks.once(1, run_with, Layout(), 4, entries[:1])
    assert relative_error(plain, alone) > 1e-3
    for answer in ranks.run(layout.ranks, run_with, layout, 4, entries):
        assert relative_error(answer, alone) <= 1e-5


@pytest.mark.parametrize("cfg_degree", [1, 2])
def test_pipefusion_keeps_the_keys_of_every_entry(ranks, cfg_degree):
    layout = Layout(pipefusion_degree=2, num_patches=3, warmup_steps=1, cfg_degree=cfg_degree)
    (expected,) = ranks.once(1, run_with_stale_model, 3, 1, 4, WHOLE)
    (alone,) = ranks.once(1, run_with, Layout(), 4, WHOLE)
    assert relative_error(expected, alone) > 1e-4
    for answer in ranks.run(layout.ranks, run_with, layout, 4, WHOLE):
        assert relative_error(answer, expected) <= 1e-5


# -- reference pictures --------------------------------------------------------------------------------------------

REFERENCES = ((6, 5), (4, 10))
"""Rows and columns of their latents."""
POSITIONS = {
    "offset": [(1, 0, 0), (1, 3, 0)],
    "index": [(1, 0, 0), (2, 0, 0)],
    "uxo": [(0, 6, 5), (0, 9, 8)],
}
"""By rule: index, row and column of the first token of each reference, in tokens."""


def reference_inputs(places):
    draw = torch.Generator().manual_seed(9)
    rand = lambda *shape: torch.randn(*shape, generator=draw)  # noqa: E731
    latent, pictures = rand(2, 16, *SIZE), (rand(1, 16, *REFERENCES[0]), rand(2, 16, *REFERENCES[1]))
    tokens, pooled = rand(1, 7, 24), rand(1, 12)
    # A ControlNet adds to the picture's tokens alone.
    control = GivenResiduals((rand(2, 30, WIDTH),), {0: 0})
    told = {"guidance": GUIDANCE, "references": pictures, "reference_places": places}
    return latent, Condition({"tokens": tokens, "pooled": pooled}, **told, controls=(control,))


def predicted(world, layout):
    mesh, family = Mesh(layout), make_family()
    strategy = SequenceParallel(family, mesh.sequence, AttentionCore(mesh.ulysses, mesh.ring, KERNELS["sdpa"]))
    inputs = {places: reference_inputs(places) for places in POSITIONS}
    return {
        places: strategy.predict(latent, torch.full((2,), 0.7), condition)
        for places, (latent, condition) in inputs.items()
    }


def patched(latent):
    """Tokens `[B, rows, columns, 4 C]`, with the first row and column again after an odd last one."""
    padded = torch.nn.functional.pad(latent, (0, latent.shape[3] % 2, 0, latent.shape[2] % 2), mode="circular")
    tokens = padded.unfold(2, 2, 2).unfold(3, 2, 2)
    return tokens.permute(0, 2, 3, 1, 4, 5).flatten(3)


def plain_prediction(transformer: FluxTransformer2DModel, places):
    """By plain diffusers, with the references' tokens and ids after the picture's, as its FluxKontextPipeline does."""
    latent, condition = reference_inputs(places)
    pictures = [latent, *(each.expand(2, -1, -1, -1) for each in condition.references)]
    tokens, ids = [], []
    for picture, (index, top, left) in zip(pictures, [(0, 0, 0), *POSITIONS[places]], strict=True):
        grid = patched(picture)
        rows, columns = torch.arange(grid.shape[1]) + top, torch.arange(grid.shape[2]) + left
        axes = torch.meshgrid(torch.tensor([index]), rows, columns, indexing="ij")
        ids.append(torch.stack(axes, dim=-1).reshape(-1, 3).float())
        tokens.append(grid.flatten(1, 2))
    (residual,) = condition.controls[0].given
    residual = torch.cat((residual, *(torch.zeros(2, each.shape[1], WIDTH) for each in tokens[1:])), dim=1)
    output = transformer(
        hidden_states=torch.cat(tokens, dim=1),
        controlnet_block_samples=[residual, torch.zeros_like(residual)],
        encoder_hidden_states=condition["tokens"].expand(2, -1, -1),
        pooled_projections=condition["pooled"].expand(2, -1),
        timestep=torch.full((2,), 0.7),
        img_ids=torch.cat(ids),
        txt_ids=torch.zeros(7, 3),
        guidance=torch.full((2,), GUIDANCE),
    ).sample[:, : tokens[0].shape[1]]
    rows, columns = -(-SIZE[0] // 2), -(-SIZE[1] // 2)
    output = output.view(2, rows, columns, 16, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return output.reshape(2, 16, 2 * rows, 2 * columns)[..., : SIZE[0], : SIZE[1]]


@pytest.mark.parametrize("layout", [Layout(ulysses_degree=2), Layout(ulysses_degree=2, ring_degree=2)], ids=str)
def test_references_are_seen_as_plain_diffusers_sees_them(ranks, layout):
    transformer = TINY_MODELS["flux dev"].make(HEADS)
    with torch.inference_mode():
        expected = {places: plain_prediction(transformer, places) for places in POSITIONS}
    assert relative_error(expected["index"], expected["offset"]) > 1e-4
    for answers in ranks.run(layout.ranks, predicted, layout):
        for places, answer in answers.items():
            assert relative_error(answer, expected[places]) <= 1e-5, places
