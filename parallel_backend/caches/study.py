"""How much each block's results change from one evaluation of a prompt to the next (the study of arXiv 2411.13588).

All blocks are computed. Of some tokens of each rank, spread evenly, a prompt's last results are kept, and each new one
is compared with them. The sums of all ranks make relative changes and cosines.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..attention.site import Attention, KeySet, KeysValues, Sent, SiteId, Streams, Sum
from ..distributed.axis import Axis
from ..families.state import Evaluation, State

QUANTITIES = ("block", "text", "attention", "mlp", "key", "value")
"""What is measured of each block: its residual of the picture's tokens, and of the text's; what its attention gives;
what its feed-forward gives; the keys and the values of its attention."""
WHOLE = ("input", "all", "rest")
"""What is measured of an evaluation: the first block's modulated input, the residual of all blocks, and that of all but
the first."""
TOKENS = 256
"""The most tokens of a rank that are looked at."""
SUMS = 5
FEED_FORWARD = re.compile(r"(ff|ffn|feed_forward|img_mlp|act_mlp)$")
"""Modules of a block that compute its feed-forward, within the block."""


@dataclass
class _Prompt:
    """Of one prompt: the last results, and the sums of every evaluation, `[len(QUANTITIES) * blocks + len(WHOLE), 5]`,
    and its time."""

    last: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    seen: set[tuple[int, str]] = field(default_factory=set)
    """What the current evaluation has given already: of several sites of a block the first one counts."""
    sums: list[Tensor] = field(default_factory=list)
    times: list[float] = field(default_factory=list)


class Study:
    """Of one run. `blocks`: how many the model has; `stream`: the one with the picture's tokens.

    `signal`: the modulated input of a state before the first block, where it is known. `tokens`: the ranks that share a
    prediction.
    """

    def __init__(self, blocks: int, stream: str, signal: Callable[[State], Tensor] | None, tokens: Axis) -> None:
        self.blocks = blocks
        self.stream = stream
        self.signal = signal
        self.tokens = tokens
        self._prompts: dict[Hashable, _Prompt] = {}
        self._now: _Prompt | None = None
        self._before: State | None = None
        self._behind_first: State | None = None
        self._device = torch.device("cpu")
        self.block: int | None = None
        """The block that is being computed."""

    def at(self, sigma: float) -> None:
        """The timestep of each evaluation is noted instead."""

    def policy(self, evaluation: Evaluation) -> Study:
        key = evaluation.condition.name, evaluation.batch, *evaluation.grids.items()
        self._now = self._prompts.setdefault(key, _Prompt())
        rows = self.blocks * len(QUANTITIES) + len(WHOLE)
        self._now.sums.append(torch.full((rows, SUMS), torch.nan, dtype=torch.float64))
        self._now.seen.clear()
        self._now.times.append(float(evaluation.timestep.flatten()[0]))
        return self

    def before(self, block: int, state: State) -> State | None:
        self.block = block
        if block == 0:
            self._before = state
            if self.signal is not None:
                self.note(self.blocks, "input", self.signal(state))
        elif block == 1:
            self._behind_first = state
        return None

    def after(self, block: int, before: State, after: State) -> None:
        self.block = None
        for name, tensor in after.streams.items():
            what = "block" if name == self.stream else "text"
            if what == "block" or name == "text":
                self.note(block, what, tensor - before[name])
        if block == self.blocks - 1:
            for what, base in (("all", self._before), ("rest", self._behind_first)):
                if base is not None:
                    self.note(self.blocks, what, after[self.stream] - base[self.stream])

    @contextmanager
    def watching(self, lists: Sequence[Sequence[nn.Module]]) -> Iterator[None]:
        """Looks at what the feed-forwards of the blocks give, which these `lists` of modules are, in their order."""
        hooks = []
        for block, layer in enumerate(layer for each in lists for layer in each):
            for name, module in layer.named_modules():
                if FEED_FORWARD.fullmatch(name):
                    hook = lambda _, args, output, block=block: self.note(block, "mlp", output)  # noqa: E731
                    hooks.append(module.register_forward_hook(hook))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def measured(self) -> dict[str, Tensor]:
        """Of the prompt with most evaluations: `times` `[E]`, `changes` `[E - 1, blocks, quantities, 2]`, and `whole`
        `[E - 1, 3, 2]`. Relative change and cosine; NaN where there is nothing to measure. A collective."""
        prompt = max(self._prompts.values(), key=lambda each: len(each.sums))
        sums = torch.stack(prompt.sums)[1:].to(self._device)
        change, size, dot, square, last = self.tokens.all_reduce(sums).cpu().unbind(-1)
        measured = torch.stack((change / size, dot / (square * last).sqrt()), dim=-1).float()
        changes, whole = measured.split((self.blocks * len(QUANTITIES), len(WHOLE)), dim=1)
        return {
            "times": torch.tensor(prompt.times),
            "changes": changes.unflatten(1, (self.blocks, len(QUANTITIES))).contiguous(),
            "whole": whole.contiguous(),
        }

    def note(self, block: int, what: str, result: Tensor) -> None:
        """Compares `result` `[B, S, ...]` of a block, or `[B, h]`, with that of the evaluation before."""
        now = self._now
        if now is None or (block, what) in now.seen:
            return
        now.seen.add((block, what))
        if result.ndim > 2:
            result = result.flatten(2)[:, :: max(1, -(-result.shape[1] // TOKENS))]
        result = result.detach().float()
        self._device = result.device
        last = now.last.get((block, what))
        now.last[block, what] = result
        if last is None or last.shape != result.shape:
            return
        row = block * len(QUANTITIES) + (QUANTITIES.index(what) if block < self.blocks else WHOLE.index(what))
        terms = ((result - last).abs(), last.abs(), result * last, result**2, last**2)
        now.sums[-1][row] = torch.stack([each.double().sum() for each in terms]).cpu()


class WatchedAttention:
    """`attention`, whose keys, values and results a study looks at."""

    def __init__(self, attention: Attention, study: Study) -> None:
        self.keeps = attention.keeps
        self._attention = attention
        self._study = study
        self._projections: WeakKeyDictionary[Sent, Tensor] = WeakKeyDictionary()

    def set_lengths(self, lengths: Mapping[str, Sequence[int]]) -> None:
        self._attention.set_lengths(lengths)

    def send(self, x: Tensor, streams: Streams, serves: Sequence[int] | None = None) -> Sent:
        sent = self._attention.send(x, streams, serves)
        self._projections[sent] = x
        return sent

    def __call__(self, site: SiteId, q: Sent, *sets: KeySet, extra_kv: KeysValues | None = None) -> Tensor:
        block = self._study.block
        if block is not None:
            for what, sent in (("key", sets[0].key), ("value", sets[0].value)):
                if sent in self._projections:
                    self._study.note(block, what, self._projections[sent])
        result = self._attention(site, q, *sets, extra_kv=extra_kv)
        if block is not None:
            self._study.note(block, "attention", result)
        return result

    def local(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._attention.local(q, k, v)

    def total(self, site: SiteId, stream: str, of: Sum) -> Tensor:
        return self._attention.total(site, stream, of)

    def halo(self, site: SiteId, stream: str, x: Tensor, row: int) -> list[Tensor]:
        return self._attention.halo(site, stream, x, row)
