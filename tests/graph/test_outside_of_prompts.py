"""What ComfyUI calls outside of a prompt: no Cancel that came too late and no fault of the ranks may leave it.

Its queue thread ends with an exception that its memory manager raises, and no prompt ever runs again.
"""

from __future__ import annotations

import asyncio
import contextlib
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from paralleldit import NODE_CLASS_MAPPINGS
from paralleldit.launcher import lifecycle
from paralleldit.launcher.client import SidecarError
from paralleldit.launcher.spec import SidecarSpec
from paralleldit.nodes import host
from paralleldit.nodes.handles import ModelHandle
from paralleldit.nodes.layout_choice import LayoutChoice
from paralleldit.nodes.panel import routes as panel_routes
from paralleldit.nodes.panel import status as panel
from paralleldit.nodes.session import session
from paralleldit.parallel_backend.errors import Cancelled, UserError
from paralleldit.parallel_backend.families.registry import FAMILIES
from paralleldit.parallel_backend.protocol import messages, records
from paralleldit.parallel_backend.protocol.errors import ProtocolError
from paralleldit.tests import fake_comfy
from paralleldit.tests.graph.sampling import NAME

FAULTS = (
    None,
    UserError("No sidecar answers."),
    SidecarError("Rank 1 died."),
    ProtocolError("Another version."),
    Cancelled("Cancelled before it began."),
    ConnectionRefusedError("Nobody listens."),
    TimeoutError("The sidecar has not answered in time."),
)


@pytest.fixture
def flag(client, monkeypatch) -> fake_comfy.Flag:
    """The interrupt flag of a stand-in for ComfyUI, with a sidecar that runs."""
    flag = fake_comfy.install(monkeypatch)
    comfy_host = import_module("paralleldit.nodes.comfyui.host").ComfyHost(host.current().spec)
    comfy_host.folders = host.current().folders
    host.use(comfy_host)

    def visit(spec: SidecarSpec) -> Any:
        if isinstance(client.fault, ConnectionRefusedError):
            raise client.fault
        return client

    monkeypatch.setattr(lifecycle, "visit", visit)
    return flag


def sampling_model() -> Any:
    """A MODEL in the middle of a sampler's run that has asked for a prediction."""
    remote_model = import_module("paralleldit.nodes.comfyui.remote_model")
    network = torch.nn.Module()
    network.stepwise = remote_model.StepwiseModel()
    model = remote_model.RemotePatcher(network, "cpu", "cpu")
    config = next(iter(FAMILIES["flux"].published.values()))
    handle = ModelHandle(messages.ModelRef(path="/models/one"), LayoutChoice(ranks=2), "flux", config)
    model.attachments["paralleldit"] = handle
    model.pre_run()
    network.stepwise._run.sent.add("a condition")
    return model


MEMORY_MANAGER = {
    "detach": lambda each: each.detach(),
    "detach, weights stay": lambda each: each.detach(unpatch_all=False),
    "unpatch_model": lambda each: each.unpatch_model("cpu"),
    "partially_unload": lambda each: each.partially_unload("cpu", 1),
    "load": lambda each: each.load("cpu"),
    "model_size": lambda each: each.model_size(),
    "model_patches_to": lambda each: each.model_patches_to("cpu"),
    "garbage": lambda each: each.__del__(),
    "cleanup": lambda each: each.cleanup(),
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
@pytest.mark.parametrize("name", MEMORY_MANAGER)
def test_nothing_leaves_what_the_memory_manager_calls(flag, client, name, fault):
    client.alive = True
    for each in (sampling_model(), host.current()._ranks_memory):
        if name != "cleanup" or hasattr(each.model, "stepwise"):
            flag.is_set, client.fault = True, fault
            MEMORY_MANAGER[name](each)
            assert flag.is_set, "a Cancel is for the next prompt to see"


def test_detaching_unloads_the_ranks_though_a_cancel_waits(flag, client):
    flag.is_set = True
    host.current()._ranks_memory.detach()
    assert [type(message) for message, _ in client.sent] == [messages.Unload, messages.Unload]
    assert flag.is_set


def test_a_runs_end_is_told_though_a_cancel_waits(flag, client):
    client.alive = True
    model = sampling_model()
    flag.is_set = True
    model.cleanup()
    assert isinstance(client.sent[-1][0], messages.EndRun)
    assert flag.is_set


GRAPH_CHECKS = [
    (name, check) for name in NODE_CLASS_MAPPINGS for check in ("INPUT_TYPES", "IS_CHANGED", "VALIDATE_INPUTS")
]
"""What ComfyUI asks of a node before a prompt runs, in the threads of its server."""


def valid_inputs(node_class: Any) -> dict[str, Any]:
    groups = node_class.INPUT_TYPES()
    inputs = {name: spec for group in groups.values() for name, spec in group.items()}
    choices = {name: spec[0] if isinstance(spec[0], list) else [] for name, spec in inputs.items()}
    firsts = {name: NAME if NAME in choices[name] else [*choices[name], ""][0] for name in inputs}
    return {name: spec[1].get("default", firsts[name]) for name, spec in inputs.items()}


@pytest.mark.parametrize(("name", "check"), GRAPH_CHECKS)
def test_checks_of_the_graph_see_no_cancel(flag, name, check):
    node_class = NODE_CLASS_MAPPINGS[name]
    flag.is_set = True
    inputs = valid_inputs(node_class) if check == "VALIDATE_INPUTS" else {}
    if hasattr(node_class, check):
        wanted = getattr(node_class, check).__code__.co_varnames
        given = inputs if "inputs" in wanted else {k: v for k, v in inputs.items() if k in wanted}
        with contextlib.suppress(UserError):  # of a file, where there is none of that kind
            getattr(node_class, check)(**given)
    assert flag.is_set


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
def routes() -> web.RouteTableDef:
    table = web.RouteTableDef()
    panel_routes.register(table, lambda event, data: None)
    return table


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
@pytest.mark.parametrize(
    ("method", "path"), [(each.method, each.path) for each in routes() if isinstance(each, web.RouteDef)]
)
def test_routes_answer_in_json_whatever_the_ranks_do(flag, client, monkeypatch, method, path, fault):
    """Also while a sidecar is replaced, whose requests end as cancelled."""
    monkeypatch.setattr(panel, "_state", lambda *_: "ready")
    monkeypatch.setattr(panel, "_asked", (object(), {}))

    async def call() -> tuple[int, Any]:
        application = web.Application()
        application.add_routes(routes())
        async with TestClient(TestServer(application)) as http:
            answer = await http.request(method, path, **body)
            return answer.status, await answer.json()

    body = {} if method == "GET" else {"json": {}}
    flag.is_set, client.fault = True, fault
    status, answer = asyncio.run(call())
    assert status in (200, 409, 502), answer
    assert (status == 200) or answer["error"]["message"]
    assert flag.is_set


class Vanishing:
    """A sidecar's directory of which each file is gone at its second look."""

    path = Path("unused")
    is_alive = is_ready = True

    def __init__(self) -> None:
        self.files: dict[str, Any] = {
            "settings": SimpleNamespace(ranks=2, gpus=()),
            "end": records.End(clean=False, message="Rank 1 died.", rank=1),
            "owner": records.this_process(),
        }

    def __getattr__(self, name: str) -> Any:
        return self.files.pop(name, None)

    def tail(self, rank: int | None = None) -> str:
        return ""


def test_the_status_holds_while_a_sidecar_is_replaced(flag, monkeypatch):
    monkeypatch.setattr(lifecycle, "current", lambda slot: Vanishing())
    told = panel.status()
    assert (told["state"], told["rank_count"]) == ("failed", 2)
    assert session.running().ranks == 2
