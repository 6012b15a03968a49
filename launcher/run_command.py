"""`launcher run`: executes a saved API-format workflow without ComfyUI."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..parallel_backend.errors import UserError
from ..parallel_backend.protocol.messages import Request, Sample, Welcome

if TYPE_CHECKING:
    from torch import Tensor
    from tqdm import tqdm

    from .headless.runner import OnShown, WorkflowRun

TEXT = """Run a saved API-format workflow without ComfyUI, for servers, scripts and tests.
ComfyUI is the pack's host: only the pack's own nodes and a few core nodes run here
(empty latents, LoadImage, SaveImage, PreviewImage, primitives)."""


def add_parser(commands: argparse._SubParsersAction) -> None:
    from .cli import add_command, add_sidecar_options

    parser = add_command(commands, "run", main, TEXT)
    add = parser.add_argument
    add_workflow_options(parser)
    add("--prompts", type=Path, metavar="FILE", help="run once for every line of FILE")
    add("--into", metavar="NODE.INPUT", help="the input that takes the lines of --prompts")
    add("--output", type=Path, default=Path("output"), help="folder of the pictures (default: output)")
    add_sidecar_options(parser)


def add_workflow_options(parser: argparse.ArgumentParser) -> None:
    """The options that say which workflow it is, and where its files are."""
    add = parser.add_argument
    add("workflow", type=Path, help="the workflow in ComfyUI's API format, or a picture that was saved by one")
    add(
        "--set",
        action="append",
        default=[],
        metavar="NODE.INPUT=VALUE",
        help="change a value; NODE is an id or a title",
    )
    add("--input", type=Path, default=Path("input"), help="folder of LoadImage (default: input)")
    add("--models", type=Path, help="a folder laid out as ComfyUI's models folder")


def main(args: argparse.Namespace) -> int:
    from ..nodes import NODE_CLASS_MAPPINGS, host
    from .cli import spec_of
    from .headless.core_nodes import Folders, core_nodes
    from .headless.runner import begin_workflow, finish_meanwhile

    api = read_workflow(args.workflow)
    values = dict(pair(each) for each in args.set)
    folders = Folders(args.input, args.output, args.output / "temp")
    classes = {**core_nodes(folders), **NODE_CLASS_MAPPINGS}
    cache: dict[str, tuple[Any, ...]] = {}
    report = Report()

    class TerminalHost(host.Host):
        def sending(self, message: Request, tensors: Mapping[str, Tensor], welcome: Welcome) -> None:
            report.sending(message, welcome)

    host.use(
        TerminalHost(models=args.models, spec=spec_of(args), owned=False, on_progress=report.progress, say=report.say)
    )

    def runs() -> Iterator[tuple[WorkflowRun, OnShown]]:
        for prompt in _prompts(args):
            with report.run():
                run = begin_workflow(api, classes=classes, set_values=values | prompt, cache=cache)
            yield run, partial(report.end, report.summary())

    finish_meanwhile(runs())
    return 0


class Summary(NamedTuple):
    """How a picture was made, and when its run began."""

    lines: list[str]
    began: float


class Report:
    """What the terminal shows: a bar for every phase, and at the end where the picture is and how it was made."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None
        self._phase = ""
        self._sample: Sample | None = None
        self._welcome: Welcome | None = None
        self._step_times: list[float] = []
        self._thread = threading.get_ident()
        self._began = time.monotonic()

    def say(self, text: str) -> None:
        if threading.get_ident() == self._thread:
            self._close_bar()
        print(text, file=sys.stderr)

    def sending(self, message: Request, welcome: Welcome) -> None:
        self._welcome = welcome
        if isinstance(message, Sample):
            self._sample = message
            self._step_times = []

    def progress(self, phase: str, step: int, total: int, preview: Tensor | None) -> None:
        from tqdm import tqdm

        if threading.get_ident() != self._thread:
            return  # the bar is that of the run that samples
        if phase == "sample":
            self._step_times.append(time.monotonic())
        if self._bar is None or phase != self._phase or step < self._bar.n:
            self._close_bar()
            self._phase = phase
            self._bar = tqdm(total=total, desc=phase, file=sys.stderr)
        self._bar.update(step - self._bar.n)
        if step == total:
            self._close_bar()

    @contextlib.contextmanager
    def run(self) -> Iterator[None]:
        self._sample = None
        self._thread = threading.get_ident()
        self._began = time.monotonic()
        try:
            yield
        finally:
            self._close_bar()

    def summary(self) -> Summary:
        """Of the run that has just sampled."""
        lines = []
        if self._sample is not None:
            lines.append(f"seed              {self._sample.seed}")
            if len(self._step_times) > 1:
                seconds = (self._step_times[-1] - self._step_times[0]) / (len(self._step_times) - 1)
                lines.append(f"seconds per step  {seconds:.3f}")
            lines.append(f"layout            {self._sample.layout}")
        if self._welcome is not None:
            lines.append(f"ranks             {self._welcome.ranks} on {self._welcome.device}")
        return Summary(lines, self._began)

    def end(self, summary: Summary, shown: dict[str, Any]) -> None:
        for ui in shown.values():
            for picture in ui.get("images", ()):
                print(f"picture           {picture['path']}")
            for text in ui.get("text", ()):
                print(text)
        print(*summary.lines, f"whole run         {time.monotonic() - summary.began:.1f} s", sep="\n")

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def read_workflow(path: Path) -> dict[str, Any]:
    """A workflow in API format, from its file or from a picture that was saved by it. Raises `UserError`."""
    try:
        if path.suffix == ".png":
            return json.loads(_prompt_of_picture(path))
        api = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"The workflow {path} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}.") from error
    if not isinstance(api, dict):
        raise UserError(f"{path} is not a workflow in ComfyUI's API format.")
    return api


def _prompt_of_picture(path: Path) -> str:
    from PIL import Image

    with Image.open(path) as picture:
        text = picture.info.get("prompt")
    if not text:
        raise UserError(f"The picture {path} holds no workflow.")
    return text


def pair(text: str) -> tuple[str, str]:
    """NODE.INPUT and the value, of what --set was given. Raises `UserError`."""
    place, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--set {text!r} is not of the form NODE.INPUT=VALUE.")
    return place, value


def _prompts(args: argparse.Namespace) -> list[dict[str, str]]:
    """The values to set in each run: none in the only one, or a line of the prompts' file in each."""
    if bool(args.prompts) != bool(args.into):
        raise UserError("--prompts and --into belong together.", "Example: --prompts prompts.txt --into Positive.text")
    if not args.prompts:
        return [{}]
    try:
        lines = args.prompts.read_text().splitlines()
    except OSError as error:
        raise UserError(f"The prompts {args.prompts} cannot be read: {error.strerror}.") from error
    return [{args.into: line} for line in lines if line.strip()]
