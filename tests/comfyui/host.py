"""A ComfyUI of its own for the tests: started from a checkout, with a scratch folder for everything it writes."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest

PACK = Path(__file__).resolve().parents[2]
SHIM = Path(__file__).resolve().parent / "shim"
NATIVE = Path(__file__).resolve().parent / "native_flux"
PACK_NAME = "ComfyUI-ParallelDiT"
CLIENT = "tests"
PREVIEW_IMAGE = b"\x00\x00\x00\x01"
TEXT = b"\x00\x00\x00\x03"
"""How the binary messages of the websocket that carry a preview, or a text of a node, begin."""
START_S = 300.0
RUN_S = 180.0


@dataclass
class Run:
    """What the websocket told about one prompt."""

    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    previews: list[bytes] = field(default_factory=list)
    texts: list[tuple[str, str]] = field(default_factory=list)
    """What was shown on nodes, by their keys."""
    phases: set[str] = field(default_factory=set)
    """What the ranks have been at meanwhile."""

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [data for name, data in self.events if name == kind]

    @property
    def error(self) -> str:
        return " ".join(data["exception_message"] for data in self.of("execution_error"))

    def pictures(self) -> list[dict[str, str]]:
        return [each for data in self.of("executed") for each in data["output"].get("images", ())]


class Host:
    """A running ComfyUI. `stop` ends it."""

    def __init__(self, base: Path, runtime: Path) -> None:
        self.base = base
        self.runtime = runtime
        self.port = _free_port()
        self.log = base / "comfyui.log"
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        base = str(self.base)
        command = [
            os.environ.get("COMFYUI_PYTHON", sys.executable),
            str(Path(os.environ["COMFYUI_PATH"]) / "main.py"),
            *("--cpu", "--port", str(self.port), "--base-directory", base),
            *("--database-url", f"sqlite:///{base}/db.sqlite", "--preview-method", "latent2rgb"),
            *("--disable-auto-launch", "--disable-api-nodes"),
        ]
        env = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PARALLELDIT_RUNTIME_DIR": str(self.runtime),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONPATH": str(SHIM),
        }
        with self.log.open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=env, cwd=base)
        deadline = time.monotonic() + START_S
        while True:
            try:
                self.get("/system_stats")
                return process
            except (urllib.error.URLError, ConnectionError):
                assert process.poll() is None, f"ComfyUI did not start:\n{self.tail()}"
                if time.monotonic() > deadline:
                    process.kill()
                    pytest.fail(f"ComfyUI is not up after {START_S:g} s:\n{self.tail()}")
                time.sleep(0.3)

    def stop(self) -> None:
        """Ends ComfyUI, and its sidecar without the grace time."""
        self._process.terminate()
        self._process.wait(timeout=30)
        self.stop_ranks()

    def restart(self) -> None:
        """Ends ComfyUI as a user does, and starts it again; the sidecar is left alone."""
        self._process.terminate()
        self._process.wait(timeout=30)
        self._process = self._start()

    def stop_ranks(self) -> None:
        """Ends the sidecar from outside, as `cli stop` does."""
        env = os.environ | {"PARALLELDIT_RUNTIME_DIR": str(self.runtime)}
        subprocess.run([sys.executable, str(PACK / "cli"), "stop"], env=env, capture_output=True, check=False)

    def ranks(self) -> list[int]:
        """The process ids of the ranks."""
        return [rank["pid"] for rank in self.get("/paralleldit/status")["details"].get("ranks", ())]

    def models(self) -> list[dict[str, Any]]:
        """What the ranks say that they hold."""
        return self.get("/paralleldit/status")["details"].get("models", [])

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as answer:
            body = answer.read()
        return json.loads(body) if answer.headers.get_content_type() == "application/json" else body

    def post(self, path: str, data: dict[str, Any]) -> bytes:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", json.dumps(data).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.read()

    def queue(self, prompts: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """Queues all `prompts` at once and waits for them: what the history says of each."""
        ids = [json.loads(self.post("/prompt", {"prompt": api}))["prompt_id"] for api in prompts]
        deadline = time.monotonic() + RUN_S
        while True:
            history = self.get("/history")
            if history.keys() >= set(ids):
                return [history[each] for each in ids]
            assert time.monotonic() < deadline, f"{len(ids)} prompts took more than {RUN_S:g} s:\n{self.tail()}"
            time.sleep(0.3)

    def view(self, picture: dict[str, str]) -> bytes:
        return self.get(f"/view?{urllib.parse.urlencode(picture)}")

    def run(self, api: dict[str, Any], interrupt_at: int | None = None) -> Run:
        """Queues a workflow and waits for its end; with `interrupt_at`, interrupts it once a bar is at that step."""
        return asyncio.run(self._run(api, interrupt_at))

    def refusal(self, api: dict[str, Any]) -> str:
        """What `/prompt` answers to a workflow that it does not accept."""
        return asyncio.run(self._refusal(api))

    async def _refusal(self, api: dict[str, Any]) -> str:
        async with self._session() as session, session.post("/prompt", json={"prompt": api}) as answer:
            assert answer.status == 400, await answer.text()
            return await answer.text()

    async def _run(self, api: dict[str, Any], interrupt_at: int | None) -> Run:
        run = Run()
        async with self._session() as session, session.ws_connect(f"/ws?clientId={CLIENT}", max_msg_size=0) as socket:
            async with session.post("/prompt", json={"prompt": api, "client_id": CLIENT}) as answer:
                assert answer.status == 200, await answer.text()
                prompt = (await answer.json())["prompt_id"]
            async with asyncio.timeout(RUN_S):
                async for message in socket:
                    if message.type == aiohttp.WSMsgType.BINARY:
                        if message.data.startswith(PREVIEW_IMAGE):
                            run.previews.append(message.data[8:])
                        elif message.data.startswith(TEXT):
                            end = 8 + int.from_bytes(message.data[4:8])
                            run.texts.append((message.data[8:end].decode(), message.data[end:].decode()))
                        continue
                    event = json.loads(message.data)
                    kind, data = event["type"], event.get("data", {})
                    if kind == "paralleldit" and data["phase"]:
                        run.phases.add(data["phase"]["name"])
                    if data.get("prompt_id") != prompt:
                        continue
                    run.events.append((kind, data))
                    if kind == "progress" and data["value"] == interrupt_at:
                        await session.post("/interrupt")
                        interrupt_at = None
                    if kind in ("execution_success", "execution_error", "execution_interrupted"):
                        break
        return run

    def _session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(f"http://127.0.0.1:{self.port}")


def prepare(base: Path, pipelines: dict[str, Path], files: Iterable[Path] = ()) -> None:
    """The folders of a ComfyUI with the pack and the tests' own node installed.

    `pipelines` go to models/diffusers, `files` to models/diffusion_models.
    """
    (base / "custom_nodes").mkdir(parents=True)
    (base / "custom_nodes" / PACK_NAME).symlink_to(PACK)
    (base / "custom_nodes" / NATIVE.name).symlink_to(NATIVE)
    for name, folder in pipelines.items():
        shutil.copytree(folder, base / "models" / "diffusers" / name)
    for file in files:
        (base / "models" / "diffusion_models").mkdir(exist_ok=True)
        shutil.copy(file, base / "models" / "diffusion_models")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
