"""What a sampler node's widgets offer and may hold: names in the order of a menu, steps. No torch: nodes read this."""

from ..errors import UserError

SAMPLER_NAMES = (
    "euler",
    "euler_ancestral",
    "heun",
    "dpm_2",
    "dpm_2_ancestral",
    "dpmpp_2s_ancestral",
    "dpmpp_sde",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "dpmpp_2m_sde_heun",
    "dpmpp_3m_sde",
    "lcm",
    "ipndm",
    "deis",
    "res_multistep",
    "res_multistep_ancestral",
    "ddim",
    "uni_pc",
    "uni_pc_bh2",
)

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


def check_part(start: int, end: int) -> None:
    """Raise `UserError` for a part of a run that ends before it starts."""
    if not 0 <= start <= end:
        raise UserError(
            f"The part of the run from step {start} to step {end} ends before it starts.",
            f"Set start_at_step to at most {max(end, 0)}, or end_at_step to at least {max(start, 0)}.",
        )
