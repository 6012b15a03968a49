"""What a node needs of the program that runs it. `Host` serves scripts and tests; ComfyUI's is in comfyui/host.py."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from torch import Tensor

from ..launcher.spec import SidecarSpec, usual_spec
from ..parallel_backend.errors import Cancelled
from ..parallel_backend.layout.layout import AttentionKernel
from ..parallel_backend.protocol.messages import Request, Schedule, Welcome

if TYPE_CHECKING:
    from .handles import SentChange

logger = logging.getLogger(__name__)

OnProgress = Callable[[str, int, int, Tensor | None], None]
"""`on_progress(phase, step, total, preview)`; the preview is an unscaled latent `[1, C, H, W]`, or the first
frame of one, `[1, C, 1, H, W]`."""


class Host:
    """Runs nodes without ComfyUI. `models`: a folder with the layout of ComfyUI's `models`; `spec`: the sidecar to use.

    An `owned` sidecar ends with this process; another one stays warm until its idle time is over.
    """

    def __init__(
        self,
        *,
        models: Path | None = None,
        spec: SidecarSpec | None = None,
        owned: bool = True,
        on_progress: OnProgress | None = None,
        say: Callable[[str], None] = logger.info,
    ) -> None:
        self.models = models
        self._spec = spec
        self.owned = owned
        self.say = say
        self._on_progress = on_progress

    @property
    def spec(self) -> SidecarSpec:
        """The sidecar to use, where a layout does not ask for other ranks. Raises `UserError` for wrong settings."""
        return self._spec or self._usual_spec()

    def _usual_spec(self) -> SidecarSpec:
        return usual_spec()

    cpu_noise_offset = 1
    """Added to the seed of a run, it gives that of a stochastic sampler's own noise, where it is drawn on a CPU."""

    takes_paths = True
    """Whether a loader may be given a path instead of a name in a list."""

    def folders(self, kind: str) -> Sequence[Path]:
        """The folders of models of a kind (`diffusion_models`, `diffusers`, `vae`)."""
        kinds = {"diffusion_models": ("unet", "diffusion_models")}.get(kind, (kind,))
        return [self.models / each for each in kinds] if self.models else []

    def progress(self, model: Any = None) -> OnProgress:
        """A receiver of progress for one request; `model` is the MODEL whose latents are previewed."""
        return self._on_progress or (lambda phase, step, total, preview: None)

    def wants_previews(self, model: Any) -> bool:
        return False

    def kept(self, tensor: Tensor) -> Tensor:
        """A latent or a picture in the type in which this host hands them from node to node."""
        return tensor

    def show(self, text: str) -> None:
        """Shows a text on the node that runs, where nodes can be seen."""

    def prompt(self) -> object:
        """Which workflow it is whose nodes run now; None where that is not known."""
        return None

    def cancelled(self) -> bool:
        return False

    def leave_cancelled(self, error: Cancelled) -> NoReturn:
        """Ends the node whose request was cancelled."""
        raise error

    def new_model(self, handle: Any) -> Any:
        """The MODEL that carries `handle`."""
        return handle

    def with_handle(self, model: Any, handle: Any) -> Any:
        """A MODEL as `model`, that carries `handle`."""
        return handle

    def changes(self, model: Any) -> list[SentChange]:
        """The weight patches that nodes have put on the MODEL. Raises `UserError` for those that cannot travel."""
        return []

    def sending(self, message: Request, tensors: Mapping[str, Tensor], welcome: Welcome) -> None:
        """Called before a request goes to the sidecar that `welcome` describes."""

    def beginning(self, welcome: Welcome) -> None:
        """Called before a sampler of the host begins to ask the sidecar that `welcome` describes for predictions."""

    def check_model(self, model: Any) -> None:
        """Raises `UserError` naming what other nodes have put on the MODEL and a run in the ranks cannot obey."""

    def chosen_attention(self, model: Any) -> AttentionKernel:
        """The attention kernel that a node other than Parallel Layout has chosen for the MODEL; "auto": none."""
        return "auto"

    def cfg_norm(self, model: Any) -> float | None:
        """The strength of a CFGNorm node on the MODEL, None without one."""
        return None

    def schedule(
        self, model: Any, sampler: str, scheduler: str, steps: int, denoise: float
    ) -> tuple[Schedule | None, Tensor | None, float | None]:
        """The noise levels of a run, by name or as sigmas, and the flow shift if a node has set one."""
        return Schedule(scheduler=scheduler, steps=steps, denoise=denoise), None, None


_current: Host | None = None
_make: Callable[[], Host] = Host


def install(make: Callable[[], Host]) -> None:
    """Have the host of this process made by `make` when it is first asked for. The pack's __init__ does in ComfyUI."""
    global _make
    _make = make


def current() -> Host:
    """The host in use: the one given to `use`, else that of this process."""
    global _current
    if _current is None:
        _current = _make()
    return _current


def use(host: Host | None) -> None:
    """Make `host` the current one; None: that of this process, made anew."""
    global _current
    _current = host
