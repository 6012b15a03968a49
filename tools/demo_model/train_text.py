"""Teach the text encoders what captions say: `python -m tools.demo_model.train_text` (resumes by itself).

No pictures are needed: linear heads, dropped afterwards, must read the scene's attributes from CLIP's pooled vector,
and from each T5 token those of the noun phrase that it belongs to. The transformer then starts with words bound to
each other, which the picture loss alone teaches slowly. The encoders stay as they are while the transformer trains.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from . import checkpoint
from .interruption import Interruption
from .model import DemoModel
from .scenes import (
    BACKGROUNDS,
    COLOURS,
    FILLS,
    NUMBERS,
    PATTERNS,
    POSITIONS,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    make_scene,
)
from .text import T5_LENGTH, WIDTH

FOLDER = checkpoint.CACHE / "text"
SEED = 41
BATCH = 96
LEARNING_RATE = 1e-3
DECAY_FROM = 0.5
PRINT_STEPS = 100

NOUN = {
    "count": list(NUMBERS),
    "size": list(SIZES),
    "fill": list(FILLS),
    "colour": list(COLOURS),
    "shape": list(SHAPES),
}
"""What a noun phrase says; class 0 of each is "nothing"."""
PLACES = [None, *RELATIONS, *POSITIONS]
"""Where the objects of a noun phrase are: the second one of a relation has the opposite place."""
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
SCENERY = {"background": list(BACKGROUNDS), "pattern": list(PATTERNS)}
NOUN_CLASSES = (*(1 + len(options) for options in NOUN.values()), len(PLACES))
SCENERY_CLASSES = tuple(len(options) for options in SCENERY.values())
TOKEN_CLASSES = (*NOUN_CLASSES, *SCENERY_CLASSES)
POOLED_CLASSES = (*NOUN_CLASSES, *NOUN_CLASSES, *SCENERY_CLASSES)


def noun_truth(scene: Scene, which: int) -> list[int]:
    """Classes of the noun phrase number `which`, all 0 where the caption has none."""
    if which >= len(scene.groups):
        return [0] * len(NOUN_CLASSES)
    group = scene.groups[which]
    place = scene.relation if which == 0 else OPPOSITE[scene.relation or ""]
    said = [1 + options.index(getattr(group, name)) for name, options in NOUN.items()]
    return [*said, PLACES.index(place or scene.position)]


def scenery_truth(scene: Scene) -> list[int]:
    return [options.index(getattr(scene, name)) for name, options in SCENERY.items()]


def token_truth(scene: Scene) -> np.ndarray:
    """Classes `[T5_LENGTH, 8]`: one T5 token a word, and after the words what no noun phrase says."""
    lengths = [len(group.phrase().split()) for group in scene.groups]
    between = len(scene.relation.split()) if scene.relation is not None else 0
    truth = np.zeros((T5_LENGTH, len(TOKEN_CLASSES)), np.int64)
    truth[:, len(NOUN_CLASSES) :] = scenery_truth(scene)
    truth[: lengths[0], : len(NOUN_CLASSES)] = noun_truth(scene, 0)
    if len(lengths) == 2:
        first = lengths[0] + between
        truth[first : first + lengths[1], : len(NOUN_CLASSES)] = noun_truth(scene, 1)
    return truth


def pooled_truth(scene: Scene) -> list[int]:
    return [*noun_truth(scene, 0), *noun_truth(scene, 1), *scenery_truth(scene)]


def classes_loss(logits: torch.Tensor, truth: torch.Tensor, classes: tuple[int, ...]) -> tuple[torch.Tensor, float]:
    """Cross entropy, summed, of logits `[..., sum(classes)]` against `[..., len(classes)]`; the worst accuracy."""
    parts = logits.flatten(0, -2).split(classes, dim=-1)
    flat = truth.flatten(0, -2)
    losses = [F.cross_entropy(part, flat[:, index]) for index, part in enumerate(parts)]
    right = [(part.argmax(-1) == flat[:, index]).float().mean().item() for index, part in enumerate(parts)]
    return torch.stack(losses).sum(), min(right)


class TextLesson(nn.Module):
    """The encoders with the heads that judge them."""

    def __init__(self, model: DemoModel) -> None:
        super().__init__()
        self.clip, self.t5 = model.clip, model.t5
        self.pooled_head = nn.Linear(WIDTH, sum(POOLED_CLASSES))
        self.token_head = nn.Linear(WIDTH, sum(TOKEN_CLASSES))

    def forward(self, clip_ids: torch.Tensor, t5_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pooled = self.pooled_head(self.clip(clip_ids).pooler_output)
        return pooled, self.token_head(self.t5(t5_ids).last_hidden_state)


def load_taught(model: DemoModel) -> None:
    """Give a model the taught encoders: of the newest lesson, or where there was none the exported ones."""
    state = checkpoint.load(FOLDER)
    if state is None:
        model.load_exported_text(checkpoint.TARGET)
        return
    lesson = TextLesson(model)
    lesson.load_state_dict(state[0]["lesson"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(SEED)
    model = DemoModel()
    lesson = TextLesson(model)
    optimizer = torch.optim.AdamW(lesson.parameters(), LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    step = 0
    resumed = checkpoint.load(FOLDER)
    if resumed is not None:
        parts, meta = resumed
        step = meta["step"]
        lesson.load_state_dict(parts["lesson"])
        checkpoint.load_optimizer(optimizer, parts["optimizer"])
    interruption = Interruption()
    begun = time.monotonic()
    while not interruption and step < options.steps:
        scenes = [make_scene(SEED, step * BATCH + index) for index in range(BATCH)]
        pooled, tokens = lesson(*model.tokenize([scene.caption() for scene in scenes]))
        pooled_loss, pooled_right = classes_loss(
            pooled, torch.tensor([pooled_truth(scene) for scene in scenes]), POOLED_CLASSES
        )
        token_loss, token_right = classes_loss(
            tokens, torch.from_numpy(np.stack([token_truth(scene) for scene in scenes])), TOKEN_CLASSES
        )
        fall = min(1.0, max(0.02, (1 - step / options.steps) / (1 - DECAY_FROM)))
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 50) * fall
        optimizer.zero_grad(set_to_none=True)
        (pooled_loss + token_loss).backward()
        torch.nn.utils.clip_grad_norm_(lesson.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % PRINT_STEPS == 0:
            print(
                f"step {step}, {time.monotonic() - begun:.0f} s: "
                f"pooled loss {pooled_loss:.3f}, worst {pooled_right:.3f}; "
                f"tokens loss {token_loss:.3f}, worst {token_right:.3f}",
                flush=True,
            )
    checkpoint.save(
        FOLDER,
        {"lesson": lesson.state_dict(), "optimizer": checkpoint.optimizer_tensors(optimizer)},
        {"step": step},
    )


if __name__ == "__main__":
    main()
