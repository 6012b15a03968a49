"""ComfyUI as a host: its folders, progress bar, previews, cancel button and sigmas."""

# pyright: reportMissingImports=false
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import comfy.model_management
import comfy.samplers
import comfy.utils
import folder_paths
import latent_preview
import server
from torch import Tensor

from ..parallel_backend.errors import Cancelled
from ..parallel_backend.protocol.messages import Decode, Request, Sample, Schedule, Welcome
from . import comfy_model
from .host import Host, OnProgress, logger
from .patches import SentChange, changes_of

PREVIEW_FORMAT = "JPEG"
ALL_MEMORY = 1e30
"""More bytes than there are."""


class ComfyHost(Host):
    takes_paths = False

    def __init__(self) -> None:
        super().__init__(say=self._say)

    def _say(self, text: str) -> None:
        logger.info(text)
        self.show(text)

    def show(self, text: str) -> None:
        prompt_server = server.PromptServer.instance
        if prompt_server.last_node_id is not None:
            prompt_server.send_progress_text(text, prompt_server.last_node_id)

    def folders(self, kind: str) -> Sequence[Path]:
        return [Path(folder) for folder in folder_paths.get_folder_paths(kind)]

    def progress(self, model: Any = None) -> OnProgress:
        bar = comfy.utils.ProgressBar(1)
        previewer = _previewer(model)

        def on_progress(phase: str, step: int, total: int, preview: Tensor | None) -> None:
            picture = None
            if previewer is not None and preview is not None:
                x0 = model.model.process_latent_in(preview).to(model.load_device)
                picture = previewer.decode_latent_to_preview_image(PREVIEW_FORMAT, x0)
            bar.update_absolute(step, total, picture)

        return on_progress

    def wants_previews(self, model: Any) -> bool:
        return _previewer(model) is not None

    def cancelled(self) -> bool:
        return comfy.model_management.processing_interrupted()

    def leave_cancelled(self, error: Cancelled) -> NoReturn:
        comfy.model_management.throw_exception_if_processing_interrupted()
        raise comfy.model_management.InterruptProcessingException from error

    def sending(self, message: Request, welcome: Welcome) -> None:
        # ComfyUI's text encoders and VAE share a GPU with rank 0, and it knows nothing of what the ranks need.
        if self._shares_gpu(welcome) and isinstance(message, Sample | Decode):
            comfy.model_management.unload_all_models()
            comfy.model_management.soft_empty_cache()

    def beginning(self, welcome: Welcome) -> None:
        if self._shares_gpu(welcome):
            loaded = comfy.model_management.current_loaded_models
            in_use = [each for each in loaded if each.currently_used]
            comfy.model_management.free_memory(ALL_MEMORY, comfy.model_management.get_torch_device(), in_use)

    def _shares_gpu(self, welcome: Welcome) -> bool:
        return welcome.device == "cuda" and not self.spec.remote

    def new_model(self, handle: Any) -> Any:
        return comfy_model.new_model(handle)

    def with_handle(self, model: Any, handle: Any) -> Any:
        return comfy_model.with_handle(model, handle)

    def changes(self, model: Any) -> list[SentChange]:
        return changes_of(model.patches)

    def check_model(self, model: Any) -> None:
        comfy_model.check_patches(model)

    def schedule(
        self, model: Any, sampler: str, scheduler: str, steps: int, denoise: float
    ) -> tuple[Schedule | None, Tensor | None, float | None]:
        run = comfy.samplers.KSampler(
            model,
            steps,
            "cpu",
            sampler=sampler,
            scheduler=scheduler,
            denoise=denoise,
            model_options=model.model_options,
        )
        return None, run.sigmas.cpu(), comfy_model.patched_shift(model)


def _previewer(model: Any) -> Any:
    if model is None:
        return None
    return latent_preview.get_previewer(model.load_device, model.model.latent_format)
