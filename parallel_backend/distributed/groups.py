"""Process groups, made and left."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import cast

import torch
import torch.distributed as dist


def new_group(ranks: Sequence[int]) -> dist.ProcessGroup:
    """A group of `ranks`. Only its members meet to make it: ranks of other groups are busy making theirs.

    They wait for each other as long as in the default group; by default torch would let them wait for half an hour.
    """
    whole = cast(dist.ProcessGroup, dist.group.WORLD)
    timeout = whole._get_backend(torch.device("cpu")).options._timeout
    group = dist.new_group(list(ranks), timeout=timeout, use_local_synchronization=True)
    if not isinstance(group, dist.ProcessGroup):
        raise RuntimeError(f"rank {dist.get_rank()} is not among the ranks {list(ranks)} of the group that it makes")
    return group


def abandon_groups(groups: list[dist.ProcessGroup]) -> None:
    """Give up `groups`, and empty the list: ranks that wait in one of them for this rank raise at once.

    For gloo alone, which has no other way to end a collective early: it closes a group's connections with the last
    reference to it. So nobody else may hold the groups, or work that is under way in them (`Exchange`, `Hop`), also no
    frame of an error that was not collected yet.
    """
    for group in groups:
        dist.destroy_process_group(group)
        del group
    # A group goes once its own collectives under way are over. They may need ranks that raise only when another group
    # goes: none of these waits for another.
    for _ in range(len(groups)):
        threading.Thread(target=groups.pop, daemon=True).start()
