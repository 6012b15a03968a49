"""Classifier-free guidance, on one group of ranks or on two (CFG parallel). Exact."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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

    @property
    def own_conditions(self) -> list[Condition]:
        """Those that this rank evaluates."""
        return [self.conditions[self.axis.rank]] if self.axis.size == 2 else self.conditions

    def timestep(self, sigma: Tensor, x: Tensor) -> Tensor:
        """The transformer's clock `[B]` at `sigma` (0-d)."""
        return self.model_sampling.timestep(sigma.to(x.device)).float().expand(x.shape[0])

    def denoised(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The guided prediction of the clean latent for the noisy `x` `[B, C, H, W]` at `sigma` (0-d), in fp32."""
        latent = self.model_sampling.calculate_input(sigma.to(x.device), x)
        timestep = self.timestep(sigma, x)
        return self.combine([self.predict(latent, timestep, condition) for condition in self.own_conditions], x, sigma)

    def combine(self, outputs: Sequence[Tensor], x: Tensor, sigma: Tensor) -> Tensor:
        """The guided prediction, from the outputs for this rank's conditions. Elementwise: `x` may be a strip."""
        sigma = sigma.to(x.device)
        outputs = [output.float() for output in outputs]
        if self.axis.size == 2:
            outputs = list(self.axis.all_gather(outputs[0].unsqueeze(0), [1, 1], dim=0))
        predictions = [self.model_sampling.denoised(output, x, sigma) for output in outputs]
        if len(predictions) == 1:
            return predictions[0]
        positive, negative = predictions
        return negative + (positive - negative) * self.cfg
