"""The panel's routes and events on ComfyUI's web server. Imported inside ComfyUI only: aiohttp is the host's."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar
from urllib.parse import urlsplit

from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...parallel_backend.errors import UserError
from ..layout_choice import MAX_DEGREE
from ..session.activity import FAILURES, activity
from . import status as panel

EVENT = "paralleldit"
PREFIX = "/paralleldit"
MAX_BODY = 4096
OWN_SITES = ("same-origin", "none")


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


AnyBody = TypeVar("AnyBody", bound=Body)


class StartBody(Body):
    ranks: int = Field(default=0, ge=0, le=MAX_DEGREE)


def register(routes: web.RouteTableDef, send: Callable[[str, dict[str, Any]], None]) -> None:
    """Add the routes to the server's, and send it an event whenever something changes. `send` is thread-safe."""

    @routes.get(f"{PREFIX}/status")
    async def status(request: web.Request) -> web.Response:
        return await _answer(panel.status)

    @routes.post(f"{PREFIX}/start")
    async def start(request: web.Request) -> web.Response:
        body = await _body(request, StartBody)
        return await _answer(panel.start, body.ranks)

    @routes.post(f"{PREFIX}/stop")
    async def stop(request: web.Request) -> web.Response:
        await _body(request, Body)
        return await _answer(panel.stop)

    @routes.post(f"{PREFIX}/unload")
    async def unload(request: web.Request) -> web.Response:
        await _body(request, Body)
        return await _answer(panel.unload)

    activity.listen(lambda snapshot: send(EVENT, snapshot.to_json()))


async def _body(request: web.Request, kind: type[AnyBody]) -> AnyBody:
    """The request's JSON, once it is known to come from a page of this server."""
    _check_origin(request)
    if request.content_type != "application/json":
        _refuse(web.HTTPUnsupportedMediaType, "The body must be JSON.")
    body = await request.content.read(MAX_BODY + 1)
    if len(body) > MAX_BODY:
        _refuse(web.HTTPBadRequest, f"The body is larger than {MAX_BODY} bytes.")
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        _refuse(web.HTTPBadRequest, "; ".join(f"{_place(each)}: {each['msg']}" for each in error.errors()))


def _check_origin(request: web.Request) -> None:
    """Other sites' pages cannot press the buttons: browsers name the page's origin, and JSON is no form's format."""
    site, origin = request.headers.get("Sec-Fetch-Site"), request.headers.get("Origin")
    foreign = site not in OWN_SITES if site else bool(origin) and urlsplit(origin).netloc != request.host
    if foreign:
        _refuse(web.HTTPForbidden, f"A page of {origin or 'another site'} may not do this.")


async def _answer(action: Callable[..., dict[str, Any]], *arguments: object) -> web.Response:
    try:
        return web.json_response(await asyncio.to_thread(action, *arguments))
    except UserError as error:
        return _error(409, error.message, error.hint)
    except FAILURES as error:
        return _error(502, getattr(error, "message", str(error)), getattr(error, "hint", ""))


def _error(status: int, message: str, hint: str = "") -> web.Response:
    return web.json_response(_described(message, hint), status=status)


def _refuse(kind: type[web.HTTPException], message: str) -> NoReturn:
    raise kind(text=json.dumps(_described(message)), content_type="application/json")


def _described(message: str, hint: str = "") -> dict[str, Any]:
    return {"error": {"message": message, "hint": hint}}


def _place(error: Any) -> str:
    return ".".join(map(str, error["loc"])) or "body"
