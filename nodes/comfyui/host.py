"""ComfyUI as a host: its folders, progress bar, previews, cancel button and sigmas."""

# pyright: reportMissingImports=false
from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import comfy.cli_args
import comfy.model_management
import comfy.samplers
import comfy.utils
import folder_paths
import latent_preview
import server
import torch
from comfy.k_diffusion.sampling import default_noise_sampler
from torch import Tensor

from ...launcher.spec import SidecarSpec, usual_spec
from ...parallel_backend.errors import Cancelled
from ...parallel_backend.layout.layout import AttentionKernel
from ...parallel_backend.protocol.messages import Request, Sample, Schedule, VaeWork, Welcome
from ..handles import SentChange, handle_of
from ..host import Host, OnProgress, logger
from ..request.weight_patches import changes_of
from ..session import session
from ..session.activity import FAILURES
from . import model_checks, remote_model, settings
from .ranks_memory import RanksMemory

PREVIEW_FORMAT = "JPEG"
ALL_MEMORY = 1e30
"""More bytes than there are."""
SETTINGS_FILE = ("default", "comfy.settings.json")
"""Of ComfyUI's only user, in the folder of its users."""


class ComfyHost(Host):
    takes_paths = False

    def __init__(self, spec: SidecarSpec | None = None) -> None:
        super().__init__(spec=spec, say=self._say)
        # Before 2026, ComfyUI drew it with the run's own seed.
        drawn = default_noise_sampler(torch.zeros(1), seed=0)(None, None)
        self.cpu_noise_offset = int(not torch.equal(drawn, torch.randn(1, generator=torch.Generator().manual_seed(0))))
        self._ranks_memory = RanksMemory(self._unload_ranks)

    def _say(self, text: str) -> None:
        logger.info(text)
        self.show(text)

    def _usual_spec(self) -> SidecarSpec:
        """That of the settings' page. With several users it is none of them who decides, but the environment."""
        if comfy.cli_args.args.multi_user:
            return usual_spec()
        return settings.spec_of(Path(folder_paths.get_user_directory(), *SETTINGS_FILE))

    def kept(self, tensor: Tensor) -> Tensor:
        # ComfyUI before 2026 has no --fp16-intermediates.
        dtype_of = getattr(comfy.model_management, "intermediate_dtype", lambda: tensor.dtype)
        return tensor.to(comfy.model_management.intermediate_device(), dtype_of())

    def show(self, text: str) -> None:
        prompt_server = server.PromptServer.instance
        if prompt_server.last_node_id is not None:
            prompt_server.send_progress_text(text, prompt_server.last_node_id)

    def folders(self, kind: str) -> Sequence[Path]:
        if kind not in folder_paths.folder_names_and_paths:
            # ComfyUI has no nodes of its own for every kind.
            return [Path(folder_paths.models_dir) / kind]
        return [Path(folder) for folder in folder_paths.get_folder_paths(kind)]

    def progress(self, model: Any = None) -> OnProgress:
        bar = comfy.utils.ProgressBar(1)
        previewer = _previewer(model)

        def on_progress(phase: str, step: int, total: int, preview: Tensor | None) -> None:
            picture = None
            if phase == "compile":
                self.show(f"compiling, block {step + 1} of {total}")
            if previewer is not None and preview is not None:
                x0 = model.model.process_latent_in(preview).to(model.load_device)
                picture = previewer.decode_latent_to_preview_image(PREVIEW_FORMAT, x0)
            bar.update_absolute(step, total, picture)

        return on_progress

    def wants_previews(self, model: Any) -> bool:
        return _previewer(model) is not None

    def prompt(self) -> object:
        return getattr(server.PromptServer.instance, "last_prompt_id", None)

    def cancelled(self) -> bool:
        return comfy.model_management.processing_interrupted()

    def leave_cancelled(self, error: Cancelled) -> NoReturn:
        comfy.model_management.throw_exception_if_processing_interrupted()
        raise comfy.model_management.InterruptProcessingException from error

    def sending(self, message: Request, tensors: Mapping[str, Tensor], welcome: Welcome) -> None:
        if isinstance(message, Sample | VaeWork):
            self._give_room(welcome, keep=[])

    def beginning(self, welcome: Welcome) -> None:
        loaded = comfy.model_management.current_loaded_models
        self._give_room(welcome, keep=[each for each in loaded if each.currently_used])

    def _give_room(self, welcome: Welcome, keep: list[Any]) -> None:
        """ComfyUI's text encoders and VAE share a GPU with rank 0, and it knows nothing of what the ranks need."""
        ranks_memory = self._ranks_memory.entry
        if self._shares_gpu(welcome):
            device = comfy.model_management.get_torch_device()
            comfy.model_management.free_memory(ALL_MEMORY, device, [ranks_memory, *keep])
            comfy.model_management.soft_empty_cache()

    def _unload_ranks(self) -> None:
        """ComfyUI's memory manager asks for this, outside of a prompt too: nothing but a line of the log leaves it."""
        try:
            if text := session.unload():
                logger.info("ComfyUI unloads models, and so do the ranks: %s", text)
        except FAILURES as error:
            logger.warning("The ranks could not unload their models: %s", error)

    def _shares_gpu(self, welcome: Welcome) -> bool:
        return welcome.device == "cuda" and not self.spec.remote

    def new_model(self, handle: Any) -> Any:
        return remote_model.new_model(handle)

    def with_handle(self, model: Any, handle: Any) -> Any:
        return remote_model.with_handle(model, handle)

    def changes(self, model: Any) -> list[SentChange]:
        return changes_of(model.patches)

    def check_model(self, model: Any) -> None:
        model_checks.check_patches(model)
        if line := model_checks.kernel_line(model, handle_of(model).layout):
            self.say(line)

    def chosen_attention(self, model: Any) -> AttentionKernel:
        return model_checks.chosen_attention(model)

    def cfg_norm(self, model: Any) -> float | None:
        return model_checks.cfg_norm(model)

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
        return None, run.sigmas.cpu(), model_checks.patched_shift(model)


def _previewer(model: Any) -> Any:
    if model is None:
        return None
    return latent_preview.get_previewer(model.load_device, model.model.latent_format)
