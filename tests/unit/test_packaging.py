"""The pack as others get it: what the registry's package holds, and how it behaves in a folder of any name."""

from __future__ import annotations

import ast
import fnmatch
import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

PACK = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((PACK / "pyproject.toml").read_text())
SHIPPED = ("nodes", "launcher", "cli", "parallel_backend")
HOSTS = {"torch", "aiohttp", "comfy", "folder_paths", "latent_preview", "server"}
"""What ComfyUI brings: never named in requirements.txt, lest pip replaces it."""
OPTIONAL = {"flash_attn", "flash_attn_interface", "sageattention"}
IMPORTED_AS = {"pillow": "PIL", "DistVAE": "distvae"}
NOT_IN_CHECKOUT = (".git", ".venv", ".*_cache", ".hypothesis", "__pycache__", "*.pyc", "output", ".build")

LOAD = """
import importlib.util, sys
path = sys.argv[1]
name = path.replace(".", "_x_")
spec = importlib.util.spec_from_file_location(name, path + "/__init__.py")
module = sys.modules[name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
"""
"""As ComfyUI loads a folder of custom_nodes."""

IN_FAKE_HOST = (
    """
import json, os, sys
import comfy.cli_args, execution, folder_paths, nodes, server, utils
before = {name: sys.modules[name] for name in ("comfy", "execution", "folder_paths", "nodes", "server", "utils")}
"""
    + LOAD
    + """
strangers = [
    each for each, found in sys.modules.items()
    if not each.startswith(name) and (getattr(found, "__file__", None) or "").startswith(path)
]
print(json.dumps({
    "nodes": sorted(module.NODE_CLASS_MAPPINGS),
    "web": os.path.isfile(os.path.join(path, module.WEB_DIRECTORY, "paralleldit.js")),
    "strangers": strangers,
    "shadowed": [each for each, found in before.items() if sys.modules[each] is not found],
    "routes": sorted({route.path for route in server.PromptServer.instance.routes}),
    "example": module.NODE_CLASS_MAPPINGS["ParallelDiTLoader"].INPUT_TYPES()["required"]["model"][0],
}))
"""
)
FAKE_HOST = {
    "comfy/__init__.py": "",
    "comfy/cli_args.py": "class args:\n    listen = '127.0.0.1'\n    enable_cors_header = None\n",
    "utils/__init__.py": "",
    "execution.py": "",
    "folder_paths.py": "import os\n"
    "def get_input_directory(): return os.path.join(os.path.dirname(os.path.abspath(__file__)), 'input')\n",
    "input/.keep": "",
    "nodes.py": "NODE_CLASS_MAPPINGS = {}\n",
    "server.py": "from aiohttp import web\n"
    "class PromptServer:\n"
    "    instance = None\n"
    "    routes = web.RouteTableDef()\n"
    "    def send_sync(self, event, data, sid=None): pass\n"
    "PromptServer.instance = PromptServer()\n",
}


def ignored() -> list[str]:
    lines = (PACK / ".comfyignore").read_text().splitlines()
    return [line.rstrip("/") for line in lines if line and not line.startswith("#")]


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    """What the registry would send, in a folder with hyphens and a dot below custom_nodes of a fake host."""
    host = tmp_path_factory.mktemp("host")
    for name, text in FAKE_HOST.items():
        (host / name).parent.mkdir(exist_ok=True)
        (host / name).write_text(text)
    left_out = shutil.ignore_patterns(*NOT_IN_CHECKOUT)
    folder = host / "custom_nodes" / "my-parallel-dit-1.0"
    folder.mkdir(parents=True)
    for path in PACK.iterdir():
        if path.name in ignored() or any(fnmatch.fnmatch(path.name, pattern) for pattern in NOT_IN_CHECKOUT):
            continue
        if path.is_dir():
            shutil.copytree(path, folder / path.name, ignore=left_out)
        else:
            shutil.copy(path, folder)
    return folder


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-B", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120, check=False)


def test_with_the_standard_library_alone_the_pack_says_what_to_install(package):
    done = python("-I", "-S", "-c", LOAD, str(package), cwd=package.parent)
    last = done.stderr.strip().splitlines()[-1]
    assert re.match(r"ModuleNotFoundError: ComfyUI-ParallelDiT needs the Python package '(torch|pydantic)'", last), last
    assert last.endswith(f"{sys.executable} -m pip install -r {package / 'requirements.txt'}")


def test_the_package_works_in_a_folder_with_hyphens_and_shadows_nothing_of_its_host(package):
    host = package.parents[1]
    done = python("-c", f"import sys; sys.path.insert(0, {str(host)!r})\n{IN_FAKE_HOST}", str(package), cwd=host)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    from paralleldit import NODE_CLASS_MAPPINGS

    assert told["nodes"] == sorted(NODE_CLASS_MAPPINGS)
    assert told["web"]
    assert told["strangers"] == []
    assert told["shadowed"] == []
    assert told["routes"] == [f"/paralleldit/{name}" for name in ("start", "status", "stop", "unload")]
    assert "demo_model/flux-tiny" in told["example"]
    assert (host / "input" / "paralleldit_edges.png").is_file()


def test_the_command_line_of_the_package_works(package):
    done = python(str(package / "cli"), "--help", cwd=package.parent)
    assert done.returncode == 0, done.stderr
    assert "status" in done.stdout


def test_the_package_leaves_out_what_is_there_and_keeps_what_the_readme_shows(package):
    assert [name for name in ignored() if not (PACK / name).exists()] == []
    kept = {path.name for path in package.iterdir()}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "requirements.txt", "pyproject.toml", "demo_model"} <= kept
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", (PACK / "README.md").read_text())
    assert pictures
    assert all((package / picture).exists() for picture in pictures)


def test_the_project_file_tells_the_registry_what_it_needs():
    project, comfy = PROJECT["project"], PROJECT["tool"]["comfy"]
    assert re.fullmatch(r"[a-z][a-z0-9]*([-_.][a-z0-9]+)*", project["name"])
    assert "comfyui" not in project["name"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert (PACK / project["license"]["file"]).read_text().lstrip().startswith("Apache License")
    assert comfy["DisplayName"]
    assert comfy["requires-comfyui"].startswith(">=")
    assert PROJECT["tool"]["setuptools"]["dynamic"]["dependencies"]["file"] == ["requirements.txt"]


def test_the_changelog_begins_with_this_version():
    first = re.search(r"^## (\S+)", (PACK / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert first
    assert first[1] == PROJECT["project"]["version"]


def test_the_icon_is_a_drawing_that_takes_the_colour_of_its_place():
    icon = (PACK / "web" / "icon.svg").read_text()
    assert icon.startswith("<svg ")
    assert "currentColor" in icon
    assert "<script" not in icon


def test_requirements_name_what_the_pack_imports_and_nothing_that_the_host_brings():
    lines = [line for line in (PACK / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    required = {re.split(r"[<>=!~;\[ ]", line, maxsplit=1)[0] for line in lines}
    assert not required & HOSTS
    importable = {IMPORTED_AS.get(name, name) for name in required}
    unnamed = set(imports()) - set(sys.stdlib_module_names) - importable - HOSTS - OPTIONAL
    assert unnamed == set()


def imports() -> Iterator[str]:
    """The top-level modules that the shipped code imports from outside."""
    for path in (PACK / "__init__.py", *(path for folder in SHIPPED for path in (PACK / folder).rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from (alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                yield node.module.partition(".")[0]
