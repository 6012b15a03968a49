"""What a rank does with a request. The same calls are made on every rank, and the same models are loaded."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..adapters.lora.store import AdapterStore
from ..distributed.axis import Axis
from ..distributed.groups import abandon_groups, new_group
from ..distributed.ledger import Ledger
from ..distributed.mesh import Mesh
from ..errors import UserError
from ..files.states import FileStates
from ..layout.model_part import ModelPart
from ..layout.stages import Stage
from ..protocol import messages
from .agreement import all_or_none, check_agreement
from .checks import batch_of, check_request, needed
from .first_pass import can_leave, key_of, reporting
from .meshes import Meshes
from .model_store import ModelStore
from .run_conditions import Runs

if TYPE_CHECKING:
    from ..adapters.controlnet.nets import ControlNet
    from ..adapters.ip_adapter import IPAdapter
    from ..families.family import Family
    from ..run_context import Run
    from .model import Transformer

T = TypeVar("T")

Answer = tuple[dict[str, Any], dict[str, Tensor]]
"""The `data` and the tensors of a `Result`."""


@dataclass(frozen=True)
class Ready:
    """What steps of a run's `place` (as `_place` says) compute with. `adapters`: IP-Adapters by path; `nets`:
    ControlNets."""

    place: tuple[object, ...]
    mesh: Mesh
    transformer: Transformer
    adapters: Mapping[str, IPAdapter]
    nets: Mapping[str, ControlNet]


class Engine:
    """Serves every request that is about models. Rank 0's answer goes to the client."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.files = FileStates()
        self.models = ModelStore(device, self.files)
        self.adapters = AdapterStore(self.files)
        self.world = _world()
        self._ready: Ready | None = None
        """What the last request has made ready: the next step of its run goes on with it."""
        self._meshes = Meshes()
        self._runs = Runs()
        self._serve = {
            messages.EncodeText: self._encode_text,
            messages.FindChanges: self._find_changes,
            messages.KeepChanges: self._keep_changes,
            messages.Sample: self._sample,
            messages.Predict: self._predict,
            messages.EndRun: self._end_run,
            messages.Decode: self._decode,
            messages.EncodeImage: self._encode_image,
            messages.Unload: self._unload,
        }

    @torch.inference_mode()
    def handle(self, request: messages.AnyRequest, tensors: dict[str, Tensor], run: Run) -> Answer:
        if not self._goes_on(request, tensors):
            self._ready = None
            self.files.begin(request.run if isinstance(request, messages.Predict) else None)
            check_agreement(request, tensors, self.files, run)
        run.begun()
        return self._serve[type(request)](request, tensors, run)

    def status(self) -> dict[str, object]:
        """This rank's device, memory, models, and what it sent in the last run of each layout, ready for JSON."""
        return {
            "device": str(self.device),
            "memory": self.models.memory(),
            "models": self.models.summary(),
            "traffic": self._meshes.traffic(),
        }

    def abandon(self) -> None:
        """As the worker's `Engine.leave`. The models stay."""
        self._ready = None
        self.models.abandon()
        abandon_groups([*self.world.release(), *self._meshes.abandon()])

    def rejoin(self, run: Run) -> None:
        """As the worker's `Engine.rejoin`. What clients have sent they will be asked for again."""
        self.world = _world()
        self.models.keep_common(run)
        self.adapters.forget()
        self._runs.forget()

    def _encode_text(self, request: messages.EncodeText, tensors: dict[str, Tensor], run: Run) -> Answer:
        """On rank 0 alone: a copy of the text encoders on every rank would cost memory and save no time."""

        def encode() -> dict[str, Tensor]:
            encoders = self.models.text(request.text, run)
            run.progress("encode text", 0, 1)
            warn = partial(run.log, "warning")
            return encoders.encode(request.prompt, request.prompt_2, request.max_length, warn).tensors()

        return {}, self._on_rank_0(encode, run) or {}

    def _find_changes(self, request: messages.FindChanges, tensors: dict[str, Tensor], run: Run) -> Answer:
        return {"missing": self.adapters.missing(request.digests)}, {}

    def _keep_changes(self, request: messages.KeepChanges, tensors: dict[str, Tensor], run: Run) -> Answer:
        self.adapters.keep(request.digests, tensors)
        return {}, {}

    def _sample(self, request: messages.Sample, tensors: dict[str, Tensor], run: Run) -> Answer:
        from .sample import sample

        mesh, transformer = self._load_for(request, tensors, run)
        family = self._begin(request, tensors, mesh, transformer, run)
        stage = Stage(mesh.pipefusion.rank, mesh.pipefusion.size)
        nets = self._controlnets(request.controls, family, stage, run)
        prompts = [prompt for entry in messages.entries_of(request) for prompt in entry.image_prompts]
        stage = replace(stage, sizes=request.layout.stage_blocks)
        adapters = self._ip_adapters(prompts, transformer, family, stage, run)
        mesh.ledger.reset()
        started = time.monotonic()
        work = partial(sample, request, tensors, family, mesh, run, nets, adapters)
        latents = self._with_files_unchanged(work, run)
        seconds = time.monotonic() - started
        memory = self.models.memory()
        run.memory(memory["used"], memory["free"])
        return {"layout": str(request.layout), "seconds": seconds, "traffic": mesh.ledger.summary()}, latents

    def _predict(self, request: messages.Predict, tensors: dict[str, Tensor], run: Run) -> Answer:
        from .predict import predict

        conditions = self._runs.at(request.run, request.model)
        missing = [key for key in request.conditions if key not in request.run_conditions and key not in conditions]
        if missing:
            return {"missing": missing}, {}
        if self._ready is None:
            mesh, transformer = self._load_for(request, tensors, run)
            prompts = self._image_prompts(request)
            adapters = self._ip_adapters(prompts, transformer, transformer.family, Stage(), run)
            nets = self._controlnets(self._controls(request), transformer.family, Stage(), run)
            self._ready = Ready(_place(request, tensors), mesh, transformer, adapters, nets)
            run.check_cancelled()
        ready = self._ready
        family = self._begin(request, tensors, ready.mesh, ready.transformer, run)
        ready.mesh.ledger.reset()
        return {}, predict(request, tensors, conditions, family, ready.mesh, run, ready.adapters, ready.nets)

    def _goes_on(self, request: messages.AnyRequest, tensors: dict[str, Tensor]) -> bool:
        """Whether all ranks have made ready what `request` needs, so that they need neither agree nor load again.

        They have all of them, or none: what they know of it came from the same requests, in which they agreed.
        """
        if not isinstance(request, messages.Predict) or self._ready is None:
            return False
        adapters = {prompt.adapter.path for prompt in self._image_prompts(request)}
        nets = {control.net.path for control in self._controls(request)}
        has_all = adapters <= self._ready.adapters.keys() and nets <= self._ready.nets.keys()
        return has_all and self._ready.place == _place(request, tensors)

    def _image_prompts(self, request: messages.Predict) -> list[messages.ImagePromptUse]:
        """Of the conditions that the ranks keep from earlier evaluations, and of those that come with this one."""
        prompts = [each.prompts for key in request.conditions if (each := self._runs.condition(key))]
        prompts += [entry.image_prompts for entry in messages.entries_of(request)]
        return [prompt for own in prompts for prompt in own]

    def _controls(self, request: messages.Predict) -> list[messages.ControlUse]:
        """As `_image_prompts`, the ControlNets."""
        known = [each.controls for key in request.conditions if (each := self._runs.condition(key))]
        return [*messages.controls_of(request), *(control for own in known for control in own)]

    def _load_for(
        self, request: messages.Sample | messages.Predict, tensors: dict[str, Tensor], run: Run
    ) -> tuple[Mesh, Transformer]:
        """The mesh and the model of a request's layout, with the changes that it asks for.

        Raises `UserError` for a layout that does not fit, before anything is loaded.
        """
        check_request(request, tensors, self.world.size, self.files.under(request.model.path))
        mesh = self._meshes.of(request.layout, self.models.settle)
        transformer = self.models.transformer(request.model, run, ModelPart.of(request.layout, mesh))
        all_or_none(lambda: self.adapters.adapt(transformer, request.adapters, run), run)
        return mesh, transformer

    def _begin(
        self,
        request: messages.Sample | messages.Predict,
        tensors: dict[str, Tensor],
        mesh: Mesh,
        transformer: Transformer,
        run: Run,
    ) -> Family:
        """The model's view, at the start of an evaluation or a run of them over `mesh`."""
        family = transformer.on(mesh)
        if request.layout.compile == "blocks":
            blocks = transformer.compile_blocks(run)
            if blocks is not None:
                blocks.watch(key_of(request, tensors), reporting(run, leaves=can_leave(request)))
        return family

    def _ip_adapters(
        self,
        prompts: Sequence[messages.ImagePromptUse],
        transformer: Transformer,
        family: Family,
        stage: Stage,
        run: Run,
    ) -> dict[str, IPAdapter]:
        """By their paths, those that show `prompts`."""
        refs = dict.fromkeys(prompt.adapter for prompt in prompts)
        return {ref.path: self.models.ip_adapter(ref, family, transformer.cuts, stage, run) for ref in refs}

    def _controlnets(
        self, controls: Sequence[messages.ControlUse], family: Family, stage: Stage, run: Run
    ) -> dict[str, ControlNet]:
        """By their paths, those of `controls`."""
        refs = dict.fromkeys(control.net for control in controls)
        return {ref.path: self.models.controlnet(ref, family.dtype, stage, run) for ref in refs}

    def _end_run(self, request: messages.EndRun, tensors: dict[str, Tensor], run: Run) -> Answer:
        counts = self._runs.end(request.run)
        if counts:
            run.evaluations(*counts)
        return {}, {}

    def _decode(self, request: messages.Decode, tensors: dict[str, Tensor], run: Run) -> Answer:
        from ..vae.decode import decode

        return self._with_vae(decode, "decode", request, needed("latent", tensors), "image", run)

    def _encode_image(self, request: messages.EncodeImage, tensors: dict[str, Tensor], run: Run) -> Answer:
        from ..vae.encode import encode

        return self._with_vae(encode, "encode image", request, needed("image", tensors), "latent", run)

    def _with_vae(
        self,
        work: Any,
        phase: messages.Phase,
        request: messages.VaeWork,
        batch: Tensor,
        name: str,
        run: Run,
    ) -> Answer:
        from ..vae.job import Memory
        from ..vae.tiles import Tiling

        def progress(done: int, total: int) -> None:
            run.check_cancelled()
            run.progress(phase, done, total)

        vae = self.models.vae(request.vae, run)
        run.progress(phase, 0, 1)
        memory = Memory(
            free_up=lambda bytes: self.models.free_up(bytes, request.vae, run),
            on_short=request.on_out_of_memory,
            say=lambda text: run.log("info", text),
        )
        tiling = Tiling(request.tile_size, request.overlap)
        converted = partial(work, vae, batch, self.world, tiling, on_progress=progress, check=run.check_cancelled)
        result = self._with_files_unchanged(partial(converted, memory=memory), run)
        return {}, {} if result is None else {name: result}

    def _with_files_unchanged(self, work: Callable[[], T], run: Run) -> T:
        """What `work` gives. Raises `UserError` if files of models were changed meanwhile, which may also be why the
        work failed."""
        try:
            result = work()
        except UserError:
            self.models.check_unchanged()
            raise
        all_or_none(self.models.check_unchanged, run)
        return result

    def _unload(self, request: messages.Unload, tensors: dict[str, Tensor], run: Run) -> Answer:
        self.adapters.forget()
        self._runs.forget()
        return {"freed_bytes": run.gather(self.models.unload())}, {}

    def _on_rank_0(self, work: Any, run: Run) -> Any:
        """Do `work` on rank 0; an error of it that the user can mend is raised on every rank."""
        return all_or_none(work if dist.get_rank() == 0 else lambda: None, run)


def _place(request: messages.Predict, tensors: dict[str, Tensor]) -> tuple[object, ...]:
    """What the steps of a run have in common, as long as they need the same weights and the same layout fits."""
    return request.run, request.model, request.layout, request.adapters, batch_of(request, tensors)


def _world() -> Axis:
    """All ranks, in a group of their own: the default one cannot be left."""
    ranks = range(dist.get_world_size())
    return Axis("world", ranks, new_group(ranks) if len(ranks) > 1 else None, Ledger())
