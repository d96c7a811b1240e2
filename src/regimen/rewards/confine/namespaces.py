"""A view of the system for one program: no network, its own processes, the system read-only, one scratch folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from typing import Any

from . import linux

BOX, TEMPORARY = "/box", "/tmp"
_DEVICES = ("null", "zero", "full", "random", "urandom")
_USER = 1000


def enter() -> None:
    """Fresh namespaces, in which this process is an ordinary user; its children will be in the pid namespace."""
    user, group = os.geteuid(), os.getegid()
    linux.unshare(
        linux.CLONE_NEWUSER
        | linux.CLONE_NEWNS
        | linux.CLONE_NEWPID
        | linux.CLONE_NEWNET
        | linux.CLONE_NEWIPC
        | linux.CLONE_NEWUTS
    )
    for name, line in (("setgroups", "deny"), ("uid_map", f"{_USER} {user} 1"), ("gid_map", f"{_USER} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(line)


def build_root(order: Mapping[str, Any]) -> None:
    """A root folder with the readable paths and the scratch space in it, and nothing else; then move into it.

    `/proc` and `/sys` are left out: to a program of the real root they would be a way to change the system. What is
    readable under `/tmp`, such as this Python in a virtual environment there, stands in the program's own `/tmp`.
    """
    root = f"{order['base']}/root"
    linux.mount(None, "/", None, linux.MS_REC | linux.MS_PRIVATE)
    linux.mount("tmpfs", root, "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, "size=1m,mode=755")
    shown = [*order["readable"], *(f"/dev/{name}" for name in _DEVICES)]
    temporary = [path for path in shown if f"{path}/".startswith(f"{TEMPORARY}/")]
    for path in shown:
        if path not in temporary:
            _show(path, root)
    _make_scratch(root, order["limits"]["disk_mb"])
    shutil.copytree(f"{order['base']}/box", root + BOX, dirs_exist_ok=True)
    for path in temporary:
        _show(path, root)
    os.chdir(root)
    linux.pivot_root()
    flags = linux.MS_REMOUNT | linux.MS_BIND | linux.MS_RDONLY | linux.MS_NOSUID | linux.MS_NODEV
    linux.mount(None, "/", None, flags)
    os.chdir(BOX)


def _make_scratch(root: str, disk_mb: int) -> None:
    """The scratch folder and `/tmp`: two folders of one file system of limited size."""
    for folder in (BOX, TEMPORARY):
        os.mkdir(root + folder)
    options = f"size={disk_mb}m,nr_inodes=16k,mode=700"
    linux.mount("tmpfs", root + BOX, "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, options)
    # The last mount is on top of the file system's own root, which nobody sees.
    for folder in (TEMPORARY, BOX):
        os.mkdir(root + BOX + folder, 0o700)
        linux.mount(root + BOX + folder, root + folder, None, linux.MS_BIND)


def _show(path: str, root: str) -> None:
    """One path of the system under the new root: a link as a link, all else mounted read-only."""
    os.makedirs(os.path.dirname(root + path), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), root + path)
        return
    if os.path.isdir(path):
        os.makedirs(root + path, exist_ok=True)
    else:
        os.close(os.open(root + path, os.O_CREAT | os.O_WRONLY))
    linux.mount(path, root + path, None, linux.MS_BIND | linux.MS_REC)
    if not path.startswith("/dev/"):
        linux.make_read_only(root + path)
