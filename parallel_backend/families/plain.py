"""The plain view of a network: its library's own forward, without blocks or tokens, for row parallelism."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .condition import Condition
from .family import Family
from .spec import LatentSpec


@dataclass(frozen=True)
class Site:
    """A self-attention module of the network. `stride`: how many rows of the latent one of its rows is made of."""

    name: str
    stride: int


Attend = Callable[[Tensor, Tensor, Tensor, Site], Tensor]
"""`attend(q, k, v, site)`, each `[B, S, H, D]`, of some rows of a picture: how they attend to all of its rows."""


class PlainFamily(Family):
    """A network as a function of the whole latent. Knows nothing of ranks: a strategy says how its sites attend.

    The processors of the self-attention modules are replaced once, when the family is made; `uninstall` undoes it.
    """

    def __init__(
        self,
        network: Any,
        dtype: torch.dtype,
        device: torch.device,
        latents: tuple[LatentSpec, ...] | None = None,
    ) -> None:
        """Takes `Family`'s arguments. Raises `ValueError` for a site that does more than project, attend, project."""
        super().__init__(dtype, device, latents)
        self.network = network
        sites = self.self_attentions()
        self.attend: Attend | None = None
        """How the sites attend; None: among the rows that they are given, as the network does by itself."""
        self._processors = {name: network.get_submodule(name).processor for name in sites}
        for name, stride in sites.items():
            module = network.get_submodule(name)
            _check_plain(name, module)
            module.set_processor(_SiteProcessor(self, Site(name, stride), module.processor))

    @property
    @abstractmethod
    def row_multiple(self) -> int:
        """How many rows of the latent one of the network's coarsest rows is made of.

        What begins at a multiple of them begins with a whole row in every layer.
        """

    @property
    @abstractmethod
    def channels(self) -> int:
        """The width of the network's first level."""

    @abstractmethod
    def self_attentions(self) -> Mapping[str, int]:
        """The stride of each self-attention module of the network (diffusers' `Attention`), by its name."""

    @abstractmethod
    def forward(self, latent: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        """The network's output for `latent` `[B, C, H, W]` at `timestep` `[B]`; H may be those of a part of a picture.

        The network takes the picture's size from `condition`, not from the latent.
        """

    @contextmanager
    def attending(self, attend: Attend) -> Iterator[None]:
        """While it is entered, every site attends by `attend`."""
        self.attend = attend
        try:
            yield
        finally:
            self.attend = None

    def uninstall(self) -> None:
        """Give the network's modules their own processors again. The family is of no use any more."""
        for name, processor in self._processors.items():
            self.network.get_submodule(name).set_processor(processor)


class _SiteProcessor:
    """An attention processor of diffusers: `plain`, the module's own, unless the family says how to attend."""

    def __init__(self, family: PlainFamily, site: Site, plain: Callable[..., Tensor]) -> None:
        self._family = family
        self._site = site
        self._plain = plain

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`hidden_states` `[B, S, C]`."""
        attend = self._family.attend
        if attend is None:
            return self._plain(attn, hidden_states, *args, **kwargs)
        projections = (attn.to_q, attn.to_k, attn.to_v)
        q, k, v = (projection(hidden_states).unflatten(2, (attn.heads, -1)) for projection in projections)
        return attn.to_out[0](attend(q, k, v, self._site).flatten(2))


def _check_plain(name: str, module: Any) -> None:
    added = ("spatial_norm", "group_norm", "norm_q", "norm_k", "added_kv_proj_dim", "residual_connection")
    more = [each for each in added if getattr(module, each)]
    if more or module.rescale_output_factor != 1:
        raise ValueError(
            f"{name} has {', '.join(more) or 'a rescaled output'}, which a site of a plain network has not"
        )
