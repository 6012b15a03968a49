"""Values that are not finite: where they came up in a run, and what to do."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import UserError
from .late import Late
from .solver import Denoise

Together = Callable[[Tensor], Tensor]
"""Maps what one rank has noted, a bool or number `[N]`, to the largest that any rank has noted."""


class FiniteCheck:
    """Raises `UserError`, naming the step and the sigma, when a prediction holds NaN or infinity.

    What is on a device is looked at one call late: the host asks for the next step while the device is at this one.
    """

    def __init__(self, total: int, together: Together = lambda noted: noted) -> None:
        """`total`: how many steps there are."""
        self._total = total
        self._together = together
        self._noted: tuple[Late, Denoise] | None = None

    def note(self, denoised: Tensor, call: Denoise) -> None:
        """The prediction for `call`. Raises for the one before it, and for this one where it is on the host."""
        broken = torch.stack([~torch.isfinite(each).all() for each in (denoised, call.x)])
        self.finish()
        self._noted = Late(self._together(broken)), call
        if self._noted[0].is_here:
            self.finish()

    def finish(self) -> None:
        """Raises for the newest prediction."""
        if self._noted is not None:
            (late, call), self._noted = self._noted, None
            is_broken, is_latent_broken = late.wait().tolist()
            if is_broken:
                raise not_finite(call, self._total, latent_is_finite=not is_latent_broken)


def not_finite(call: Denoise, total: int, *, latent_is_finite: bool) -> UserError:
    """The error message for a prediction that holds NaN or infinity."""
    where = f"step {call.step + 1} of {total} (sigma {float(call.sigma):.4g})"
    if not latent_is_finite:
        return UserError(f"The latent is not finite at {where}: {SAMPLER_BROKE_DOWN}", USE_ANOTHER_SAMPLER)
    return UserError(
        f"The model's prediction is not finite at {where}: it holds NaN or infinite values.",
        "Load the model in bfloat16 or float32 instead of float16, lower cfg, or check the file of the model.",
    )


SAMPLER_BROKE_DOWN = "the sampler's own numbers broke down, not the model's."
USE_ANOTHER_SAMPLER = "Use another scheduler (beta or simple), fewer steps, or another sampler (euler)."


def check_result(latent: Tensor, total: int) -> None:
    """Raises UserError when the last step made the sampled latent not finite."""
    if not torch.isfinite(latent).all():
        raise UserError(
            f"The latent is not finite after step {total} of {total}: {SAMPLER_BROKE_DOWN}", USE_ANOTHER_SAMPLER
        )
