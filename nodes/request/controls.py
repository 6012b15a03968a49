"""ControlNets of a conditioning, placed and prepared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...parallel_backend.errors import UserError
from ...parallel_backend.protocol.messages import Conditioning, ControlUse

if TYPE_CHECKING:
    from torch import Tensor

CONTROL = "control"
"""The key of a prompt's ControlNet in ComfyUI."""
CELL = 8
"""Pixels of a picture for a cell of its latent, in both directions."""

PREPARED: dict[int | None, Callable[[Tensor], Tensor]] = {
    # In training, its VAE encoded edges of half of 255, not of 1: that is twice this, less 1.
    1: lambda edges: 63.75 * edges + 0.75,
    # It was trained on depths, of which other programs draw the near ones bright.
    2: lambda depth: 1.0 - depth,
}
"""What Stability's ControlNets for 3.5 Large make of a picture in 0..1, by the number of its kind in the file."""


class PendingControls:
    """The ControlNets of a prompt, `controls` after those of ComfyUI's own `previous_controlnet`, if there is one.

    Parallel Sampler sends them with the run. ComfyUI's own samplers ask them for residuals at each step, as they ask
    its own: these name themselves instead, and the model of the ranks is asked for the prediction with them.
    """

    def __init__(self, controls: Sequence[PendingControl] = (), previous_controlnet: Any = None) -> None:
        self.controls = tuple(controls)
        self.previous_controlnet = previous_controlnet
        self.multigpu_clones: dict[Any, Any] = {}
        self.extra_hooks = None

    def pre_run(self, model: Any, percent_to_sigma: Any) -> None:
        """Raises `UserError` for a model that is not in the ranks."""
        if not hasattr(model, "stepwise"):
            raise UserError(
                "This prompt has a ControlNet of Parallel ControlNet Apply, which only the ranks can evaluate, but the "
                "model is in ComfyUI's memory.",
                "Load the model with Parallel Loader, or use ComfyUI's own Load ControlNet Model and Apply ControlNet.",
            )
        if self.previous_controlnet is not None:
            self.previous_controlnet.pre_run(model, percent_to_sigma)

    def get_control(self, x_noisy: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> dict[str, list[Any]]:
        """ComfyUI's lists of residuals. In "middle", where transformers get none, is what the ranks are to evaluate."""
        own = {"middle": [ActiveControls(self.controls, float(t[0]))]}
        before = self._previous("get_control", None, x_noisy, t, *args, **kwargs) or {}
        return {name: [*before.get(name, ()), *own.get(name, ())] for name in ("input", "middle", "output")}

    def get_models(self) -> list[Any]:
        return self._previous("get_models", [])

    def get_models_only_self(self) -> list[Any]:
        return []

    def get_extra_hooks(self) -> list[Any]:
        return self._previous("get_extra_hooks", [])

    def inference_memory_requirements(self, dtype: Any) -> int:
        return self._previous("inference_memory_requirements", 0, dtype)

    def get_instance_for_device(self, device: Any) -> PendingControls:
        return self

    def cleanup(self) -> None:
        self._previous("cleanup", None)

    def _previous(self, name: str, otherwise: Any, *args: Any, **kwargs: Any) -> Any:
        if self.previous_controlnet is None:
            return otherwise
        return getattr(self.previous_controlnet, name)(*args, **kwargs)


@dataclass(frozen=True)
class ActiveControls:
    """The ControlNets of a prompt at the noise level `sigma` of one of ComfyUI's own samplers."""

    controls: tuple[PendingControl, ...]
    sigma: float


def active_controls(control: Mapping[str, Sequence[Any]] | None) -> list[ActiveControls]:
    """What the ranks are to evaluate, of the lists that ComfyUI's samplers hand to the network."""
    return [each for each in (control or {}).get("middle", ()) if isinstance(each, ActiveControls)]


@dataclass(frozen=True, eq=False)
class PendingControl:
    """A ControlNet and its picture `[B, H, W, 3]` in 0..1, encoded by `vae` when the latent's size is known.

    Without one: the ControlNet takes pixels.
    """

    message: ControlUse
    image: Tensor
    vae: Any

    def picture(self, height: int, width: int, batch: int) -> Tensor:
        """What is sent of the pictures, for `batch` latents of `height` and `width`: latents of that size, or pixels.

        One picture is for all latents; others are taken one each, from the first again where there are fewer.
        """
        count = len(self.image)
        image = self.image if count == 1 else self.image[[number % count for number in range(batch)]]
        picture = resized(image, CELL * height, CELL * width)
        if self.vae is None:
            return picture.movedim(-1, 1).float().contiguous()
        return self.vae.encode(picture)[:, :, :height, :width].float()


@dataclass(frozen=True)
class PlacedControl:
    """A ControlNet whose whole picture covers the latent, or an area of `size` (height and width)."""

    control: PendingControl
    size: tuple[int, int] | None

    @property
    def message(self) -> ControlUse:
        return self.control.message

    def picture(self, like: Tensor) -> Tensor:
        """What is sent of the picture for a run over the latent `like` `[B, C, ..., h, w]`."""
        height, width = self.size or like.shape[-2:]
        return self.control.picture(height, width, len(like))


def resized(image: Tensor, height: int, width: int) -> Tensor:
    """`[B, H, W, 3]` cut in the middle to the proportions asked for, then resized, as ComfyUI does with one."""
    import torch.nn.functional as F

    own_height, own_width = image.shape[1:3]
    top = max(0, round((own_height - own_width * height / width) / 2))
    left = max(0, round((own_width - own_height * width / height) / 2))
    middle = image[:, top : own_height - top, left : own_width - left].movedim(-1, 1)
    return F.interpolate(middle, size=(height, width), mode="nearest-exact").movedim(1, -1)


def pending_controls(side: str, entry: Mapping[str, Any]) -> tuple[PendingControl, ...]:
    """The ControlNets of a prompt's entry. Raises `UserError` for those of ComfyUI's own nodes."""
    control = entry.get(CONTROL)
    if control is None:
        return ()
    if not isinstance(control, PendingControls) or control.previous_controlnet is not None:
        raise UserError(
            f"The {side} prompt has a ControlNet of ComfyUI's own, which Parallel Sampler cannot send to the ranks.",
            "Use Parallel ControlNet Loader and Parallel ControlNet Apply, or sample with KSampler.",
        )
    return control.controls


def with_control(entry: Mapping[str, Any], control: PendingControl) -> PendingControls:
    """Those of a prompt's entry, and `control` after them."""
    before = entry.get(CONTROL)
    if before is None or isinstance(before, PendingControls):
        before = before or PendingControls()
        return PendingControls((*before.controls, control), before.previous_controlnet)
    return PendingControls((control,), before)


def to_message(
    sides: Mapping[str, tuple[tuple[Conditioning, ...], list[Any]]],
) -> tuple[dict[str, tuple[Conditioning, ...]], list[PlacedControl]]:
    """The sides' entries, which name their controls, and these.

    `sides`: by side the message's entries and the CONDITIONING that they come from.
    """
    controls: list[PlacedControl] = []
    named: dict[str, tuple[Conditioning, ...]] = {}
    for side, (messages, conditioning) in sides.items():
        own = []
        for message, (_, entry) in zip(messages, conditioning, strict=True):
            size = None if message.area is None else message.area[:2]
            numbers = tuple(_number(controls, each, size) for each in pending_controls(side, entry))
            own.append(message.model_copy(update={"controls": numbers}))
        named[side] = tuple(own)
    return named, controls


def _number(controls: list[PlacedControl], control: PendingControl, size: tuple[int, int] | None) -> int:
    """Its index in `controls`, to which it is added if it is missing: both prompts mostly have the same."""
    for index, known in enumerate(controls):
        if known.control is control and known.size == size:
            return index
    controls.append(PlacedControl(control, size))
    return len(controls) - 1
