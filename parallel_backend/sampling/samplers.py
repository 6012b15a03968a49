"""The table of samplers, under ComfyUI's names."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError
from . import multistep, singlestep, unipc
from .noise import NoiseKind
from .solver import SolverFunction


@dataclass(frozen=True)
class Sampler:
    """What the driver, the scheduler and the strategies must know of a sampler.

    `evaluations`: model calls per step (a last step to sigma 0 needs one). `discard_penultimate_sigma`:
    schedules leave out the level before the last. `minimum_steps`: what its order needs. `elementwise`:
    each element of x depends on the same element of x and of the predictions only, so the latent may be
    stepped in parts. `fresh_mask_noise`: a masked area is held with noise of its own. `terminal_sigma`: the
    level at which a run that is to end at 0 ends.
    """

    name: str
    function: SolverFunction
    evaluations: int = 1
    noise: NoiseKind = NoiseKind.NONE
    elementwise: bool = True
    discard_penultimate_sigma: bool = False
    fresh_mask_noise: bool = False
    minimum_steps: int = 1
    terminal_sigma: float = 0.0

    @property
    def stochastic(self) -> bool:
        return self.noise is not NoiseKind.NONE

    def end_levels(self, sigmas: Tensor) -> Tensor:
        """`sigmas` with the last level where this sampler can end. Raises UserError for too few steps."""
        steps = len(sigmas) - 1
        if steps < self.minimum_steps:
            raise UserError(
                f"The sampler {self.name} needs at least {self.minimum_steps} steps, this run has {steps}.",
                "Take more steps, or the sampler euler.",
            )
        if sigmas[-1] != 0 or self.terminal_sigma == 0:
            return sigmas
        return torch.cat([sigmas[:-1], sigmas.new_tensor([self.terminal_sigma])])


_GAUSSIAN, _BROWNIAN = NoiseKind.GAUSSIAN, NoiseKind.BROWNIAN
_UNIPC = {
    "discard_penultimate_sigma": True,
    "minimum_steps": 2,
    "terminal_sigma": unipc.TERMINAL_SIGMA,
}

SAMPLERS: dict[str, Sampler] = {
    sampler.name: sampler
    for sampler in (
        Sampler("euler", singlestep.euler),
        Sampler("euler_ancestral", singlestep.euler_ancestral, noise=_GAUSSIAN),
        Sampler("heun", singlestep.heun, evaluations=2),
        Sampler("dpm_2", singlestep.dpm_2, evaluations=2, discard_penultimate_sigma=True),
        Sampler(
            "dpm_2_ancestral",
            singlestep.dpm_2_ancestral,
            evaluations=2,
            noise=_GAUSSIAN,
            discard_penultimate_sigma=True,
        ),
        Sampler("dpmpp_2s_ancestral", singlestep.dpmpp_2s_ancestral, evaluations=2, noise=_GAUSSIAN),
        Sampler("dpmpp_sde", singlestep.dpmpp_sde, evaluations=2, noise=_BROWNIAN),
        Sampler("dpmpp_2m", multistep.dpmpp_2m),
        Sampler("dpmpp_2m_sde", multistep.dpmpp_2m_sde, noise=_BROWNIAN),
        Sampler("dpmpp_2m_sde_heun", multistep.dpmpp_2m_sde_heun, noise=_BROWNIAN),
        Sampler("dpmpp_3m_sde", multistep.dpmpp_3m_sde, noise=_BROWNIAN),
        Sampler("lcm", singlestep.lcm, noise=_GAUSSIAN),
        Sampler("ipndm", multistep.ipndm),
        Sampler("deis", multistep.deis),
        Sampler("res_multistep", multistep.res_multistep),
        Sampler("res_multistep_ancestral", multistep.res_multistep_ancestral, noise=_GAUSSIAN),
        Sampler("ddim", singlestep.euler, fresh_mask_noise=True),
        Sampler("uni_pc", unipc.uni_pc, **_UNIPC),
        Sampler("uni_pc_bh2", unipc.uni_pc_bh2, **_UNIPC),
    )
}


def find_sampler(name: str) -> Sampler:
    """Raises UserError that lists the known samplers."""
    if name not in SAMPLERS:
        raise UserError(f"Unknown sampler {name!r}.", f"Known samplers: {', '.join(sorted(SAMPLERS))}.")
    return SAMPLERS[name]
