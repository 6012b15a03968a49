"""Every link, path, command and message in the documents exists, and the README stays short."""

from __future__ import annotations

import ast
import contextlib
import io
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from paralleldit.cli.commands.main import main

PACK = Path(__file__).resolve().parents[2]
README = PACK / "README.md"
DOCS = sorted((PACK / "docs").glob("*.md"))
PAGES = [README, PACK / "CHANGELOG.md", *DOCS, PACK / "demo_model" / "README.md", PACK / "tools/demo_model/README.md"]
LONGEST = 250
"""Lines of the README. What goes deeper has its page in docs."""

CODE = ("cli", "launcher", "nodes", "parallel_backend")
FOLDERS = "cli|demo_model|docs|launcher|locales|nodes|parallel_backend|subgraphs|tests|tools|web|workflows"
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE_LINES = re.compile(r"^```[\s\S]*?^```$|^ {4}.*$", re.MULTILINE)
CODE_SPAN = re.compile(r"`([^`]+)`")
PATH = re.compile(rf"(?<![\w/.~-])(?:{FOLDERS})/[\w./*-]*")
PYTHON = re.compile(r"\bpython (-m )?([\w./]+)([^#|;]*)")
MAKE = re.compile(r"^make ([a-z]+)")
VARIABLE = re.compile(r"(?<!\S)[A-Z_]+=\S+ ")
"""A shell variable that is set for a command."""
OPTION = re.compile(r"(?<=\s)--[a-z][a-z-]+")
OTHERS_MODULES = ("pip", "pytest")
"""What `python -m` runs that is not the pack's. Their arguments are checked as paths."""


def code(text: str) -> Iterator[str]:
    """Each line of the code blocks, and each code span, of a page."""
    for block in CODE_LINES.findall(text):
        yield from (line.strip() for line in block.splitlines())
    yield from (" ".join(span.split()) for span in CODE_SPAN.findall(CODE_LINES.sub("", text)))


def faults(page: Path, text: str) -> Iterator[str]:
    yield from faults_of_links(page, text)
    for line in code(text):
        yield from (f"no file {path}" for path in PATH.findall(line) if not exists(path))
        if (target := MAKE.match(line)) and target[1] not in targets():
            yield f"no target {target[1]} in the Makefile"
        for is_module, name, rest in PYTHON.findall(VARIABLE.sub("", line)):
            yield from faults_of_command(bool(is_module), name, rest)


def faults_of_links(page: Path, text: str) -> Iterator[str]:
    for link in LINK.findall(CODE_LINES.sub("", text)):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists():
            yield f"no file behind the link {link}"
        elif anchor and anchor not in anchors(target.read_text() if name else text):
            yield f"no heading behind the link {link}"


def anchors(text: str) -> set[str]:
    """The names of the page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", CODE_LINES.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def exists(path: str) -> bool:
    """Whether the pack has it. What hidden folders hold is made by the tools."""
    return "/." in path or bool(list(PACK.glob(path.rstrip("/."))))


@cache
def targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", (PACK / "Makefile").read_text(), re.MULTILINE))


def faults_of_command(is_module: bool, name: str, rest: str) -> Iterator[str]:
    if is_module and name.partition(".")[0] in OTHERS_MODULES:
        return
    path = PACK / (name.replace(".", "/") + ".py" if is_module else name)
    if not is_module and name == "cli":
        command = rest.split()[0] if rest.strip() else ""
        known = cli_help(command) if command else ""
        if command and not known:
            yield f"no command {command} of cli"
            return
    elif path.is_file():
        known = path.read_text()
    elif (path / "__main__.py").is_file():
        known = "\n".join(source.read_text() for source in path.glob("*.py"))
    else:
        yield f"nothing to run at {name}"
        return
    yield from (f"no option {option} of {name}" for option in OPTION.findall(rest) if option not in known)


@cache
def cli_help(command: str) -> str:
    """What `python cli COMMAND --help` prints; nothing where there is no such command."""
    printed = io.StringIO()
    with (
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(io.StringIO()),
        pytest.raises(SystemExit) as end,
    ):
        main([command, "--help"])
    return printed.getvalue() if end.value.code == 0 else ""


def quoted(page: str) -> list[str]:
    """The messages that the first column of the page's table quotes."""
    cells = [line.split("|")[1] for line in page.splitlines() if line.startswith("|")]
    return [message for cell in cells for message in re.findall(r'"([^"]+)"', cell)]


@cache
def messages() -> list[str]:
    """Every text in the pack's code, with … for what is put into it."""
    sources = [PACK / "__init__.py", *(path for folder in CODE for path in (PACK / folder).rglob("*.py"))]
    nodes = [node for path in sources for node in ast.walk(ast.parse(path.read_text()))]
    found = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    joined = [node.values for node in nodes if isinstance(node, ast.JoinedStr)]
    return found + [
        "".join(part.value if isinstance(part, ast.Constant) else "…" for part in parts) for parts in joined
    ]


def is_said(message: str) -> bool:
    """Whether a text in the code has all parts of `message` between its dots."""
    parts = [part.strip() for part in message.split("…") if part.strip()]
    return any(all(part in text for part in parts) for text in messages())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(PACK).as_posix())
def test_links_paths_and_commands_lead_somewhere(page):
    assert list(faults(page, page.read_text())) == []


@pytest.mark.parametrize("message", quoted((PACK / "docs" / "troubleshooting.md").read_text()))
def test_a_message_that_is_explained_is_in_the_code(message):
    assert is_said(message)


def test_a_message_that_nothing_says_is_found():
    assert is_said("Rank … (process …) was killed by …")
    assert not is_said("Rank … (process …) was killed by nobody …")


def test_the_readme_is_short():
    lines = len(README.read_text().splitlines())
    assert lines <= LONGEST, f"the README has {lines} lines: move what goes deeper to a page in docs"


def test_the_readme_leads_to_every_page():
    linked = {(PACK / link.partition("#")[0]).resolve() for link in LINK.findall(README.read_text())}
    assert [page.name for page in DOCS if page not in linked] == []


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[a](docs/none.md)", "no file behind the link docs/none.md"),
        ("![a](docs/none.png)", "no file behind the link docs/none.png"),
        ("[a](#none)", "no heading behind the link #none"),
        ("[a](docs/MEASURED.md#none)", "no heading behind the link docs/MEASURED.md#none"),
        ("`nodes/none.py`", "no file nodes/none.py"),
        ("`tests/none/*.mjs`", "no file tests/none/*.mjs"),
        ("`make none`", "no target none in the Makefile"),
        ("    make none    # comment", "no target none in the Makefile"),
        ("`python cli none`", "no command none of cli"),
        ("    python cli plan --none 3", "no option --none of cli"),
        ("`python tools/none.py`", "nothing to run at tools/none.py"),
        ("`.venv/bin/python tools/bench.py --none`", "no option --none of tools/bench.py"),
        ("`python tools/quality --none`", "no option --none of tools/quality"),
        ("```\npython -m tools.none\n```", "nothing to run at tools.none"),
        ("`X=1 python -m pytest tests/none -s`", "no file tests/none"),
        ("`python\nnone run`", "nothing to run at none"),
    ],
)
def test_a_fault_is_found(text, fault):
    assert fault in list(faults(README, text))


@pytest.mark.parametrize(
    "text",
    [
        "# A heading, with `code`: and more\n[a](#a-heading-with-code-and-more)",
        "[a](https://example.org/none) [b](docs/MEASURED.md#memory)",
        "`make test`, `python cli plan --ranks 8 --family flux`, `python tools/bench.py --rounds 6`",
        "We make nothing at nodes/none.py",
        "    .venv/bin/python -m pytest tests/unit -k name",
    ],
)
def test_what_exists_is_no_fault(text):
    assert list(faults(README, text)) == []
