"""The ledger counts what the theory of each method says that a rank sends in one step."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from paralleldit.parallel_backend.distributed.control_group import ControlGroup
from paralleldit.parallel_backend.distributed.mesh import Mesh
from paralleldit.parallel_backend.engine.model import Transformer
from paralleldit.parallel_backend.engine.sample import sample
from paralleldit.parallel_backend.layout.layout import Layout
from paralleldit.parallel_backend.layout.model_part import ModelPart
from paralleldit.parallel_backend.layout.stages import Stage, block_parameters
from paralleldit.parallel_backend.protocol.messages import ModelRef, Sample, Schedule
from paralleldit.parallel_backend.run_context import Run
from paralleldit.tests.covering import covering, pairs_of
from paralleldit.tests.tiny_models import CPU, TINY_MODELS, entry_of, tensors_of

HEADS, BATCH, BYTES = 8, 2, 4
TEXT, SIDE = 16, 16
IMAGE = (SIDE // 2) ** 2
BOTH = TEXT + IMAGE
AXES = (
    *("tensor", "ulysses", "ring", "distrifusion", "replicas", "sequence", "cfg"),
    *("stages", "feedback", "skips"),
)
STEPS = (2, 4)
"""Of two runs whose difference is two steps after the exact ones."""


@dataclass(frozen=True)
class Theory:
    """What passes through a model in one evaluation, block by block.

    `attended` tokens, through attention sites; `reduced` tokens, where tensor-parallel ranks add up their outputs;
    `gathered` vectors of modulation. Between blocks go `tokens`, and `skips` from one block to another.
    """

    width: int
    tokens: int
    attended: tuple[int, ...]
    reduced: tuple[float, ...]
    gathered: tuple[int, ...]
    skips: dict[int, int] = field(default_factory=dict)


MODELS = {
    # Two double blocks, two single ones: these have attention and feed-forward in one output matrix.
    "flux dev": Theory(128, BOTH, (BOTH,) * 4, (2 * BOTH, 2 * BOTH, BOTH, BOTH), (12, 12, 3, 3)),
    # Two blocks attend over the image once more. The last block gives no text, and modulates it with two vectors.
    "sd3.5 medium": Theory(
        *(128, BOTH, (BOTH + IMAGE,) * 2 + (BOTH,) * 2),
        *((2 * BOTH + IMAGE,) * 2 + (2 * BOTH, 2 * IMAGE), (15, 15, 12, 8)),
    ),
    # All blocks are modulated alike, by what every rank has.
    "pixart alpha": Theory(192, IMAGE, (IMAGE,) * 4, (3 * IMAGE,) * 4, (0,) * 4),
    # What blocks make of their skips is gathered: half as much as is sent to add it up.
    "hunyuandit 1.1": Theory(
        *(128, IMAGE, (IMAGE,) * 6, (3 * IMAGE,) * 4 + (3.5 * IMAGE,) * 2, (1,) * 6), {0: 5, 1: 4}
    ),
}
FLUX, JOINT, HUNYUAN, ALL = ["flux dev"], ["flux dev", "sd3.5 medium"], ["hunyuandit 1.1"], list(MODELS)
ROWS = [
    (Layout(ulysses_degree=2), ALL),
    (Layout(ulysses_degree=4), FLUX),
    (Layout(ring_degree=2), ALL),
    (Layout(ring_degree=4), FLUX),
    (Layout(ulysses_degree=2, ring_degree=2), JOINT),
    (Layout(ulysses_degree=2, ring_degree=2, cfg_degree=2), FLUX),
    (Layout(distrifusion_degree=2), ALL),
    (Layout(distrifusion_degree=2, refresh="in_turn"), FLUX),
    (Layout(distrifusion_degree=2, ulysses_degree=2, ring_degree=2), FLUX),
    (Layout(tensor_degree=2), ALL),
    (Layout(tensor_degree=4, cfg_degree=2), FLUX),
    (Layout(tensor_degree=2, ulysses_degree=2, ring_degree=2), FLUX),
    (Layout(ulysses_degree=2, weights="sharded"), ALL),
    (Layout(tensor_degree=2, ring_degree=2, cfg_degree=2, weights="sharded"), FLUX),
    (Layout(pipefusion_degree=2, num_patches=4), ALL),
    (Layout(pipefusion_degree=3, num_patches=4, stage_blocks=(2, 2, 2)), HUNYUAN),
    (Layout(pipefusion_degree=4, num_patches=8), FLUX),
    (Layout(pipefusion_degree=2, num_patches=2, ulysses_degree=2), [*FLUX, *HUNYUAN]),
    (Layout(pipefusion_degree=2, num_patches=2, ring_degree=2), FLUX),
    (Layout(pipefusion_degree=2, num_patches=2, ulysses_degree=2, ring_degree=2), FLUX),
    (Layout(pipefusion_degree=2, num_patches=4, cfg_degree=2), FLUX),
    (Layout(pipefusion_degree=2, num_patches=2, tensor_degree=2), FLUX),
    (Layout(pipefusion_degree=2, num_patches=2, ulysses_degree=2, weights="sharded"), HUNYUAN),
]


def traffic_per_step(world, layout: Layout, model: str, path: Path):
    """This rank's stage, and the bytes and messages that it sends on each axis."""
    generator = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    tiny, mesh = TINY_MODELS[model], Mesh(layout)
    condition = tiny.condition(draw, 1, TEXT)
    transformer = Transformer(path, CPU, part=ModelPart.of(layout, mesh))
    tensors = {"latent": draw(BATCH, tiny.spec.latents[0].channels, SIDE, SIDE)}
    tensors |= tensors_of("positive", condition) | tensors_of("negative", condition)
    sent = []
    for steps in STEPS:
        request = Sample(
            id=1,
            model=ModelRef(path="given"),
            layout=layout,
            positive=(entry_of(condition),),
            negative=(entry_of(condition),),
            cfg=2.0,
            sampler="euler",
            schedule=Schedule(scheduler="simple", steps=steps),
            seed=42,
        )
        mesh.ledger.reset()
        sample(request, tensors, transformer.on(mesh), mesh, Run(ControlGroup(), request.id, lambda *_: None))
        sent.append({axis: (mesh.ledger.bytes_on(axis), mesh.ledger.messages_on(axis)) for axis in AXES})
    fewer, more = sent
    steps = STEPS[1] - STEPS[0]
    per_step = [{axis: (more[axis][what] - fewer[axis][what]) / steps for axis in AXES} for what in range(2)]
    return mesh.pipefusion.rank, *per_step


@pytest.fixture(scope="module")
def model_of(tmp_path_factory):
    """A model's file, and the bytes of its blocks."""
    models = {}

    def of(model):
        if model not in models:
            path = tmp_path_factory.mktemp("model")
            transformer = TINY_MODELS[model].make(HEADS)
            transformer.save_pretrained(path)
            shapes = {name: value.shape for name, value in transformer.state_dict().items()}
            models[model] = (
                path,
                [count * BYTES for count in block_parameters(shapes, TINY_MODELS[model].spec.blocks).values()],
            )
        return models[model]

    return of


def expected_bytes(layout: Layout, model: str, block_bytes: list[int], stage: Stage) -> dict[str, float]:
    theory = MODELS[model]
    own = stage.blocks(block_bytes)
    owners = stage.owners(block_bytes)
    attended, reduced, gathered = (sum(each[own]) for each in (theory.attended, theory.reduced, theory.gathered))
    # Blocks take turns in two buffers; one that has a buffer for itself stays there.
    held = sum(size for place in range(2) if len(sizes := block_bytes[own][place::2]) > 1 for size in sizes)
    ulysses, ring, tensor, replicas = layout.ulysses_degree, layout.ring_degree, layout.tensor_degree, layout.replicas
    cfg, late, sequence = layout.cfg_degree, layout.distrifusion_degree, layout.sequence_degree
    evaluations = 2 // cfg
    turns = late * (late if layout.refresh == "in_turn" else 1)
    # How many times a block is used in one evaluation.
    patches = layout.num_patches if stage.count > 1 else 1
    # Both prompts are of one length, and one batch, but for the stages.
    gathers = evaluations * patches if stage.count > 1 else 1
    vector_bytes = BATCH * theory.width * BYTES * evaluations
    latent_bytes = BATCH * TINY_MODELS[model].spec.latents[0].channels * SIDE * SIDE * BYTES
    leaving = sum(owners[giver] == stage.index != owners[taker] for giver, taker in theory.skips.items())
    return {
        # USP (arXiv 2405.07719): four all-to-alls of this rank's tokens; keys and values of R - 1 other ranks' hops,
        # which are whole for every patch of a pipeline.
        "ulysses": 4 * (ulysses - 1) / ulysses**2 * attended / ring / late * vector_bytes / tensor,
        "ring": 2 * (ring - 1) * attended / ring / ulysses * vector_bytes / tensor * patches,
        # DistriFusion (arXiv 2402.19481): this rank's keys and values to every other; in turn, every N-th time.
        "distrifusion": 2 * (late - 1) / turns * attended / ring / ulysses * vector_bytes / tensor,
        # Megatron-LM (arXiv 1909.08053): all-reduces of this rank's tokens. The modulation of a block is gathered.
        "tensor": (tensor - 1) / tensor * vector_bytes * (2 * reduced / sequence + gathered * patches),
        # FSDP: each use of a block gathers it once, for all prompts of a batch.
        "replicas": (replicas - 1) / replicas * held / tensor * gathers * (layout.weights == "sharded"),
        # The predicted latent is put together once an evaluation, and handed over once a step.
        "sequence": (sequence - 1) / sequence * latent_bytes * evaluations * stage.is_last,
        "cfg": (cfg - 1) * latent_bytes * stage.is_last,
        # PipeFusion (arXiv 2405.14430, section 3): the tokens once, however many blocks and patches there are.
        "stages": 0 if stage.is_last else theory.tokens / sequence * vector_bytes,
        "feedback": latent_bytes * (stage.is_last and stage.count > 1),
        # HunyuanDiT (arXiv 2405.08748): a block's output to its mirror block, where another stage has it.
        "skips": leaving * IMAGE / sequence * vector_bytes,
    }


CASES = [(layout, model) for layout, models in ROWS for model in models]


@pytest.mark.parametrize(
    ("layout", "model"),
    sorted(covering(CASES, lambda case: pairs_of(*case), lambda case: case[0].ranks), key=lambda case: case[0].ranks),
    ids=str,
)
def test_bytes_sent_match_theory(ranks, model_of, layout, model):
    path, block_bytes = model_of(model)
    for index, sent, messages in ranks.run(layout.ranks, traffic_per_step, layout, model, path):
        stage = Stage(index, layout.pipefusion_degree, layout.stage_blocks)
        assert sent == pytest.approx(expected_bytes(layout, model, block_bytes, stage), rel=0.05)
        # One message for each patch and condition to the next stage, and one for each patch back to the first.
        patches = layout.num_patches * (stage.count > 1)
        assert messages["stages"] == patches * (2 // layout.cfg_degree) * (not stage.is_last)
        assert messages["feedback"] == patches * stage.is_last
