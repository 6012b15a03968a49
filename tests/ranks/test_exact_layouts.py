"""Every exact layout gives what the plain diffusers transformer gives in one process."""

import pytest
import torch
from diffusers import FluxTransformer2DModel
from paralleldit.parallel_backend.attention.core import AttentionCore
from paralleldit.parallel_backend.attention.kernels import KERNELS
from paralleldit.parallel_backend.comm import split_sizes
from paralleldit.parallel_backend.errors import UserError
from paralleldit.parallel_backend.families.base import Condition
from paralleldit.parallel_backend.families.flux import Flux
from paralleldit.parallel_backend.layout import Layout
from paralleldit.parallel_backend.mesh import Mesh
from paralleldit.parallel_backend.parts import Part
from paralleldit.parallel_backend.protocol.messages import Conditioning, ModelRef, Sample, Schedule
from paralleldit.parallel_backend.sample_request import sample
from paralleldit.parallel_backend.sampling.model_sampling import DiscreteFlow
from paralleldit.parallel_backend.strategies.guidance import Guidance
from paralleldit.parallel_backend.strategies.sequence import SequenceParallel
from paralleldit.parallel_backend.transformer import Transformer

CPU = torch.device("cpu")
CFG = 3.0

LAYOUTS = [
    # ulysses, ring, cfg, data
    (1, 1, 1, 1),
    (2, 1, 1, 1),
    (1, 2, 1, 1),
    (1, 1, 2, 1),
    (1, 1, 1, 2),
    (3, 1, 1, 1),
    (1, 3, 1, 1),
    (4, 1, 1, 1),
    (1, 4, 1, 1),
    (2, 2, 1, 1),
    (2, 1, 2, 1),
    (1, 2, 2, 1),
    (2, 1, 1, 2),
    (1, 2, 1, 2),
    (1, 1, 2, 2),
    (5, 1, 1, 1),
    (3, 2, 1, 1),
    (3, 1, 2, 1),
    (7, 1, 1, 1),
    (8, 1, 1, 1),
    (1, 8, 1, 1),
    (4, 2, 1, 1),
    (2, 4, 1, 1),
    (4, 1, 2, 1),
    (1, 4, 2, 1),
    (2, 2, 2, 1),
    (2, 2, 1, 2),
    (2, 1, 2, 2),
    (1, 2, 2, 2),
    (4, 1, 1, 2),
    (1, 1, 2, 4),
]
SPREAD = [
    # Layouts in which no rank holds the whole model
    Layout(tensor_degree=2),
    Layout(tensor_degree=3),
    Layout(tensor_degree=4),
    Layout(tensor_degree=8),
    Layout(tensor_degree=2, ulysses_degree=2),
    Layout(tensor_degree=2, ring_degree=2),
    Layout(tensor_degree=2, cfg_degree=2),
    Layout(tensor_degree=3, data_degree=2),
    Layout(tensor_degree=2, ulysses_degree=2, ring_degree=2),
    Layout(tensor_degree=2, ulysses_degree=2, cfg_degree=2),
    Layout(weights="offloaded"),
    Layout(ulysses_degree=2, weights="sharded"),
    Layout(ring_degree=3, weights="sharded"),
    Layout(ulysses_degree=2, ring_degree=2, weights="offloaded"),
    Layout(cfg_degree=2, data_degree=2, weights="sharded"),
    Layout(ulysses_degree=4, cfg_degree=2, weights="sharded"),
    Layout(tensor_degree=2, ulysses_degree=2, weights="sharded"),
    Layout(tensor_degree=3, cfg_degree=2, weights="sharded"),
    Layout(tensor_degree=2, ring_degree=2, data_degree=2, weights="offloaded"),
]
SHAPES = [
    # heads, latent height and width, text tokens, batch
    (4, 8, 8, 16, 4),
    (3, 7, 9, 5, 4),
    (2, 2, 2, 3, 4),
]


def make_model(heads: int, guidance: bool) -> FluxTransformer2DModel:
    with torch.random.fork_rng():
        torch.manual_seed(11)
        return FluxTransformer2DModel(
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=heads,
            joint_attention_dim=24,
            pooled_projection_dim=12,
            guidance_embeds=guidance,
            axes_dims_rope=(4, 6, 6),
        ).eval()


def make_inputs(height, width, text, batch):
    generator = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    latent = draw(batch, 16, height, width)
    positive = Condition(tokens=draw(1, text, 24), pooled=draw(1, 12), guidance=2.5)
    # The negative prompt has another length, and one text for every picture.
    negative = Condition(tokens=draw(batch, text + 3, 24), pooled=draw(batch, 12), guidance=2.5)
    return latent, positive, negative


def plain_denoised(model, latent, sigma, condition):
    """The stock diffusers forward, with the packing written out here independently."""
    batch, channels, height, width = latent.shape
    rows, columns = -(-height // 2), -(-width // 2)
    padded = torch.nn.functional.pad(latent, (0, width % 2, 0, height % 2), mode="circular")
    tokens = padded.view(batch, channels, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5)
    ids = torch.stack(
        [torch.zeros(rows, columns), *torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")], dim=-1
    )
    output = model(
        hidden_states=tokens.reshape(batch, rows * columns, channels * 4),
        encoder_hidden_states=condition.tokens.expand(batch, -1, -1),
        pooled_projections=condition.pooled.expand(batch, -1),
        timestep=torch.full((batch,), sigma),
        img_ids=ids.reshape(-1, 3),
        txt_ids=torch.zeros(condition.tokens.shape[1], 3),
        guidance=torch.full((batch,), condition.guidance) if model.config.guidance_embeds else None,
    ).sample
    velocity = output.view(batch, rows, columns, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return latent - sigma * velocity.reshape(batch, channels, rows * 2, columns * 2)[..., :height, :width]


def guided(world, degrees, guidance, shape, dtype):
    """One guided prediction, this rank's part of the batch gathered to the whole."""
    family = Flux(make_model(shape[0], guidance).to(dtype), dtype, CPU)
    return guided_by(family, Mesh(layout_of(degrees)), shape)


def guided_by_part(world, layout, path, shape, dtype):
    """Two guided predictions, of which the second finds what the first left behind."""
    mesh = Mesh(layout)
    transformer = Transformer(path, CPU, dtype, Part.of(layout, mesh))
    guided_by(transformer.on(mesh), mesh, shape)
    return guided_by(transformer.on(mesh), mesh, shape)


def guided_by(family, mesh, shape):
    _, height, width, text, batch = shape
    latent, positive, negative = make_inputs(height, width, text, batch)
    counts = split_sizes(batch, mesh.data.size)
    own = slice(sum(counts[: mesh.data.rank]), sum(counts[: mesh.data.rank + 1]))
    attention = AttentionCore(mesh.ulysses, mesh.ring, KERNELS["sdpa"])
    predict = SequenceParallel(family, mesh.sequence, attention).predict
    guide = Guidance(
        predict, DiscreteFlow(1.0, 1.0), mesh.cfg, positive.part(own, batch), negative.part(own, batch), CFG
    )
    return mesh.data.all_gather(guide.denoised(latent[own], torch.tensor(0.7)), counts, dim=0)


def layout_of(degrees) -> Layout:
    ulysses, ring, cfg, data = degrees
    return Layout(ulysses_degree=ulysses, ring_degree=ring, cfg_degree=cfg, data_degree=data)


def relative_error(actual, expected) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def expected():
    """Plain diffusers predictions, computed once per shape."""
    answers = {}

    def of(guidance, shape):
        if (guidance, shape) not in answers:
            heads, height, width, text, batch = shape
            model = make_model(heads, guidance)
            latent, positive, negative = make_inputs(height, width, text, batch)
            with torch.inference_mode():
                yes, no = (plain_denoised(model, latent, 0.7, condition) for condition in (positive, negative))
            answers[guidance, shape] = no + CFG * (yes - no)
        return answers[guidance, shape]

    return of


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "{}heads-{}x{}-text{}-batch{}".format(*shape))
@pytest.mark.parametrize("degrees", LAYOUTS, ids=lambda degrees: "ulysses{}-ring{}-cfg{}-data{}".format(*degrees))
def test_layout_equals_plain_diffusers(ranks, figures, expected, degrees, shape):
    layout = layout_of(degrees)
    row = f"{layout.ranks} | {layout}"
    for guidance in (False, True) if shape == SHAPES[0] else (True,):
        for answer in ranks.run(layout.ranks, guided, degrees, guidance, shape, torch.float32):
            error = relative_error(answer, expected(guidance, shape))
            figures[row] = max(error, figures.get(row, 0.0))
            assert error <= 1e-5


@pytest.mark.parametrize("degrees", [(2, 1, 1, 1), (1, 2, 1, 1), (2, 2, 2, 1)], ids=str)
def test_layout_in_bf16_stays_within_its_rounding(ranks, degrees):
    shape = SHAPES[0]
    (alone,) = ranks.run(1, guided, (1, 1, 1, 1), True, shape, torch.bfloat16)
    (exact,) = ranks.run(1, guided, (1, 1, 1, 1), True, shape, torch.float32)
    rounding = relative_error(alone, exact)
    answer = ranks.run(layout_of(degrees).ranks, guided, degrees, True, shape, torch.bfloat16)[0]
    assert relative_error(answer, exact) <= 2 * rounding


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    """The file of a model with as many heads, which ranks read their parts from."""

    def of(heads):
        folder = tmp_path_factory.getbasetemp() / f"flux-{heads}-heads"
        if not folder.exists():
            make_model(heads, guidance=True).save_pretrained(folder)
        return folder

    return of


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "{}heads-{}x{}-text{}-batch{}".format(*shape))
@pytest.mark.parametrize("layout", SPREAD, ids=str)
def test_parts_of_a_model_equal_plain_diffusers(ranks, figures, expected, model_path, layout, shape):
    row = f"{layout.ranks} | {layout}"
    for answer in ranks.run(layout.ranks, guided_by_part, layout, model_path(shape[0]), shape, "auto"):
        error = relative_error(answer, expected(True, shape))
        figures[row] = max(error, figures.get(row, 0.0))
        assert error <= 1e-5


@pytest.mark.parametrize("layout", [SPREAD[0], SPREAD[9], SPREAD[-3]], ids=str)
def test_parts_of_a_model_in_bf16_stay_within_its_rounding(ranks, model_path, layout):
    shape = SHAPES[0]
    (alone,) = ranks.run(1, guided, (1, 1, 1, 1), True, shape, torch.bfloat16)
    (exact,) = ranks.run(1, guided, (1, 1, 1, 1), True, shape, torch.float32)
    rounding = relative_error(alone, exact)
    answer = ranks.run(layout.ranks, guided_by_part, layout, model_path(shape[0]), shape, "bf16")[0]
    assert relative_error(answer, exact) <= 2 * rounding


class QuietRun:
    """A run that nobody watches."""

    def progress(self, *args):
        pass

    def log(self, *args):
        pass

    def check_cancelled(self):
        pass


def sampled(world, degrees, sampler, batch_index, masked, spoilt=False):
    heads, height, width, text, batch = SHAPES[0]
    family = Flux(make_model(heads, True), torch.float32, CPU)
    latent, positive, negative = make_inputs(height, width, text, batch)
    request = Sample(
        id=1,
        model=ModelRef(path="unused"),
        layout=layout_of(degrees),
        positive=(Conditioning(guidance=2.5),),
        negative=(Conditioning(guidance=2.5),),
        cfg=CFG,
        sampler=sampler,
        schedule=Schedule(scheduler="simple", steps=4, denoise=0.8),
        seed=42,
        batch_index=batch_index,
    )
    tensors = {
        "latent": latent,
        "positive.0.tokens": positive.tokens,
        "positive.0.pooled": positive.pooled,
        "negative.0.tokens": negative.tokens,
        "negative.0.pooled": negative.pooled,
    }
    if spoilt:
        tensors["negative.0.tokens"][0] = torch.nan
    if masked:
        tensors["noise_mask"] = torch.linspace(0, 1, batch * 16 * 16).view(batch, 1, 16, 16).round()
    return sample(request, tensors, family, Mesh(request.layout), QuietRun())


@pytest.mark.parametrize(
    ("degrees", "sampler", "batch_index", "masked"),
    [
        ((2, 1, 1, 1), "euler", None, False),
        ((1, 2, 2, 1), "dpmpp_2m", None, True),
        ((1, 1, 1, 2), "euler_ancestral", None, True),
        ((1, 1, 2, 2), "dpmpp_2m_sde", (3, 1, 1, 0), False),
        ((2, 1, 2, 2), "ddim", None, True),
    ],
    ids=str,
)
def test_whole_run_equals_one_rank(ranks, degrees, sampler, batch_index, masked):
    (alone,) = ranks.run(1, sampled, (1, 1, 1, 1), sampler, batch_index, masked)
    for answer in ranks.run(layout_of(degrees).ranks, sampled, degrees, sampler, batch_index, masked):
        assert relative_error(answer, alone) <= 1e-5


def failure_of_run(world, degrees):
    try:
        sampled(world, degrees, "euler", None, False, spoilt=True)
    except UserError as error:
        return str(error)


def test_prediction_that_breaks_on_one_replica_stops_all_alike(ranks):
    failures = ranks.run(2, failure_of_run, (1, 1, 1, 2))
    assert len(set(failures)) == 1
    assert "step 1 of 4" in failures[0]
