"""What a rank holds in memory: at most one transformer, one VAE and one set of text encoders."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from .errors import UserError
from .parts import WHOLE, Part
from .protocol.messages import ModelRef, TextRef, VaeRef

if TYPE_CHECKING:
    from .control import Run
    from .text.encoders import TextEncoders
    from .transformer import Transformer
    from .vae.load import LoadedVAE

Ref = ModelRef | TextRef | VaeRef

VAE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass
class Held:
    """One loaded model: the reference that it came from, which part of it, the state of the files when it was read."""

    ref: Ref
    part: Part
    fingerprint: tuple[object, ...]
    model: Any
    bytes: int


class ModelStore:
    """Loads by reference, and keeps what it loaded until another of its kind is asked for, or the file changes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._held: dict[str, Held] = {}

    def transformer(self, ref: ModelRef, run: Run, part: Part = WHOLE) -> Transformer:
        """`part` of a model. Raises `UserError` when the file is missing, broken, or of no family that we sample."""

        def load() -> tuple[Transformer, int]:
            from .transformer import Transformer

            transformer = Transformer(Path(ref.path), self.device, ref.weight_dtype, part)
            return transformer, transformer.bytes

        return self._get(ref, load, run, part)

    def vae(self, ref: VaeRef, run: Run) -> LoadedVAE:
        """Raises `UserError` when the file is missing, broken, or no AutoencoderKL."""

        def load() -> tuple[LoadedVAE, int]:
            from .vae.load import load_vae

            vae = load_vae(ref.path, device=self.device, dtype=self._vae_dtype(ref))
            return vae, _bytes(vae.module)

        return self._get(ref, load, run)

    def text(self, ref: TextRef, run: Run) -> TextEncoders:
        """Raises `UserError` when the folder lacks an encoder or a tokenizer."""

        def load() -> tuple[TextEncoders, int]:
            from .text.encoders import load_text_encoders

            dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
            encoders = load_text_encoders(ref.path, device=self.device, dtype=dtype)
            return encoders, sum(_bytes(part.encoder) for part in encoders.parts)

        return self._get(ref, load, run)

    def unload(self) -> int:
        """Forget every model; the number of bytes that they took."""
        freed = sum(held.bytes for held in self._held.values())
        self._held.clear()
        self._release()
        return freed

    def summary(self) -> list[dict[str, object]]:
        return [{"kind": kind, "path": held.ref.path, "bytes": held.bytes} for kind, held in sorted(self._held.items())]

    def memory(self) -> dict[str, int]:
        """Bytes that this process uses, and that are free, on its device."""
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            return {"used": torch.cuda.memory_reserved(self.device), "free": free, "total": total}
        host = psutil.virtual_memory()
        return {"used": psutil.Process().memory_info().rss, "free": host.available, "total": host.total}

    def _get(self, ref: Ref, load: Callable[[], tuple[Any, int]], run: Run, part: Part = WHOLE) -> Any:
        fingerprint = _fingerprint(Path(ref.path))
        held = self._held.get(ref.kind)
        if held is not None and (held.ref, held.part, held.fingerprint) == (ref, part, fingerprint):
            return held.model
        if held is not None:
            run.log("info", f"{Path(held.ref.path).name} makes room for {Path(ref.path).name}.")
            del self._held[ref.kind], held
            self._release()
        run.progress("load", 0, 1)
        model, size = load()
        self._held[ref.kind] = Held(ref, part, fingerprint, model, size)
        run.progress("load", 1, 1)
        return model

    def _release(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _vae_dtype(self, ref: VaeRef) -> torch.dtype:
        if ref.weight_dtype == "auto":
            # fp16 overflows in some of these decoders, bf16 does not; a CPU computes fastest in fp32.
            return torch.float32 if self.device.type == "cpu" else torch.bfloat16
        if ref.weight_dtype not in VAE_DTYPES:
            raise UserError(f"A VAE cannot be loaded as {ref.weight_dtype}.", f"Choose auto, {', '.join(VAE_DTYPES)}.")
        return VAE_DTYPES[ref.weight_dtype]


def _fingerprint(path: Path) -> tuple[object, ...]:
    """Changes when the file, or any file of the folder, is replaced."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file())


def _bytes(module: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
