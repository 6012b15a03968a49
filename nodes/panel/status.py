"""What the panel in ComfyUI's sidebar shows of the sidecar, and what its buttons do. Calls may block for a while."""

from __future__ import annotations

import threading
from typing import Any

from ...launcher import lifecycle
from ...launcher.instance import SidecarInstance
from ...parallel_backend.errors import UserError
from ...parallel_backend.protocol import records
from ...parallel_backend.protocol.messages import Status
from .. import host
from ..layout_choice import LayoutChoice
from ..session import session
from ..session.activity import FAILURES, activity

ANSWER_S = 10.0
"""The time limit for the ranks' reply to a status request: it comes at once, unless they have just begun to work."""
LOG_LINES = 60

_asked: tuple[object, dict[str, Any]] = (None, {})
_asking = threading.Lock()


def status() -> dict[str, Any]:
    """The state of the sidecar, what the nodes have learnt of it, and what the ranks report.

    The ranks are asked only when something has changed: to be asked counts as work, and would put off their idle time.
    A sidecar may be replaced meanwhile: each of its files is read once.
    """
    spec = host.current().spec
    life = None if spec.remote else lifecycle.current(spec.slot)
    settings, end = (life.settings, life.end) if life else (None, None)
    now = activity.now
    answer: dict[str, Any] = {
        "state": _state(life, settings, end),
        "remote": spec.remote,
        "rank_count": settings.ranks if settings else spec.ranks,
        "default_ranks": _default_ranks(),
        "activity": now.to_json(),
        "log": "",
        "details": {},
        "beside": _vae_ranks(),
    }
    if answer["state"] in ("ready", "remote"):
        answer["details"] = _details((life.path if life else None, now.version))
    elif answer["state"] == "failed" and end:
        answer["activity"]["error"] = answer["activity"]["error"] or _fault(end)
    if life and (answer["state"] == "failed" or (now.error and now.error.sidecar_failed)):
        answer["log"] = _log(life, end)
    return answer


def start(ranks: int) -> dict[str, Any]:
    """Start a sidecar of `ranks` ranks (0: all GPUs, or two on CPU). Raises `UserError` while one runs."""
    here = host.current()
    running = session.running()
    if running is not None:
        raise UserError(
            f"The sidecar is running already, with {running.ranks} ranks.", "Stop it first to start another one."
        )
    spec = session.spec_for(LayoutChoice(ranks=ranks))
    with activity.during("start"):
        lifecycle.ensure_sidecar(spec, activity.starting, owned=here.owned)
    return status()


def stop() -> dict[str, Any]:
    """End the sidecar, whatever it does. Raises `UserError` when it is not ours to end."""
    spec = host.current().spec
    if spec.remote:
        raise UserError(
            f"The sidecar at {spec.address} was started elsewhere.", "Stop it there, with `python cli stop`."
        )
    life = lifecycle.current(spec.slot)
    owner = life.owner if life else None
    if owner and owner.alive and owner != records.this_process():
        raise UserError(f"The sidecar belongs to process {owner.pid}.", "Stop it there, or with `python cli stop`.")
    with activity.during("stop"):
        ended = [lifecycle.stop(slot, force=owner is not None) for slot in (spec.slot.vae, spec.slot)]
        if not any(ended):
            raise UserError("No sidecar is running.")
    return status()


def unload() -> dict[str, Any]:
    """Free what the ranks hold. Raises `UserError` during a run."""
    if activity.now.phase is not None:
        raise UserError("The ranks are at work.", "Unload the models when the run is over, or interrupt it.")
    if not session.unload():
        raise UserError("No sidecar is running.", "Queue a prompt, or start one.")
    return status()


def _state(life: SidecarInstance | None, settings: records.Settings | None, end: records.End | None) -> str:
    if host.current().spec.remote:
        return "remote"
    if life is None:
        return "stopped"
    is_alive = life.is_alive
    if is_alive and settings is None:
        return "other version"
    if is_alive and end is None:
        return "ready" if life.is_ready else "starting"
    return "stopped" if end is None or end.clean else "failed"


def _vae_ranks() -> int:
    """How many ranks a VAE has for itself now."""
    spec = host.current().spec
    life = None if spec.remote else lifecycle.current(spec.slot.vae)
    settings = life.settings if life and life.is_alive else None
    return settings.ranks if settings else 0


def _default_ranks() -> int:
    """How many ranks a layout that names none would have; 0 when that is unknown."""
    try:
        return session.ranks_for(LayoutChoice())
    except UserError:
        return 0


def _details(change: object) -> dict[str, Any]:
    """What the ranks have reported of themselves since `change`; a reply during a run is not kept."""
    global _asked
    with _asking:
        if _asked[0] == change:
            return _asked[1]
        try:
            visited = session.visit(Status(id=0), ANSWER_S)
        except FAILURES as error:
            return {"unreachable": str(error)}
        if visited is None:
            return {"unreachable": "The sidecar has just ended."}
        details = visited[1]
        if not details.get("busy"):
            _asked = (change, details)
        return details


def _fault(end: records.End) -> dict[str, Any]:
    return {"message": end.message, "hint": end.hint, "sidecar_failed": True}


def _log(life: SidecarInstance, end: records.End | None) -> str:
    """The end of the log of the rank that failed, or of torchrun's."""
    rank = end.rank if end else None
    return "\n".join(life.tail(rank).splitlines()[-LOG_LINES:])
