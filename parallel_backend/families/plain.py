"""The plain view of a network: its library's own forward, without blocks or tokens, for row parallelism."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..sampling.model_sampling import ModelSampling
from .condition import Condition, check_widths


@dataclass(frozen=True)
class Site:
    """A self-attention module of the network. `stride`: how many rows of the latent one of its rows is made of."""

    name: str
    stride: int


Attend = Callable[[Tensor, Tensor, Tensor, Site], Tensor]
"""`attend(q, k, v, site)`, each `[B, S, H, D]`, of some rows of a picture: how they attend to all of its rows."""


class PlainFamily(ABC):
    """A network as a function of the whole latent. Knows nothing of ranks: a strategy says how its sites attend.

    `encoders`: what makes its conditioning, in words. `row_multiple`: how many rows of the latent one of the network's
    coarsest rows is made of: what begins at a multiple of them begins with a whole row in every layer.

    The processors of the self-attention modules are replaced once, when the family is made; `uninstall` undoes it.
    """

    name: str
    encoders: str
    latent_channels: int
    latent_scale: float
    latent_shift: float = 0.0
    row_multiple: int

    def __init__(self, network: Any, dtype: torch.dtype, device: torch.device, sites: Mapping[str, int]) -> None:
        """`dtype`: what `network` computes in. `sites`: the stride of each of its self-attention modules, by name.

        Raises `ValueError` where such a module (diffusers' `Attention`) does more than project, attend and project.
        """
        self.network = network
        self.dtype = dtype
        self.device = device
        self.attend: Attend | None = None
        """How the sites attend; None: among the rows that they are given, as the network does by itself."""
        self._processors = {name: network.get_submodule(name).processor for name in sites}
        for name, stride in sites.items():
            module = network.get_submodule(name)
            _check_plain(name, module)
            module.set_processor(_SiteProcessor(self, Site(name, stride), module.processor))

    @property
    @abstractmethod
    def inputs(self) -> Mapping[str, int]:
        """The tensors of a `Condition` that the network needs, and their widths."""

    @abstractmethod
    def forward(self, latent: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        """The network's output for `latent` `[B, C, H, W]` at `timestep` `[B]`; H may be those of a part of a picture.

        What the network is told of the picture's size comes from `condition`, not from the latent.
        """

    @abstractmethod
    def model_sampling(self, shift: float | None) -> ModelSampling:
        """Sigmas and prediction type."""

    @property
    def input_channels(self) -> int:
        """Channels of what the network takes: the noisy latent's, and of what an inpainting model is given with it."""
        return self.latent_channels

    def check_condition(self, condition: Condition) -> None:
        """Raise `UserError` when the conditioning is not of this model's kind."""
        check_widths(condition, self.inputs, self.name, self.encoders)

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

    def process_in(self, latent: Tensor) -> Tensor:
        """From the VAE's latent to the latent that the network was trained on."""
        return (latent - self.latent_shift) * self.latent_scale

    def process_out(self, latent: Tensor) -> Tensor:
        """The inverse of `process_in`."""
        return latent / self.latent_scale + self.latent_shift


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
