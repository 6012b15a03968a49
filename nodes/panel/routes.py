"""The panel's routes and events on ComfyUI's web server. Imported inside ComfyUI only: aiohttp is the host's."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Collection
from typing import Any, NoReturn, TypeVar

from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...parallel_backend.errors import UserError
from ...parallel_backend.layout.layout import MAX_DEGREE
from ..session.activity import FAILURES, activity
from . import origin
from . import status as panel

EVENT = "paralleldit"
PREFIX = "/paralleldit"
MAX_BODY = 4096


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


AnyBody = TypeVar("AnyBody", bound=Body)


class StartBody(Body):
    ranks: int = Field(default=0, ge=0, le=MAX_DEGREE)


def register(
    routes: web.RouteTableDef, send: Callable[[str, dict[str, Any]], None], names: Collection[str] = ()
) -> None:
    """Add the routes to the server's, and send it an event whenever something changes. `send` is thread-safe.

    `names`: the server's own, under which pages may ask (`origin.own_names`).
    """

    @routes.get(f"{PREFIX}/status")
    async def status(request: web.Request) -> web.Response:
        _check_origin(request, names)
        return await _answer(panel.status)

    @routes.post(f"{PREFIX}/start")
    async def start(request: web.Request) -> web.Response:
        _check_origin(request, names)
        body = await _body(request, StartBody)
        return await _answer(panel.start, body.ranks)

    @routes.post(f"{PREFIX}/stop")
    async def stop(request: web.Request) -> web.Response:
        _check_origin(request, names)
        await _body(request, Body)
        return await _answer(panel.stop)

    @routes.post(f"{PREFIX}/unload")
    async def unload(request: web.Request) -> web.Response:
        _check_origin(request, names)
        await _body(request, Body)
        return await _answer(panel.unload)

    activity.listen(lambda snapshot: send(EVENT, snapshot.to_json()))


def _check_origin(request: web.Request, names: Collection[str]) -> None:
    try:
        origin.check(request.headers, names)
    except UserError as error:
        _refuse(web.HTTPForbidden, error.message, error.hint)


async def _body(request: web.Request, kind: type[AnyBody]) -> AnyBody:
    """The request's JSON. No form of another site's page can send that without being asked first."""
    if request.content_type != "application/json":
        _refuse(web.HTTPUnsupportedMediaType, "The body must be JSON.")
    body = bytearray()
    async for piece in request.content.iter_any():
        body += piece
        if len(body) > MAX_BODY:
            _refuse(web.HTTPBadRequest, f"The body is larger than {MAX_BODY} bytes.")
    try:
        return kind.model_validate_json(bytes(body))
    except ValidationError as error:
        _refuse(web.HTTPBadRequest, "; ".join(f"{_place(each)}: {each['msg']}" for each in error.errors()))


async def _answer(action: Callable[..., dict[str, Any]], *arguments: object) -> web.Response:
    try:
        return web.json_response(await asyncio.to_thread(action, *arguments))
    except UserError as error:
        return _error(409, error.message, error.hint)
    except FAILURES as error:
        return _error(502, getattr(error, "message", str(error)), getattr(error, "hint", ""))


def _error(status: int, message: str, hint: str = "") -> web.Response:
    return web.json_response(_described(message, hint), status=status)


def _refuse(kind: type[web.HTTPException], message: str, hint: str = "") -> NoReturn:
    raise kind(text=json.dumps(_described(message, hint)), content_type="application/json")


def _described(message: str, hint: str = "") -> dict[str, Any]:
    return {"error": {"message": message, "hint": hint}}


def _place(error: Any) -> str:
    return ".".join(map(str, error["loc"])) or "body"
