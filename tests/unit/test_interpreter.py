"""The Python of the ranks finds what the host's finds, and other systems are told what the pack needs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from paralleldit.launcher import devices, interpreter
from paralleldit.parallel_backend.engine import checks
from paralleldit.parallel_backend.errors import UserError

PACK = Path(__file__).resolve().parents[2]
SEEN = "import json, site, sys; print(json.dumps([sys.path, sys.flags.no_user_site, sys.argv[1:]]))"
HOST = f"""
import json, os, subprocess, sys, types
sys.path[:0] = {{paths}}
sys.modules["pack"] = pack = types.ModuleType("pack")  # its nodes would load torch
pack.__path__ = [{str(PACK)!r}]
from pack.launcher import interpreter
command = interpreter.command(sys.executable, "seen_by_ranks", "an argument")
env = interpreter.environment(os.environ, sys.executable)
print(subprocess.run(command, env=env, cwd="/", capture_output=True, text=True, check=True).stdout)
"""
HOSTS = {
    "plain": ((), {}, "found"),
    "without the user's packages": (("-s",), {}, "found"),
    "isolated": (("-I",), {"PYTHONPATH": "/nowhere"}, "found"),
    "environment ignored": (("-E",), {"PYTHONPATH": "/nowhere"}, "found"),
    "a relative PYTHONPATH": ((), {"PYTHONPATH": "found"}, None),
    "a start script that edits the path": ((), {}, "found"),
    "a colon": ((), {}, "with:colon"),
}
"""Options of the host's Python, its environment, and a folder that its start script put into `sys.path`."""


@pytest.mark.parametrize(("options", "env", "edited"), HOSTS.values(), ids=HOSTS)
def test_ranks_find_what_the_host_finds(options, env, edited, tmp_path: Path) -> None:
    place = tmp_path / (edited or "found")
    for folder in (place, tmp_path / "custom_nodes" / "another"):
        folder.mkdir(parents=True)
        (folder / "seen_by_ranks.py").write_text(SEEN)
    paths = [str(tmp_path / "custom_nodes" / "another"), *([str(place)] if edited else [])]
    done = subprocess.run(
        [sys.executable, *options, "-c", HOST.format(paths=paths)],
        cwd=tmp_path,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found, no_user_site, arguments = json.loads(done.stdout.strip().splitlines()[-1])
    assert found[0] == str(PACK)
    assert str(place) in found
    assert not [each for each in found if "custom_nodes" in each or not os.path.isabs(each) or each == "/nowhere"]
    assert no_user_site == int("-s" in options or "-I" in options)
    assert arguments == ["an argument"]


def test_an_environment_in_the_packs_own_folder_is_no_other_pack(monkeypatch) -> None:
    pack = Path("/ComfyUI/custom_nodes/pack")
    monkeypatch.setattr(interpreter, "PACK", pack)
    monkeypatch.setattr(interpreter.sys, "prefix", str(pack / ".venv"))
    packages = str(pack / ".venv" / "lib" / "site-packages")
    monkeypatch.setattr(interpreter.sys, "path", [packages, "/ComfyUI/custom_nodes/another", "/ComfyUI"])
    found = json.loads(interpreter.environment({}, sys.executable)[interpreter.PATH_VARIABLE])
    assert found == [str(pack), packages, "/ComfyUI"]


def test_another_python_has_its_own_path_and_the_packs() -> None:
    env = interpreter.environment({"PYTHONPATH": f"here{os.pathsep}/there"}, "/usr/bin/another")
    assert json.loads(env[interpreter.PATH_VARIABLE]) == [str(PACK)]
    assert env["PYTHONPATH"] == os.pathsep.join([str(PACK), os.path.abspath("here"), "/there"])


def test_what_other_tools_left_in_the_environment_does_not_reach_the_ranks_of_one_host() -> None:
    left = {
        "GLOO_SOCKET_IFNAME": "eth7",
        "NCCL_SOCKET_IFNAME": "ib0",
        "NCCL_IB_HCA": "mlx5_3",
        "TP_SOCKET_IFNAME": "eth7",
        "PET_STANDALONE": "1",
        "PET_RDZV_ENDPOINT": "master:29500",
        "TORCHELASTIC_RUN_ID": "9",
    }
    env = devices.rank_environment("cpu", 2, single_host=True, base=left)
    assert {env.get(name, "gone") for name in left} == {"lo", "gone"}
    of_several = devices.rank_environment("cpu", 2, single_host=False, base=left)
    assert left.keys() - of_several.keys() == {"PET_STANDALONE", "PET_RDZV_ENDPOINT", "TORCHELASTIC_RUN_ID"}


def test_compiled_blocks_are_refused_where_there_is_no_compiler(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(checks.torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"compile=blocks needs a compiler .* looked for g\+\+") as refused:
        checks.check_compiler()
    assert "compile to off" in refused.value.hint
    (tmp_path / "mine").write_text("#!/bin/sh\n")
    (tmp_path / "mine").chmod(0o755)
    monkeypatch.setenv("CXX", "mine -O2")
    checks.check_compiler()


@pytest.mark.parametrize("system", ["win32", "darwin"])
@pytest.mark.parametrize("entry", ["__init__.py", "cli/__main__.py"])
def test_other_systems_are_told_what_the_pack_needs(system: str, entry: str) -> None:
    code = f"import runpy, sys; sys.platform = {system!r}; runpy.run_path({str(PACK / entry)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert f"needs Linux, and this is {system}. On Windows" in done.stderr
    assert "fcntl" not in done.stderr
