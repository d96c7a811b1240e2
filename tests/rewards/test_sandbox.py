"""A confined program: whatever it tries, it ends within its limits, is reported, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import venv
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from regimen.rewards import sandbox
from regimen.rewards.limits import LimitReached, time_limit
from regimen.rewards.sandbox import Limits, Outcome, run_limited, run_python

Run = Callable[..., Outcome]
WAYS = ("namespaces", "limits")
TIGHT = Limits(wall_s=20, cpu_s=10, memory_mb=128, file_mb=1, disk_mb=4, processes=8)
HASTY = replace(TIGHT, wall_s=1)
OPEN = {"require": (), "without": ("namespaces",)}
DAEMON = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(60)
    os._exit(0)
os.wait()
"""

pytestmark = pytest.mark.skipif(
    run_limited([sys.executable, "-c", ""], **OPEN).trouble is not None, reason="programs cannot be confined here"
)
allowed = run_limited([sys.executable, "-c", ""]).trouble is None
needs_namespaces = pytest.mark.skipif(not allowed, reason="user namespaces are not allowed here")
ways = pytest.mark.parametrize("way", [pytest.param("namespaces", marks=needs_namespaces), "limits"])


class Marked:
    """Programs whose processes, keepers included, have a word in their command line by which they are found."""

    def __init__(self) -> None:
        self.word = uuid4().hex

    def argv(self) -> list[str]:
        return [sys.executable, "-s", "program.py", self.word]

    def run(self, source: str, way: str = "namespaces", **settings: Any) -> Outcome:
        files = {"program.py": textwrap.dedent(source), **settings.pop("files", {})}
        how = {"limits": TIGHT, **(OPEN if way == "limits" else {}), **settings}
        return run_limited(self.argv(), files=files, **how)

    def alive(self) -> dict[int, str]:
        found = {}
        for entry in Path("/proc").iterdir():
            try:
                line = (entry / "cmdline").read_text().replace("\0", " ")
            except OSError:
                continue
            if entry.name.isdigit() and self.word in line:
                found[int(entry.name)] = line
        return found

    def wait_until(self, count: int) -> None:
        """Until so many processes are alive, or none if that is what is waited for."""
        deadline = time.monotonic() + 10
        while (len(self.alive()) < count if count else self.alive()) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert time.monotonic() < deadline, self.alive()


@pytest.fixture
def marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Marked]:
    """After the test no process and no file of its programs may be left."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    marked = Marked()
    yield marked
    assert not marked.alive()
    assert not list(scratch.iterdir())


@ways
def test_ordinary_program_gets_its_files_and_input_and_nothing_else(
    marked: Marked, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_KEY", "hunter2")
    source = """
        import fcntl, os, subprocess, sys, threading
        import numpy
        print(input(), open("folder/given.txt").read(), numpy.arange(3).sum())
        threading.Thread(target=print, args=["thread"]).start()
        print(subprocess.run([sys.executable, "-c", "print('child')"], capture_output=True, text=True).stdout)
        def is_open(number):
            try:
                return fcntl.fcntl(number, fcntl.F_GETFD) >= 0
            except OSError:
                return False
        print("SECRET_KEY" in os.environ, [number for number in range(256) if is_open(number)])
        print("error", file=sys.stderr)
    """
    roomy = Limits(wall_s=10, memory_mb=1024)
    outcome = marked.run(source, way, stdin="in\n", files={"folder/given.txt": "file"}, limits=roomy)
    assert outcome.ok, outcome
    assert outcome.stdout.split() == ["in", "file", "3", "thread", "child", "False", "[0,", "1,", "2]"]
    assert outcome.stderr == "error\n"
    assert outcome.why == "ended well"


@ways
@pytest.mark.parametrize(
    ("ending", "code", "why"),
    [
        ("sys.exit(3)", 3, "ended with exit code 3: nothing on standard error"),
        ("raise KeyError('colour')", 1, "ended with exit code 1: KeyError: 'colour'"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", -11, "was killed by signal 11 (Segmentation fault)"),
        ("os.kill(os.getpid(), 40)", -40, "was killed by signal 40 (Real-time signal 6)"),
    ],
)
def test_a_bad_end_is_told_and_is_no_breach(marked: Marked, way: str, ending: str, code: int, why: str) -> None:
    outcome = marked.run(f"import os, signal, sys\n{ending}", way)
    assert (outcome.code, outcome.why, outcome.breach, outcome.trouble) == (code, why, None, None)
    assert not outcome.ok


@ways
def test_endless_loop_breaks_wall_s(marked: Marked, way: str) -> None:
    outcome = marked.run("print('begun', flush=True)\nwhile True: pass", way, limits=HASTY)
    assert outcome.breach == outcome.why == "did not end within 1 s (wall_s)"
    assert outcome.stdout == "begun\n"
    assert outcome.code == -signal.SIGKILL
    assert outcome.seconds < 5


@ways
def test_program_that_ignores_sigterm_breaks_wall_s(marked: Marked, way: str) -> None:
    source = """
        import signal, time
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGXCPU):
            signal.signal(number, signal.SIG_IGN)
        while True: time.sleep(1)
    """
    assert marked.run(source, way, limits=HASTY).breach == "did not end within 1 s (wall_s)"


@ways
def test_processor_time_of_all_processes_together_breaks_cpu_s(marked: Marked, way: str) -> None:
    source = """
        import os, signal
        signal.signal(signal.SIGXCPU, signal.SIG_IGN)
        os.fork()
        while True: pass
    """
    outcome = marked.run(source, way, limits=Limits(wall_s=20, cpu_s=0.3))
    assert outcome.breach == "used more than 0.3 s of processor time (cpu_s)"


@ways
def test_dozens_of_children_break_processes(marked: Marked, way: str) -> None:
    source = """
        import os, time
        for _ in range(40):
            if os.fork() == 0:
                time.sleep(20)
                os._exit(0)
        time.sleep(20)
    """
    outcome = marked.run(source, way, limits=Limits(wall_s=20, processes=8))
    assert outcome.breach == "had more than 8 processes and threads (processes)"


@ways
def test_a_long_line_of_descent_breaks_processes(marked: Marked, way: str) -> None:
    source = """
        import os, time
        for _ in range(40):
            if os.fork() > 0:
                break
        time.sleep(20)
    """
    outcome = marked.run(source, way, limits=Limits(wall_s=20, processes=8))
    assert outcome.breach == "had more than 8 processes and threads (processes)"


@ways
def test_threads_count_as_processes(marked: Marked, way: str) -> None:
    source = """
        import threading, time
        for _ in range(20):
            threading.Thread(target=time.sleep, args=[20]).start()
    """
    outcome = marked.run(source, way, limits=Limits(wall_s=20, memory_mb=1024, processes=8))
    assert outcome.breach == "had more than 8 processes and threads (processes)"


@ways
def test_ten_gigabytes_break_memory_mb(marked: Marked, way: str) -> None:
    outcome = marked.run("memory = bytearray(10 << 30)", way)
    assert outcome.breach == "needed more than 128 MB of memory (memory_mb)"
    assert outcome.code == 1


@ways
def test_program_that_deals_with_a_refused_allocation_breaks_nothing(marked: Marked, way: str) -> None:
    source = """
        try:
            memory = bytearray(10 << 30)
        except MemoryError:
            print("done without")
    """
    assert marked.run(source, way).ok


@ways
def test_memory_of_all_processes_together_breaks_memory_mb(marked: Marked, way: str) -> None:
    source = """
        import os, time
        os.fork(), os.fork()
        memory = b"x" * (64 << 20)
        time.sleep(20)
    """
    outcome = marked.run(source, way, limits=Limits(wall_s=20, memory_mb=160))
    assert outcome.breach == "took more than 160 MB of memory (memory_mb)"


@ways
def test_memory_outside_of_any_process_is_refused(marked: Marked, way: str) -> None:
    source = """
        import ctypes, os
        libc = ctypes.CDLL(None, use_errno=True)
        for name, *arguments in (
            ("memfd_create", b"x", 0), ("shmget", 0, ctypes.c_size_t(4096), 0o1600), ("msgget", 0, 0o1600)
        ):
            print(name, getattr(libc, name)(*arguments), os.strerror(ctypes.get_errno()))
    """
    told = marked.run(source, way).stdout.splitlines()
    assert told == [f"{name} -1 Operation not permitted" for name in ("memfd_create", "shmget", "msgget")]


@ways
def test_namespaces_of_its_own_are_refused(marked: Marked, way: str) -> None:
    source = """
        import ctypes, os, platform
        libc = ctypes.CDLL(None, use_errno=True)
        new_user, clone = 0x10000000, {"x86_64": 56, "aarch64": 220}[platform.machine()]
        print(libc.unshare(new_user), os.strerror(ctypes.get_errno()))
        child = libc.syscall(clone, ctypes.c_ulong(new_user | 17), *[ctypes.c_ulong(0)] * 4)
        if child == 0: os._exit(0)
        print(child, os.strerror(ctypes.get_errno()))
        print(libc.syscall(435, None, 0), os.strerror(ctypes.get_errno()))
    """
    told = marked.run(source, way).stdout.splitlines()
    assert told == ["-1 Operation not permitted"] * 2 + ["-1 Function not implemented"]


@ways
@pytest.mark.parametrize("stream", ["output", "error"])
def test_huge_output_breaks_file_mb(marked: Marked, way: str, stream: str) -> None:
    source = f"""
        import sys
        while True: sys.std{stream[:3]}.write("x" * 65536)
    """
    outcome = marked.run(source, way)
    assert outcome.breach == f"filled its standard {stream} with 1 MB (file_mb)"
    assert max(len(outcome.stdout), len(outcome.stderr)) == 2**20


@ways
def test_program_without_a_mind_of_its_own_is_ended_by_sigxfsz(marked: Marked, way: str) -> None:
    shell = ["/bin/sh", "-c", "exec head -c 9000000 /dev/zero > file", marked.word]
    outcome = run_limited(shell, limits=TIGHT, **(OPEN if way == "limits" else {}))
    assert (outcome.code, outcome.breach) == (-signal.SIGXFSZ, "wrote a file of more than 1 MB (file_mb)")


@needs_namespaces
def test_many_files_break_disk_mb(marked: Marked) -> None:
    source = """
        for number in range(9):
            with open(f"/tmp/{number}", "wb") as file:
                file.write(b"x" * 999_999)
    """
    assert marked.run(source).breach == "needed more than 4 MB of disk (disk_mb)"


@needs_namespaces
def test_readable_paths_under_tmp_leave_tmp_a_place_to_write_within_disk_mb(marked: Marked) -> None:
    source = """
        import os, sys
        print(sorted(os.listdir(".")), open(sys.argv[2]).read(), flush=True)
        open("/tmp/first", "w").write("x" * 999_999)
        for number in range(9):
            open(str(number), "w").write("x" * 999_999)
    """
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        text = Path(folder, "text")
        text.write_text("seen")
        files = {"program.py": textwrap.dedent(source)}
        outcome = run_limited([*marked.argv(), str(text)], files=files, limits=TIGHT, readable=[folder])
        assert outcome.stdout == "['program.py'] seen\n"
        assert outcome.breach == "needed more than 4 MB of disk (disk_mb)"
        assert os.listdir(folder) == ["text"]


@needs_namespaces
def test_an_interpreter_under_tmp_runs_programs_that_write_to_tmp(marked: Marked) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        venv.create(folder, symlinks=True)
        inner = "import sys; open('/tmp/new', 'w').write('x'); print(sys.prefix, open('/tmp/new').read())"
        outer = (
            f"import sys; sys.path.append({str(Path(sandbox.__file__).parent)!r})\n"
            f"import sandbox; outcome = sandbox.run_python({inner!r}); print(outcome.stdout, outcome.why)"
        )
        said = subprocess.run([f"{folder}/bin/python", "-c", outer, marked.word], capture_output=True, text=True)
        assert said.stdout.splitlines() == [f"{folder} x", " ended well"]


@needs_namespaces
def test_files_outside_cannot_be_read(marked: Marked, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("hunter2")
    source = f"""
        import os
        for path in ({str(secret)!r}, "/etc/passwd", "/proc/1/environ", "/sys/kernel", {__file__!r}):
            print(os.path.exists(path))
        print(sorted(os.listdir(".")), open({str(secret)!r}).read())
    """
    outcome = marked.run(source)
    assert outcome.stdout.split() == ["False"] * 5
    assert outcome.why == f"ended with exit code 1: FileNotFoundError: [Errno 2] No such file or directory: '{secret}'"
    assert marked.run(source, readable=[secret]).stdout.endswith("['program.py'] hunter2\n")


@needs_namespaces
def test_nothing_outside_can_be_written(marked: Marked, tmp_path: Path) -> None:
    folder = tmp_path / "readable"
    folder.mkdir()
    (folder / "kept.txt").write_text("as it was")
    source = f"""
        import os
        def attempt(what, *arguments):
            try:
                what(*arguments)
                print("done", what, arguments)
            except OSError as error:
                print(type(error).__name__)
        folder = {str(folder)!r}
        for path in ("/new", "/usr/new", "/dev/new", folder + "/new", folder + "/kept.txt"):
            attempt(open, path, "w")
        attempt(os.remove, folder + "/kept.txt")
        attempt(os.chmod, folder, 0o777)
        attempt(os.mknod, "device", 0o60666, os.makedev(8, 0))
        open("own", "w").write("in the scratch folder")
    """
    outcome = marked.run(source, readable=[folder])
    assert outcome.ok, outcome
    assert "done" not in outcome.stdout
    assert [path.name for path in folder.iterdir()] == ["kept.txt"]
    assert (folder / "kept.txt").read_text() == "as it was"


@ways
def test_sockets_are_refused(marked: Marked, way: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        source = f"""
            import socket
            for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, socket.AF_NETLINK, 40):
                try:
                    socket.socket(family, socket.SOCK_STREAM)
                except PermissionError:
                    print("refused")
            socket.create_connection(("127.0.0.1", {server.getsockname()[1]}))
        """
        outcome = marked.run(source, way)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert outcome.stdout.split() == ["refused"] * 5
    assert outcome.why == "ended with exit code 1: PermissionError: [Errno 1] Operation not permitted"


@ways
def test_a_daemon_child_ends_with_its_program(marked: Marked, way: str) -> None:
    outcome = marked.run(DAEMON + "print('leaving a daemon')", way)
    assert outcome.ok, outcome
    assert outcome.stdout == "leaving a daemon\n"
    assert not marked.alive()


@needs_namespaces
def test_the_keeper_is_out_of_reach_in_namespaces(marked: Marked) -> None:
    source = """
        import os, signal, time
        for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGSTOP):
            os.kill(1, number)
        print(os.getppid(), flush=True)
        time.sleep(20)
    """
    outcome = marked.run(DAEMON + textwrap.dedent(source), limits=HASTY)
    assert outcome.stdout == "1\n"
    assert outcome.breach == "did not end within 1 s (wall_s)"


def test_without_namespaces_the_keeper_and_the_trainer_get_no_signals(marked: Marked) -> None:
    # Signal 0 to others than the keeper: it is checked like any, and does nothing if the check fails.
    source = f"""
        import os, signal
        for process, number in ((os.getppid(), signal.SIGKILL), ({os.getpid()}, 0), (-1, 0), (-os.getppid(), 0)):
            try:
                os.kill(process, number)
            except PermissionError:
                print("refused", flush=True)
        child = os.fork()
        if child == 0: signal.pause()
        os.kill(child, signal.SIGTERM)
        print(os.waitpid(child, 0)[1], flush=True)
        os.kill(os.getppid(), signal.SIGKILL)
    """
    outcome = marked.run(DAEMON + textwrap.dedent(source), "limits")
    assert outcome.stdout.split() == ["refused"] * 4 + ["15"]
    assert outcome.why == "ended with exit code 1: PermissionError: [Errno 1] Operation not permitted"


@needs_namespaces
def test_a_keeper_killed_from_outside_takes_everything_with_it(marked: Marked) -> None:
    def kill() -> None:
        while not (
            found := [pid for pid, line in marked.alive().items() if line.endswith(f"program.py {marked.word} ")]
        ):
            time.sleep(0.02)
        keepers = [pid for pid, line in marked.alive().items() if "keeper" in line]
        os.kill(min(keepers), signal.SIGKILL)
        assert found

    killer = threading.Thread(target=kill)
    killer.start()
    outcome = marked.run(DAEMON + "time.sleep(60)")
    killer.join()
    assert outcome.trouble == outcome.why == "lost its keeper (exit code -9)"
    assert (outcome.code, outcome.breach) == (None, None)
    marked.wait_until(0)


@ways
def test_an_interrupted_caller_leaves_nothing_running(marked: Marked, way: str) -> None:
    with pytest.raises(LimitReached), time_limit(0.4, "it"):
        marked.run(DAEMON + "time.sleep(60)", way)
    assert not marked.alive()


@ways
def test_another_thread_can_stop_a_program(marked: Marked, way: str) -> None:
    stop = threading.Event()
    timer = threading.Timer(0.3, stop.set)
    timer.start()
    outcome = marked.run(DAEMON + "time.sleep(60)", way, stop=stop)
    assert outcome.trouble == "was called off"
    assert outcome.breach is None
    assert outcome.seconds < 5


@ways
def test_a_killed_caller_leaves_no_process(marked: Marked, way: str, tmp_path: Path) -> None:
    job = {"argv": marked.argv(), "files": {"program.py": DAEMON + "time.sleep(60)"}}
    program = (
        f"import sys; sys.path.append({str(Path(sandbox.__file__).parent)!r})\n"
        "import json, sandbox\n"
        f"sandbox.run_limited(**json.loads({json.dumps({**job, **(OPEN if way == 'limits' else {})})!r}))\n"
    )
    caller = subprocess.Popen([sys.executable, "-c", program], env={**os.environ, "TMPDIR": str(tmp_path)})
    # The caller's own command line has the word too; then keeper, entrance, process 1, program and daemon.
    marked.wait_until(6 if way == "namespaces" else 4)
    caller.kill()
    caller.wait()
    marked.wait_until(0)


def test_without_user_namespaces_nothing_is_run(marked: Marked, tmp_path: Path) -> None:
    target = tmp_path / "target"
    outcome = marked.run(f"open({str(target)!r}, 'w')", without=("namespaces",))
    assert outcome.code is None
    assert outcome.breach is None
    assert outcome.trouble == (
        "was not run, because this machine cannot protect files (namespaces: switched off); allow user namespaces "
        "(in a container: without its seccomp profile), or give require=() to run it all the same"
    )
    assert not target.exists()
    for require in ((), ("network", "processes")):
        outcome = marked.run("print('ran')", without=("namespaces",), require=require)
        assert outcome.stdout == "ran\n"
        assert sorted(outcome.protection) == ["network", "processes"]


@needs_namespaces
def test_protection_says_what_was_on(marked: Marked) -> None:
    assert sorted(marked.run("").protection) == ["files", "network", "processes"]


@ways
def test_what_cannot_be_run_is_trouble_and_not_a_breach(way: str) -> None:
    outcome = run_limited(["no-such-program"], **(OPEN if way == "limits" else {}))
    assert outcome.trouble == "could not be run (no-such-program: No such file or directory)"
    assert (outcome.code, outcome.breach, outcome.ok) == (None, None, False)


def test_a_program_that_is_stopped_beforehand_is_called_off(marked: Marked) -> None:
    stop = threading.Event()
    stop.set()
    outcome = marked.run("while True: pass", "limits", stop=stop)
    assert outcome.trouble is not None
    assert outcome.breach is None


def test_other_machines_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    outcome = run_python("print(1)")
    assert outcome.trouble == (
        "was not run: programs are confined on Linux (x86_64, aarch64), this is " + sys.platform + " on riscv64"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"argv": "ls"}, "argv is 'ls', expected a list with a program and its arguments"),
        ({"argv": []}, r"argv is \[\], expected a list"),
        ({"argv": ["ls"], "require": ("memory",)}, r"require=\['memory'\]; what can be protected is files, network"),
        ({"argv": ["ls"], "files": {"../up": ""}}, "file name '../up' leads out of the scratch folder"),
        ({"argv": ["ls"], "files": {"/etc/passwd": ""}}, "file name '/etc/passwd' leads out of the scratch folder"),
        ({"argv": ["ls"], "readable": ["/no/such"]}, "readable path '/no/such' is not there"),
        ({"argv": ["ls"], "readable": ["/"]}, "readable path '/' is not there, or is the whole system"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_limited(**settings)


@pytest.mark.parametrize("settings", [{"wall_s": 0}, {"memory_mb": 0.5}, {"processes": -1}])
def test_bad_limits_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"Limits: {next(iter(settings))} is .*, expected a positive number"):
        Limits(**settings)
