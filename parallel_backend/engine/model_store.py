"""What a rank holds in memory: as many transformers and VAEs as there is room for, and one set of text encoders."""

from __future__ import annotations

import gc
import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
import torch.distributed as dist

from ..errors import Cancelled, UserError
from ..files.checkpoint import is_weights, open_checkpoint
from ..files.detect import PREFIXES as MODEL_PREFIXES
from ..files.states import FileState, FileStates
from ..layout.model_part import WHOLE, ModelPart
from ..machine import resources
from ..protocol.messages import ControlNetRef, IPAdapterRef, ModelRef, TextRef, VaeRef
from ..vae.files.autoencoder_kl import PREFIXES as VAE_PREFIXES
from .agreement import all_or_none, of_component

if TYPE_CHECKING:
    from ..adapters.controlnet.nets import ControlNet
    from ..adapters.ip_adapter import IPAdapter
    from ..families.family import Family
    from ..layout.stages import Stage
    from ..run_context import Run
    from ..text.encoders import TextEncoders
    from ..vae.load import LoadedVAE
    from ..weights.tensor_cuts import TensorCuts
    from .model import Transformer

log = logging.getLogger(__name__)

Ref = ModelRef | TextRef | VaeRef | ControlNetRef | IPAdapterRef

KEPT_FREE = 0.4
"""Share of a device's memory that must stay free for the work itself, for one model more to be kept."""

WITHIN_FILES = {"model": MODEL_PREFIXES, "vae": VAE_PREFIXES}
"""Of kinds of references: how their keys begin in a file that holds more, deepest first."""

VAE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass
class Held:
    """One loaded model: the reference that it came from, which part of it, the state of the files when it was read."""

    ref: Ref
    part: ModelPart
    fingerprint: tuple[FileState, ...]
    model: Any
    bytes: int


class ModelStore:
    """Loads by reference, and keeps what it loaded until the file changes, another part of it is asked for, or another
    model needs the room.

    Then the one goes that was used longest ago. All ranks hold parts of the same models, used in the same order.
    """

    def __init__(self, device: torch.device, states: FileStates) -> None:
        self.device = device
        self.states = states
        self._held: OrderedDict[Ref, Held] = OrderedDict()
        self._in_use: list[Ref] = []
        """What was asked for last, and what works together with it."""

    def transformer(self, ref: ModelRef, run: Run, part: ModelPart = WHOLE) -> Transformer:
        """`part` of a model. Raises `UserError` when the file is missing, broken, or of no family that we sample."""

        def load() -> tuple[Transformer, int]:
            from .model import Transformer

            transformer = Transformer(Path(ref.path), self.device, ref.weight_dtype, part, run.leave_if_cancelled)
            return transformer, transformer.bytes

        return self._get(ref, load, run, part)

    def controlnet(self, ref: ControlNetRef, dtype: torch.dtype, stage: Stage, run: Run) -> ControlNet:
        """In the model's `dtype`. Of a pipeline only the first stage has its weights; the others know its shape."""

        def load() -> tuple[ControlNet, int]:
            from ..adapters.controlnet.nets import open_controlnet

            device = self.device if stage.is_first else torch.device("meta")
            net = open_controlnet(Path(ref.path), device, dtype, run.leave_if_cancelled)
            return net, net.bytes if stage.is_first else 0

        return self._get(ref.model_copy(update={"dtype": str(dtype)}), load, run, ModelPart(stage), keep_in_use=True)

    def ip_adapter(self, ref: IPAdapterRef, family: Family, cuts: TensorCuts, stage: Stage, run: Run) -> IPAdapter:
        """In the model's dtype, for the blocks of `stage`, and of their heads for what `cuts` say."""

        def load() -> tuple[IPAdapter, int]:
            from ..adapters.ip_adapter import open_ip_adapter

            adapter = open_ip_adapter(Path(ref.path), family, cuts, stage)
            return adapter, adapter.bytes

        part = ModelPart(stage.settled(family.block_parameters), cuts.share)
        return self._get(ref.model_copy(update={"dtype": str(family.dtype)}), load, run, part, keep_in_use=True)

    def vae(self, ref: VaeRef, run: Run) -> LoadedVAE:
        """Raises `UserError` when the file is missing, broken, or no AutoencoderKL."""

        def load() -> tuple[LoadedVAE, int]:
            from ..vae.load import load_vae

            vae = load_vae(
                ref.path, device=self.device, dtype=self._vae_dtype(ref), check_cancelled=run.leave_if_cancelled
            )
            return vae, _bytes(vae.module)

        return self._get(ref, load, run)

    def text(self, ref: TextRef, run: Run) -> TextEncoders:
        """Raises `UserError` when the folder lacks an encoder or a tokenizer."""

        def load() -> tuple[TextEncoders, int]:
            from ..text.encoders import load_text_encoders

            dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
            encoders = load_text_encoders(
                ref.path, device=self.device, dtype=dtype, check_cancelled=run.leave_if_cancelled
            )
            return encoders, sum(_bytes(part.encoder) for part in encoders.parts)

        return self._get(ref, load, run)

    def free_up(self, bytes: int, ref: Ref, run: Run) -> int:
        """A collective: make room for `bytes` more on every rank for the model `ref`, as far as others can go.

        Returns what the rank with least has free then.
        """
        while True:
            free = min(map(int, run.gather(self._usable())))  # pyright: ignore[reportArgumentType]
            others = [each for each in self._held if each != ref and not isinstance(each, TextRef)]
            if free >= bytes or not others:
                return free
            self._give_up(others[0], f"the work of {Path(ref.path).name}", run)

    def abandon(self) -> None:
        """Of what is under way to other ranks."""
        for held in self._held.values():
            if isinstance(held.ref, ModelRef):
                held.model.abandon()

    def settle(self) -> None:
        """End what is under way to other ranks, which all do."""
        for held in self._held.values():
            if isinstance(held.ref, ModelRef):
                held.model.settle()

    def check_unchanged(self) -> None:
        """Raises `UserError` naming a file that was overwritten or cut while a model of the CPU had it mapped."""
        files = self._mapped() if self.device.type == "cpu" else ()
        for file in files:
            if file.is_overwritten():
                raise UserError(
                    f"{file.path} was changed while the ranks had it in memory: what they made of it is worthless.",
                    "Queue the prompt again: the file is read anew. To replace a model in use, write a new file and "
                    "rename it.",
                )

    def _mapped(self) -> tuple[FileState, ...]:
        return tuple(state for held in self._held.values() for state in held.fingerprint)

    def keep_common(self, run: Run) -> None:
        """A collective: forget what not all ranks hold, and the order in which they used the rest."""
        shared = [ref for ref in self._held if not isinstance(ref, TextRef)]
        names = {ref: f"{type(ref).__name__} {ref.model_dump_json()}" for ref in shared}
        first, *others = (
            [str(name) for name in each] for each in run.gather(list(names.values())) if isinstance(each, list)
        )
        common = [name for name in first if all(name in each for each in others)]
        for ref in sorted(shared, key=lambda ref: common.index(names[ref]) if names[ref] in common else -1):
            if names[ref] in common:
                self._held.move_to_end(ref)
            else:
                del self._held[ref]

    def unload(self) -> int:
        """Forget every model; the number of bytes that this process uses less of its device."""
        used = self.memory()["used"]
        self._held.clear()
        self._release()
        return max(0, used - self.memory()["used"])

    def summary(self) -> list[dict[str, object]]:
        """What is held, by kind, the last used first."""
        newest = sorted(reversed(self._held.values()), key=lambda held: held.ref.kind)
        return [{"kind": held.ref.kind, "path": held.ref.path, "bytes": held.bytes} for held in newest]

    def memory(self) -> dict[str, int]:
        """Bytes that this process uses, and that are free, on its device; on CPU as far as its container lets it."""
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            return {"used": torch.cuda.memory_reserved(self.device), "free": free, "total": total}
        host = resources.memory()
        return {"used": psutil.Process().memory_info().rss, "free": host.available, "total": host.total}

    def _get(
        self,
        ref: Ref,
        load: Callable[[], tuple[Any, int]],
        run: Run,
        part: ModelPart = WHOLE,
        *,
        keep_in_use: bool = False,
    ) -> Any:
        """`keep_in_use`: the models that were asked for before it stay, since it works together with them."""
        now = self.states.under(ref.path)
        self._in_use = [*(self._in_use if keep_in_use else ()), ref]
        held = self._held.get(ref)
        if held is not None and (held.part, held.fingerprint) != (part, now):
            del self._held[ref]
            held = None
            self._release()
        self._make_room(ref, part, held is None, run)

        def hold() -> Held:
            if held is not None:
                return held
            run.progress("load", 0, 1)
            run.holds((*self._mapped(), *now))
            model, size = load()
            run.progress("load", 1, 1)
            return Held(ref, part, now, model, size)

        try:
            own = hold() if isinstance(ref, TextRef) else all_or_none(hold, run)
        except (UserError, Cancelled):
            # What one rank cannot load no other keeps.
            self._held.pop(ref, None)
            raise
        self._held[ref] = own
        self._held.move_to_end(ref)
        return own.model

    def _make_room(self, ref: Ref, part: ModelPart, missing: bool, run: Run) -> None:
        """A collective, also of ranks that hold this part already: of another layout, others may have to load theirs.

        But for text encoders: rank 0 alone has those, and only ever one set.
        """
        is_text = isinstance(ref, TextRef)
        while others := [
            each for each in self._held if each not in self._in_use and isinstance(each, TextRef) == is_text
        ]:
            if is_text:
                enough = not missing
            else:
                spares = run.gather(self._spare(ref, part) if missing else 0)
                enough = min(map(int, spares)) >= 0  # pyright: ignore[reportArgumentType]
            if enough:
                return
            self._give_up(others[0], Path(ref.path).name, run)

    def _give_up(self, ref: Ref, taker: str, run: Run) -> None:
        del self._held[ref]
        self._release()
        run.log("info", f"{Path(ref.path).name} makes room for {taker}.")

    def _usable(self) -> int:
        """Bytes that this rank may still take: its share of what is free, and what its allocator holds unused."""
        free = self.memory()["free"] // self._sharers
        if self.device.type == "cuda":
            free += torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return free

    @property
    def _sharers(self) -> int:
        """Ranks that share the memory of this rank's device."""
        return 1 if self.device.type == "cuda" else dist.get_world_size()

    def _spare(self, ref: Ref, part: ModelPart) -> int:
        """Bytes that would be free, beyond what is to stay free, with this part of a model loaded as well."""
        memory = self.memory()
        return int((memory["free"] - KEPT_FREE * memory["total"]) / self._sharers) - self._expected_bytes(ref, part)

    def _expected_bytes(self, ref: Ref, part: ModelPart) -> int:
        """Of the device's memory, judged by the size of the files, or of its part of a file that holds others too."""
        files = [state for state in of_component(ref, self.states) if is_weights(state.path)]
        on_disk = sum(state.size for state in files)
        if len(files) == 1 and ref.kind in WITHIN_FILES:
            on_disk = open_checkpoint(files[0].path).bytes_under(WITHIN_FILES[ref.kind])
        shares = part.stage.count * part.tensor.count * (part.shard.count if part.shard else 1)
        widened = 2 if getattr(ref, "weight_dtype", "auto") == "fp32" else 1
        return 0 if part.offload else widened * on_disk // shares

    def _release(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            # Of offloaded weights. Older releases of torch call it by the second name.
            empty = getattr(torch.accelerator, "empty_host_cache", getattr(torch._C, "_host_emptyCache", None))
            if empty is None:
                log.warning("torch %s keeps the pinned host memory of unloaded models for the next.", torch.__version__)
            else:
                empty()

    def _vae_dtype(self, ref: VaeRef) -> torch.dtype:
        if ref.weight_dtype == "auto":
            # fp16 overflows in some of these decoders, bf16 does not; a CPU computes fastest in fp32.
            return torch.float32 if self.device.type == "cpu" else torch.bfloat16
        if ref.weight_dtype not in VAE_DTYPES:
            raise UserError(f"A VAE cannot be loaded as {ref.weight_dtype}.", f"Choose auto, {', '.join(VAE_DTYPES)}.")
        return VAE_DTYPES[ref.weight_dtype]


def _bytes(module: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
