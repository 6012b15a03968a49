"""How a model's output, its timesteps and the noise level sigma belong together.

Every sampler works in sigma space on a denoised prediction; these objects translate. The parametrisations and
tables agree with ComfyUI's, so that schedules and latents do too. `sigma` is a 0-d or `[B]` float tensor everywhere.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

FULL_DENOISE_TOLERANCE = 1e-5
LAST_ALPHA = 4.8973451890853435e-08
"""ComfyUI's in place of zero, where a schedule ends at noise alone."""

Time = TypeVar("Time", Tensor, float)


def per_sample(sigma: Tensor, like: Tensor) -> Tensor:
    """`sigma` 0-d or `[B]`, shaped to broadcast over `like` `[B, C, ...]`."""
    return sigma if sigma.ndim == 0 else sigma.to(like.device).view(-1, *[1] * (like.ndim - 1))


class ModelSampling(ABC):
    """The sigma table, the clock and the prediction type of one model."""

    @cached_property
    @abstractmethod
    def sigmas(self) -> Tensor:
        """The table of noise levels, ascending, fp32 `[T]`."""

    @property
    def sigma_min(self) -> Tensor:
        return self.sigmas[0]

    @property
    def sigma_max(self) -> Tensor:
        return self.sigmas[-1]

    def starts_from_pure_noise(self, sigma: Tensor) -> bool:
        """Whether a run that begins at `sigma` begins at (or above) the model's highest noise level."""
        highest, first = float(self.sigma_max), float(sigma)
        return first > highest or math.isclose(highest, first, rel_tol=FULL_DENOISE_TOLERANCE)

    @abstractmethod
    def timestep(self, sigma: Tensor) -> Tensor:
        """The model's timestep for the noise level `sigma`."""

    @abstractmethod
    def sigma(self, timestep: Tensor) -> Tensor:
        """The noise level at `timestep`."""

    def level(self, timestep: float) -> float:
        """Where the model's clock is at `timestep`: from 1 at the highest noise level to 0 at the lowest."""
        first, last = (float(self.timestep(sigma)) for sigma in (self.sigma_max, self.sigma_min))
        return min(1.0, max(0.0, (timestep - last) / (first - last)))

    @abstractmethod
    def percent_to_sigma(self, percent: float) -> float:
        """The noise level after the share `percent` of the sampling time; 0 is the start."""

    @abstractmethod
    def calculate_input(self, sigma: Tensor, x: Tensor) -> Tensor:
        """What the model sees of the noisy latent `x`."""

    @abstractmethod
    def denoised(self, output: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """The model's prediction of the clean latent, from its `output` on `x`."""

    @abstractmethod
    def noise_scaling(self, sigma: Tensor, noise: Tensor, latent: Tensor, max_denoise: bool = False) -> Tensor:
        """`latent` brought to the noise level `sigma`."""

    @abstractmethod
    def inverse_noise_scaling(self, sigma: Tensor, x: Tensor) -> Tensor:
        """The latent that a run hands back when it ends at `sigma`."""

    @abstractmethod
    def half_log_snr(self, sigma: Tensor) -> Tensor:
        """lambda = log(alpha / sigma), the time of the exponential integrators (Lu et al. 2022, DPM-Solver)."""

    @abstractmethod
    def sigma_from_half_log_snr(self, half_log_snr: Tensor) -> Tensor:
        """The inverse of `half_log_snr`."""

    def finite_half_log_snr(self, sigmas: Tensor) -> Tensor:
        """`sigmas` with a first entry whose lambda is finite."""
        return sigmas


class FlowSampling(ModelSampling):
    """Rectified flow: x = (1 - sigma) latent + sigma noise, and the model predicts noise - latent."""

    shift: float

    def percent_to_sigma(self, percent: float) -> float:
        if percent <= 0.0:
            return 1.0
        if percent >= 1.0:
            return 0.0
        return float(self.shifted(1.0 - percent))

    @abstractmethod
    def shifted(self, time: Time) -> Time:
        """The noise level at `time` in (0, 1]."""

    def calculate_input(self, sigma: Tensor, x: Tensor) -> Tensor:
        return x

    def denoised(self, output: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        return x - output * per_sample(sigma, x)

    def noise_scaling(self, sigma: Tensor, noise: Tensor, latent: Tensor, max_denoise: bool = False) -> Tensor:
        sigma = per_sample(sigma, noise)
        return sigma * noise + (1.0 - sigma) * latent

    def inverse_noise_scaling(self, sigma: Tensor, x: Tensor) -> Tensor:
        return x / (1.0 - per_sample(sigma, x))

    def half_log_snr(self, sigma: Tensor) -> Tensor:
        return -torch.logit(sigma)

    def sigma_from_half_log_snr(self, half_log_snr: Tensor) -> Tensor:
        return torch.sigmoid(-half_log_snr)

    def finite_half_log_snr(self, sigmas: Tensor) -> Tensor:
        if len(sigmas) < 2 or sigmas[0] < 1:
            return sigmas
        first = sigmas.new_tensor([self.percent_to_sigma(1e-4)])
        return torch.cat([first, sigmas[1:]])


@dataclass(frozen=True)
class FluxFlow(FlowSampling):
    """Flux's exponential time shift (Black Forest Labs, flux); the model's clock is sigma itself."""

    shift: float = 1.15
    table_size: int = 10000

    @cached_property
    def sigmas(self) -> Tensor:
        return self.shifted(torch.arange(1, self.table_size + 1) / self.table_size)

    def shifted(self, time: Time) -> Time:
        scale = math.exp(self.shift)
        return scale / (scale + (1 / time - 1))

    def timestep(self, sigma: Tensor) -> Tensor:
        return sigma

    def sigma(self, timestep: Tensor) -> Tensor:
        return self.shifted(timestep)


@dataclass(frozen=True)
class DiscreteFlow(FlowSampling):
    """Flow with SD3's shift (Esser et al. 2024, 5.3.2): SD3 has shift 3 and multiplier 1000, Flux schnell 1 and 1."""

    shift: float = 1.0
    multiplier: float = 1000.0
    table_size: int = 1000

    @cached_property
    def sigmas(self) -> Tensor:
        return self.sigma(torch.arange(1, self.table_size + 1) / self.table_size * self.multiplier)

    def shifted(self, time: Time) -> Time:
        return time if self.shift == 1.0 else self.shift * time / (1 + (self.shift - 1) * time)

    def timestep(self, sigma: Tensor) -> Tensor:
        return sigma * self.multiplier

    def sigma(self, timestep: Tensor) -> Tensor:
        return self.shifted(timestep / self.multiplier)


@dataclass(frozen=True)
class EpsPrediction(ModelSampling):
    """x = latent + sigma noise over a discrete beta schedule (Ho et al. 2020); the model predicts the noise.

    `beta_schedule` "linear" is linear in the square root of beta (Stable Diffusion), "sqrt_linear" is linear in beta
    (DDPM, DiT-XL): ComfyUI's names. `zero_terminal`: the schedule is stretched to end at noise alone (Lin et al. 2023,
    2305.08891), as nearly as ComfyUI does. `snr_shift`: by how much the ratio of signal to noise is divided before.
    """

    beta_schedule: str = "linear"
    linear_start: float = 0.00085
    linear_end: float = 0.012
    table_size: int = 1000
    zero_terminal: bool = False
    snr_shift: float = 1.0

    @cached_property
    def sigmas(self) -> Tensor:
        return self._exact_sigmas().float()

    @cached_property
    def log_sigmas(self) -> Tensor:
        return self._exact_sigmas().log().float()

    def _exact_sigmas(self) -> Tensor:
        power = {"linear": 2, "sqrt_linear": 1}[self.beta_schedule]
        ends = (self.linear_start ** (1 / power), self.linear_end ** (1 / power))
        betas = torch.linspace(*ends, self.table_size, dtype=torch.float64) ** power
        alphas = torch.cumprod(1.0 - betas, dim=0)
        alphas = alphas / (self.snr_shift + (1 - self.snr_shift) * alphas)
        if self.zero_terminal:
            roots = alphas.sqrt()
            alphas = ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])).square()
            alphas[-1] = LAST_ALPHA
        return torch.sqrt((1 - alphas) / alphas)

    def timestep(self, sigma: Tensor) -> Tensor:
        distance = (sigma.log().to(self.log_sigmas.device).reshape(1, -1) - self.log_sigmas[:, None]).abs()
        return distance.argmin(dim=0).view(sigma.shape).to(sigma.device)

    def sigma(self, timestep: Tensor) -> Tensor:
        time = timestep.float().to(self.log_sigmas.device).clamp(0, self.table_size - 1)
        low, high = self.log_sigmas[time.floor().long()], self.log_sigmas[time.ceil().long()]
        log_sigma = (1 - time.frac()) * low + time.frac() * high
        return log_sigma.exp().to(timestep.device)

    def percent_to_sigma(self, percent: float) -> float:
        if percent <= 0.0:
            return 999999999.9
        if percent >= 1.0:
            return 0.0
        return float(self.sigma(torch.tensor((1.0 - percent) * 999.0)))

    def calculate_input(self, sigma: Tensor, x: Tensor) -> Tensor:
        return x / torch.sqrt(per_sample(sigma, x) ** 2 + 1.0)

    def denoised(self, output: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        return x - output * per_sample(sigma, x)

    def noise_scaling(self, sigma: Tensor, noise: Tensor, latent: Tensor, max_denoise: bool = False) -> Tensor:
        sigma = per_sample(sigma, noise)
        return noise * (torch.sqrt(1.0 + sigma**2) if max_denoise else sigma) + latent

    def inverse_noise_scaling(self, sigma: Tensor, x: Tensor) -> Tensor:
        return x

    def half_log_snr(self, sigma: Tensor) -> Tensor:
        return -sigma.log()

    def sigma_from_half_log_snr(self, half_log_snr: Tensor) -> Tensor:
        return torch.exp(-half_log_snr)


@dataclass(frozen=True)
class VPrediction(EpsPrediction):
    """The noise levels of `EpsPrediction` for a model of the velocity (Salimans and Ho 2022, appendix D)."""

    def denoised(self, output: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        sigma = per_sample(sigma, x)
        variance = sigma**2 + 1.0
        return x / variance - output * sigma / torch.sqrt(variance)
