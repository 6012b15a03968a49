"""PipeFusion with the other families: exact where nothing is old, else equal to a serial model of stale attention."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from paralleldit.parallel_backend import sample_request
from paralleldit.parallel_backend.control import Control, Run
from paralleldit.parallel_backend.families.base import Shard
from paralleldit.parallel_backend.layout import Layout
from paralleldit.parallel_backend.mesh import Mesh
from paralleldit.parallel_backend.protocol import messages
from paralleldit.tests.tiny_models import TINY_MODELS, entry_of, tensors_of

CFG, HEADS, TEXT, STEPS = 3.0, 3, 5, 4
MODELS = ["sd3 medium", "sd3.5 medium", "pixart alpha", "hunyuandit 1.1"]
EXACT = [
    # pipefusion, ulysses, ring, cfg, data; patches, warm-up
    ((2, 1, 1, 1, 1), (3, STEPS)),
    ((4, 1, 1, 1, 1), (1, 1)),
    ((2, 2, 1, 2, 1), (1, 1)),
    ((2, 1, 2, 1, 2), (3, STEPS)),
]
STALE = [
    ((2, 1, 1, 1, 1), (2, 1)),
    ((3, 1, 1, 1, 1), (5, 2)),
    ((2, 2, 1, 1, 1), (3, 1)),
    ((2, 2, 2, 1, 1), (2, 1)),
    ((2, 1, 2, 2, 1), (3, 1)),
]
SIZE = (11, 9)


def layout_of(degrees, plan) -> Layout:
    names = ("pipefusion", "ulysses", "ring", "cfg", "data")
    settings = {f"{name}_degree": degree for name, degree in zip(names, degrees, strict=True)}
    return Layout(**settings, num_patches=plan[0], warmup_steps=plan[1])


def sampled(world, model, layout):
    """A guided batch of two, with a negative prompt of another length."""
    generator = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    tiny = TINY_MODELS[model]
    conditions = {"positive": tiny.condition(draw, 1, TEXT), "negative": tiny.condition(draw, 2, TEXT + 3)}
    entries = {side: (entry_of(condition),) for side, condition in conditions.items()}
    tensors = {"latent": draw(2, tiny.family.latent_channels, *SIZE)}
    for side, condition in conditions.items():
        tensors |= tensors_of(side, condition)
    request = messages.Sample(
        id=1,
        model=messages.ModelRef(path="unused"),
        layout=layout,
        **entries,
        cfg=CFG,
        sampler="euler",
        schedule=messages.Schedule(scheduler="simple", steps=STEPS, denoise=0.8),
        seed=42,
    )
    work = SimpleNamespace(request=request, cancelled=False, progress=None, send=lambda *_: None)
    return sample_request.sample(request, tensors, tiny.make_family(HEADS), Mesh(layout), Run(Control(), work))


class StaleAttention:
    """Serial attention over the newest keys and values of all tokens; those at hand are put in their places."""

    def __init__(self):
        self.kept = {}

    def begin(self, prompt, places, totals):
        self.prompt, self.places, self.totals, self.site = prompt, places, totals, 0

    def send(self, x, tokens="all"):
        return SimpleNamespace(x=x, tokens=tokens)

    def __call__(self, q, k, v):
        batch, _, heads, dim = q.x.shape
        empty = lambda: torch.zeros(2, batch, self.totals[q.tokens], heads, dim)  # noqa: E731
        if (self.prompt, self.site) not in self.kept:
            self.kept[self.prompt, self.site] = empty()
        kept = self.kept[self.prompt, self.site]
        self.site += 1
        kept[:, :, self.places[q.tokens]] = torch.stack((k.x, v.x))
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q.x, *kept))).transpose(1, 2)


class StaleModel:
    """A serial model whose blocks see one strip after the other, once it is warm."""

    def __init__(self, family, patches, warmup):
        self.family, self.patches, self.warmup = family, patches, warmup
        self.attention = StaleAttention()
        self.evaluations = {}

    def begin_step(self, step):
        pass

    def finish(self):
        pass

    def predict(self, latent, timestep, condition):
        length, prompt = self.family.text_length(condition), id(condition)
        evaluation = self.evaluations[prompt] = self.evaluations.get(prompt, -1) + 1
        grid = tuple(-(-side // 2) for side in latent.shape[2:])
        rows = torch.arange(grid[0])
        tokens = self.family.tokenize(latent)
        answer = torch.zeros_like(tokens)
        self.family.use_attention(self.attention)
        for number, strip in enumerate([rows] if evaluation < self.warmup else rows.tensor_split(self.patches)):
            at = (strip[:, None] * grid[1] + torch.arange(grid[1])).flatten()
            text = slice(0, length if number == 0 else 0)
            places = {"all": torch.cat((torch.arange(length)[text], length + at)), "image": at}
            self.attention.begin(prompt, places, {"all": length + tokens.shape[1], "image": tokens.shape[1]})
            state = self.family.embed(tokens, timestep, condition, Shard(text, at), grid)
            for block in self.family.blocks:
                state = block(state)
            answer[:, at] = self.family.head(state)
        return self.family.untokenize(answer, *latent.shape[2:])


def sampled_with_stale_model(world, model, patches, warmup):
    def stale(family, axis, attention):
        return StaleModel(family, patches, warmup)

    with mock.patch.object(sample_request, "SequenceParallel", stale):
        return sampled(world, model, Layout())


def relative_error(actual, expected) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize(("degrees", "plan"), EXACT, ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_run_without_old_keys_equals_one_rank(ranks, figures, model, degrees, plan):
    layout = layout_of(degrees, plan)
    (alone,) = ranks.run(1, sampled, model, Layout())
    for answer in ranks.run(layout.ranks, sampled, model, layout):
        error = relative_error(answer, alone)
        figures.note(f"{layout.ranks} | {layout}", TINY_MODELS[model].family.name, error)
        assert error <= 1e-5


@pytest.mark.parametrize(("degrees", "plan"), STALE, ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_run_with_old_keys_equals_a_serial_model_of_them(ranks, model, degrees, plan):
    layout = layout_of(degrees, plan)
    (alone,) = ranks.run(1, sampled, model, Layout())
    (expected,) = ranks.run(1, sampled_with_stale_model, model, *plan)
    assert relative_error(expected, alone) > 1e-4, "the case must be able to tell old keys from fresh ones"
    for answer in ranks.run(layout.ranks, sampled, model, layout):
        assert relative_error(answer, expected) <= 1e-5
