"""Runs of every family's tiny model, for tests of approximate methods, and a serial model of stale attention."""

from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from paralleldit.parallel_backend.distributed.control_group import ControlGroup
from paralleldit.parallel_backend.distributed.mesh import Mesh
from paralleldit.parallel_backend.engine import sample
from paralleldit.parallel_backend.engine.model import Transformer
from paralleldit.parallel_backend.families.blocks import run_blocks
from paralleldit.parallel_backend.families.state import Evaluation
from paralleldit.parallel_backend.layout.layout import Layout
from paralleldit.parallel_backend.layout.model_part import ModelPart
from paralleldit.parallel_backend.protocol import messages
from paralleldit.parallel_backend.run_context import Run
from paralleldit.parallel_backend.strategies import select
from paralleldit.tests.tiny_models import CPU, TINY_MODELS, entry_of, tensors_of

CFG, HEADS, TEXT, STEPS = 3.0, 3, 5, 4
SIZE = (11, 9)


def request_of(model, layout, path="unused"):
    """A guided batch of two, with a negative prompt of another length."""
    generator = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    tiny = TINY_MODELS[model]
    conditions = {"positive": tiny.condition(draw, 1, TEXT), "negative": tiny.condition(draw, 2, TEXT + 3)}
    entries = {side: (entry_of(condition),) for side, condition in conditions.items()}
    tensors = {"latent": tiny.latent(draw, 2, *SIZE)}
    for side, condition in conditions.items():
        tensors |= tensors_of(side, condition)
    request = messages.Sample(
        id=1,
        model=messages.ModelRef(path=str(path)),
        layout=layout,
        **entries,
        cfg=CFG,
        sampler="euler",
        schedule=messages.Schedule(scheduler="simple", steps=STEPS, denoise=0.8),
        seed=42,
    )
    return request, tensors


def sampled(world, model, layout, path=None, device=CPU):
    """What `request_of` asks for; by a part of the model that lies at `path`, on `device`."""
    tiny, mesh = TINY_MODELS[model], Mesh(layout)
    request, tensors = request_of(model, layout)
    run = Run(ControlGroup(), request.id, lambda *_: None)
    if path is None:
        family = tiny.make_family(HEADS)
    else:
        transformer = Transformer(path, torch.device(device), part=ModelPart.of(layout, mesh))
        family = transformer.on(mesh)
        if layout.compile == "blocks":
            transformer.compile_blocks(run)
    return sample.sample(request, tensors, family, mesh, run)["latent"]


class StaleAttention:
    """Serial attention over the keys and values that are kept of all tokens; those at hand are put in their places."""

    def __init__(self):
        self.kept = {}
        self.fresh = []

    def begin(self, prompt, places, totals):
        self.prompt, self.places, self.totals = prompt, places, totals

    def keep(self):
        """From now on what has been at hand so far is what is kept of it."""
        for kept, places, keys_values in self.fresh:
            kept[:, :, places] = keys_values
        self.fresh = []

    def send(self, x, streams, serves=None):
        return SimpleNamespace(x=x, streams=streams)

    def __call__(self, site, q, keys):
        batch, _, heads, dim = q.x.shape
        if (self.prompt, site) not in self.kept:
            self.kept[self.prompt, site] = torch.zeros(2, batch, self.totals[q.streams], heads, dim)
        kept, places = self.kept[self.prompt, site], self.places[q.streams]
        self.fresh.append((kept, places, torch.stack((keys.key.x, keys.value.x))))
        seen = kept.clone()
        seen[:, :, places] = self.fresh[-1][2]
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q.x, *seen))).transpose(1, 2)


class StaleModel:
    """A serial model whose blocks see a part of the tokens at a time, once it is warm."""

    def __init__(self, family, layout):
        self.family, self.layout = family, layout
        self.attention = StaleAttention()
        self.evaluations = {}

    def begin_step(self, step):
        pass

    def finish(self):
        pass

    forget = finish

    def outputs_of(self, latent, condition):
        """As many as keep prompts apart: PipeFusion evaluates one by one."""
        return 10**12

    def predict(self, latent, timestep, condition, next_timestep=None):
        family, prompt = self.family, id(condition)
        evaluation = self.evaluations[prompt] = self.evaluations.get(prompt, -1) + 1
        name = family.controlled
        latents = {name: latent}
        grids = family.grids(latents)
        lengths = {name: sum(each.count for each in own) for name, own in family.segments(condition, grids).items()}
        length, (grid,), count = lengths.get("text", 0), grids.values(), lengths[name]
        tokens = family.tokenise(latents)
        answer = torch.zeros_like(tokens[name])
        family.sites.attention = self.attention
        totals = {("text",): length, (name,): count, ("text", name): length + count}
        for text, at, pads in self.parts(evaluation, length, grid, count - grid.count):
            own = torch.cat((at, grid.count + torch.arange(count - grid.count)[pads]))
            of_text = torch.arange(length)[text]
            places = {("text",): of_text, (name,): own, ("text", name): torch.cat((of_text, length + own))}
            self.attention.begin(prompt, places, totals)
            state = family.embed(Evaluation(tokens, grids, timestep, condition, {"text": text, name: own}))
            state = run_blocks(family, state, family.blocks, policy=sample.COMPUTE_ALL)
            answer[:, at] = family.head(state, {name: slice(len(at))})[name]
            self.end_part()
        self.attention.keep()
        return family.untokenise({name: answer}, latents)[name]

    def parts(self, evaluation, length, grid, pads):
        """The text, the tokens of the grid and the pads behind them that are computed at once, one part after the
        other."""
        if evaluation < max(1, self.layout.warmup_steps):
            yield slice(0, length), torch.arange(grid.count), slice(0, pads)
        else:
            yield from self.stale_parts(length, grid, pads)

    def stale_parts(self, length, grid, pads):
        raise AssertionError("each method has its own")

    def end_part(self):
        pass


def sampled_by(stale_model, world, model, layout):
    """As `sampled` on one rank, by a `StaleModel` for the method of `layout`."""
    with mock.patch.object(select, "SequenceParallel", lambda family, *_: stale_model(family, layout)):
        return sampled(world, model, Layout())


def relative_error(actual, expected) -> float:
    return float((actual - expected).norm() / expected.norm())
