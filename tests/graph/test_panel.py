"""The panel: what it is told of the sidecar, and who may press its buttons."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from typing import Any

import pytest
import torch
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from paralleldit.launcher import lifecycle
from paralleldit.launcher.client import SidecarError
from paralleldit.launcher.spec import SidecarSpec
from paralleldit.nodes import NODE_CLASS_MAPPINGS as nodes
from paralleldit.nodes import host, widgets
from paralleldit.nodes.layout_choice import LayoutChoice
from paralleldit.nodes.panel import routes as panel_routes
from paralleldit.nodes.panel import status as panel
from paralleldit.nodes.session import activity as activities
from paralleldit.nodes.session import session
from paralleldit.nodes.session.activity import Activity, Snapshot
from paralleldit.parallel_backend.errors import Cancelled, UserError
from paralleldit.parallel_backend.layout.layout import Layout
from paralleldit.parallel_backend.protocol import messages

JSON = {"Content-Type": "application/json"}


@pytest.fixture(autouse=True)
def activity(monkeypatch) -> Activity:
    """Of this test alone."""
    fresh = Activity()
    for module in (activities, session, panel, panel_routes, widgets):
        monkeypatch.setattr(module, "activity", fresh)
    return fresh


# -- what is noted -------------------------------------------------------------------------------------------------


def sample() -> None:
    message = messages.Sample(
        id=0,
        model=messages.ModelRef(path="unused"),
        layout=Layout(ulysses_degree=2),
        positive=(messages.Conditioning(),),
        sampler="euler",
        schedule=messages.Schedule(scheduler="simple", steps=3),
        seed=0,
    )
    session.ask(session.client_for(LayoutChoice(ranks=2)), message, {"latent": torch.zeros(1, 4, 2, 2)})


def test_listeners_hear_every_phase_of_a_run_and_its_end(client, activity):
    heard: list[Snapshot] = []
    activity.listen(heard.append)
    sample()
    phases = dict.fromkeys(snapshot.phase and (snapshot.phase.name, snapshot.phase.step) for snapshot in heard)
    assert list(phases) == [("start", 0), None, *(("sample", step) for step in range(4))]
    assert heard[-1].phase is None
    assert heard[-1].version > heard[0].version


def test_a_run_leaves_what_it_cost(activity):
    result = messages.Result(
        id=1,
        data={"seconds": 6.0, "traffic": {"ulysses all_to_all": {"bytes": 30, "messages": 3}, "cfg": {"bytes": 12}}},
    )
    message = messages.Sample.model_construct(layout=Layout(pipefusion_degree=4))
    with activity.during("sample"):
        activity.event(messages.Progress(id=1, phase="sample", step=3, total=3))
        activity.done(message, result)
    run = activity.now.run
    assert run == activities.RunCost("pipefusion4", False, 4, 6.0, 3, 42)


def test_what_a_step_cache_left_is_noted_until_a_run_without_one(client, activity):
    activity.event(messages.Evaluations(id=1, computed=12, total=28))
    assert activity.now.evaluations == (12, 28)
    sample()
    assert activity.now.evaluations is None


@pytest.mark.parametrize(
    ("fault", "is_noted", "is_of_the_sidecar"),
    [
        (UserError("Too many.", "Use fewer."), True, False),
        (SidecarError("Rank 1 died.", "See the log."), True, True),
        (Cancelled("Cancelled."), False, False),
    ],
)
def test_errors_are_noted_and_a_cancel_is_none(client, activity, fault, is_noted, is_of_the_sidecar):
    client.fault = fault
    with pytest.raises(type(fault)):
        sample()
    error = activity.now.error
    assert (error is not None) == is_noted
    if error:
        assert (error.message, error.hint) == (fault.message, fault.hint)
        assert error.sidecar_failed == is_of_the_sidecar
    assert activity.now.phase is None
    sample()
    assert activity.now.error is None, "a run that works ends the error"


@pytest.mark.parametrize(
    ("fail", "words"),
    [
        (lambda: nodes["ParallelDiTLoader"]().load("nothing", "auto"), "'nothing' was not found"),
        (lambda: nodes["ParallelDiTLoader"].VALIDATE_INPUTS("nothing"), "'nothing' was not found"),
        (lambda: nodes["ParallelDiTLayout"].VALIDATE_INPUTS(ranks=2, ulysses_degree=3), "ulysses_degree=3"),
        (lambda: nodes["ParallelDiTLora"].VALIDATE_INPUTS("nothing"), "'nothing' was not found"),
        (lambda: nodes["ParallelDiTVAEDecode"]().decode({}, object(), 0, 0), "not loaded by Parallel VAE Loader"),
        (lambda: nodes["ParallelDiTSampler"]().sample(object(), *range(8)), "not loaded by Parallel Loader"),
    ],
    ids=["a file", "a file, before the run", "a degree", "a LoRA", "a VAE", "a model"],
)
def test_errors_that_nodes_raise_before_they_ask_the_ranks_are_noted(client, fail, words):
    before = activities.activity.now.error
    with contextlib.suppress(UserError):
        fail()
    error = activities.activity.now.error
    assert error is not before
    assert words in error.message
    assert not error.sidecar_failed


# -- a real sidecar ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """A sidecar of two ranks that do as their prompt says."""
    directory = tmp_path_factory.mktemp("panel")
    spec = SidecarSpec(device="cpu", worker="tests.ranks.stand_in", directory=directory, hang_timeout=8.0)
    yield spec
    lifecycle.stop(spec.slot)


@pytest.fixture
def spec(stand_in):
    host.use(host.Host(spec=stand_in))
    yield stand_in
    host.use(None)


@pytest.fixture
def ready(spec) -> SidecarSpec:
    if session.running() is None:
        panel.start(0)
    return spec


def prompt(text: str) -> Any:
    message = messages.EncodeText(id=0, text=messages.TextRef(path="/none"), prompt=text)
    return session.ask(session.client_for(None), message)


def wait_for(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def test_the_panel_starts_watches_and_stops_a_sidecar(spec, activity):
    before = panel.status()
    assert (before["state"], before["default_ranks"], before["details"]) == ("stopped", 2, {})
    with pytest.raises(UserError, match="No sidecar"):
        panel.stop()
    started = panel.start(0)
    assert started["state"] == "ready"
    assert [rank["rank"] for rank in started["details"]["ranks"]] == [0, 1]
    with pytest.raises(UserError, match="running already, with 2 ranks"):
        panel.start(4)

    left = []

    def run() -> None:
        try:
            prompt("steps")
        except Cancelled as error:
            left.append(error)

    running = threading.Thread(target=run)
    running.start()
    wait_for(lambda: activity.now.phase is not None and activity.now.phase.step > 1)
    busy = panel.status()
    assert (busy["state"], busy["activity"]["phase"]["name"]) == ("ready", "sample")
    assert busy["activity"]["phase"]["total"] == 200
    assert len(busy["details"]["ranks"]) == 2
    with pytest.raises(UserError, match="at work"):
        panel.unload()
    assert panel.stop()["state"] == "stopped"
    running.join(30)
    assert left, "the run ends with the sidecar"


def test_the_ranks_are_asked_only_when_something_has_changed(ready, monkeypatch):
    asked = []
    visit = lifecycle.visit
    monkeypatch.setattr(lifecycle, "visit", lambda spec: asked.append(spec) or visit(spec))
    details = [panel.status()["details"] for _ in range(3)]
    assert details[0]["ranks"]
    assert len(asked) <= 1
    prompt("echo")
    panel.status()
    panel.status()
    assert len(asked) <= 2


def test_a_sidecar_that_dies_is_told_with_its_log(ready):
    with pytest.raises(SidecarError):
        prompt("crash 1")
    told = panel.status()
    assert told["state"] == "failed"
    assert "crash" in told["activity"]["error"]["message"]
    assert "the stand-in was told to crash" in told["log"]


# -- routes --------------------------------------------------------------------------------------------------------


def serve(calls) -> Any:
    """What `calls(client)`, a coroutine, returns, with the routes on a server of their own."""
    heard: list[tuple[str, Any]] = []

    async def run() -> Any:
        routes = web.RouteTableDef()
        panel_routes.register(routes, lambda event, data: heard.append((event, data)))
        application = web.Application()
        application.add_routes(routes)
        async with TestClient(TestServer(application)) as client:
            return await calls(client)

    return asyncio.run(run()), heard


@pytest.mark.parametrize("name", ["start", "stop", "unload"])
def test_nothing_is_changed_by_a_get(client, name):
    async def calls(http):
        return (await http.get(f"/paralleldit/{name}")).status

    assert serve(calls)[0] == 405


FOREIGN = {"Origin": "http://elsewhere.example"}
REBOUND = {"Host": "evil.example:8188", "Origin": "http://evil.example:8188"}


@pytest.mark.parametrize(
    ("name", "headers", "body", "code", "word"),
    [
        ("start", JSON, '{"ranks": 2}', 200, ""),
        ("start", JSON, "{}", 200, ""),
        ("start", {**JSON, "Sec-Fetch-Site": "same-origin", **FOREIGN}, "{}", 200, ""),
        ("start", {**JSON, **FOREIGN}, "{}", 403, "elsewhere.example"),
        ("stop", {**JSON, "Sec-Fetch-Site": "cross-site"}, "{}", 403, "another site"),
        ("stop", {**JSON, "Sec-Fetch-Site": "same-site"}, "{}", 403, "may not"),
        ("start", {**JSON, "Origin": "null"}, "{}", 403, "null"),
        ("stop", {**JSON, **REBOUND}, "{}", 403, "evil.example is no name of this server"),
        ("stop", {**JSON, **REBOUND, "Sec-Fetch-Site": "same-origin"}, "{}", 403, "evil.example"),
        ("unload", {"Content-Type": "text/plain"}, "{}", 415, "JSON"),
        ("unload", {"Content-Type": "application/x-www-form-urlencoded"}, "a=b", 415, "JSON"),
        ("start", JSON, '{"ranks": "2"}', 400, "ranks"),
        ("start", JSON, '{"ranks": -1}', 400, "ranks"),
        ("start", JSON, '{"ranks": 5000}', 400, "ranks"),
        ("start", JSON, '{"ranks": true}', 400, "ranks"),
        ("start", JSON, '{"rank": 2}', 400, "rank"),
        ("stop", JSON, '{"force": true}', 400, "force"),
        ("start", JSON, "[]", 400, "object"),
        ("start", JSON, "nonsense", 400, "JSON"),
        ("start", JSON, '{"ranks": 2' + " " * 5000 + "}", 400, "4096"),
    ],
)
def test_only_well_formed_requests_of_the_servers_own_pages_pass(monkeypatch, name, headers, body, code, word):
    pressed = []
    for action in ("start", "stop", "unload"):
        monkeypatch.setattr(panel, action, lambda *arguments: pressed.append(arguments) or {})

    async def calls(http):
        answer = await http.post(f"/paralleldit/{name}", data=body, headers=headers)
        return answer.status, await answer.json()

    (status, answer), _ = serve(calls)
    assert status == code
    assert bool(pressed) == (code == 200)
    assert code == 200 or word in answer["error"]["message"], answer


@pytest.mark.parametrize(
    ("headers", "code"),
    [({}, 200), (REBOUND, 403), ({"Host": "evil.example"}, 403), ({"Sec-Fetch-Site": "cross-site", **FOREIGN}, 403)],
)
def test_the_status_is_shown_to_the_servers_own_pages_only(monkeypatch, headers, code):
    monkeypatch.setattr(panel, "status", lambda: {"secret": 1})

    async def calls(http):
        answer = await http.get("/paralleldit/status", headers=headers)
        return answer.status, await answer.text()

    (status, text), _ = serve(calls)
    assert (status, "secret" in text) == (code, code == 200)


@pytest.mark.parametrize(
    "pieces", [[b'{"ranks": ', b"2}"], [b"{", b'"ranks"', b": 2", b"}"], [b" " * 3000, b" " * 3000]]
)
def test_a_body_is_read_to_its_end(monkeypatch, pieces):
    pressed = []
    monkeypatch.setattr(panel, "start", lambda ranks: pressed.append(ranks) or {})

    async def body():
        for piece in pieces:
            yield piece
            await asyncio.sleep(0.05)

    async def calls(http):
        answer = await http.post("/paralleldit/start", data=body(), headers=JSON)
        return answer.status

    status, _ = serve(calls)
    assert (status, pressed) == ((400, []) if len(b"".join(pieces)) > panel_routes.MAX_BODY else (200, [2]))


@pytest.mark.parametrize(
    ("fault", "code"), [(UserError("No.", "Yes."), 409), (SidecarError("No.", "Yes."), 502), (OSError("No."), 502)]
)
def test_a_button_that_fails_says_why(monkeypatch, fault, code):
    def fail() -> None:
        raise fault

    monkeypatch.setattr(panel, "stop", fail)

    async def calls(http):
        answer = await http.post("/paralleldit/stop", json={})
        return answer.status, (await answer.json())["error"]

    (status, error), _ = serve(calls)
    assert (status, error["message"]) == (code, "No.")


def test_events_reach_the_server_as_plain_data(client, activity):
    async def calls(http):
        await asyncio.to_thread(sample)
        return await (await http.get("/paralleldit/status")).json()

    status, heard = serve(calls)
    assert {event for event, _ in heard} == {"paralleldit"}
    steps = [data["phase"]["step"] for _, data in heard if data["phase"] and data["phase"]["name"] == "sample"]
    assert sorted(set(steps)) == [0, 1, 2, 3]
    assert status["state"] == "stopped"
