"""Step caches decide alike on all ranks, and do what a serial model of their rule does."""

import itertools
from unittest import mock

import numpy as np
import pytest
import torch
from paralleldit.parallel_backend.distributed.control_group import ControlGroup
from paralleldit.parallel_backend.distributed.mesh import Mesh
from paralleldit.parallel_backend.engine import sample
from paralleldit.parallel_backend.engine.model import Transformer
from paralleldit.parallel_backend.families.blocks import run_blocks
from paralleldit.parallel_backend.layout.layout import Layout
from paralleldit.parallel_backend.layout.model_part import ModelPart
from paralleldit.parallel_backend.protocol.messages import Evaluations, StepCache
from paralleldit.parallel_backend.run_context import Run
from paralleldit.parallel_backend.strategies import select, sequence
from paralleldit.tests.covering import covering, pairs_of
from paralleldit.tests.ranks import stale_families
from paralleldit.tests.ranks.stale_families import HEADS, relative_error, request_of
from paralleldit.tests.ranks.test_pipefusion_families import StripModel
from paralleldit.tests.tiny_models import CPU, TINY_MODELS

STEPS = 8
MODELS = [
    "flux dev",
    "sd3.5 medium",
    "pixart alpha",
    "hunyuandit 1.2",
    "wan 2.1",
    "z-image",
    "qwen-image",
    "hunyuanvideo",
]
LAYOUTS = [
    Layout(),
    Layout(ulysses_degree=2),
    Layout(ring_degree=2),
    Layout(cfg_degree=2),
    Layout(data_degree=2),
    Layout(tensor_degree=2),
    Layout(ulysses_degree=2, cfg_degree=2, weights="sharded"),
    Layout(tensor_degree=2, data_degree=2, weights="offloaded"),
]
BY_CHANGE = StepCache(threshold=0.4)
WAN = 2.0
"""Its threshold for TeaCache: the time alone changes more than what others look at."""
CACHES = {
    "first block": StepCache(threshold=10.0, max_skips=1),
    "teacache": StepCache(rule="teacache", threshold=0.25, coefficients=(2.0, 0.5, 0.0)),
    "schedule": StepCache(rule="schedule", threshold=0.3, rates=(0.5, 1.0, 2.0)),
}
CASES = covering(
    [(model, layout, kind) for model in MODELS for layout in LAYOUTS for kind in CACHES],
    lambda case: pairs_of(case[1], case[2]) | {frozenset((case[0], met)) for met in (case[2], case[1].ranks > 1)},
)


def cache_of(kind, model):
    cache = CACHES[kind]
    return cache.model_copy(update={"threshold": WAN}) if (kind, model) == ("teacache", "wan 2.1") else cache


def cached(world, model, layout, cache, path=None):
    """The latent of a run of `request_of`, and what the cache reports."""
    tiny, mesh, said = TINY_MODELS[model], Mesh(layout), []
    request, tensors = request_of(model, layout)
    schedule = request.schedule.model_copy(update={"steps": STEPS})
    request = request.model_copy(update={"cache": cache, "schedule": schedule})
    run = Run(ControlGroup(), request.id, lambda event, _: said.append(event))
    family = (
        tiny.make_family(HEADS) if path is None else Transformer(path, CPU, part=ModelPart.of(layout, mesh)).on(mesh)
    )
    latent = sample.sample(request, tensors, family, mesh, run)["latent"]
    return latent, [(event.computed, event.total) for event in said if isinstance(event, Evaluations)]


def every_other(kept, family, state, blocks, cache, time):
    """Every other evaluation adds to its first block what the others added in the one before."""
    first = blocks[0](state)
    if (added := kept.pop("added", None)) is not None:
        return plus(first, added)
    last = run_blocks(family, first, blocks[1:], policy=sample.COMPUTE_ALL, first=1)
    kept["added"] = {name: last[name] - first[name] for name in last.streams}
    return last


def by_teacache(kept, family, state, blocks, cache, time):
    """TeaCache's rule, of the picture of a batch that has changed most."""
    now = family.modulated_input(state).flatten(1)
    if "input" in kept:
        change = (now - kept["input"]).abs().mean(1) / kept["input"].abs().mean(1)
        kept["sum"] += np.polyval(cache.coefficients or (1.0, 0.0), change.numpy())
    kept["input"] = now
    if "added" in kept and (kept["sum"] < cache.threshold).all():
        return plus(state, kept["added"])
    last = run_blocks(family, state, blocks, policy=sample.COMPUTE_ALL)
    kept["sum"], kept["added"] = 0.0, {name: last[name] - state[name] for name in last.streams}
    return last


def by_schedule(kept, family, state, blocks, cache, time):
    """An evaluation is whole where the rates add up to the threshold since the last whole one; each counts for a third
    of the run."""
    level = family.model_sampling(None).level(time)
    between = np.linspace(*sorted((level, kept.get("level", level))), 1001)[:-1]
    step = abs(level - kept.get("level", level)) / 1000
    kept["sum"] = kept.get("sum", 0.0) + sum(cache.rates[min(2, int(3 * each))] * step for each in between)
    kept["level"] = level
    if "added" in kept and kept["sum"] < cache.threshold:
        return plus(state, kept["added"])
    last = run_blocks(family, state, blocks, policy=sample.COMPUTE_ALL)
    kept["sum"], kept["added"] = 0.0, {name: last[name] - state[name] for name in last.streams}
    return last


def plus(state, added):
    return state.with_streams(**{name: state[name] + more for name, more in added.items()})


def serially(world, model, cache):
    """The latent of a serial model of the rule of `cache`."""
    rule = {"first block": every_other, "teacache": by_teacache, "schedule": by_schedule}[cache.rule]
    turns, kept, times = itertools.count(), ({}, {}), []
    predict = sequence.SequenceParallel.predict

    def noted(self, latent, timestep, *more):
        times.append(float(timestep[0]))
        return predict(self, latent, timestep, *more)

    def run_by_rule(family, state, blocks, *, policy, residuals):
        # The positive prompt and the negative one take turns.
        return rule(kept[next(turns) % 2], family, state, blocks, cache, times[-1])

    with (
        mock.patch.object(sequence, "run_blocks", run_by_rule),
        mock.patch.object(sequence.SequenceParallel, "predict", noted),
    ):
        return cached(world, model, Layout(), None)[0]


def projected(world, model):
    """The modulated input of the first block, and what its attention projects to values of the picture."""
    family = TINY_MODELS[model].make_family(HEADS)
    found, layers = [], dict(family.transformer.named_modules())
    block = f"{family.spec.blocks[0].names[0]}.0."
    first = next(name for name in layers if name.startswith(block) and name.endswith(".to_v"))
    layers[first].register_forward_pre_hook(lambda _, args: found.append(args[0]))

    def look(family, state, blocks, *, policy, residuals):
        found.append(family.modulated_input(state))
        return run_blocks(family, state, blocks, policy=policy, residuals=residuals)

    with mock.patch.object(sequence, "run_blocks", look):
        request, tensors = request_of(model, Layout())
        sample.sample(request, tensors, family, Mesh(Layout()), Run(ControlGroup(), 1, lambda *_: None))
    return found[:2]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for model in MODELS:
        TINY_MODELS[model].make_family(HEADS).transformer.save_pretrained(folder / model)
    return {model: folder / model for model in MODELS}


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("model", MODELS)
def test_a_threshold_of_zero_changes_no_bit(ranks, model, kind):
    ((plain, _),) = ranks.once(1, cached, model, Layout(), None)
    ((latent, said),) = ranks.run(
        1, cached, model, Layout(), CACHES[kind].model_copy(update={"threshold": 0.0, "max_skips": 0})
    )
    assert torch.equal(latent, plain)
    assert said == [(2 * STEPS, 2 * STEPS)]


@pytest.mark.parametrize(("model", "layout", "kind"), CASES, ids=str)
def test_every_layout_skips_what_a_serial_model_of_the_rule_skips(ranks, paths, model, layout, kind):
    cache = cache_of(kind, model)
    (expected,) = ranks.once(1, serially, model, cache)
    ((plain, _),) = ranks.once(1, cached, model, Layout(), None)
    assert relative_error(expected, plain) > 1e-4, "what is skipped must matter"
    for latent, _ in ranks.run(layout.ranks, cached, model, layout, cache, paths[model]):
        assert relative_error(latent, expected) <= 1e-5


@pytest.mark.parametrize("model", [model for model in MODELS if model != "wan 2.1"])
def test_teacache_looks_at_what_the_first_attention_projects(ranks, model):
    """Of Wan its authors look at the time alone."""
    ((modulated, projection),) = ranks.run(1, projected, model)
    assert relative_error(modulated, projection) <= 1e-6


ALIKE = [layout for layout in LAYOUTS[1:] if layout.cfg_degree == 1 or layout.weights == "whole"]
"""Where each prompt decides for itself, as on one rank: otherwise ranks of both prompts gather weights together."""


@pytest.mark.parametrize("layout", [*ALIKE, Layout(ulysses_degree=2, weights="sharded")], ids=str)
def test_ranks_decide_by_the_change_of_all_tokens(ranks, paths, layout):
    model = "sd3.5 medium"
    ((expected, ((whole, _),)),) = ranks.once(1, cached, model, Layout(), BY_CHANGE)
    assert 2 < whole < 2 * STEPS, "some are skipped, and some are not"
    for latent, _ in ranks.run(layout.ranks, cached, model, layout, BY_CHANGE, paths[model]):
        assert relative_error(latent, expected) <= 1e-5


def studied(world, model, layout):
    request, tensors = request_of(model, layout)
    family = TINY_MODELS[model].make_family(HEADS)
    run = Run(ControlGroup(), 1, lambda *_: None)
    reply = sample.sample(request.model_copy(update={"study": True}), tensors, family, Mesh(layout), run)
    return {name: tensor for name, tensor in reply.items() if name.startswith("study.")}


@pytest.mark.parametrize("layout", [Layout(ulysses_degree=2), Layout(ring_degree=2, cfg_degree=2)], ids=str)
def test_a_study_by_several_ranks_finds_what_one_rank_finds(ranks, layout):
    (expected,) = ranks.once(1, studied, "sd3.5 medium", Layout())
    found = ranks.run(layout.ranks, studied, "sd3.5 medium", layout)[0]
    assert expected["study.changes"].isfinite().float().mean() > 0.9
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-5, equal_nan=True)


def test_distrifusion_with_a_cache_is_what_it_is_without_where_nothing_is_skipped(ranks):
    layout = Layout(distrifusion_degree=2)
    plain = ranks.run(2, cached, "flux dev", layout, None)
    for (latent, _), (expected, _) in zip(
        ranks.run(2, cached, "flux dev", layout, StepCache(threshold=0.0)), plain, strict=True
    ):
        assert torch.equal(latent, expected)


class NaivelyShared:
    """Serial attention that gives again what it gave, where the rates of a block add up to less than the budget."""

    keeps = False

    def __init__(self, attention, settings):
        self.attention, self.settings = attention, settings
        self.prompts, self.levels = {}, {}

    def begin(self, prompt, level):
        self.kept = self.prompts.setdefault(prompt, {})
        passed = abs(level - self.levels.get(prompt, level))
        self.levels[prompt] = level
        for block, (rate,) in enumerate(self.settings.attention):
            self.kept[block] = self.kept.get(block, 0.0) + rate * passed

    def set_lengths(self, lengths):
        self.attention.set_lengths(lengths)

    def send(self, *given):
        return self.attention.send(*given)

    def __call__(self, site, q, *sets, extra_kv=None):
        if site not in self.kept or self.kept[site[0]] >= self.settings.threshold:
            self.kept[site] = self.attention(site, q, *sets, extra_kv=extra_kv)
        return self.kept[site]

    def end(self):
        """A block whose attention was computed begins anew."""
        for block in range(len(self.settings.attention)):
            if self.kept[block] >= self.settings.threshold:
                self.kept[block] = 0.0


SHARED = StepCache(rule="attention", threshold=0.25, attention=((1.0,), (2.0,), (0.0,), (9.0,)))
"""Of four blocks two share some of their attention, one all of it, and one none."""


def shared_serially(world, model):
    turns, made = itertools.count(), []
    predict, attention_of = sequence.SequenceParallel.predict, sample.attention_of

    def naive(*given):
        made.append(NaivelyShared(attention_of(*given), SHARED))
        return made[-1]

    def noted(self, latent, timestep, *more):
        made[-1].begin(next(turns) % 2, self.family.model_sampling(None).level(float(timestep[0])))
        prediction = predict(self, latent, timestep, *more)
        made[-1].end()
        return prediction

    with (
        mock.patch.object(sample, "attention_of", naive),
        mock.patch.object(sequence.SequenceParallel, "predict", noted),
    ):
        return cached(world, model, Layout(), None)[0]


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("flux dev", Layout()),
        ("sd3.5 medium", Layout(ulysses_degree=2)),
        ("wan 2.1", Layout(ring_degree=2)),
        ("qwen-image", Layout(ulysses_degree=2, cfg_degree=2, weights="sharded")),
        ("pixart alpha", Layout(tensor_degree=2, data_degree=2)),
    ],
    ids=str,
)
def test_attention_is_shared_as_a_serial_model_shares_it(ranks, paths, model, layout):
    (expected,) = ranks.run(1, shared_serially, model)
    ((plain, _),) = ranks.once(1, cached, model, Layout(), None)
    assert relative_error(expected, plain) > 1e-5, "what is shared must matter"
    for latent, _ in ranks.run(layout.ranks, cached, model, layout, SHARED, paths[model]):
        assert relative_error(latent, expected) <= 1e-5


class CachedStrips(StripModel):
    """Strips whose blocks are computed, or not, by a schedule: each patch has what its own evaluations left."""

    def __init__(self, family, layout):
        super().__init__(family, layout)
        self.kept = {}

    def predict(self, latent, timestep, condition, next_timestep=None):
        time = float(timestep[0])

        def run_by_rule(family, state, blocks, *, policy):
            patch = self.attention.prompt, tuple(self.attention.places[("image",)].tolist())
            return by_schedule(self.kept.setdefault(patch, {}), family, state, blocks, CACHES["schedule"], time)

        with mock.patch.object(stale_families, "run_blocks", run_by_rule):
            return super().predict(latent, timestep, condition, next_timestep)


def cached_strips(world, model, layout):
    with mock.patch.object(select, "SequenceParallel", lambda family, *_: CachedStrips(family, layout)):
        return cached(world, model, Layout(), None)[0]


PIPED = [
    Layout(pipefusion_degree=2, num_patches=2, warmup_steps=1),
    Layout(pipefusion_degree=2, ulysses_degree=2, num_patches=3, warmup_steps=2),
]


@pytest.mark.parametrize(
    ("model", "layout"), [("flux dev", PIPED[0]), ("sd3.5 medium", PIPED[1]), ("hunyuandit 1.2", PIPED[0])], ids=str
)
def test_pipefusion_skips_blocks_of_a_patch_by_a_schedule(ranks, model, layout):
    (expected,) = ranks.once(1, cached_strips, model, layout.model_copy(update={"ulysses_degree": 1}))
    ((plain, _), *_) = ranks.run(layout.ranks, cached, model, layout, None)
    assert relative_error(expected, plain) > 1e-4, "what is skipped must matter"
    for latent, counts in ranks.run(layout.ranks, cached, model, layout, CACHES["schedule"]):
        assert relative_error(latent, expected) <= 1e-5
        assert not counts or counts[0][0] < counts[0][1] == 2 * STEPS
