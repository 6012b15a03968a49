"""What a sampler node's widgets offer and may hold: names in the order of a menu, steps. No torch: nodes read this."""

from collections.abc import Sequence

from ..errors import UserError

SAMPLER_NAMES = (
    "euler",
    "euler_cfg_pp",
    "euler_ancestral",
    "euler_ancestral_cfg_pp",
    "heun",
    "heunpp2",
    "exp_heun_2_x0",
    "exp_heun_2_x0_sde",
    "dpm_2",
    "dpm_2_ancestral",
    "lms",
    "dpm_fast",
    "dpm_adaptive",
    "dpmpp_2s_ancestral",
    "dpmpp_2s_ancestral_cfg_pp",
    "dpmpp_sde",
    "dpmpp_sde_gpu",
    "dpmpp_2m",
    "dpmpp_2m_cfg_pp",
    "dpmpp_2m_sde",
    "dpmpp_2m_sde_gpu",
    "dpmpp_2m_sde_heun",
    "dpmpp_2m_sde_heun_gpu",
    "dpmpp_3m_sde",
    "dpmpp_3m_sde_gpu",
    "ddpm",
    "lcm",
    "ipndm",
    "ipndm_v",
    "deis",
    "res_multistep",
    "res_multistep_cfg_pp",
    "res_multistep_ancestral",
    "res_multistep_ancestral_cfg_pp",
    "gradient_estimation",
    "gradient_estimation_cfg_pp",
    "er_sde",
    "seeds_2",
    "seeds_3",
    "sa_solver",
    "sa_solver_pece",
    "ddim",
    "uni_pc",
    "uni_pc_bh2",
)

CFG_PP_SAMPLERS = frozenset(name for name in SAMPLER_NAMES if name.endswith("_cfg_pp"))
"""Those that step by the negative prompt's own prediction, at cfg 1 too."""

WHOLE_BATCH_SAMPLERS = frozenset({"dpm_adaptive"})
"""Those that look at the whole latent of the whole batch. The others step each of its elements by itself."""

SCHEDULER_NAMES = (
    "simple",
    "sgm_uniform",
    "karras",
    "exponential",
    "ddim_uniform",
    "beta",
    "normal",
    "linear_quadratic",
    "kl_optimal",
)


def needs_negative(sampler: str, cfg: float) -> bool:
    """Whether the negative prompt is evaluated."""
    return cfg != 1.0 or sampler in CFG_PP_SAMPLERS


def check_negative(sampler: str, cfg: float, *, has_negative: bool) -> None:
    """Raise `UserError` when there is no negative prompt though it is needed."""
    if has_negative or not needs_negative(sampler, cfg):
        return
    if cfg != 1.0:
        raise UserError(f"cfg={cfg:g} needs a negative prompt.", "Connect one, or set cfg to 1.")
    raise UserError(
        f"The sampler {sampler} steps by what the negative prompt predicts, at cfg 1 too.",
        f"Connect a negative prompt, or use {sampler.removesuffix('_cfg_pp')}.",
    )


def check_part(start: int, end: int) -> None:
    """Raise `UserError` for a part of a run that ends before it starts."""
    if not 0 <= start <= end:
        raise UserError(
            f"The part of the run from step {start} to step {end} ends before it starts.",
            f"Set start_at_step to at most {max(end, 0)}, or end_at_step to at least {max(start, 0)}.",
        )


def unknown(what: str, name: str, known: Sequence[str]) -> UserError:
    """The error for a sampler or scheduler that Parallel Sampler has not."""
    return UserError(
        f"Unknown {what} {name!r}.",
        f"Known {what}s: {', '.join(known)}. Others work in KSampler, with the same model.",
    )
