"""Stable Diffusion XL and its refiner (arXiv 2307.01952): U-Nets that are told of the picture's size, crop and more."""

from __future__ import annotations

from ..sampling.model_sampling import EpsPrediction, ModelSampling, VPrediction
from .condition import Condition
from .keys.sdxl import SDXL as SPEC
from .keys.sdxl import SDXL_REFINER, V_PREDICTION, ZERO_TERMINAL
from .unet import UNet


class SDXL(UNet):
    """The base model and its relatives, such as Turbo."""

    spec = SPEC
    numbers = 6

    def model_sampling(self, shift: float | None) -> ModelSampling:
        self.refuse_shift(shift)
        marks = self.network.config["_marks"]
        kind = VPrediction if V_PREDICTION in marks else EpsPrediction
        return kind(zero_terminal=V_PREDICTION in marks and ZERO_TERMINAL in marks)

    def added_numbers(self, condition: Condition) -> list[float]:
        assert condition.size is not None
        return [*condition.size, *condition.crop, *(condition.target_size or condition.size)]


class SDXLRefiner(UNet):
    """The refiner, which is told how beautiful the picture is to be instead of its target size."""

    spec = SDXL_REFINER
    numbers = 5

    def model_sampling(self, shift: float | None) -> ModelSampling:
        self.refuse_shift(shift)
        return EpsPrediction()

    def added_numbers(self, condition: Condition) -> list[float]:
        assert condition.size is not None
        assert condition.aesthetic_score is not None
        return [*condition.size, *condition.crop, condition.aesthetic_score]
