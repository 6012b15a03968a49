"""Classifier-free guidance, on one group of ranks or on two (CFG parallel). Exact."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..comm import Axis
from ..families.base import Condition
from ..sampling.model_sampling import ModelSampling

Predict = Callable[[Tensor, Tensor, Condition], Tensor]
"""`predict(latent [B, C, H, W], timestep [B], condition)`: a transformer's output, however many ranks compute it."""


class Guidance:
    """From a transformer's output to a guided, denoised latent (Ho and Salimans, arXiv 2207.12598).

    With a CFG axis of two, its first rank evaluates the positive condition and its second the negative one; each step
    they exchange one prediction. At `cfg` 1, or without a negative condition, only the positive one is evaluated.
    """

    def __init__(
        self,
        predict: Predict,
        model_sampling: ModelSampling,
        axis: Axis,
        positive: Condition,
        negative: Condition | None,
        cfg: float,
    ) -> None:
        self.predict = predict
        self.model_sampling = model_sampling
        self.axis = axis
        self.cfg = cfg
        self.conditions = [positive] if negative is None or cfg == 1.0 else [positive, negative]

    def denoised(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The guided prediction of the clean latent for the noisy `x` `[B, C, H, W]` at `sigma` (0-d), in fp32."""
        sigma = sigma.to(x.device)
        latent = self.model_sampling.calculate_input(sigma, x)
        timestep = self.model_sampling.timestep(sigma).float().expand(x.shape[0])
        if self.axis.size == 2:
            own = self.predict(latent, timestep, self.conditions[self.axis.rank]).float()
            outputs = list(self.axis.all_gather(own.unsqueeze(0), [1, 1], dim=0))
        else:
            outputs = [self.predict(latent, timestep, condition).float() for condition in self.conditions]
        predictions = [self.model_sampling.denoised(output, x, sigma) for output in outputs]
        if len(predictions) == 1:
            return predictions[0]
        positive, negative = predictions
        return negative + (positive - negative) * self.cfg
