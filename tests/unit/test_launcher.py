"""What the launcher decides without starting a sidecar."""

import argparse
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from paralleldit.cli.commands import options
from paralleldit.launcher import devices, host_checks, instance, lifecycle, runtime_dir, spec
from paralleldit.launcher.spec import SidecarSpec
from paralleldit.nodes import host
from paralleldit.parallel_backend.errors import Cancelled, UserError
from paralleldit.parallel_backend.failures import STAY_READY, Outcome, describe
from paralleldit.parallel_backend.protocol import records
from paralleldit.parallel_backend.worker.torchrun import cause_of_death
from paralleldit.parallel_backend.worker.verdict import judge

PACK = Path(__file__).resolve().parents[2]


# -- devices -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "ranks", "nnodes", "gpus", "chosen"),
    [
        ("auto", 0, 1, 4, ("cuda", 4)),
        ("auto", 0, 2, 4, ("cuda", 8)),
        ("auto", 2, 1, 4, ("cuda", 2)),
        ("auto", 0, 1, 0, ("cpu", 2)),
        ("auto", 0, 4, 0, ("cpu", 4)),
        ("cpu", 0, 1, 4, ("cpu", 2)),
        ("cpu", 8, 1, 4, ("cpu", 8)),
        ("cuda", 4, 1, 4, ("cuda", 4)),
    ],
)
def test_device_and_ranks(kind, ranks, nnodes, gpus, chosen):
    assert devices.choose(kind, ranks, nnodes, gpus) == chosen


@pytest.mark.parametrize(
    ("kind", "ranks", "nnodes", "gpus", "text"),
    [
        ("cuda", 8, 1, 2, "8 ranks on this host need as many GPUs, but torch sees 2"),
        ("auto", 4, 1, 2, "4 ranks .* sees 2"),
        ("cuda", 1, 1, 0, "1 ranks .* sees 0"),
        ("cpu", 3, 2, 0, "3 ranks cannot be spread evenly over 2 hosts"),
    ],
)
def test_ranks_that_do_not_fit_are_refused_with_both_numbers(kind, ranks, nnodes, gpus, text):
    with pytest.raises(UserError, match=text):
        devices.choose(kind, ranks, nnodes, gpus)


@pytest.mark.parametrize(("ranks", "cores", "most"), [(64, 2, 8), (9, 1, 8), (64, 8, 32)])
def test_more_cpu_ranks_than_the_cores_can_bear_are_refused_with_the_number_that_fits(ranks, cores, most):
    with pytest.raises(UserError, match=f"{ranks} ranks on this host are too many for {cores} core") as refused:
        host_checks.check_cores("cpu", ranks, cores)
    assert f"at most {most} ranks" in refused.value.hint
    host_checks.check_cores("cpu", most, cores)
    host_checks.check_cores("cuda", ranks, cores)


@pytest.mark.parametrize(
    ("ranks", "free", "remedy"), [(8, 1.5e9, "Use 3 ranks"), (2, 5e8, "Use 1 rank,"), (1, 1e8, "Free memory.")]
)
def test_more_ranks_than_the_memory_holds_are_refused_with_the_number_that_fits(ranks, free, remedy):
    with pytest.raises(UserError, match=f"{ranks} ranks need about .* GB .* but {free / 1e9:.1f} GB") as refused:
        host_checks._check_memory(ranks, int(free))
    assert remedy in refused.value.hint


@pytest.mark.parametrize(
    ("setting", "kept"),
    [
        ("", "expandable_segments:True"),
        ("backend:cudaMallocAsync", "expandable_segments:True"),
        ("backend:cudaMallocAsync,expandable_segments:True", "expandable_segments:True"),
        ("max_split_size_mb:64, backend:cudaMallocAsync ,garbage_collection_threshold:0.8",
         "max_split_size_mb:64,garbage_collection_threshold:0.8"),
        ("backend:native", "backend:native"),
    ],
)  # fmt: skip
def test_the_ranks_allocator_grows_its_segments_and_is_never_the_asynchronous_one(setting, kept):
    for variable in devices.ALLOCATOR_VARIABLES:
        env = devices.rank_environment("cuda", 1, single_host=True, base={variable: setting})
        assert [env[name] for name in devices.ALLOCATOR_VARIABLES if name in env] == [kept]


def test_streams_have_queues_of_their_own_and_launches_do_not_block():
    base = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "CUDA_LAUNCH_BLOCKING": "1"}
    env = devices.rank_environment("cuda", 2, single_host=True, base=base)
    assert env["CUDA_DEVICE_MAX_CONNECTIONS"] == devices.HARDWARE_QUEUES
    assert "CUDA_LAUNCH_BLOCKING" not in env


def test_ranks_share_the_cores_unless_told_otherwise():
    cores = len(os.sched_getaffinity(0))
    for ranks in (1, 2, 4 * cores):
        env = devices.rank_environment("cpu", ranks, single_host=True, base={})
        assert env["OMP_NUM_THREADS"] == str(max(1, cores // ranks))
    assert devices.rank_environment("cpu", 1, single_host=True, base={"OMP_NUM_THREADS": "7"})["OMP_NUM_THREADS"] == "7"


@pytest.mark.parametrize(("shown", "seen"), [("", "2,3"), ("GPU-a,GPU-b,GPU-c,GPU-d", "GPU-c,GPU-d")])
def test_a_second_sidecar_sees_its_own_gpus_only(shown, seen):
    base = {"CUDA_VISIBLE_DEVICES": shown} if shown else {}
    env = devices.rank_environment("cuda", 2, single_host=True, base=base, gpus=(2, 3))
    assert env["CUDA_VISIBLE_DEVICES"] == seen


# -- specs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"nnodes": 2}, "2 hosts need a place to meet"),
        ({"nnodes": 2, "node_rank": 2, "rdzv_endpoint": "a:1"}, r"node rank 2 does not lie in 0..1"),
        ({"rdzv_endpoint": "host"}, "'host' is not of the form host:port"),
        ({"rdzv_endpoint": "a:1"}, "a:1 is where several hosts meet, but this sidecar has one"),
        ({"address": "tcp://host"}, "not an address of the form tcp://host:port"),
        ({"address": "udp://host:1"}, "not an address of the form tcp://host:port"),
        ({"address": "tcp://host:99999"}, "not an address of the form tcp://host:port"),
        ({"device": "cpu", "ranks": 3, "nnodes": 2, "rdzv_endpoint": "a:1"}, "3 ranks cannot be spread"),
        ({"device": "cuda", "ranks": 99}, "99 ranks on this host need as many GPUs"),
        ({"remote": True, "address": "tcp://127.0.0.1:9"}, "No sidecar answers at tcp://127.0.0.1:9"),
        ({"remote": True, "address": "tcp://127.0.0.1:9", "token_file": Path("/none")}, "/none cannot be read"),
        ({"remote": True, "address": "tcp://127.0.0.1:9", "token_file": Path("/bin/true")}, "holds no text in UTF-8"),
        ({"remote": True, "address": "tcp://127.0.0.1"}, "not an address of the form tcp://host:port"),
        ({"remote": True}, "A sidecar elsewhere needs an address"),
    ],
)
def test_a_spec_that_cannot_work_is_refused_before_anything_starts(tmp_path, more, text):
    with pytest.raises(UserError, match=text):
        lifecycle.ensure_sidecar(SidecarSpec(directory=tmp_path / "run", **more))
    assert not (tmp_path / "run" / "node-0" / "current").exists()


def test_the_key_tells_sidecars_apart_by_what_shapes_them():
    base = SidecarSpec(ranks=2, device="cpu")
    key = spec.settings_of(base).key
    assert spec.settings_of(SidecarSpec(ranks=2, device="cpu", start_timeout=9)).key == key
    for more in ({"ranks": 4}, {"address": "tcp://127.0.0.1:5"}, {"hang_timeout": 9}, {"python": "/usr/bin/python3"}):
        assert spec.settings_of(SidecarSpec(**{"ranks": 2, "device": "cpu", **more})).key != key


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, SidecarSpec()),
        ({spec.TOKEN_VARIABLE: "/t"}, SidecarSpec()),
        ({spec.REMOTE_VARIABLE: "tcp://a:1"}, SidecarSpec(remote=True, address="tcp://a:1")),
        (
            {spec.REMOTE_VARIABLE: "tcp://a:1", spec.TOKEN_VARIABLE: "/t"},
            SidecarSpec(remote=True, address="tcp://a:1", token_file=Path("/t")),
        ),
    ],
)
def test_the_environment_names_a_sidecar_elsewhere_to_nodes_and_commands(monkeypatch, variables, expected):
    for name in (spec.REMOTE_VARIABLE, spec.TOKEN_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert spec.usual_spec() == host.Host().spec == expected
    parser = argparse.ArgumentParser()
    options.add_sidecar_options(parser)
    options.add_remote_option(parser)
    assert options.spec_of(parser.parse_args([])) == expected
    given = options.spec_of(parser.parse_args(["--remote", "tcp://b:2", "--token-file", "/u"]))
    assert (given.remote, given.address, given.token_file) == (True, "tcp://b:2", Path("/u"))
    with pytest.raises(UserError, match="exclude each other"):
        options.spec_of(parser.parse_args(["--remote", "tcp://b:2", "--address", "tcp://c:3"]))


# -- the runtime directory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda place: (place.mkdir(), place.chmod(0o755)), "others may enter it: only its owner may, and its mode is"),
        (lambda place: place.symlink_to(place.parent), "it is a file or a link"),
        (lambda place: place.write_text(""), "it is a file"),
        (os.mkfifo, "it is a file"),
    ],
)
def test_a_runtime_directory_that_cannot_be_used_is_refused_with_its_cause(tmp_path, spoil, why):
    spoil(tmp_path / "run")
    with pytest.raises(UserError, match=f"{tmp_path}/run cannot hold the sidecar's files: {why}") as refused:
        runtime_dir.Slot(0, tmp_path / "run").new_life()
    assert "PARALLELDIT_RUNTIME_DIR" in refused.value.hint


def test_a_new_life_is_private_and_the_last_few_are_kept(tmp_path):
    slot = runtime_dir.Slot(0, tmp_path / "run")
    lives = [slot.new_life() for _ in range(runtime_dir.KEPT_LIVES + 2)]
    assert slot.life == lives[-1]
    assert lives[-1].stat().st_mode & 0o077 == 0
    assert sum(path.exists() for path in lives) == runtime_dir.KEPT_LIVES


def test_only_one_process_at_a_time_starts_or_stops(tmp_path):
    slot, told = runtime_dir.Slot(0, tmp_path / "run"), []
    with slot.lock(1), pytest.raises(UserError, match="Another process has held"), slot.lock(0.1, told.append):
        pass
    assert len(told) == 1
    with slot.lock(0.1):
        pass


# -- outcomes ----------------------------------------------------------------------------------------------------

OKAY, CANCELLED = Outcome("ok"), Outcome("cancelled", "Cancelled.")
USER, OTHER, CRASH = Outcome("user", "bad"), Outcome("user", "worse"), Outcome("crash", "broken")
LOST = Outcome("lost", "alone")


@pytest.mark.parametrize(
    ("outcomes", "code", "rank", "in_step"),
    [
        ([OKAY, OKAY], None, None, True),
        ([CANCELLED, CANCELLED], "cancelled", None, True),
        ([USER, USER], "user", None, True),
        ([OKAY, USER], "user", 1, False),
        ([USER, OTHER], "user", 0, False),
        ([OKAY, CANCELLED], "cancelled", 1, False),
        ([CANCELLED, USER, CRASH], "crash", 2, False),
        ([CRASH, CRASH], "crash", 0, False),
        ([replace(USER, gave_up=True), USER], "user", 0, False),
        ([LOST, CRASH, LOST], "crash", 1, False),
        ([LOST, USER], "user", 1, False),
        ([LOST, OKAY], "crash", 0, False),
    ],
)
def test_ranks_stay_warm_when_all_left_a_request_alike_or_can_form_groups_anew(outcomes, code, rank, in_step):
    verdict = judge(5, dict(enumerate(outcomes)), can_regroup=False)
    failure = verdict.failure
    assert (failure and failure.code, failure and failure.rank, verdict.is_warm) == (code, rank, in_step)
    verdict = judge(5, dict(enumerate(outcomes)), can_regroup=True)
    assert (verdict.is_warm, verdict.in_step) == (True, in_step)
    if failure:
        assert verdict.failure.message == failure.message == outcomes[verdict.rank].message
        assert (verdict.failure.code, verdict.failure.rank) == ({"crash": "user"}.get(code, code), None)
        assert verdict.failure.hint.endswith(STAY_READY) != in_step


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (UserError("wrong", "do this"), "user", "wrong"),
        (Cancelled("stop"), "cancelled", "stop"),
        (ValueError("oops"), "crash", "Rank 3 failed: ValueError: oops"),
        (RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer"), "lost", "Rank 3 failed: "),
        (torch.OutOfMemoryError("CUDA out of memory."), "crash", "Rank 3 ran out of memory on cpu: "),
        (MemoryError(), "crash", "Rank 3 ran out of memory on cpu: "),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "crash", "Rank 3 ran out of memory on cpu: "),
    ],
)
def test_an_error_becomes_an_outcome_that_names_the_rank_and_cause(error, kind, text):
    outcome = describe(error, 3, torch.device("cpu"))
    assert (outcome.kind, outcome.message.startswith(text)) == (kind, True)
    assert "GiB are free now" in outcome.message or "memory" not in text


@pytest.mark.parametrize(
    ("deaths", "text"),
    [
        ({0: (1, 10), 1: (-9, 11)}, r"Rank 1 \(process 11\) was killed by SIGKILL"),
        ({0: (-15, 10), 1: (-11, 11)}, r"Rank 1 \(process 11\) was killed by SIGSEGV"),
        ({0: (-15, 10), 1: (3, 11)}, r"Rank 1 \(process 11\) exited with code 3"),
        ({0: (-15, 10), 1: (-15, 11)}, r"Rank 0 \(process 10\) was killed by SIGTERM"),
    ],
)
def test_the_rank_that_died_first_is_named(deaths, text):
    end = cause_of_death(deaths)
    assert re.match(text, end.message)


@pytest.mark.parametrize(
    ("log", "text"),
    [
        ("ModuleNotFoundError: No module named 'torch'", "no module torch"),
        ("/usr/bin/python3: No module named parallel_backend.worker", "no module parallel_backend.worker"),
        ("DistNetworkError: ... EADDRINUSE ...", "port that the sidecar needs is taken"),
        ("OSError: [Errno 12] Cannot allocate memory", "not enough memory"),
        ("OSError: [Errno 24] Too many open files: '/x'", "limit of open files"),
        ("OSError: [Errno 28] No space left on device", "disk is full"),
        ("something else", "ended without a word"),
    ],
)
def test_a_failed_start_is_explained_from_the_logs(tmp_path, log, text):
    (tmp_path / records.AgentLog).write_text(f"Traceback ...\n{log}\n")
    assert text in instance.SidecarInstance(tmp_path).why_not_started()[0]


def test_a_failed_start_names_the_limit_of_its_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(instance.resource, "getrlimit", lambda kind: (1_500_000_000, -1))
    (tmp_path / records.AgentLog).write_text("ImportError: libtorch.so: failed to map segment from shared object\n")
    assert "limited to 1.5 GB (ulimit -v)" in instance.SidecarInstance(tmp_path).why_not_started()[0]


def test_a_process_is_not_taken_for_a_later_one_of_the_same_pid():
    me = records.this_process()
    assert me.alive
    assert not records.Process(pid=me.pid, started=me.started - 1).alive


# -- the command line --------------------------------------------------------------------------------------------


def launcher(*arguments, **env):
    return subprocess.run(
        [sys.executable, PACK / "cli", *arguments],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("command", [(), ("start",), ("status",), ("stop",), ("logs",)])
def test_every_command_has_help_that_lists_the_exit_codes(command):
    found = launcher(*command, "--help")
    assert (found.returncode, "exit codes:" in found.stdout) == (0, True)


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        ((), 2, "COMMAND"),
        (("dance",), 2, "dance"),
        (("start", "--ranks", "-1"), 2, "must be at least 0"),
        (("start", "--ranks", "3", "--device", "cpu", "--nnodes", "2", "--rdzv-endpoint", "a:1"), 1, "error: 3 ranks"),
        (("start", "--hang-timeout", "nan"), 2, "must be finite"),
        (("start", "--idle-timeout", "inf"), 2, "must be finite"),
        (("status", "--remote", "tcp://127.0.0.1:9"), 1, "No sidecar answers at tcp://127.0.0.1:9"),
        (("status", "--remote", "here"), 1, "'here' is not an address"),
        (("run", "none.json", "--remote", "tcp://a:1", "--address", "tcp://b:2"), 1, "none.json cannot be read"),
        (("bench", "none.json", "--remote", "tcp://a:1"), 1, "Add --no-alone"),
        (("status",), 3, "no sidecar runs"),
        (("stop",), 3, "no sidecar runs"),
        (("logs",), 3, "no sidecar runs"),
    ],
)
def test_exit_codes_and_errors_of_the_command_line(tmp_path, arguments, code, text):
    found = launcher(*arguments, PARALLELDIT_RUNTIME_DIR=str(tmp_path / "run"))
    assert (found.returncode, text in found.stderr, "Traceback" in found.stderr) == (code, True, False), found.stderr


def test_the_command_line_loads_no_torch():
    code = (
        "import sys, types; p = types.ModuleType('pack'); p.__path__ = [sys.argv[1]]; sys.modules['pack'] = p; "
        "import pack.cli.commands.main; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(PACK)], timeout=60, check=False).returncode == 0
