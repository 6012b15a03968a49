"""Which parallel methods a family's view serves: data that its spec declares, and that fitting judges layouts by."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Capabilities:
    """What is refused by name where it is False. Data and CFG parallelism serve every family.

    `sequence`: Ulysses and ring, which share tokens or rows; `stages`: PipeFusion; `tensor`: tensor parallelism;
    `stale`: DistriFusion; `shards`: sharded and offloaded weights; `compile`: compiled blocks.
    """

    sequence: bool = True
    stages: bool = True
    tensor: bool = True
    stale: bool = True
    shards: bool = True
    compile: bool = True


ROWS_ALONE = Capabilities(stages=False, tensor=False, stale=False, shards=False, compile=False)
"""Capabilities of a network without blocks (families/plain.py): data, CFG, and rows over the Ulysses and ring axes."""
