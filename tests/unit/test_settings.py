"""The page in ComfyUI's settings: which sidecar its values ask for."""

from __future__ import annotations

import json
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from paralleldit.launcher.spec import REMOTE_VARIABLE, TOKEN_VARIABLE, SidecarSpec
from paralleldit.nodes.comfyui import settings
from paralleldit.parallel_backend.errors import UserError

PACK = Path(__file__).resolve().parents[2]
RANKS, IDLE, ADDRESS, TOKEN = (f"ParallelDiT.{name}" for name in ("Ranks", "IdleMinutes", "RemoteAddress", "TokenFile"))
THERE = {ADDRESS: " tcp://there:1 ", TOKEN: "/of/page"}


def elsewhere(token: str | None, address: str = "tcp://there:1") -> SidecarSpec:
    return SidecarSpec(remote=True, address=address, token_file=Path(token) if token else None)


ASKED: dict[str, tuple[dict[str, Any] | None, dict[str, str], SidecarSpec]] = {
    "no file yet": (None, {}, SidecarSpec()),
    "settings of others": ({"Comfy.Locale": "zh", "ParallelDiT.Other": 1}, {}, SidecarSpec()),
    "ranks and idle time": ({RANKS: 3, IDLE: 0.5}, {}, SidecarSpec(ranks=3, idle_timeout=30.0)),
    "never idle": ({IDLE: 0}, {}, SidecarSpec(idle_timeout=0.0)),
    "emptied fields": ({RANKS: None, IDLE: None, ADDRESS: "", TOKEN: ""}, {}, SidecarSpec()),
    "a number as the browser may write it": ({RANKS: 4.0}, {}, SidecarSpec(ranks=4)),
    "elsewhere, whose ranks and times are its own": ({**THERE, RANKS: 3, IDLE: 1}, {}, elsewhere("/of/page")),
    "elsewhere, without a token": ({ADDRESS: "tcp://there:1"}, {}, elsewhere(None)),
    "the environment's address wins": (THERE, {REMOTE_VARIABLE: "tcp://env:2"}, elsewhere(None, "tcp://env:2")),
    "the environment's token wins": (THERE, {TOKEN_VARIABLE: "/of/env"}, elsewhere("/of/env")),
    "an empty address of the environment wins": ({**THERE, RANKS: 2}, {REMOTE_VARIABLE: ""}, SidecarSpec(ranks=2)),
    "wrong settings that do not count": ({RANKS: -1}, {REMOTE_VARIABLE: "tcp://env:2"}, elsewhere(None, "tcp://env:2")),
}
WRONG = {
    "negative": (json.dumps({RANKS: -1}), f"{RANKS}=-1 in ComfyUI's settings"),
    "too many": (json.dumps({RANKS: 10**400}), RANKS),
    "no number": (json.dumps({IDLE: "soon"}), f"{IDLE}='soon'"),
    "not finite": (f'{{"{IDLE}": NaN}}', IDLE),
    "no text": (json.dumps({TOKEN: ["a"]}), TOKEN),
    "no settings": ("[]", "holds no settings"),
    "no JSON": ("{", "are no JSON"),
}


@pytest.fixture(autouse=True)
def no_environment(monkeypatch) -> None:
    for name in (REMOTE_VARIABLE, TOKEN_VARIABLE):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(("content", "environment", "expected"), ASKED.values(), ids=ASKED)
def test_the_page_and_the_environment_ask_for_a_sidecar(tmp_path, monkeypatch, content, environment, expected):
    file = tmp_path / "comfy.settings.json"
    if content is not None:
        file.write_text(json.dumps(content))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert settings.spec_of(file) == expected


@pytest.mark.parametrize(("content", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_setting_is_named(tmp_path, monkeypatch, content, message):
    monkeypatch.setattr(settings, "WRITING_S", 0.05)
    file = tmp_path / "comfy.settings.json"
    file.write_text(content)
    with pytest.raises(UserError, match=re.escape(message)):
        settings.spec_of(file)


def test_a_file_that_is_just_being_written_is_read_when_it_is_whole(tmp_path):
    file = tmp_path / "comfy.settings.json"
    file.write_text("")
    writer = threading.Thread(target=lambda: (time.sleep(0.05), file.write_text(json.dumps({RANKS: 5}))))
    writer.start()
    assert settings.spec_of(file).ranks == 5
    writer.join()


def test_the_page_has_the_settings_that_are_read():
    named = re.findall(r'id: "([\w.]+)"', (PACK / "web" / "settings.js").read_text())
    assert named == [field.alias for field in settings.PageSettings.model_fields.values()]
