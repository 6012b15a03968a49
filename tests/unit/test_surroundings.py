"""A sidecar in odd surroundings: what they lack is told in one sentence, with its cause and what to change."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from paralleldit.launcher import runtime_dir

PACK = Path(__file__).resolve().parents[2]
VARIABLE = "PARALLELDIT_RUNTIME_DIR"
START = ("start", "--device", "cpu", "--worker", "tests.ranks.stand_in", "--start-timeout", "20")
"""Refused before any rank has started, but where a case says otherwise."""


def cli(*arguments: str, wrap: tuple[str, ...] = (), **env: str | None) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name != VARIABLE}
    given = {name: value for name, value in env.items() if value is not None}
    return subprocess.run(
        [*wrap, sys.executable, str(PACK / "cli"), *arguments],
        env={**inherited, **given},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def shell(command: str) -> tuple[str, ...]:
    return ("bash", "-c", f'{command}; exec "$@"', "x")


def in_namespaces(flags: str, command: str) -> tuple[str, ...]:
    return ("unshare", flags, *shell(command))


def disk(size: str, more: str = "") -> tuple[str, ...]:
    return in_namespaces("-m", f"mount -t tmpfs -o size={size},mode=700 none PLACE{more}")


CASES = {
    "a file": (lambda place: place.write_text(""), (), "it is a file", VARIABLE),
    "in a file": (lambda place: place.parent.write_text(""), (), "is a file", VARIABLE),
    "a link": (lambda place: place.symlink_to(place.parent), (), "it is a file or a link", VARIABLE),
    "a pipe": (os.mkfifo, (), "it is a file", VARIABLE),
    "others may enter": (lambda place: place.mkdir(mode=0o777) or place.chmod(0o777), (), "others may enter", VARIABLE),
    "size of files limited": (None, shell("ulimit -f 0"), r"the size of files is limited \(ulimit -f\)", VARIABLE),
    "open files limited": (None, shell("ulimit -n 24"), "may have 24 open files here", "ulimit -n 1024"),
}
AS_ROOT = {
    "of another user": (
        lambda place: place.mkdir(mode=0o700) or os.chown(place, 1001, 1001),
        (),
        "user 1001",
        VARIABLE,
    ),
    "spoilt by another": (
        lambda place: (
            (place / "node-0").mkdir(parents=True) or place.chmod(0o700) or os.chown(place / "node-0", 1001, 1001)
        ),
        (),
        "node-0 in it belongs to user 1001",
        VARIABLE,
    ),
    "disk of 4 kB": (Path.mkdir, disk("4k"), "(disk .* is full|the disk is full)", VARIABLE),
    "disk of 16 kB": (Path.mkdir, disk("16k"), "disk .* is full: 1?[0-9] kB are free", VARIABLE),
    "read-only": (Path.mkdir, disk("4m", "; mount -o remount,ro PLACE"), "(read-only|may not write)", VARIABLE),
    "loopback down": (
        None,
        in_namespaces("-n", "true"),
        "cannot connect to itself at 127.0.0.1: Network is unreach",
        "ip link",
    ),
    "no IPv4": (
        None,
        in_namespaces("-n", "ip link set lo up; ip addr del 127.0.0.1/8 dev lo"),
        "cannot connect to itself at 127.0.0.1: Cannot assign",
        "ip link set lo up",
    ),
}


@pytest.mark.parametrize("name", [*CASES, *AS_ROOT])
def test_what_a_host_lacks_is_told_in_one_sentence(tmp_path, name):
    prepare, wrap, why, remedy = (CASES | AS_ROOT)[name]
    if name in AS_ROOT and (os.getuid() != 0 or subprocess.run(["unshare", "-mn", "true"], check=False).returncode):
        pytest.skip("needs root, and namespaces")
    place = tmp_path / "run" / "deeper" if name == "in a file" else tmp_path / "run"
    if prepare:
        prepare(place)
    wrap = tuple(part.replace("PLACE", str(place)) for part in wrap)
    found = cli(*START, wrap=wrap, **{VARIABLE: str(place)})
    assert found.returncode == 1, found
    assert "Traceback" not in found.stderr
    sentence, hint = found.stderr.strip().splitlines()[-2:]
    assert sentence.startswith("error: "), found.stderr
    assert hint.startswith("hint: "), found.stderr
    assert re.search(why, sentence), sentence
    assert remedy in hint


def test_a_path_that_is_too_long_is_told(tmp_path):
    place = tmp_path / "/".join(letter * 250 for letter in "abcdefghijklmnopq")
    found = cli(*START, **{VARIABLE: str(place)})
    assert (found.returncode, "the path is too long" in found.stderr, VARIABLE in found.stderr) == (1, True, True)


def test_what_python_prints_when_it_starts_is_no_number_of_gpus(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("print('hello from sitecustomize')\n")
    from paralleldit.launcher import devices

    # Without torch at hand, which the pack's nodes load, another Python counts.
    code = (
        f"import sys, types; sys.modules['pack'] = pack = types.ModuleType('pack'); pack.__path__ = [{str(PACK)!r}]\n"
    )
    code += "from pack.launcher import devices; print(devices.gpu_count()); assert 'torch' not in sys.modules"
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert found.stdout.splitlines()[-1].isdecimal()
    assert devices.gpu_count() == int(found.stdout.splitlines()[-1])


# -- the usual places --------------------------------------------------------------------------------------------


@pytest.fixture
def places(tmp_path, monkeypatch) -> list[Path]:
    """The first two usual places."""
    for name in ("session", "temporary"):
        (tmp_path / name).mkdir()
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "session"))
    monkeypatch.setattr(runtime_dir.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    first, *others = runtime_dir.usual_places()
    return [first, next(place for place in others if place.is_relative_to(tmp_path))]


def test_a_place_that_was_spoilt_is_passed_over_and_that_is_said(places):
    assert runtime_dir.root() == places[0]
    assert runtime_dir.passed_over() == []
    places[0].write_text("")
    usable = runtime_dir.root()
    assert usable in runtime_dir.usual_places()[1:]
    assert runtime_dir.passed_over()[0] == f"{places[0]} cannot hold the sidecar's files: it is a file or a link."


def test_a_sidecar_is_looked_for_in_all_usual_places_that_are_the_users_own(places):
    for place in places:
        place.mkdir(mode=0o700)
    directories = [slot.directory.parent for slot in runtime_dir.slots()]
    assert set(places) <= set(directories)
    assert directories[0] == places[0]
    places[1].chmod(0o755)
    assert places[1] not in [slot.directory.parent for slot in runtime_dir.slots()]


def test_a_place_that_is_named_is_the_only_one(places, tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "named"))
    assert [slot.directory.parent for slot in runtime_dir.slots()] == [tmp_path / "named"]
    (tmp_path / "named").write_text("")
    assert runtime_dir.root() == tmp_path / "named"
    assert runtime_dir.passed_over() == []
