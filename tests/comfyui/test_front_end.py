"""The front end in Chromium against a real ComfyUI: needs COMFYUI_PATH, a Chromium, and requirements-browser.txt.

With PARALLELDIT_WRITE_PICTURES=1, and a font that has Chinese, the README's pictures of the panel are written to docs.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = os.environ.get("CHROMIUM_PATH") or shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.comfyui,
    pytest.mark.skipif("COMFYUI_PATH" not in os.environ, reason="set COMFYUI_PATH to a checkout of ComfyUI"),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: install one, or name it in CHROMIUM_PATH"),
]
PACK = Path(__file__).resolve().parents[2]
QUIET = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking")
READY_MS = 120_000
RUN_MS = 180_000
SETTLE_MS = 1500
LINE_PX = 16
"""The least height of a line that can be read, on a canvas that is not zoomed."""
JPEG_QUALITY = 70
BESIDE_PANEL = """async () => {
  const { setting } = window.app.extensionManager;
  await setting.set("LiteGraph.Canvas.MinFontSizeForLOD", 0);
  await setting.set("Comfy.Minimap.Visible", false);
  const first = window.app.graph._nodes.find((node) => node.type === "ParallelDiTSampler");
  const { ds } = window.app.canvas;
  ds.scale = 0.75;
  ds.offset = [420 / ds.scale - first.pos[0], 110 / ds.scale - first.pos[1]];
  window.app.canvas.setDirty(true, true);
}"""
PACK_NAME = "ComfyUI-ParallelDiT"
DROP = """(text) => {
  const files = new DataTransfer();
  files.items.add(new File([text], "workflow.json", {type: "application/json"}));
  const target = document.querySelector("#graph-canvas");
  for (const kind of ["dragenter", "dragover", "drop"])
    target.dispatchEvent(new DragEvent(kind, {dataTransfer: files, bubbles: true, cancelable: true}));
}"""
NODES = """() => window.app.graph._nodes.map((node) => ({
  type: node.type, id: node.id, isRed: Boolean(node.has_errors), isKnown: node.type in LiteGraph.registered_node_types,
  box: [node.pos[0], node.pos[1], node.size[0], node.size[1]],
}))"""
DOWNLOADS = [each["url"] for each in json.loads((PACK / "tools" / "model_downloads.json").read_text()).values()]
SAVED = sorted(path.stem for path in (PACK / "workflows").glob("*.json"))


class Page:
    """ComfyUI's page, and what has gone wrong on it."""

    def __init__(self, page: Any, address: str) -> None:
        self.page = page
        self.faults: list[str] = []
        page.on("pageerror", lambda error: self.faults.append(f"{error.message} {error.stack}"))
        page.on("console", self._note)
        page.goto(address, wait_until="domcontentloaded", timeout=READY_MS)
        self.wait()
        page.keyboard.press("Escape")  # the dialog of templates, which greets a new user
        self.faults = [fault for fault in self.faults if PACK_NAME in fault]  # ComfyUI alone has some while it starts

    def wait(self) -> None:
        page = self.page
        page.wait_for_function("() => window.app?.graph?._nodes && window.app.extensionManager", timeout=READY_MS)
        page.locator(".side-bar-button").first.wait_for(timeout=READY_MS)
        page.wait_for_timeout(SETTLE_MS)

    def _note(self, message: Any) -> None:
        said = f"{message.text} {message.location['url']}"
        # Files that a new user does not have, and downloads whose sizes ComfyUI asks for and may not be told.
        if message.type == "error" and not any(place in said for place in ("/api/userdata", *DOWNLOADS)):
            self.faults.append(said)

    def drop(self, workflow: Path) -> None:
        self.page.evaluate(DROP, workflow.read_text())
        count = workflow.read_text().count('"Node name for S&R"')
        self.page.wait_for_function(f"() => window.app.graph._nodes.length === {count}", timeout=READY_MS)

    def open_template(self, name: str) -> None:
        """As a click on the template does."""
        self.page.evaluate(
            """async ([pack, name]) => {
              const answer = await fetch(`/api/workflow_templates/${pack}/${name}.json`);
              await window.app.loadGraphData(await answer.json(), true, true, name);
            }""",
            [PACK_NAME, name],
        )

    def picture(self, name: str) -> None:
        """Writes what is seen, the panel and the nodes behind the loaders, to docs/NAME.jpg where that is asked for."""
        if "PARALLELDIT_WRITE_PICTURES" not in os.environ:
            return
        self.page.evaluate(BESIDE_PANEL)
        self.page.wait_for_timeout(SETTLE_MS)
        size = {"x": 0, "y": 0, "width": 1200, "height": 560}
        self.page.screenshot(path=PACK / "docs" / f"{name}.jpg", type="jpeg", quality=JPEG_QUALITY, clip=size)

    def nodes(self) -> list[dict[str, Any]]:
        return self.page.evaluate(NODES)

    def open_panel(self) -> Any:
        panel = self.page.locator(".paralleldit-panel")
        if not panel.count():
            self.page.get_by_role("button", name="Parallel ranks").click()
        panel.wait_for()
        return panel


@pytest.fixture(scope="module")
def host(tmp_path_factory) -> Iterator[Any]:
    from paralleldit.tests.comfyui.host import Host, prepare

    base = tmp_path_factory.mktemp("front-end") / "base"
    prepare(base, {})
    running = Host(base, base.parent / "runtime")
    yield running
    running.stop()


@pytest.fixture(scope="module")
def page(host) -> Iterator[Page]:
    api = pytest.importorskip("playwright.sync_api", reason="pip install -r requirements-browser.txt")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(QUIET))
        yield Page(browser.new_page(viewport={"width": 1600, "height": 900}), f"http://127.0.0.1:{host.port}/")
        browser.close()


def test_a_dropped_workflow_runs_and_shows_its_picture_without_an_error(page):
    page.drop(PACK / "workflows" / "demo_txt2img.json")
    assert all(node["isKnown"] and not node["isRed"] for node in page.nodes())
    page.page.get_by_test_id("queue-button").click()
    api = json.loads((PACK / "workflows" / "api" / "demo_txt2img.api.json").read_text())
    width = next(node["inputs"]["width"] for node in api.values() if node["class_type"] == "EmptySD3LatentImage")
    page.page.wait_for_function(
        "(width) => window.app.graph._nodes.some((node) => node.imgs?.[0]?.naturalWidth === width)",
        arg=width,
        timeout=RUN_MS,
    )
    assert not any(node["isRed"] for node in page.nodes())
    assert page.faults == []


def test_the_panel_shows_the_ranks_and_what_the_run_has_cost(page):
    panel = page.open_panel()
    panel.locator(".state[data-state=ready]").wait_for()
    rows = panel.locator("tbody tr")
    rows.nth(1).wait_for()
    assert [row.split()[:2] for row in rows.all_inner_texts()] == [["0", "cpu"], ["1", "cpu"]]
    assert "ulysses2" in panel.locator(".run").inner_text() or "cfg2" in panel.locator(".run").inner_text()
    assert "flux-tiny" in panel.locator(".models").inner_text()
    page.picture("panel")
    assert page.faults == []


@pytest.mark.parametrize("name", SAVED)
def test_a_template_opens_with_every_node_known_and_none_upon_another(page, host, name):
    assert sorted(host.get("/workflow_templates")[PACK_NAME]) == SAVED
    page.open_template(name)
    nodes = page.nodes()
    assert len(nodes) == len(read(name)["nodes"])
    assert all(node["isKnown"] for node in nodes)
    if name.startswith("demo_"):
        assert not any(node["isRed"] for node in nodes)
    for index, node in enumerate(nodes):
        for other in nodes[index + 1 :]:
            assert not overlap(node["box"], other["box"]), (node["type"], other["type"])
    assert host.get(f"/api/workflow_templates/{PACK_NAME}/{name}.jpg").startswith(b"\xff\xd8")
    assert page.faults == []


def overlap(one: list[float], other: list[float]) -> bool:
    return all(one[axis] < other[axis] + other[axis + 2] and other[axis] < one[axis] + one[axis + 2] for axis in (0, 1))


def test_the_layout_node_multiplies_degrees_as_they_are_typed(page):
    line = page.page.locator(".paralleldit-fit")
    told = {}
    for degree in (2, 3):
        page.page.evaluate(
            """(degree) => {
              const node = window.app.graph._nodes.find((node) => node.type === "ParallelDiTLayout");
              for (const [name, value] of [["ranks", 2], ["ulysses_degree", degree]]) {
                const widget = node.widgets.find((widget) => widget.name === name);
                widget.value = value;
                widget.callback(value);
              }
            }""",
            degree,
        )
        told[degree] = (line.get_attribute("data-verdict"), line.inner_text())
        assert line.bounding_box()["height"] >= LINE_PX * page.page.evaluate("() => window.app.canvas.ds.scale")
    assert told == {2: ("fits", "2 = 2 ranks"), 3: ("clashes", "3 = 3 does not make 2 ranks")}


def test_the_line_on_the_layout_node_is_not_saved_and_not_sent(page):
    saved = page.page.evaluate("() => window.app.graph.serialize()")
    node = next(node for node in saved["nodes"] if node["type"] == "ParallelDiTLayout")
    original = next(n for n in read("demo_txt2img")["nodes"] if n["type"] == "ParallelDiTLayout")
    assert len(node["widgets_values"]) == len(original["widgets_values"])
    prompt = page.page.evaluate("async () => (await window.app.graphToPrompt()).output")
    layout = next(entry for entry in prompt.values() if entry["class_type"] == "ParallelDiTLayout")
    assert "paralleldit_fit" not in layout["inputs"]


def test_the_settings_page_says_how_many_ranks_there_are_and_what_is_wrong_with_it(page, host):
    page.page.evaluate("() => window.app.extensionManager.command.execute('Comfy.ShowSettingsDialog')")
    dialog = page.page.get_by_role("dialog")
    dialog.get_by_text("ParallelDiT", exact=True).first.click()
    groups = json.loads((PACK / "locales" / "en" / "main.json").read_text())["settingsCategories"]
    assert all(dialog.get_by_text(group, exact=True).count() == 1 for group in groups.values())
    ranks, address = (
        dialog.locator(f'[id="ParallelDiT.{name}"] input, input[id="ParallelDiT.{name}"]')
        for name in ("Ranks", "RemoteAddress")
    )
    told = {}
    for number in (1, 0):
        ranks.press("Control+a")  # it hears keys only
        ranks.press_sequentially(str(number))
        ranks.blur()
        page.page.wait_for_timeout(SETTLE_MS)
        told[number] = host.get("/paralleldit/status")["default_ranks"]
    assert told == {1: 1, 0: 2}
    address.fill("there")
    page.page.wait_for_timeout(SETTLE_MS)
    assert "tcp://host:port" in host.get("/paralleldit/status")["details"]["unreachable"]
    address.fill("")
    page.page.wait_for_timeout(SETTLE_MS)
    assert host.get("/paralleldit/status")["remote"] is False
    page.page.keyboard.press("Escape")
    assert page.faults == []


def test_the_buttons_free_stop_and_start_the_ranks(page):
    panel = page.open_panel()
    panel.locator("button.unload").click()
    panel.locator(".models .none").wait_for()
    panel.locator("button.stop").click()
    panel.locator(".state[data-state=stopped]").wait_for()
    assert panel.locator("tbody tr").count() == 0
    panel.locator("button.start").click()
    panel.locator(".state[data-state=ready]").wait_for(timeout=READY_MS)
    panel.locator("tbody tr").nth(1).wait_for()
    assert page.faults == []


def test_a_button_that_the_server_refuses_says_why(page):
    panel = page.open_panel()
    refusal = {"error": {"message": "The sidecar belongs to process 7.", "hint": "Stop it there."}}
    page.page.route("**/paralleldit/unload", lambda route: route.fulfill(status=409, json=refusal))
    panel.locator("button.unload").click()
    page.page.get_by_text("The sidecar belongs to process 7. Stop it there.").wait_for()
    page.page.unroute("**/paralleldit/unload")
    page.faults.clear()  # the browser's own line about the answer 409


def test_text_of_an_error_is_never_read_as_html(page):
    panel = page.open_panel()
    html = "<img src=x onerror='window.wasRun = true'><b>bold</b>"
    error = {"message": html, "hint": html, "sidecar_failed": True}
    phase = {"name": html, "step": 0, "total": 0, "text": html}

    def told(route: Any) -> None:
        answer = route.fetch()
        status = answer.json()
        status["activity"] |= {"phase": phase, "error": error}
        route.fulfill(response=answer, json=status)

    page.page.route("**/paralleldit/status", told)  # the panel asks for it, too, once it hears of an error
    page.page.evaluate(
        """async (detail) => {
          const { api } = await import("/scripts/api.js");
          api.dispatchEvent(new CustomEvent("paralleldit", {detail}));
        }""",
        {"phase": phase, "error": error},
    )
    panel.get_by_text("bold").first.wait_for()
    page.page.wait_for_timeout(SETTLE_MS)
    assert panel.get_by_text("bold").count() >= 2
    assert panel.locator("img, b").count() == 0
    assert page.page.evaluate("() => window.wasRun") is None
    page.page.unroute("**/paralleldit/status")


def test_in_chinese_nodes_and_panel_speak_chinese(page):
    page.page.evaluate("() => window.app.extensionManager.setting.set('Comfy.Locale', 'zh')")
    page.page.reload()
    page.wait()
    page.open_template("demo_txt2img")
    texts = json.loads((PACK / "locales" / "zh" / "main.json").read_text())["paralleldit"]
    names = json.loads((PACK / "locales" / "zh" / "nodeDefs.json").read_text())
    page.page.locator(".side-bar-button .paralleldit-icon").click()
    panel = page.page.locator(".paralleldit-panel")
    panel.get_by_text(texts["unload"], exact=True).wait_for()
    steps = page.page.evaluate(
        """() => window.app.graph._nodes.find((node) => node.type === "ParallelDiTSampler")
             .widgets.find((widget) => widget.name === "steps").label"""
    )
    assert steps == names["ParallelDiTSampler"]["inputs"]["steps"]["name"]
    panel.locator("tbody tr").nth(1).wait_for()
    page.picture("panel-zh")


def read(name: str) -> dict[str, Any]:
    return json.loads((PACK / "workflows" / f"{name}.json").read_text())
