"""Run a program that nobody has read: limits on time, memory, processes and disk, no network, no files of others.

What confines it is what Linux gives an ordinary user: resource limits, user, mount, pid and network namespaces, and a
seccomp filter. `Outcome.protection` says what was on. Where the machine does not allow namespaces, files cannot be
protected; then nothing is run, unless `require` is given without them. See `regimen.rewards.confine` for the child's
side.
"""

from __future__ import annotations

import json
import os
import platform
import re
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal

Protected = Literal["files", "network", "processes"]
PROTECT_ALL: tuple[Protected, ...] = ("files", "network", "processes")
START_S, GRACE_S, TICK_S = 30.0, 5.0, 0.05
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/alternatives")
_KEEPER = "import sys; sys.path.append(sys.argv[1]); from confine.keeper import main; main()"
_MACHINES = ("x86_64", "aarch64")
# A program is refused memory or disk, not ended; what it then says last is all that tells.
_LAST_WORDS = {
    r"MemoryError|bad_alloc|[Cc]annot allocate memory|[Oo]ut of memory": "needed more than {memory_mb} MB of memory "
    "(memory_mb)",
    r"No space left on device": "needed more than {disk_mb} MB of disk (disk_mb)",
    r"File too large": "wrote a file of more than {file_mb} MB (file_mb)",
}


@dataclass(frozen=True)
class Limits:
    """What a program may take.

    Attributes:
        wall_s: seconds from its start to its end.
        cpu_s: seconds of processor time, of all its processes together.
        memory_mb: address space of each process, and resident memory of all together.
        file_mb: size of each file that it writes, standard output included.
        disk_mb: size of its scratch folder; not limited where files are not protected.
        processes: processes and threads at one time. They are counted along the line of descent, because the
            kernel's own limit counts per user. A burst between two counts, 20 ms apart, is killed with the rest.
    """

    wall_s: float = 10.0
    cpu_s: float = 10.0
    memory_mb: int = 512
    file_mb: int = 16
    disk_mb: int = 64
    processes: int = 16

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value <= 0 or not (isinstance(value, int) or name.endswith("_s")):
                raise ValueError(
                    f"Limits: {name} is {value!r}, expected a positive number (whole, except wall_s, cpu_s)"
                )


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
        code: its exit code, or minus the signal that ended it; `None` if that is not known, as when it did not run.
        stdout, stderr: what it wrote, as UTF-8 with replacements.
        breach: the limit that it broke, by name, as in `did not end within 10 s (wall_s)`; `None` if none. A program
            that is refused memory or disk may deal with it; if it gives up, the last line of its standard error tells.
        trouble: why it was not run, or not watched to its end, which is not its fault; `None` if all went well.
        seconds: that it ran.
        protection: what was on, for each of `files`, `network` and `processes`; what is not on is not there.
    """

    code: int | None
    stdout: str = ""
    stderr: str = ""
    breach: str | None = None
    trouble: str | None = None
    seconds: float = 0.0
    protection: Mapping[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether it ended by itself with exit code 0."""
        return self.code == 0 and self.breach is None and self.trouble is None

    @property
    def why(self) -> str:
        """One line on how it ended."""
        if told := self.trouble or self.breach:
            return told
        if self.code is not None and self.code < 0:
            return f"was killed by signal {-self.code} ({signal.strsignal(-self.code)})"
        return "ended well" if self.ok else f"ended with exit code {self.code}: {_last_line(self.stderr)[:200]}"


def run_limited(
    argv: Sequence[str],
    *,
    files: Mapping[str, str] | None = None,
    stdin: str = "",
    limits: Limits | None = None,
    readable: Sequence[str | Path] = (),
    require: Sequence[Protected] = PROTECT_ALL,
    without: Sequence[Literal["namespaces"]] = (),
    stop: threading.Event | None = None,
) -> Outcome:
    """Run a program, and end it and all that it started when it breaks a limit.

    It starts in a scratch folder with the given files, with a bare environment and no descriptors but the standard
    three. It sees the system's programs and libraries and this Python's, read-only. No shell is involved. Nothing
    that it leaves in the scratch folder is kept.

    Args:
        argv: program and arguments; `sys.executable` is this Python. Files are named relative to the scratch folder.
        files: texts to put into the scratch folder, by name.
        stdin: its standard input.
        limits: what it may take.
        readable: more paths that it may read.
        require: what must be protected; where the machine cannot, the program is not run, and `trouble` says why.
            Without files among it, a program may run that reads and writes what the user can: that holds off
            accidents, not attacks.
        without: ways to confine that are not to be used, to try what happens on a machine that lacks them.
        stop: ends the program early when another thread sets it.

    Raises:
        ValueError: an empty command, a file name that leads out of the scratch folder, or a readable path that is
            not there.
    """
    limits = limits or Limits()
    order = _order(argv, limits, readable, require, without)
    if sys.platform != "linux" or platform.machine() not in _MACHINES:
        here = f"{sys.platform} on {platform.machine()}"
        return Outcome(
            None, trouble=f"was not run: programs are confined on Linux ({', '.join(_MACHINES)}), this is {here}"
        )
    with (
        tempfile.TemporaryDirectory(prefix="regimen-", ignore_cleanup_errors=True) as base,
        tempfile.TemporaryFile() as given,
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as err,
    ):
        os.mkdir(f"{base}/root")
        _write_files(Path(base, "box"), files or {})
        given.write(stdin.encode(errors="replace"))
        given.seek(0)
        report = _ask_keeper({**order, "base": base}, (given, out, err), limits.wall_s + START_S, stop)
        return _outcome(report, out, err, limits)


def run_python(source: str, **settings: Any) -> Outcome:
    """Run a Python program with this interpreter and its packages; see `run_limited`."""
    files = {**settings.pop("files", {}), "program.py": source}
    return run_limited([sys.executable, "-s", "program.py"], files=files, **settings)


def _order(
    argv: Sequence[str],
    limits: Limits,
    readable: Sequence[str | Path],
    require: Sequence[str],
    without: Sequence[str],
) -> dict[str, Any]:
    if not argv or isinstance(argv, str):
        raise ValueError(f"run_limited: argv is {argv!r}, expected a list with a program and its arguments")
    if odd := set(require) - set(PROTECT_ALL):
        raise ValueError(f"run_limited: require={sorted(odd)}; what can be protected is {', '.join(PROTECT_ALL)}")
    return {
        "argv": list(argv),
        "env": {
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "HOME": ".",
            "TMPDIR": ".",
            "LANG": "C.UTF-8",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONHASHSEED": "0",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        },
        "limits": asdict(limits),
        "readable": _readable(readable),
        "require": list(require),
        "without": list(without),
        "parent": os.getpid(),
    }


def _readable(more: Sequence[str | Path]) -> list[str]:
    """Absolute paths, none inside another, of the system, this Python, and what the caller adds."""
    python = {sys.prefix, sys.base_prefix, os.path.realpath(sys.prefix), os.path.realpath(sys.base_prefix)}
    added = [os.path.abspath(path) for path in more]
    for path in added:
        if not os.path.exists(path) or path == "/":
            raise ValueError(f"run_limited: readable path '{path}' is not there, or is the whole system")
    paths = {path for path in (*_SYSTEM, *python) if os.path.exists(path)} | set(added)
    return sorted(path for path in paths if not any(str(above) in paths for above in PurePosixPath(path).parents))


def _write_files(box: Path, files: Mapping[str, str]) -> None:
    box.mkdir()
    for name, text in files.items():
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts:
            raise ValueError(f"run_limited: file name '{name}' leads out of the scratch folder; give a relative one")
        path = box.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", errors="replace")


def _ask_keeper(
    order: dict[str, Any], standard: tuple[IO[bytes], ...], patience_s: float, stop: threading.Event | None
) -> dict[str, Any]:
    """Start the keeper and wait for its report; whatever happens, nothing that it started outlives this call."""
    report, report_end = os.pipe()
    given, out, err = standard
    command = [sys.executable, "-I", "-S", "-c", _KEEPER, str(Path(__file__).parent)]
    with os.fdopen(report) as answer:
        try:
            keeper = subprocess.Popen(
                [*command, json.dumps({**order, "report": report_end})],
                stdin=given,
                stdout=out,
                stderr=err,
                env={},
                cwd="/",
                pass_fds=(report_end,),
                start_new_session=True,
            )
        finally:
            os.close(report_end)
        try:
            _await(answer, patience_s, stop)
        finally:
            _end(keeper)
        text = answer.read()
    return dict(json.loads(text)) if text else {"trouble": f"lost its keeper (exit code {keeper.returncode})"}


def _await(answer: IO[str], patience_s: float, stop: threading.Event | None) -> None:
    """Wait until there is an answer, or no more reason to wait."""
    deadline = time.monotonic() + patience_s
    ready = select.poll()
    ready.register(answer, select.POLLIN | select.POLLHUP)
    while not ready.poll(TICK_S * 1000) and time.monotonic() < deadline:
        if stop is not None and stop.is_set():
            return


def _end(keeper: subprocess.Popen[bytes]) -> None:
    """Let a keeper end that has reported; one that has not ends all that it started first."""
    try:
        keeper.terminate()
        with suppress(subprocess.TimeoutExpired):
            keeper.wait(GRACE_S)
    finally:
        if keeper.poll() is None:
            os.killpg(keeper.pid, signal.SIGKILL)
            keeper.wait()


def _outcome(report: Mapping[str, Any], out: IO[bytes], err: IO[bytes], limits: Limits) -> Outcome:
    code = None if report.get("status") is None else os.waitstatus_to_exitcode(report["status"])
    stdout, stderr = _text(out, limits), _text(err, limits)
    breach, trouble = report.get("breach"), report.get("trouble")
    if code is not None and not breach and not trouble:
        filled = [name for name, file in (("output", out), ("error", err)) if _size(file) >= limits.file_mb * 2**20]
        breach = f"filled its standard {filled[0]} with {limits.file_mb} MB (file_mb)" if filled else None
        breach = breach or _told_breach(code, stderr, limits)
    return Outcome(code, stdout, stderr, breach, trouble, report.get("seconds", 0.0), report.get("protection", {}))


def _told_breach(code: int, stderr: str, limits: Limits) -> str | None:
    """The limit that a program's own end tells of, if it does."""
    if code == -signal.SIGXFSZ:
        return f"wrote a file of more than {limits.file_mb} MB (file_mb)"
    told = [breach for pattern, breach in _LAST_WORDS.items() if code and re.search(pattern, _last_line(stderr))]
    return told[0].format(**asdict(limits)) if told else None


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["nothing on standard error"])[-1]


def _size(file: IO[bytes]) -> int:
    return os.fstat(file.fileno()).st_size


def _text(file: IO[bytes], limits: Limits) -> str:
    file.seek(0)
    return file.read(limits.file_mb * 2**20).decode("utf-8", errors="replace")
