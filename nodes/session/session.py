"""The nodes' way to the ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import Tensor

from ...launcher import devices, lifecycle
from ...launcher.client import Client, Event, NotBegun
from ...launcher.spec import SidecarSpec, check, device_and_ranks
from ...parallel_backend.errors import Cancelled, UserError
from ...parallel_backend.protocol.messages import (
    AnyRequest,
    Evaluations,
    Log,
    Memory,
    Progress,
    Request,
    Result,
    Unload,
    Welcome,
)
from .. import host
from ..layout_choice import LayoutChoice
from .activity import activity

T = TypeVar("T")

UNLOAD_S = 60.0
"""The time limit for the ranks to unload their models, once the request before is done."""

_asked_by_prompt: tuple[object, str] = (None, "")
"""The workflow that asked for ranks last, and for which, in words."""


@dataclass(frozen=True)
class Reply:
    result: Result
    tensors: dict[str, Tensor]


def ranks_for(layout: LayoutChoice) -> int:
    """Ranks of the sidecar that would be started for a layout. Raises `UserError` for GPUs that are not there."""
    return spec_for(layout).ranks


def spec_for(layout: LayoutChoice) -> SidecarSpec:
    """The sidecar that a layout asks for. Raises `UserError` for GPUs that are not there."""
    spec = host.current().spec
    usual = 0 if layout.gpus else spec.ranks
    wanted = replace(spec, ranks=layout.ranks or usual, gpus=layout.gpus or spec.gpus)
    if not spec.remote:
        return replace(wanted, ranks=device_and_ranks(wanted)[1])
    check(wanted)
    return wanted


def client_for(layout: LayoutChoice | None) -> Client:
    """A client of a sidecar as the layout wants it, started if need be. None takes the one that runs, as it is.

    Raises `UserError` where a node of the same workflow has asked for other ranks.
    """
    here = host.current()
    spec = running() if layout is None else None
    if spec is None:
        spec = spec_for(layout or LayoutChoice())
        _check_one_sidecar(here.prompt(), spec)
    return _client(here.spec if here.spec.remote else spec)


def _check_one_sidecar(prompt: object, spec: SidecarSpec) -> None:
    """A workflow that asked for two kinds of ranks would have the sidecar started anew for each, time and again."""
    global _asked_by_prompt
    ranks = f"{spec.ranks} ranks" + (f" on the GPUs {', '.join(map(str, spec.gpus))}" if spec.gpus else "")
    if prompt is not None and prompt == _asked_by_prompt[0] and ranks != _asked_by_prompt[1]:
        raise UserError(
            f"This node asks for {ranks}, another one of this workflow has asked for {_asked_by_prompt[1]}: the "
            "sidecar would be started anew for each of them.",
            "Give all Parallel Layouts the same ranks and devices. A VAE may have ranks of its own: own_ranks of "
            "Parallel VAE Loader.",
        )
    _asked_by_prompt = prompt, ranks


def vae_client(ranks: int, layout: LayoutChoice) -> Client:
    """A client of the VAE's own sidecar of `ranks` ranks, started if need be. `layout`: of the ranks that sample. On
    GPUs it takes the last ones that these leave. Raises `UserError` for too few GPUs, and where there can be no second
    sidecar."""
    spec = host.current().spec
    if spec.remote or spec.address != "unix":
        raise UserError(
            f"own_ranks={ranks} starts a second sidecar on this host, but the first one is at {spec.address}.",
            "Set own_ranks to 0.",
        )
    count = 0 if spec.device == "cpu" else devices.gpu_count(spec.python)
    device, _ = devices.choose(spec.device, ranks, 1, count)
    if device == "cpu":
        return _client(spec.for_vae(ranks))
    sampler = spec_for(layout)
    sampling = sampler.ranks // spec.nnodes
    if sampling + ranks > count:
        fewer = f"Set ranks of Parallel Layout to {count - ranks}, or own_ranks to {max(0, count - sampling)}."
        raise UserError(
            f"{sampling} ranks that sample and own_ranks={ranks} of the VAE need {sampling + ranks} GPUs, but torch "
            f"sees {count}.",
            # ranks=0 means all of them.
            fewer if count > ranks else "Set own_ranks to 0: then the ranks that sample decode, too.",
        )
    free = sorted(set(range(count)) - set(sampler.gpus or range(sampling)))
    return _client(spec.for_vae(ranks, tuple(free[-ranks:])))


def _client(spec: SidecarSpec) -> Client:
    here = host.current()

    def say(text: str) -> None:
        if here.cancelled():
            here.leave_cancelled(Cancelled("Cancelled while the sidecar started."))
        activity.starting(text)
        here.say(text)

    with activity.during():
        return lifecycle.ensure_sidecar(spec, say, owned=here.owned)


def inherit() -> None:
    """Keep the ranks of a ComfyUI that has ended: this one's first prompt adopts them, or ends them."""
    if lifecycle.inherit(SidecarSpec().slot):
        host.logger.info("The ranks of the last ComfyUI are still up: they are kept for the first prompt.")


def running() -> SidecarSpec | None:
    """The specification of the sidecar that runs now, None when none does."""
    spec = host.current().spec
    if spec.remote:
        return spec
    life = lifecycle.current(spec.slot)
    settings = life.settings if life and life.is_alive else None
    return replace(spec, ranks=settings.ranks, gpus=settings.gpus) if settings else None


def visit(
    message: Request, timeout: float | None = None, *, vae: bool = False
) -> tuple[Welcome, dict[str, Any]] | None:
    """The welcome and the reply of the sidecar that runs, or of the VAE's own; None when there is none.

    On a connection of its own and without a word to the host, so that it may be called outside of a prompt: no Cancel
    ends it, not even one that has come too late for its prompt. Raises what `FAILURES` lists.
    """
    spec = host.current().spec
    if vae and spec.remote:
        return None
    client = lifecycle.visit(spec.for_vae(0) if vae else spec)
    if client is None:
        return None
    try:
        return client.welcome, client.request(message, timeout=timeout)[0].data
    finally:
        client.close()


def ask(
    client: Client,
    message: AnyRequest,
    tensors: Mapping[str, Tensor] | None = None,
    model: Any = None,
    *,
    on_vae_sidecar: bool = False,
) -> Reply:
    """Sends `message` and waits; shows progress and previews of `model`, and leaves when the user cancels.

    `on_vae_sidecar`: the client is that of the VAE's own sidecar, whose devices nobody else uses.
    """
    here = host.current()
    on_progress = here.progress(model)

    def on_event(event: Event, tensors: dict[str, Tensor]) -> None:
        hear(event, tensors)
        if isinstance(event, Progress):
            on_progress(event.phase, event.step, event.total, tensors.get("preview"))

    sent = _sendable(tensors or {})
    if not on_vae_sidecar:
        here.sending(message, sent, client.welcome)
    try:
        with activity.during(message.type.replace("_", " ")):
            reply = Reply(*client.request(message, sent, on_event, here.cancelled))
            activity.done(message, reply.result)
        return reply
    except Cancelled as error:
        here.leave_cancelled(error)


def hear(event: Event, tensors: Mapping[str, Tensor]) -> None:
    """Tells the user, on the node that runs, in the log and in the panel, what the ranks report of their work."""
    activity.event(event)
    match event:
        case Log():
            host.current().say(event.text)
        case Memory():
            used = ", ".join(f"{bytes / 1e9:.1f} GB" for bytes in event.used)
            host.current().say(f"memory in use by the ranks: {used}")
        case Evaluations():
            host.current().say(str(event))


def with_living(client: Client, work: Callable[[Client], T]) -> T:
    """What `work` gives with `client`. Where the sidecar is lost before its ranks have begun, once more with a new one.

    A rank may have died since it was last asked, which shows when it is asked again.
    """
    try:
        return work(client)
    except NotBegun as error:
        spec = lifecycle.spec_of(client)
        if spec is None or spec.remote:
            raise
        host.current().say(f"{error.message} Nothing had begun: a new sidecar is asked.")
        return work(_client(spec))


def unload() -> str:
    """Has the ranks of all sidecars unload their models, and says how much memory that gave back; "" without any.

    May be called outside of a prompt, as `visit`.
    """
    with activity.during("unload"):
        visited = [visit(Unload(id=0), UNLOAD_S, vae=vae) for vae in (False, True)]
    freed = [data["freed_bytes"] for _, data in filter(None, visited)]
    sizes = [", ".join(f"{size / 1e9:.2f} GB" for size in of_ranks) for of_ranks in freed]
    return f"Freed {'; of the VAE: '.join(sizes)} (rank by rank)." if sizes else ""


def _sendable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
