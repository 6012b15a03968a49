"""The table of samplers, under ComfyUI's names."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..errors import UserError
from . import cfg_pp, dpm_solver, exponential, multistep, sa_solver, singlestep, unipc
from .names import CFG_PP_SAMPLERS, SAMPLER_NAMES, WHOLE_BATCH_SAMPLERS, unknown
from .noise import NoiseKind
from .solver import SolverFunction


@dataclass(frozen=True)
class Sampler:
    """What the driver, the scheduler and the strategies must know of a sampler.

    `discard_penultimate_sigma`: schedules leave out the level before the last. `minimum_steps`: what its order needs.
    `fresh_mask_noise`: a masked area is held with noise of its own. `terminal_sigma`: the level at which a run that is
    to end at 0 ends.
    """

    name: str
    function: SolverFunction
    noise: NoiseKind = NoiseKind.NONE
    discard_penultimate_sigma: bool = False
    fresh_mask_noise: bool = False
    minimum_steps: int = 1
    terminal_sigma: float = 0.0

    @property
    def stochastic(self) -> bool:
        return self.noise is not NoiseKind.NONE

    @property
    def cfg_pp(self) -> bool:
        """Whether it steps by the negative prompt's own prediction."""
        return self.name in CFG_PP_SAMPLERS

    @property
    def elementwise(self) -> bool:
        """Whether each element of x depends on the same element of x and of the predictions only.

        The latent may then be stepped in parts, and the noise levels of the run are known before it.
        """
        return self.name not in WHOLE_BATCH_SAMPLERS

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


_GAUSSIAN, _BROWNIAN, _DEVICE_BROWNIAN = NoiseKind.GAUSSIAN, NoiseKind.BROWNIAN, NoiseKind.DEVICE_BROWNIAN
_UNIPC = {"discard_penultimate_sigma": True, "minimum_steps": 2, "terminal_sigma": unipc.TERMINAL_SIGMA}

SAMPLERS: dict[str, Sampler] = {
    sampler.name: sampler
    for sampler in (
        Sampler("euler", singlestep.euler),
        Sampler("euler_cfg_pp", partial(cfg_pp.euler_ancestral, eta=0.0)),
        Sampler("euler_ancestral", singlestep.euler_ancestral, _GAUSSIAN),
        Sampler("euler_ancestral_cfg_pp", cfg_pp.euler_ancestral, _GAUSSIAN),
        Sampler("heun", singlestep.heun),
        Sampler("heunpp2", singlestep.heunpp2),
        Sampler("exp_heun_2_x0", partial(exponential.seeds, stages=exponential.EXP_HEUN_2, eta=0.0)),
        Sampler("exp_heun_2_x0_sde", partial(exponential.seeds, stages=exponential.EXP_HEUN_2), _GAUSSIAN),
        Sampler("dpm_2", singlestep.dpm_2, discard_penultimate_sigma=True),
        Sampler("dpm_2_ancestral", singlestep.dpm_2_ancestral, _GAUSSIAN, discard_penultimate_sigma=True),
        Sampler("lms", multistep.lms),
        Sampler("dpm_fast", dpm_solver.dpm_fast, minimum_steps=2),
        Sampler("dpm_adaptive", dpm_solver.dpm_adaptive, minimum_steps=2),
        Sampler("dpmpp_2s_ancestral", singlestep.dpmpp_2s_ancestral, _GAUSSIAN),
        Sampler("dpmpp_2s_ancestral_cfg_pp", cfg_pp.dpmpp_2s_ancestral, _GAUSSIAN),
        Sampler("dpmpp_sde", singlestep.dpmpp_sde, _BROWNIAN),
        Sampler("dpmpp_sde_gpu", singlestep.dpmpp_sde, _DEVICE_BROWNIAN),
        Sampler("dpmpp_2m", multistep.dpmpp_2m),
        Sampler("dpmpp_2m_cfg_pp", partial(multistep.dpmpp_2m, cfg_pp=True)),
        Sampler("dpmpp_2m_sde", multistep.dpmpp_2m_sde, _BROWNIAN),
        Sampler("dpmpp_2m_sde_gpu", multistep.dpmpp_2m_sde, _DEVICE_BROWNIAN),
        Sampler("dpmpp_2m_sde_heun", multistep.dpmpp_2m_sde_heun, _BROWNIAN),
        Sampler("dpmpp_2m_sde_heun_gpu", multistep.dpmpp_2m_sde_heun, _DEVICE_BROWNIAN),
        Sampler("dpmpp_3m_sde", multistep.dpmpp_3m_sde, _BROWNIAN),
        Sampler("dpmpp_3m_sde_gpu", multistep.dpmpp_3m_sde, _DEVICE_BROWNIAN),
        Sampler("ddpm", singlestep.ddpm, _GAUSSIAN),
        Sampler("lcm", singlestep.lcm, _GAUSSIAN),
        Sampler("ipndm", multistep.ipndm),
        Sampler("ipndm_v", multistep.ipndm_v),
        Sampler("deis", multistep.deis),
        Sampler("res_multistep", multistep.res_multistep),
        Sampler("res_multistep_cfg_pp", partial(multistep.res_multistep, cfg_pp=True)),
        Sampler("res_multistep_ancestral", partial(multistep.res_multistep, eta=1.0), _GAUSSIAN),
        Sampler("res_multistep_ancestral_cfg_pp", partial(multistep.res_multistep, eta=1.0, cfg_pp=True), _GAUSSIAN),
        Sampler("gradient_estimation", multistep.gradient_estimation),
        Sampler("gradient_estimation_cfg_pp", partial(multistep.gradient_estimation, cfg_pp=True)),
        Sampler("er_sde", exponential.er_sde, _GAUSSIAN),
        Sampler("seeds_2", partial(exponential.seeds, stages=exponential.SEEDS_2), _GAUSSIAN),
        Sampler("seeds_3", partial(exponential.seeds, stages=exponential.SEEDS_3), _GAUSSIAN),
        Sampler("sa_solver", sa_solver.sa_solver, _GAUSSIAN),
        Sampler("sa_solver_pece", partial(sa_solver.sa_solver, evaluate_corrected=True), _GAUSSIAN),
        Sampler("ddim", singlestep.euler, fresh_mask_noise=True),
        Sampler("uni_pc", unipc.uni_pc, **_UNIPC),
        Sampler("uni_pc_bh2", unipc.uni_pc_bh2, **_UNIPC),
    )
}


def find_sampler(name: str) -> Sampler:
    """Raises UserError that lists the known samplers."""
    if name not in SAMPLERS:
        raise unknown("sampler", name, SAMPLER_NAMES)
    return SAMPLERS[name]
