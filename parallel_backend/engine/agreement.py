"""Whether all ranks are about to do the same work: asked before it starts, so that none waits for another in vain."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

from torch import Tensor

from ..errors import Cancelled, UserError
from ..files.checkpoint import MODEL_FOLDERS
from ..files.regular import open_regular
from ..files.states import FileState, FileStates
from ..protocol import messages

if TYPE_CHECKING:
    from ..run_context import Run

FileRef = messages.ModelRef | messages.VaeRef | messages.LoraRef | messages.ControlNetRef | messages.IPAdapterRef
COMPONENTS = {"model": MODEL_FOLDERS, "vae": ("vae",), "controlnet": ("controlnet",)}
"""The folder of a diffusers pipeline that a reference of that kind reads."""
SAMPLES, SAMPLE_BYTES = 16, 4096
"""How much of each file tells it from others: evenly spread, so that another model of the same shapes is found out."""

REQUEST = "the request"

T = TypeVar("T")


def check_agreement(request: messages.AnyRequest, tensors: Mapping[str, Tensor], states: FileStates, run: Run) -> None:
    """A collective: raise `UserError` on all ranks, naming those that differ, unless all have the same request, tensors
    of the same names and shapes, and the same files."""
    mine = {REQUEST: request_key(request, tensors)}
    mine |= {f"the file {ref.path}": file_key(ref, states) for ref in files_of(request)}
    first, *others = (each for each in run.gather(mine) if isinstance(each, dict))
    for what, key in first.items():
        differing = [str(rank) for rank, each in enumerate(others, start=1) if each.get(what) != key]
        if differing:
            raise UserError(
                f"The ranks disagree on {what}: rank 0 has another than rank {', '.join(differing)}; nothing was "
                "started.",
                "Run the same version of this node pack on every host."
                if what == REQUEST
                else "Put the same file under that path on every host.",
            )


def all_or_none(work: Callable[[], T], run: Run) -> T:
    """A collective: do `work` on every rank; what one of them refuses, all refuse with its `UserError`; where one was
    cancelled, all are.

    Each rank reads its own part of a file, so that it may be the only one that finds something wrong, or that is still
    at it when the user cancels. In `work` no rank may wait for another.
    """
    result, refusal = None, None
    try:
        result = work()
    except UserError as error:
        refusal = [error.message, error.hint]
    except Cancelled as error:
        refusal = str(error)
    refusals = run.gather(refusal)
    for each in refusals:
        if isinstance(each, list):
            raise UserError(*each)
    for each in refusals:
        if isinstance(each, str):
            raise Cancelled(each)
    return cast(T, result)


def files_of(request: messages.AnyRequest) -> Iterator[FileRef]:
    """What every rank reads for this request. Text encoders are read by rank 0 alone."""
    for _, value in request:
        if isinstance(value, FileRef):
            yield value
        elif isinstance(value, messages.Adapters):
            yield from value.files
    yield from (control.net for control in messages.controls_of(request))
    for entry in messages.entries_of(request):
        yield from (prompt.adapter for prompt in entry.image_prompts)


def request_key(request: messages.AnyRequest, tensors: Mapping[str, Tensor]) -> str:
    """A digest of the request as this rank has understood it, layout included, and of what came with it."""
    kinds = sorted((name, str(tensor.dtype), list(tensor.shape)) for name, tensor in tensors.items())
    return hashlib.sha256(f"{request.model_dump_json()} {kinds}".encode()).hexdigest()


def file_key(ref: FileRef, states: FileStates) -> str:
    """The same for copies of a file or folder on several hosts, and for no others."""
    try:
        return _content_key(of_component(ref, states))
    except OSError as error:
        return f"{error.strerror}"


def of_component(ref: FileRef | messages.TextRef, states: FileStates) -> tuple[FileState, ...]:
    """Of the files that `ref` reads: in a pipeline's folder, those of one component."""
    found = states.under(ref.path)
    components = {Path(ref.path) / name for name in COMPONENTS.get(ref.kind, ())}
    return tuple(state for state in found if components.intersection(state.path.parents)) or found


@lru_cache(maxsize=16)
def _content_key(files: tuple[FileState, ...]) -> str:
    """Of the names, sizes and some of the bytes of `files`; the modification time only tells when to look again."""
    digest = hashlib.sha256()
    for path, size, *_ in files:
        digest.update(f"{path.name} {size} ".encode())
        with open_regular(path) as file:
            for sample in range(SAMPLES):
                file.seek(sample * size // SAMPLES)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
